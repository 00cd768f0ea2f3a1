"""What an evaluation found, as one JSON file from which every table and plot is made."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from fluxclip.evaluation.protocols import Captions
from fluxclip.evaluation.ranking import CaptionGallery, Floats, Ints, Ranks, bootstrap_interval


class _Facts(BaseModel):
    """Read-only, and strict about what a file may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Bounds(_Facts):
    """A 95 % confidence interval."""

    low: float
    high: float

    @classmethod
    def of(cls, values_Q: Floats, *, group_Q: Ints, seed: int) -> "Bounds":
        """Bootstrap interval of the mean of values 0-1, in percent; groups are drawn whole."""
        interval = bootstrap_interval(100 * values_Q, group_Q=group_Q, seed=seed)
        return cls(low=interval.low, high=interval.high)


class Means(_Facts):
    """R@k in percent, their mean, MRR times 100, ranks from 1; ties as `ranking` has them."""

    r1: float
    r5: float
    r10: float
    r_mean: float
    mrr: float
    median_rank: float
    mean_rank: float

    @classmethod
    def of(cls, ranks: Ranks) -> "Means":
        recalls = [ranks.recall(k) for k in (1, 5, 10)]
        return cls(
            r1=recalls[0],
            r5=recalls[1],
            r10=recalls[2],
            r_mean=sum(recalls) / 3,
            mrr=ranks.mrr,
            median_rank=ranks.median_rank,
            mean_rank=ranks.mean_rank,
        )


class Change(Bounds):
    """A mean difference with its 95 % interval."""

    mean: float


class Score(Means):
    """One direction with 95 % intervals and the rank of every query.

    `mrr_change` is MRR minus that of the record's first budget, query by query: a paired bootstrap,
    in which queries that are hard at every budget cancel out. The first budget has none.

    `ranks` is in the order of the task's texts (text-to-video) or videos (video-to-text). Where a
    query is tied it is the mean rank, and `ties` has for it, by its place in `ranks`, how many
    wrong items score higher, how many score the same, and how many right ones do: with these
    `to_ranks` is exact.
    """

    num_queries: int
    num_gallery: int
    r1_interval: Bounds
    r5_interval: Bounds
    r10_interval: Bounds
    mrr_interval: Bounds
    mrr_change: Change | None = None
    ranks: list[float]
    ties: dict[int, tuple[int, int, int]]

    def to_ranks(self) -> Ranks:
        """The ranks that every number here is made of."""
        return Ranks.from_means(self.ranks, self.ties)


class Scores(_Facts):
    """Both directions."""

    text_to_video: Score
    video_to_text: Score


class Chance(_Facts):
    """What guessing scores in both directions."""

    text_to_video: Means
    video_to_text: Means


class DualSoftmax(_Facts):
    """Scores after `ranking.dual_softmax`; not comparable with plain cosines."""

    temperature: float
    scores: Scores


class Cost(_Facts):
    """What a clip costs at one token budget; None is all tokens of the model's default grid.

    `num_tokens` enter the tower of the `grid_tokens` that the grid has (a clip with fewer frames
    has fewer). `macs` are multiply-accumulates of the video tower per clip, embedding of dropped
    tokens included, None if the model does not say; papers often call them FLOPs. Where a filter
    lets clips differ, `tokens_of_clips` has those of each, and `num_tokens` and `macs` are means.
    `decode_s` (a thread per core) and `embed_s` are seconds for the whole set, added up over the
    processes that shared the work and over the runs that it took; budgets that share a grid share
    its decoding.
    """

    token_budget: int | None
    num_tokens: int
    tokens_of_clips: list[int] | None = None
    grid_tokens: int
    num_frames: int
    side: int
    macs: int | None
    decode_s: float
    embed_s: float

    @property
    def budget_name(self) -> str:
        """The token budget as text."""
        return "all" if self.token_budget is None else str(self.token_budget)


class BudgetResult(Cost):
    """Retrieval scores and cost at one token budget."""

    cosine: Scores
    dual_softmax: DualSoftmax


class Accuracy(_Facts):
    """Share of the videos, in percent, whose class comes first or among the first five."""

    top1: float
    top5: float
    top1_interval: Bounds
    top5_interval: Bounds


