"""Records of evaluations as tables on the screen and as curves against tokens and time."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxclip.evaluation.record import (
    AnyRecord,
    Bounds,
    ClassificationRecord,
    Cost,
    Means,
    Record,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
METRICS = ("r1", "r5", "r10", "mrr")
SCORE_HEADS = ("R@1", "R@5", "R@10", "mean", "MRR", "MdR", "MnR")
COST_HEADS = ("tokens", "frames", "GMAC", "embed ms", "decode ms")
DUAL_SOFTMAX_NOTE = (
    "Dual softmax re-weights every score by all queries of the test set at once, which a search "
    "does not have: compare it only with other dual-softmax numbers at the same temperature."
)
_COMPARED_HEADS = ("model", "tokens", "scores", "t2v R@1", "R@10", "v2t R@1", "R@10")
_SHOWN = 5  # names in a line
COLOURS = ("#1f5fa8", "#c8641e", "#3a7d44", "#7b4fa3", "#a33b4b", "#4a4a4a")


@dataclass(frozen=True)
class Published:
    """R@1 (%) that others published, on a protocol of ours.

    scores: "cosine", "dual softmax" or "reranked". differs: how it was measured otherwise.
    """

    protocol: str
    model: str
    scores: str
    source: str
    t2v_r1: float | None = None
    v2t_r1: float | None = None
    tokens: int | None = None
    differs: str | None = None


@cache
def published(protocol: str) -> list[Published]:
    """What published.json has on a protocol.

    That is every row whose words are all in the protocol's name: papers do not say which split of
    VATEX they took, so "VATEX en" goes with each of its English splits.
    """
    text = (files("fluxclip.evaluation") / "published.json").read_text("utf-8")
    rows = [Published(**row) for row in json.loads(text)]
    return [row for row in rows if set(row.protocol.split()) <= set(protocol.split())]


def print_table(record: AnyRecord, console: Console) -> None:
    """Print the numbers of a record: quality, then cost; dual softmax apart and last."""
    for line in describe(record):
        console.print(Text(line))  # Text: brackets and colons in names are no markup
    if isinstance(record, ClassificationRecord):
        _print_accuracy(record, console)
        return
    for direction, title in DIRECTIONS.items():
        scores = [(result, getattr(result.cosine, direction)) for result in record.results]
        table = _table(f"{title}, cosine (R@k in %, 95 % interval)", ["budget", *SCORE_HEADS])
        for result, score in scores:
            table.add_row(result.budget_name, *score_cells(score))
        guess = getattr(record.chance, direction)
        table.add_row("guess", *score_cells(guess), style="dim")
        console.print(table)
        changes = [
            f"{result.budget_name} {c.mean:+.1f} ({c.low:+.1f} to {c.high:+.1f})"
            for result, score in scores
            if (c := score.mrr_change) is not None
        ]
        if changes:
            first = record.results[0].budget_name
            console.print(Text(f"MRR against {first}, paired: {', '.join(changes)}"))
        num_tied = max(len(score.ties) for _, score in scores)
        if num_tied:
            console.print(f"up to {num_tied} queries are tied: their mean over all orders counts")
    _print_cost(record.results, record.data.num_videos, console)
    for direction, title in DIRECTIONS.items():
        temperature = record.results[0].dual_softmax.temperature
        heading = f"{title}, dual softmax at temperature {temperature:g}"
        table = _table(heading, ["budget", *SCORE_HEADS])
        for result in record.results:
            score = getattr(result.dual_softmax.scores, direction)
            table.add_row(result.budget_name, *score_cells(score))
        console.print(table)
    console.print(DUAL_SOFTMAX_NOTE, style="dim", highlight=False)


def describe(record: AnyRecord) -> list[str]:
    """What was measured on what, a line each, and what is not as it should be."""
    data, model = record.data, record.model
    texts = data.texts
    choices = "".join(f", {name} {choice}" for name, choice in data.choices.items())
    if isinstance(record, Record):
        asked = f"{texts.num_texts} texts (captions={record.captions}), {data.num_videos} videos"
        if record.caption_gallery == "best":
            asked += ", video to text among the best caption of each video"
    else:
        asked = (
            f"{record.num_classes} classes by {len(record.templates)} templates, {data.num_videos} "
            f"videos in {record.num_views} views"
        )
    lines = [f"{model.name}@{model.fingerprint[:6]} on {data.name}{choices}: {asked}"]
    if texts.num_repeated and isinstance(record, Record):
        lines.append(f"{texts.num_repeated} texts are word for word those of another")
    if texts.clean_up:
        lines.append("texts in lower case without punctuation")
    if texts.num_cut:
        share = 100 * texts.num_cut / texts.num_texts
        lines.append(f"{texts.num_cut} texts ({share:.1f} %) cut at {model.text_limit} tokens")
    if data.missing:
        lines.append(f"{len(data.missing)} videos missing: {_some(data.missing)}")
    for video, reason in itertools.islice(data.broken.items(), _SHOWN):
        lines.append(f"video {video} cannot be read: {reason}")
    if len(data.broken) > _SHOWN:
        lines.append(f"... and {len(data.broken) - _SHOWN} more; the record lists all")
    return lines


def by_task(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records whose numbers can be compared, by what they were measured on.

    Those are of one protocol and file, with the same captions, clean-up and gallery of captions.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        files = {Path(path).name: digest[:6] for path, digest in record.data.files.items()}
        parts = [record.data.protocol, *(f"{name}@{digest}" for name, digest in files.items())]
        parts.append(f"captions={record.captions}")
        parts += ["cleaned"] if record.data.texts.clean_up else []
        parts += ["best caption of each video"] if record.caption_gallery == "best" else []
        groups.setdefault(", ".join(parts), []).append(record)
    return groups


def print_comparison(records: Sequence[Record], console: Console) -> None:
    """Print records side by side, task by task, with published numbers below them.

    Plain cosine and dual softmax are never in one row. A published row is marked where it was
    measured otherwise than the protocol says, and the mark is explained.
    """
    for task, compared in by_task(records).items():
        protocol = compared[0].data.protocol
        table = _table(f"{task}: R@1, R@10 (%) and their 95 % interval", _COMPARED_HEADS)
        table.columns[0].justify = "left"
        notes: list[str] = []
        for record in compared:
            name = _label(record)
            for result in record.results:
                for kind, scores in (
                    ("cosine", result.cosine),
                    ("dual", result.dual_softmax.scores),
                ):
                    t2v, v2t = scores.text_to_video, scores.video_to_text
                    cells = [
                        cell
                        for score in (t2v, v2t)
                        for cell in (
                            _cell(score.r1, score.r1_interval), _cell(score.r10, score.r10_interval)
                        )
                    ]  # fmt: skip
                    table.add_row(Text(name), str(result.num_tokens), kind, *cells)
        for row in published(protocol):
            mark = ""
            if row.differs is not None:
                notes += [] if row.differs in notes else [row.differs]
                mark = f" [{notes.index(row.differs) + 1}]"
            r1 = ["-" if r is None else f"{r:.1f}" for r in (row.t2v_r1, row.v2t_r1)]
            tokens = "?" if row.tokens is None else str(row.tokens)
            cells = [tokens, row.scores.removesuffix(" softmax"), r1[0], "-", r1[1], "-"]
            table.add_row(Text(f"{row.model}{mark}"), *cells, style="dim")
        console.print(table)
        console.print(DUAL_SOFTMAX_NOTE, style="dim", highlight=False)
        for number, note in enumerate(notes, start=1):
            console.print(Text(f"[{number}] {note}"), style="dim")
        sources = dict.fromkeys(row.source for row in published(protocol))
        if sources:
            console.print(Text(f"published: {'; '.join(sources)}"), style="dim")


def plot_curve(
    records: Sequence[Record],
    path: str | Path | BytesIO,
    *,
    against: Literal["tokens", "time"] = "tokens",
) -> None:
    """Draw text-to-video R@1, R@5, R@10 and MRR against tokens or time, one line per record.

    The records are of one task (`by_task`). Time is that of the video tower, in milliseconds per
    clip. Bands are 95 % intervals, dotted lines what guessing scores. Crosses in R@1 against tokens
    are published numbers: dark by cosine, light by dual softmax or reranking. `path` ends in .png,
    .svg or .pdf; a buffer receives a PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(8, 5.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    titles = (
        "R@1: the right clip comes first",
        "R@5: it is among the first 5",
        "R@10: it is among the first 10",
        "MRR: 100 / rank, averaged",
    )
    for axes, metric, title in zip(figure.subplots(2, 2).flat, METRICS, titles, strict=True):
        for record, colour in zip(records, itertools.cycle(COLOURS)):
            _draw(axes, record, metric, colour, against)
        guess = getattr(records[0].chance.text_to_video, metric)
        axes.axhline(guess, color="#555555", linestyle=":", linewidth=1.2)
        axes.annotate(
            f"guessing: {guess:.1f}",
            (0.985, guess),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color="#555555",
        )
        axes.set_xscale("log", base=2)
        ticks = {
            _cost_of(result, record, against) for record in records for result in record.results
        }
        if metric == "r1" and against == "tokens":
            ticks |= _draw_published(axes, records[0].data.protocol)
        if against == "tokens":
            axes.set_xticks(sorted(ticks), [f"{tick:.0f}" for tick in sorted(ticks)])
        else:
            axes.xaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08)
        axes.set_title(title, fontsize=10, loc="left")
        label = "tokens per clip" if against == "tokens" else "ms per clip in the video tower"
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel("MRR x 100" if metric == "mrr" else "% of queries", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if len(records) > 1:
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False
        )
    if not isinstance(path, BytesIO):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def font_path(name: str) -> Path:
    """A font file that matplotlib carries ("DejaVuSans"): Pillow's own lacks most of Unicode."""
    from matplotlib import get_data_path

    return Path(get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def score_cells(score: Means) -> list[str]:
    """Cells under `SCORE_HEADS`: 12.0 7-17 is 12.0 with a 95 % interval of 7 to 17."""
    cells = [_cell(getattr(score, m), getattr(score, f"{m}_interval", None)) for m in METRICS]
    cells.insert(3, f"{score.r_mean:.1f}")
    return [*cells, f"{score.median_rank:.4g}", f"{score.mean_rank:.1f}"]


def cost_cells(result: Cost, num_clips: int) -> list[str]:
    """Cells under `COST_HEADS`: tokens, frames x side, 10^9 multiply-accumulates, milliseconds."""
    return [
        str(result.num_tokens),
        f"{result.num_frames} x {result.side}²",
        "-" if result.macs is None else f"{result.macs / 1e9:.3g}",
        f"{1000 * result.embed_s / num_clips:.1f}",
        f"{1000 * result.decode_s / num_clips:.1f}",
    ]


def _cell(value: float, bounds: Bounds | None) -> str:
    """A number with its interval where it has one."""
    return f"{value:.1f}" if bounds is None else f"{value:.1f} {bounds.low:.0f}-{bounds.high:.0f}"


def _print_accuracy(record: ClassificationRecord, console: Console) -> None:
    table = _table("accuracy (% of videos, 95 % interval)", ["budget", "top-1", "top-5"])
    for result in record.results:
        a = result.accuracy
        table.add_row(
            result.budget_name, _cell(a.top1, a.top1_interval), _cell(a.top5, a.top5_interval)
        )
    console.print(table)
    _print_cost(record.results, record.data.num_videos * record.num_views, console)


def _print_cost(results: Sequence[Cost], num_clips: int, console: Console) -> None:
    table = _table("cost of a clip in the video tower", ["budget", *COST_HEADS])
    for result in results:
        table.add_row(result.budget_name, *cost_cells(result, num_clips))
    console.print(table)


def _some(names: Sequence[str]) -> str:
    """The first of some names."""
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _table(title: str, heads: Sequence[str]) -> Table:
    """A table with right-aligned columns, close together: scores fit in 80 columns."""
    table = Table(
        title=title,
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        min_width=len(title),
    )
    for head in heads:
        table.add_column(head, justify="right")
    return table


def _cost_of(result: Cost, record: Record, against: Literal["tokens", "time"]) -> float:
    """Tokens of a clip, or its milliseconds in the tower."""
    if against == "tokens":
        return result.num_tokens
    return 1000 * result.embed_s / record.data.num_videos


def _draw(
    axes: "Axes", record: Record, metric: str, colour: str, against: Literal["tokens", "time"]
) -> None:
    """One record as a line with its band."""
    results = sorted(record.results, key=lambda result: _cost_of(result, record, against))
    costs = [_cost_of(result, record, against) for result in results]
    scores = [result.cosine.text_to_video for result in results]
    values = [getattr(score, metric) for score in scores]
    bounds = [getattr(score, f"{metric}_interval") for score in scores]
    label = _label(record)
    axes.plot(costs, values, color=colour, marker="o", markersize=5, linewidth=1.8, label=label)
    axes.fill_between(
        costs, [b.low for b in bounds], [b.high for b in bounds], color=colour, alpha=0.13, lw=0
    )


def _label(record: Record) -> str:
    """The model, and what of the protocol it was scored on where that is not all."""
    model, data = f"{record.model.name}@{record.model.fingerprint[:6]}", record.data
    return model + data.name.removeprefix(data.protocol)


def _draw_published(axes: "Axes", protocol: str) -> set[float]:
    """Published R@1 as crosses with the models' names; returns their numbers of tokens."""
    drawn = set()
    for row in published(protocol):
        if row.tokens is not None and row.t2v_r1 is not None:
            colour = "#555555" if row.scores == "cosine" else "#aaaaaa"
            axes.plot(row.tokens, row.t2v_r1, marker="x", color=colour, markersize=5)
            axes.annotate(
                row.model, (row.tokens, row.t2v_r1), fontsize=5, color=colour,
                xytext=(3, 2), textcoords="offset points",
            )  # fmt: skip
            drawn.add(float(row.tokens))
    return drawn
