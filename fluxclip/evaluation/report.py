"""An evaluation as a JSON record, as tables on the screen and as a curve against tokens."""

import itertools
import os
import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fluxclip.evaluation.budgets import Bounds, BudgetResult, Means, Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIRECTIONS = {"text_to_video": "text to video", "video_to_text": "video to text"}
METRICS = ("r1", "r5", "r10", "mrr")
SCORE_HEADS = ("R@1", "R@5", "R@10", "MRR", "median", "mean")
COST_HEADS = ("tokens", "frames", "GMAC", "embed ms", "decode ms")
DUAL_SOFTMAX_NOTE = (
    "Dual softmax re-weights every score by all queries of the test set at once, which a search "
    "does not have: compare it only with other dual-softmax numbers at the same temperature."
)
COLOURS = ("#1f5fa8", "#c8641e", "#3a7d44", "#7b4fa3", "#a33b4b", "#4a4a4a")


def save_record(record: Record, path: str | Path) -> None:
    """Write a record as JSON, folders made as needed; an existing file is replaced whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = record.model_dump_json(indent=1)
    # Ranks on one line: a number a line buries the rest of the record.
    text = re.sub(r"\[[\d.,\s]*\]", lambda found: " ".join(found[0].split()), text)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(path)


def load_record(path: str | Path) -> Record:
    """Read a record that `save_record` wrote.

    Raises FileNotFoundError if it is missing and ValueError, with the first thing wrong, if it is
    not such a record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"evaluation record {path} not found")
    try:
        return Record.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path} is not an evaluation record: {where + ': ' if where else ''}{first['msg']}; "
            "expected a file written by `fluxclip eval`"
        ) from error


def print_table(record: Record, console: Console) -> None:
    """Print the numbers of a record: plain cosine first, cost, and dual softmax apart."""
    data, model = record.data, record.model
    repeated = f", {data.num_repeated_texts} texts repeated" if data.num_repeated_texts else ""
    heading = (
        f"{model.name}@{model.fingerprint[:6]} on {data.name}: {data.num_texts} texts "
        f"(captions={data.captions}{repeated}), {data.num_videos} videos"
    )
    console.print(Text(heading))  # Text: brackets and colons in names are no markup
    for direction, title in DIRECTIONS.items():
        scores = [(result, getattr(result.cosine, direction)) for result in record.results]
        table = _table(f"{title}, cosine (R@k in %, 95 % interval)", ["budget", *SCORE_HEADS])
        for result, score in scores:
            table.add_row(budget_name(result), *score_cells(score))
        guess = getattr(record.chance, direction)
        table.add_row("guess", *score_cells(guess), style="dim")
        console.print(table)
        changes = [
            f"{budget_name(result)} {c.mean:+.1f} ({c.low:+.1f} to {c.high:+.1f})"
            for result, score in scores
            if (c := score.mrr_change) is not None
        ]
        if changes:
            first = budget_name(record.results[0])
            console.print(Text(f"MRR against {first}, paired: {', '.join(changes)}"))
        num_tied = max(score.num_tied for _, score in scores)
        if num_tied:
            console.print(f"up to {num_tied} queries are tied: their mean over all orders counts")
    table = _table("cost of a clip in the video tower", ["budget", *COST_HEADS])
    for result in record.results:
        table.add_row(budget_name(result), *cost_cells(result, data.num_videos))
    console.print(table)
    for direction, title in DIRECTIONS.items():
        temperature = record.results[0].dual_softmax.temperature
        heading = f"{title}, dual softmax at temperature {temperature:g}"
        table = _table(heading, ["budget", *SCORE_HEADS])
        for result in record.results:
            score = getattr(result.dual_softmax.scores, direction)
            table.add_row(budget_name(result), *score_cells(score))
        console.print(table)
    console.print(DUAL_SOFTMAX_NOTE, style="dim", highlight=False)


def plot_curve(records: Sequence[Record], path: str | Path | BytesIO) -> None:
    """Draw text-to-video R@1, R@5, R@10 and MRR against tokens, one line per record.

    Bands are 95 % intervals, dotted lines what guessing scores on the set of the first record.
    `path` ends in .png, .svg or .pdf; a buffer receives a PNG.
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
            _draw(axes, record, metric, colour)
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
        tokens = sorted({result.num_tokens for record in records for result in record.results})
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, [str(count) for count in tokens])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("tokens per clip", fontsize=9)
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


def budget_name(result: BudgetResult) -> str:
    """The token budget as text."""
    return "all" if result.token_budget is None else str(result.token_budget)


def score_cells(score: Means) -> list[str]:
    """Cells under `SCORE_HEADS`: 12.0 7-17 is 12.0 with a 95 % interval of 7 to 17."""
    cells = []
    for metric in METRICS:
        bounds: Bounds | None = getattr(score, f"{metric}_interval", None)
        interval = "" if bounds is None else f" {bounds.low:.0f}-{bounds.high:.0f}"
        cells.append(f"{getattr(score, metric):.1f}{interval}")
    return [*cells, f"{score.median_rank:.4g}", f"{score.mean_rank:.1f}"]


def cost_cells(result: BudgetResult, num_videos: int) -> list[str]:
    """Cells under `COST_HEADS`: tokens, frames x side, 10^9 multiply-accumulates, milliseconds."""
    return [
        str(result.num_tokens),
        f"{result.num_frames} x {result.side}²",
        "-" if result.macs is None else f"{result.macs / 1e9:.3g}",
        f"{1000 * result.embed_s / num_videos:.1f}",
        f"{1000 * result.decode_s / num_videos:.1f}",
    ]


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


def _draw(axes: "Axes", record: Record, metric: str, colour: str) -> None:
    """One record as a line with its band."""
    results = sorted(record.results, key=lambda result: result.num_tokens)
    tokens = [result.num_tokens for result in results]
    scores = [result.cosine.text_to_video for result in results]
    values = [getattr(score, metric) for score in scores]
    bounds = [getattr(score, f"{metric}_interval") for score in scores]
    label = f"{record.model.name}@{record.model.fingerprint[:6]}"
    axes.plot(tokens, values, color=colour, marker="o", markersize=5, linewidth=1.8, label=label)
    axes.fill_between(
        tokens, [b.low for b in bounds], [b.high for b in bounds], color=colour, alpha=0.13, lw=0
    )
