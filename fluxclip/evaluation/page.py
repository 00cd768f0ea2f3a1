"""Hits as pictures: a contact sheet in one PNG, a report in one HTML file without network."""

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from fluxclip.evaluation.record import BudgetResult, Record
from fluxclip.evaluation.report import (
    COST_HEADS,
    DIRECTIONS,
    DUAL_SOFTMAX_NOTE,
    SCORE_HEADS,
    cost_cells,
    font_path,
    plot_curve,
    score_cells,
)

_INTERVAL, _SMALL = re.compile(r"\d+-\d+$"), r"<small>\g<0></small>"  # at the end of a cell
_PICTURE = 320  # pixels of the longer side in the page: twice what is shown, for sharp displays
_THUMB, _GAP, _LINE = 176, 14, 19  # pixels in the contact sheet
_INK, _SOFT, _RIGHT = "#24292f", "#5d6670", "#2e7d4f"


@dataclass(frozen=True)
class ShownHit:
    """A hit with its picture: uint8 (H, W, 3), 0-255, or the path of an image file.

    `caption` and `file_name` may be empty. `is_expected` says whether it is the right
    answer, None where that is not known.
    """

    picture: npt.NDArray[np.uint8] | Path
    caption: str
    score: float
    start_s: float
    end_s: float
    is_expected: bool | None = None
    file_name: str = ""


@dataclass(frozen=True)
class QueryHits:
    """A query and its hits, best first."""

    query: str
    hits: Sequence[ShownHit]

    def verdict(self) -> str:
        """Where the right answer stands, empty where it is not known."""
        if all(hit.is_expected is None for hit in self.hits):
            return ""
        for place, hit in enumerate(self.hits, start=1):
            if hit.is_expected:
                return f"right clip at place {place}"
        return f"the right clip is not among the first {len(self.hits)}"


