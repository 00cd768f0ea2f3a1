"""Annotations in files other than small JSON: the same records, prepared once, the same errors."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fluxclip.data import sources
from fluxclip.data.sources import Record, Records, _tables, looked_at
from fluxclip.data.sources import annotations as source
from fluxclip.data.sources.annotations import read

ROWS = [("a.mp4", ["one"], "f"), ("b.mp4", ["zwölf", 'a "b", c'], None), ("c.png", ["NA"], None)]
HEADER = "video,caption,family\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("FLUXCLIP_CACHE", str(folder))
    return folder


def write_json(folder: Path) -> Path:
    items = [{"video": v, "caption": c, "family": f} for v, c, f in ROWS]
    (folder / "set.json").write_text(json.dumps(items), "utf-8")
    return folder / "set.json"


def write_lines(folder: Path) -> Path:
    items = [{"video": v, "caption": c[0] if len(c) == 1 else c, "family": f} for v, c, f in ROWS]
    text = "\n".join(json.dumps(item) for item in items)
    (folder / "set.jsonl").write_text(text + "\n\n", "utf-8")
    return folder / "set.jsonl"


def write_csv(folder: Path) -> Path:
    rows = ["a.mp4,one,f", "b.mp4,zwölf,", "c.png,NA,", 'b.mp4,"a ""b"", c",']
    (folder / "set.csv").write_text("\ufeff" + HEADER + "\n".join(rows), "utf-8")
    return folder / "set.csv"


def write_tsv(folder: Path) -> Path:
    rows = ["f\tone\t1\ta.mp4", "\tzwölf\t2\tb.mp4", '\t"a ""b"", c"\t3\tb.mp4', "\tNA\t4\tc.png"]
    (folder / "set.tsv").write_text("family\ttext\tn\tpath\n" + "\n".join(rows), "utf-8")
    return Path(f"{folder / 'set.tsv'}?video=path&caption=text")


def write_parquet(folder: Path) -> Path:
    videos, captions, families = map(list, zip(*ROWS, strict=True))
    pq.write_table(
        pa.table({"n": [1, 2, 3], "caption": captions, "video": videos, "family": families}),
        folder / "set.parquet", row_group_size=2,
    )  # fmt: skip
    return folder / "set.parquet"


def write_parquet_of_texts(folder: Path) -> Path:
    flat = [(v, text, f) for v, captions, f in ROWS for text in captions]
    videos, captions, families = map(list, zip(*flat, strict=True))
    table = pa.table({"video": videos, "caption": captions, "family": families})
    pq.write_table(table, folder / "set.parquet")
    return folder / "set.parquet"


WRITERS = [write_json, write_lines, write_csv, write_tsv, write_parquet, write_parquet_of_texts]


@pytest.mark.parametrize("in_memory", [0, 2**22])
@pytest.mark.parametrize("write", WRITERS)
def test_every_form_holds_the_same_records(
    tmp_path: Path, write: Callable[[Path], Path], in_memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_IN_MEMORY", in_memory)
    path = write(tmp_path)
    wanted = [Record(tmp_path / v, tuple(captions), f) for v, captions, f in ROWS]
    for _ in range(2):  # prepared, and opened again
        records = read(path, check_files=False)
        assert len(records) == 3
        assert list(records) == wanted
        assert records[-1] == wanted[-1] and records[1:] == tuple(wanted[1:])
        with pytest.raises(IndexError):
            _ = records[3]
    elsewhere = read(path, check_files=False, folder=Path("/elsewhere"))
    assert elsewhere[0].video == Path("/elsewhere/a.mp4")


def test_the_hubs_data_sets_are_read_like_tables(tmp_path: Path) -> None:
    """A folder stands for one, as there is no network here: the same call reads both."""
    write_parquet(tmp_path)
    tables = _tables.of_hub(str(tmp_path), "it", columns=("video", "caption"), split="train")
    rows = [row for table in tables for row in table.to_pylist()]
    assert [(r["video"], r["captions"], r["family"]) for r in rows] == ROWS
    with pytest.raises(ValueError, match="it cannot be read: .*nothing"):
        list(_tables.of_hub(str(tmp_path), "it", columns=("video", "caption"), split="nothing"))
    with pytest.raises(ValueError, match="no/such.split=train cannot be read: ") as caught:
        read("hf://datasets/no/such?split=train")
    assert "\n" not in str(caught.value)


def test_a_broken_data_set_of_the_hub_is_named(tmp_path: Path) -> None:
    """JSON says its columns in its first row, and whatever that holds has the name with it."""
    (tmp_path / "set.jsonl").write_text('{"video": "a.mp4", "capt')
    with pytest.raises(ValueError, match="it cannot be read: ") as caught:
        list(_tables.of_hub(str(tmp_path), "it", columns=("video", "caption")))
    assert "\n" not in str(caught.value)


def test_other_columns_are_other_data_and_another_folder_is_not(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text("video,caption,title\na.mp4,x,y\n")

    def identity(name: str) -> str:
        return sources.fingerprint_of("annotations", name)

    plain = sources.fingerprint_of_file(path)  # as runs have it that were started before
    assert identity(f"{path}") == identity(f"{path}?caption=caption&video=video") == plain
    assert identity(f"{path}?folder=/elsewhere") == plain
    other = identity(f"{path}?caption=title")
    assert other == identity(f"{path}?folder=/elsewhere&caption=title")
    assert len({plain, other, identity(f"{path}?video=title"), ""}) == 4
    path.write_text("video,caption,title\na.mp4,x,z\n")
    assert identity(f"{path}?caption=title") not in (plain, other)
    assert identity(f"{tmp_path}/none.csv?caption=title") == f"{tmp_path}/none.csv?caption=title"
    assert identity("hf://datasets/org/name?split=train") == "hf://datasets/org/name?split=train"
    with pytest.raises(ValueError, match="unknown setting 'titel'"):
        identity(f"{path}?titel=x")


def test_more_rows_than_a_piece_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a video may lie far apart; a record stands where the first of them does."""
    number = 2 * _tables.ROWS + 17
    rows = [f"{n % (number - 5)}.mp4,caption {n}," for n in range(number)]
    (tmp_path / "set.csv").write_text(HEADER + "\n".join(rows))
    records = read(tmp_path / "set.csv", check_files=False)
    assert len(records) == number - 5
    for n in (0, 4, 5, _tables.ROWS - 1, _tables.ROWS, 2 * _tables.ROWS, number - 6):
        again = (f"caption {n + number - 5}",) if n < 5 else ()
        assert records[n] == Record(tmp_path / f"{n}.mp4", (f"caption {n}", *again), None)


