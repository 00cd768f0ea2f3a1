"""A record survives its file; tables, curve and page show what it holds."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fluxclip.evaluation.page import QueryHits, ShownHit, contact_sheet, html_report
from fluxclip.evaluation.record import Means, Record, load_record, save_record
from fluxclip.evaluation.report import (
    COLOURS,
    DIRECTIONS,
    METRICS,
    plot_curve,
    print_comparison,
    print_table,
    published,
)
from fluxclip.video import read_clip

QUERIES = ("red heart", "a <b>bold</b> & 'quoted' query", "сердце", "dancing")


def table(record: Record, *, width: int = 120) -> str:
    """What print_table writes on a screen of that many columns."""
    console = Console(file=StringIO(), width=width)
    print_table(record, console)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def queries(emoji: Path) -> list[QueryHits]:
    """Three hits a query, frames and a file: the right one known first, known missing, unknown."""
    frames = [
        read_clip(emoji / "clips" / f"{name}.mp4", num_frames=1).frames_THWC[0]
        for name in ("2764-fe0f", "1f499")
    ]
    pictures = [*frames, min((emoji / "stills").glob("*.webp"))]
    expected = {QUERIES[0]: (True, False, False), QUERIES[1]: (False, False, False)}
    return [
        QueryHits(
            query,
            [
                ShownHit(
                    picture, f"picture {i}", 0.9 - i / 10, i, i + 1.5, is_right, f"file{i}.mp4"
                )
                for i, (picture, is_right) in enumerate(
                    zip(pictures, expected.get(query, (None, None, None)), strict=True)
                )
            ],
        )
        for query in QUERIES
    ]


@pytest.fixture(scope="module")
def page(record: Record, queries: list[QueryHits], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "new" / "report.html"
    html_report(
        path,
        title="A demo & more",
        trained="A small model.\n\nFor four minutes.",
        data="Emoji <clips>.",
        caveat="Cartoon art on white.",
        record=record,
        queries=queries,
    )
    return path.read_text(encoding="utf-8")


def test_record_survives_its_file(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "new" / "record.json"
    save_record(record, path)
    loaded = load_record(path)
    assert loaded == record
    assert table(loaded) == table(record)
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


def test_every_number_of_a_record_can_be_made_again_from_its_ranks(record: Record) -> None:
    for result in record.results:
        for scores in (result.cosine, result.dual_softmax.scores):
            for direction in DIRECTIONS:
                score = getattr(scores, direction)
                again = Means.of(score.to_ranks()).model_dump()
                assert again == {name: getattr(score, name) for name in again}


def test_records_and_published_numbers_stand_side_by_side(record: Record) -> None:
    content = record.model_dump()
    content["data"]["protocol"], content["data"]["num_expected"] = "MSR-VTT 1k-A", 1000
    console = Console(file=StringIO(), width=140)
    print_comparison([record, Record.model_validate(content)], console)
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    own, official = shown.split("MSR-VTT 1k-A, ")
    assert "FluxViT" not in own and "12 of 1000 videos" in official
    row = next(
        line for line in official.splitlines() if line.startswith(" FluxViT-B [") and "2048" in line
    )
    assert row.split()[2:4] == ["2048", "dual"] and "49.8" in row
    reranked = next(line for line in official.splitlines() if "UMT-B 25M" in line)
    mark = re.search(r"\[\d\]", reranked)
    assert mark is not None
    assert f"{mark[0]} a cross-encoder ranks the first 128 anew" in official


def test_every_published_row_names_its_source_and_how_it_was_scored() -> None:
    rows = [
        row
        for name in ("MSR-VTT 1k-A", "ActivityNet Captions val_1", "VATEX test en")
        for row in published(name)
    ]
    assert len(rows) == 60
    assert {row.scores for row in rows} == {"cosine", "dual softmax", "reranked"}
    assert all(row.source and 0 < (row.t2v_r1 or 0) < 100 for row in rows)
    assert published("VATEX test zh") == published("MSR-VTT full") == []


def test_table_gives_cosine_first_and_dual_softmax_apart(record: Record) -> None:
    shown = table(record)
    titles = re.findall(r"^(?:text|video) to .*|^cost.*", shown, flags=re.MULTILINE)
    assert [title.split(" (")[0].strip() for title in titles] == [
        "text to video, cosine",
        "video to text, cosine",
        "cost of a clip in the video tower",
        "text to video, dual softmax at temperature 1",
        "video to text, dual softmax at temperature 1",
    ]
    assert "all queries of the test set at once" in shown
    assert f"{record.results[0].cosine.text_to_video.r1:.1f}" in shown
    assert "guess" in shown


def test_scores_fit_in_80_columns(record: Record) -> None:
    """Every row on one line, also where all is found and the intervals are longest."""
    perfect = {"r1": 100.0, "r5": 100.0, "r10": 100.0, "mrr": 100.0}
    longest = {f"{metric}_interval": {"low": 98.0, "high": 100.0} for metric in METRICS}
    content = record.model_dump()
    for result in content["results"]:
        for direction in DIRECTIONS:
            result["cosine"][direction] |= perfect | longest
    for each in (record, Record.model_validate(content)):
        narrow, wide = (
            [line.rstrip() for line in table(each, width=width).splitlines()] for width in (80, 200)
        )
        assert max(map(len, narrow)) <= 80
        rows = [
            line for line in wide if re.match(" *(text|video|cost|budget|guess|all|[0-9])", line)
        ]
        assert len(rows) == 5 * 5 + 2 and set(rows) <= set(narrow)


def test_names_are_shown_as_they_are(record: Record) -> None:
    content = record.model_dump()
    content["model"]["name"], content["data"]["protocol"] = "[red]a[/blue]", "b:smile:"
    shown = table(Record.model_validate(content))
    assert shown.startswith(f"[red]a[/blue]@{record.model.fingerprint[:6]} on b:smile:: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not an evaluation record: Input should be an object"),
        ("{", "is not an evaluation record: Invalid JSON"),
        (
            '{"format": "fluxclip-evaluation-9"}',
            "an evaluation record: Input tag 'fluxclip-evaluation-9'",
        ),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_record(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="nothing.json not found"):
        load_record(tmp_path / "nothing.json")


def test_curve_of_one_and_of_two_records(record: Record, tmp_path: Path) -> None:
    other = record.model_copy(update={"results": record.results[:2]})
    plot_curve([record], tmp_path / "new" / "time.png", against="time")
    plot_curve([record], tmp_path / "new" / "one.png")
    plot_curve([record, other], tmp_path / "two.png")
    with Image.open(tmp_path / "new" / "one.png") as image:
        assert image.size == (1280, 896)
        one = np.asarray(image.convert("RGB"))
    with Image.open(tmp_path / "two.png") as image:
        two = np.asarray(image.convert("RGB"))
    for colour, shown in zip(COLOURS[:2], (True, False), strict=True):
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        assert (one == rgb).all(axis=2).any() == shown
        assert (two == rgb).all(axis=2).any()


def test_contact_sheet_has_a_row_a_query_and_one_green_frame(
    queries: list[QueryHits], tmp_path: Path
) -> None:
    contact_sheet(queries, tmp_path / "all.png")
    contact_sheet(queries[:1], tmp_path / "first.png")
    contact_sheet(queries[1:], tmp_path / "rest.png")
    whole, first, rest = (
        np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("all", "first", "rest")
    )
    assert whole.shape[1] == first.shape[1]
    assert whole.shape[0] > 3.5 * (first.shape[0] - 14)
    green = np.array([0x2E, 0x7D, 0x4F])
    assert (first == green).all(axis=2).sum() > 4 * 170
    assert not (rest == green).all(axis=2).any()


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_holds_every_query_hit_and_number(
    page: str, record: Record, queries: list[QueryHits]
) -> None:
    shown = Page(page)
    for text in ("A demo & more", "For four minutes.", "Emoji <clips>.", "Cartoon art on white."):
        assert text in shown.text
    for query in queries:
        assert f"“{query.query}”" in shown.text
    assert "right clip at place 1" in shown.text
    assert "the right clip is not among the first 3" in shown.text
    assert shown.text.count("picture 0") == len(queries)
    assert "0.80 · 1.0-2.5 s" in shown.text
    assert "file1.mp4" in shown.text
    for result in record.results:
        assert f"{result.cosine.text_to_video.mrr:.1f}" in shown.text
    assert all(digest[:16] in shown.text for digest in record.data.files.values())
    assert "dual softmax at temperature 1" in shown.text


def test_page_stands_alone(page: str, queries: list[QueryHits]) -> None:
    shown = Page(page)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in shown.tags}
    assert "http" not in page.replace("http-equiv", "")
    assert "url(" not in page
    sources = [attributes["src"] or "" for tag, attributes in shown.tags if tag == "img"]
    assert len(sources) == 1 + sum(len(query.hits) for query in queries)
    for source in sources:
        header, _, content = source.partition(";base64,")
        with Image.open(BytesIO(base64.b64decode(content))) as image:
            assert header == f"data:image/{(image.format or '').lower()}"
            image.load()


def test_reading_a_record_loads_neither_torch_nor_matplotlib() -> None:
    script = (
        "import sys, fluxclip.evaluation.page;"
        "loaded = {'torch', 'matplotlib', 'transformers', 'faiss'} & set(sys.modules);"
        "sys.exit(' '.join(loaded) or 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