def contact_sheet(queries: Sequence[QueryHits], path: str | Path) -> None:
    """Draw one row of thumbnails per query into a PNG; the right answer has a green frame."""
    columns = max(len(query.hits) for query in queries)
    row_height = _LINE + 10 + _THUMB + 3 * _LINE + 2 * _GAP
    width = _GAP + columns * (_THUMB + _GAP)
    sheet = Image.new("RGB", (width, _GAP + len(queries) * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    bold = ImageFont.truetype(font_path("DejaVuSans-Bold"), 15)
    plain = ImageFont.truetype(font_path("DejaVuSans"), 12)
    for row, query in enumerate(queries):
        top = _GAP + row * row_height
        draw.text((_GAP, top), _cut(f"“{query.query}”", bold, width // 2), font=bold, fill=_INK)
        draw.text((width - _GAP, top + 2), query.verdict(), font=plain, fill=_SOFT, anchor="ra")
        top += _LINE + 10
        for column, hit in enumerate(query.hits):
            left = _GAP + column * (_THUMB + _GAP)
            picture = _image(hit.picture, _THUMB)
            sheet.paste(
                picture,
                (left + (_THUMB - picture.width) // 2, top + (_THUMB - picture.height) // 2),
            )
            right = bool(hit.is_expected)
            draw.rectangle(
                (left - 3, top - 3, left + _THUMB + 2, top + _THUMB + 2),
                outline=_RIGHT if right else "#e3e1dc",
                width=3 if right else 1,
            )
            lines = filter(None, (hit.caption, hit.file_name, _where(hit)))
            for number, line in enumerate(lines):
                below = top + _THUMB + 5 + number * _LINE
                colour = _SOFT if number else _RIGHT if right else _INK
                draw.text((left, below), _cut(line, plain, _THUMB), font=plain, fill=colour)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG", optimize=True)


def html_report(
    path: str | Path,
    *,
    title: str,
    trained: str,
    data: str,
    caveat: str,
    record: Record,
    queries: Sequence[QueryHits],
) -> None:
    """Write one HTML file with text, tables, the curve and the hits, all pictures inside.

    `trained` says what was trained, `data` on what, `caveat` what a stranger could misread; plain
    text, an empty line starts a paragraph. The rest is said by the record and the hits.
    """
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{html.escape(_identity(record))}</p>',
        f'<p class="summary">{html.escape(_summary(record))}</p>',
        "<h2>What was trained</h2>",
        _paragraphs(trained),
        "<h2>On what</h2>",
        _paragraphs(data),
        f'<div class="note">{_paragraphs(caveat)}</div>' if caveat.strip() else "",
        "<h2>What it answers</h2>",
        *_answers(queries),
        "<h2>What the numbers mean</h2>",
        _explanation(record),
        "<h2>Score and cost by token budget</h2>",
        _score_tables(record),
        _cost_table(record),
        _curve(record),
        _dual_softmax(record),
        f"<footer>{html.escape(_provenance(record))}</footer>",
    ]
    style = files("fluxclip.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _identity(record: Record) -> str:
    """Model, set and day on one line."""
    model = f"{record.model.name}, fingerprint {record.model.fingerprint[:12]}"
    return f"Model {model}. Scored on {record.data.name}, {record.created[:10]}."


def _largest(record: Record) -> BudgetResult:
    """The result with the most tokens."""
    return max(record.results, key=lambda result: result.num_tokens)


def _summary(record: Record) -> str:
    """The main result in two sentences."""
    best = _largest(record)
    score, guess = best.cosine.text_to_video, record.chance.text_to_video
    return (
        f"Asked with {score.num_queries} texts, the model puts the right clip first of "
        f"{score.num_gallery} for {score.r1:.1f} % of them and among the first 10 for "
        f"{score.r10:.1f} %, at {best.num_tokens} tokens a clip. "
        f"Guessing does so for {guess.r1:.1f} % and {guess.r10:.1f} %."
    )


def _explanation(record: Record) -> str:
    """What is measured, in words for a reader who has not met it."""
    guess = record.chance.text_to_video
    videos, texts = record.data.num_videos, record.data.texts.num_texts
    terms = {
        "The task": "The model turns a text and a clip into two lists of numbers, and the closer "
        "these point in one direction (their cosine), the better the match. Text to video: each "
        f"of the {texts} texts ranks all {videos} clips. Video to text: each clip ranks all texts.",
        "R@1, R@5, R@10": "Recall at k: for how many of 100 queries a right answer is among the "
        f"first k. Guessing gives {guess.r1:.1f}, {guess.r5:.1f} and {guess.r10:.1f}.",
        "MRR": "Mean reciprocal rank, times 100: a right answer counts 100 at place 1, 50 at "
        f"place 2, 10 at place 10, and the average is taken. Guessing gives {guess.mrr:.1f}.",
        "Mean": "The average of R@1, R@5 and R@10.",
        "MdR and MnR": "The median and the mean place of the right answer; 1 is best.",
        "12.0 7-17": "The small range is a 95 % interval: with other queries of the same kind "
        "the number would fall about there. Differences smaller than the interval may be luck.",
        "Token budget": "A clip is cut into patches, called tokens, and only as many as the budget "
        "says go through the model. Fewer tokens cost less. Every row is the same model, trained "
        "once. GMAC counts billions of multiplications for one clip.",
    }
    items = (f"<dt>{html.escape(t)}</dt><dd>{html.escape(d)}</dd>" for t, d in terms.items())
    return f"<dl>{''.join(items)}</dl>"


def _score_tables(record: Record) -> str:
    """Both directions by plain cosine, with the row of guessing."""
    tables = []
    for direction, title in DIRECTIONS.items():
        rows = [
            [result.budget_name, *score_cells(getattr(result.cosine, direction))]
            for result in record.results
        ]
        guess = ["guess", *score_cells(getattr(record.chance, direction))]
        caption = f"{title.capitalize()}, plain cosine"
        tables.append(_table(caption, ["budget", *SCORE_HEADS], rows, guess))
    return "\n".join(tables)


def _cost_table(record: Record) -> str:
    """What a clip costs at each budget."""
    rows = [
        [result.budget_name, *cost_cells(result, record.data.num_videos)]
        for result in record.results
    ]
    return _table("Cost of one clip in the video tower", ["budget", *COST_HEADS], rows)


def _dual_softmax(record: Record) -> str:
    """Dual softmax, folded away and with its warning."""
    tables = []
    for direction, title in DIRECTIONS.items():
        rows = [
            [result.budget_name, *score_cells(getattr(result.dual_softmax.scores, direction))]
            for result in record.results
        ]
        temperature = record.results[0].dual_softmax.temperature
        caption = f"{title.capitalize()}, dual softmax at temperature {temperature:g}"
        tables.append(_table(caption, ["budget", *SCORE_HEADS], rows))
    return (
        "<details><summary>With dual softmax, for comparison with papers</summary>"
        f"<p>{html.escape(DUAL_SOFTMAX_NOTE)}</p>{''.join(tables)}</details>"
    )


def _table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    guess: Sequence[str] | None = None,
) -> str:
    """An HTML table; an interval behind a number is set small."""

    def cells(row: Sequence[str]) -> str:
        escaped = map(html.escape, row)
        return "".join(f"<td>{_INTERVAL.sub(_SMALL, cell)}</td>" for cell in escaped)

    body = "".join(f"<tr>{cells(row)}</tr>" for row in rows)
    if guess is not None:
        body += f'<tr class="guess">{cells(guess)}</tr>'
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    return (
        f'<div class="wide"><table><caption>{html.escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _curve(record: Record) -> str:
    """The curve as an embedded picture."""
    buffer = BytesIO()
    plot_curve([record], buffer)
    return (
        f'<figure><div class="wide"><img alt="recall and MRR against tokens per clip" '
        f'src="{_data_url(buffer.getvalue(), "png")}"></div>'
        "<figcaption>Text to video against tokens per clip. Shaded: 95 % interval. Dotted: "
        "guessing.</figcaption></figure>"
    )


def _answers(queries: Sequence[QueryHits]) -> list[str]:
    """A heading and a row of cards per query."""
    known = any(query.verdict() for query in queries)
    parts = [
        "<p>The closest clips to each text, best first, with their cosine and the seconds they "
        "cover."
        + (
            " A green frame marks the clip that the text was written for; others may fit too, but "
            "count as wrong."
            if known
            else ""
        )
        + "</p>"
    ]
    for query in queries:
        verdict = f' <span class="soft">{html.escape(query.verdict())}</span>'
        cards = "".join(_card(hit) for hit in query.hits)
        parts.append(
            f"<h3>“{html.escape(query.query)}”{verdict if query.verdict() else ''}</h3>"
            f'<ul class="hits">{cards}</ul>'
        )
    return parts


def _card(hit: ShownHit) -> str:
    """One hit: picture, caption, score and time."""
    buffer = BytesIO()
    _image(hit.picture, _PICTURE).save(buffer, format="JPEG", quality=85)
    right = bool(hit.is_expected)
    badge = '<div class="badge">✓ right clip</div>' if right else ""
    kind = ' class="right"' if right else ""
    return (
        f"<li{kind}>"
        f'<img alt="" src="{_data_url(buffer.getvalue(), "jpeg")}">'
        f'<div class="what">{html.escape(hit.caption)}</div>{badge}'
        f'<div class="soft">{html.escape(hit.file_name)}</div>'
        f'<div class="soft">{html.escape(_where(hit))}</div></li>'
    )


def _where(hit: ShownHit) -> str:
    """Score and interval of a hit."""
    return f"{hit.score:.2f} · {hit.start_s:.1f}-{hit.end_s:.1f} s"


def _provenance(record: Record) -> str:
    """What somebody needs to get the same numbers."""
    versions = record.environment
    files = (f"{Path(p).name}, sha256 {digest[:16]}" for p, digest in record.data.files.items())
    return (
        f"Data: {'; '.join(files)}, captions={record.captions}. "
        f"Model fingerprint: {record.model.fingerprint}. Bootstrap seed {record.seed}. "
        f"{', '.join(f'{name} {value}' for name, value in versions.items())}."
    )


def _paragraphs(text: str) -> str:
    """Plain text as paragraphs, split at empty lines."""
    blocks = (block.strip() for block in text.split("\n\n"))
    return "".join(f"<p>{html.escape(block)}</p>" for block in blocks if block)


def _image(picture: npt.NDArray[np.uint8] | Path, side: int) -> Image.Image:
    """A picture as RGB, shrunk to fit a square."""
    if isinstance(picture, np.ndarray):
        image = Image.fromarray(picture)
    else:
        image = Image.open(picture).convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _data_url(content: bytes, kind: str) -> str:
    """Bytes of an image as the source of an <img>."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """A text shortened to so many pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