def test_prepared_once_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    path = write_csv(tmp_path)
    first = read(path, check_files=False)
    (made,) = cache.rglob("*.arrow")
    written = made.stat().st_mtime_ns
    assert list(read(path, check_files=False)) == list(first)
    assert made.stat().st_mtime_ns == written
    path.write_text(HEADER + "a.mp4,another,\n")
    assert [record.captions for record in read(path, check_files=False)] == [("another",)]
    assert list(cache.rglob("*.arrow")) == [made]  # in its place
    assert first[2].captions == ("NA",)  # who has the old one open keeps it
    with pytest.raises(ValueError, match="has been replaced since this run started"):
        pickle.loads(pickle.dumps(first))
    made.write_bytes(made.read_bytes()[:100])  # whatever broke it
    assert len(read(path, check_files=False)) == 1
    assert not list(cache.rglob("*.partial"))


def test_a_worker_gets_a_name_and_needs_neither_datasets_nor_pandas(tmp_path: Path) -> None:
    rows = "".join(f"{n}.mp4,caption {n},\n" for n in range(20_000))
    (tmp_path / "set.csv").write_text(HEADER + rows)
    sent = pickle.dumps(read(tmp_path / "set.csv", check_files=False))
    assert len(sent) < 1000
    (tmp_path / "sent").write_bytes(sent)
    code = (
        f"import pickle, sys; r = pickle.load(open({str(tmp_path / 'sent')!r}, 'rb'))\n"
        "print(r[19_999].captions[0], 'datasets' in sys.modules, 'pandas' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "caption 19999 False False\n", done.stderr


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "video,text\na.mp4,x\n", "no column 'caption'; it has: video, text; .video="),
        ("a.csv", "", "no column 'video'; it has: nothing"),
        ("a.csv", "video,caption,caption\na,b,c\n", "several columns 'caption'"),
        ("a.csv", HEADER, "a.csv has no records"),
        ("a.csv", HEADER + "a,b,\na,x, y,\n", "row 2 of .* has 4 fields where the header has 3"),
        ("a.csv", HEADER + "a,b, c,\n", "row 1 of .* has 4 fields where the header has 3"),
        ("a.csv", HEADER + "a,b,\nc\n", "row 2 of .* has 1 fields"),
        ("a.csv", HEADER + "a, ,\n", "row 1 of .*: a caption must be a text, got \" \""),
        ("a.csv", HEADER + ",b,\n", "row 1 of .*: 'video' must be a path, got \"\""),
        ("a.csv", b"video,caption\na,\xff\n", "not UTF-8 text"),
        ("a.jsonl", '{"video": "a", "caption": "x"}\n{"video"', "line 2 of .* is not JSON"),
        ("a.jsonl", '{"video": "a", "caption": 7}', "line 1 of .*: a caption .* a text, got 7"),
        ("a.jsonl", '\n["a"]', "line 2 of .* is a list; expected an object"),
        ("a.parquet", "PAR1", "a.parquet cannot be read as Parquet: "),
        ("a.parquet", "", "a.parquet cannot be read as Parquet: "),
        ("a.parquet", {"video": ["a", "b"], "text": ["x", "y"]}, "no column 'caption'; it has: "),
        ("a.parquet", {"video": ["a", "b"], "caption": ["x", None]}, "row 2 .*a text, got None"),
        ("a.parquet", {"video": ["a", "b"], "caption": ["x", " "]}, "row 2 of .*a text, got ' '"),
        ("a.parquet", {"video": ["a"], "caption": [7]}, "row 1 of .*a text, got 7 .int64."),
        ("a.parquet", {"video": [None, "a"], "caption": ["x", "y"]}, "row 1 .*path, got None"),
        (
            "a.parquet", {"video": ["a", "b", "c"], "caption": [["x", "y"], ["z"], ["u", ""]]},
            "row 3 of .*a caption must be a text, got ''",
        ),
        ("a.parquet", {"video": ["a", "b"], "caption": [["x"], []]}, "row 2 of .* has no caption"),
        ("a.parquet", {"video": ["a"], "caption": [[7]]}, "row 1 of .*a text, got 7 .int64."),
        ("a.parquet", {"video": ["a"], "caption": ["x"], "family": [7]}, "'family' .*is int64"),
        ("a.csv?text=x", HEADER, "unknown setting 'text'; known: video, caption, folder"),
        ("a.csv?x", HEADER, "what follows the . is key=value&key=value, got 'x'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, cache: Path, name: str, content: object, message: str
) -> None:
    path = tmp_path / name.partition("?")[0]
    if isinstance(content, dict):
        pq.write_table(pa.table(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else str(content).encode())
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(cache.rglob("*.arrow")) and not list(cache.rglob("*.partial"))


def test_missing_videos_of_a_table(tmp_path: Path) -> None:
    path = write_csv(tmp_path)
    (tmp_path / "a.mp4").touch()
    for _ in range(2):  # at each start
        with pytest.raises(FileNotFoundError, match="2 of 3 video files not found: .*b.mp4"):
            read(path)
    assert looked_at(100_000) == range(100_000)
    assert all(10_000 <= len(looked_at(size)) < 11_000 for size in (100_001, 10**7 + 7))
    many = Records([Record(Path("gone.mp4"), ("x",), None)] * 100_001)
    with pytest.raises(FileNotFoundError, match="1 of 1 video files not found .by 10,001 of 1"):
        source._require_files(many, "set", tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_cannot_be_written_to_without_rights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setenv("FLUXCLIP_CACHE", str(closed))
    with pytest.raises(OSError, match="cannot write to .*set FLUXCLIP_CACHE"):
        read(write_csv(tmp_path), check_files=False)


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLUXCLIP_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match="cannot write to .*set FLUXCLIP_CACHE"):
        read(write_csv(tmp_path), check_files=False)