class ClassBudgetResult(Cost):
    """Classification accuracy and cost at one token budget.

    `ranks` and `ties` are those of each video's class among all classes, as in `Score`.
    """

    accuracy: Accuracy
    ranks: list[float]
    ties: dict[int, tuple[int, int, int]]

    def to_ranks(self) -> Ranks:
        """The ranks that the accuracy is made of."""
        return Ranks.from_means(self.ranks, self.ties)


class ModelFacts(_Facts):
    """Which model was scored; `scorer` and `filter` are what selects its tokens, where it says.

    `text_limit` is the number of text tokens that it reads, after which a text is cut.
    """

    name: str
    fingerprint: str
    dim: int
    logit_scale: float
    scorer: str | None
    filter: str | None
    text_limit: int | None


class TextFacts(_Facts):
    """The texts that were embedded: how many, how they were treated, how many were cut.

    `num_expected` is how many the protocol has, None where that is not known. `num_repeated` texts
    are word for word those of another. `cut` is None if the model cannot tell.
    """

    num_texts: int
    num_expected: int | None
    num_repeated: int
    num_cut: int | None
    clean_up: bool


class DataFacts(_Facts):
    """What it was scored on.

    `files` are the annotations with their sha256. Of `num_expected` videos of the protocol,
    `num_videos` were scored; `missing` have no file and `broken` could not be read, with reasons.
    """

    protocol: str
    choices: dict[str, str]
    files: dict[str, str]
    num_expected: int
    num_videos: int
    missing: list[str]
    broken: dict[str, str]
    texts: TextFacts

    @property
    def name(self) -> str:
        """The protocol's name alone only where precisely its videos and texts were scored."""
        if self.num_videos != self.num_expected or self.missing or self.broken:
            return f"{self.protocol} ({self.num_videos} of {self.num_expected} videos)"
        texts = self.texts
        if texts.num_expected not in (None, texts.num_texts):
            return f"{self.protocol} ({texts.num_texts} of {texts.num_expected} texts)"
        return self.protocol


class _Record(_Facts):
    """What all evaluations record. `seed` is that of the bootstrap intervals."""

    created: str
    model: ModelFacts
    data: DataFacts
    embed_text_s: float
    seed: int
    environment: dict[str, str]


class Record(_Record):
    """A retrieval evaluation: model, data, what guessing scores there, a result per budget.

    `caption_gallery` is that of video-to-text, as in `ranking.retrieval_ranks`.
    """

    format: Literal["fluxclip-retrieval-2"] = "fluxclip-retrieval-2"
    captions: Captions
    caption_gallery: CaptionGallery
    chance: Chance
    results: list[BudgetResult]


class ClassificationRecord(_Record):
    """A zero-shot classification: `templates` are filled with each of `num_classes` names."""

    format: Literal["fluxclip-classification-2"] = "fluxclip-classification-2"
    num_classes: int
    templates: list[str]
    num_views: int
    results: list[ClassBudgetResult]


AnyRecord = Record | ClassificationRecord
_RECORD: TypeAdapter[AnyRecord] = TypeAdapter(Annotated[AnyRecord, Field(discriminator="format")])


def save_record(record: AnyRecord, path: str | Path) -> None:
    """Write a record as JSON, folders made as needed; an existing file is replaced whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = record.model_dump_json(indent=1)
    # Ranks on one line: a number a line buries the rest of the record.
    text = re.sub(r"\[[\d.,\s]*\]", lambda found: " ".join(found[0].split()), text)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    unfinished.write_text(f"{text}\n", encoding="utf-8")
    unfinished.replace(path)


def load_record(path: str | Path) -> AnyRecord:
    """Read a record that `save_record` wrote.

    Raises FileNotFoundError if it is missing and ValueError, with the first thing wrong, if it is
    not such a record.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"evaluation record {path} not found")
    try:
        return _RECORD.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ValueError(
            f"{path} is not an evaluation record: {where + ': ' if where else ''}{first['msg']}; "
            "expected a file written by `fluxclip eval`"
        ) from error


def load_retrieval(paths: Sequence[str | Path]) -> list[Record]:
    """Retrieval records; ValueError if one is of a classification."""
    records = []
    for path in paths:
        record = load_record(path)
        if not isinstance(record, Record):
            raise ValueError(f"{path} is the record of a classification, not of retrieval")
        records.append(record)
    return records
