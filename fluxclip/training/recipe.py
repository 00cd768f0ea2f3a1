"""A training recipe: TOML in, checked settings out. Unknown keys are refused with the nearest one.

Paths to data are relative to the recipe's folder, `output` to the folder the command runs in.
"""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from fluxclip.data import sources
from fluxclip.data.loader import Augment
from fluxclip.embedder import find_folder, split_settings
from fluxclip.model import weights
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import (
    FluxCLIPConfig,
    PreprocessConfig,
    TextConfig,
    VideoTowerConfig,
    preset,
)
from fluxclip.settings import parse, settings
from fluxclip.tokens.budget import FluxSampling, GridTable
from fluxclip.training.freeze import set_trained

Rate = Annotated[float, Field(ge=0, lt=1)]


@settings
class ModelRecipe:
    """preset: tiny, small or base; dim: width of the shared space; the rest changes the preset.

    projectors: "shared" pools the tokens of every budget by the same weights; "per_budget" has
    weights for each of flux.budgets, and the nearest in log tokens serves the budgets between.
    filter, filter_settings, length_encoding, pool_by_length: see VideoTowerConfig.
    """

    preset: str = "tiny"
    dim: PositiveInt = 256
    drop_path: float = 0.0
    scorer: str = "group_dynamic"
    gelu: Literal["tanh", "erf"] = "tanh"
    fit: Literal["crop", "squash"] = "crop"
    projectors: Literal["shared", "per_budget"] = "shared"
    filter: str = ""
    filter_settings: dict[str, str | float] = field(default_factory=dict)
    length_encoding: bool = False
    pool_by_length: bool = False


@settings
class FluxRecipe:
    """Flux sampling (see FluxSampling), and the weight of aligning smaller budgets to the largest.

    frames, sides: [first, last, stride]; tokens: [least, most] before selection. budgets: tokens
    kept per view; one is the paper's Flux-Single, several are Flux-Multi: each step then encodes
    its clips once per budget, and `align` weighs the distance of the smaller views to the largest
    (0 for none). grids: rows [token_budget, num_frames, side], what the trained model uses for a
    budget; the first row is also its default without one; none leaves those of the model started
    from.
    """

    frames: tuple[int, int, int]
    sides: tuple[int, int, int]
    tokens: tuple[int, int]
    budgets: tuple[int, ...]
    grids: tuple[tuple[int, int, int], ...] = ()
    align: NonNegativeFloat = 1.0


@settings
class SourceRecipe:
    """Pairs of videos and captions, and how many of them are in each step.

    annotations: a file of them, relative to the recipe, or what else `source` reads by that name.
    source: a file of fluxclip/data/sources or a dotted name; docs/data.md describes each.
    decoder: what reads its videos, a file of fluxclip/video/decoders or a dotted name.
    cache_frames: 0 decodes a clip each time it is used; n keeps n frames of every clip in memory,
    `cache_side` pixels square (small sets only). captions: "one" draws one of a record's captions,
    "first" always takes the first. teacher: a file of features of the same records to learn from,
    written by scripts/teacher_features.py.
    """

    annotations: str
    batch: PositiveInt
    source: str = "annotations"
    decoder: str = "pyav"
    captions: Literal["one", "first"] = "one"
    cache_frames: NonNegativeInt = 0
    cache_side: PositiveInt = 128
    teacher: str = ""


@settings
class OptimizerRecipe:
    """AdamW, linear warm-up, cosine to final_lr * lr; the gradient norm is cut at clip_norm.

    muon: above 0, the matrices of the video tower's blocks are trained by Muon, at muon * lr.
    """

    steps: PositiveInt
    lr: PositiveFloat = 1e-3
    warmup_steps: NonNegativeInt = 100
    final_lr: NonNegativeFloat = 0.01
    weight_decay: NonNegativeFloat = 0.02
    betas: tuple[Rate, Rate] = (0.9, 0.98)
    clip_norm: PositiveFloat = 1.0
    muon: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps must be below steps, got steps={self.steps}, "
                f"warmup_steps={self.warmup_steps}"
            )


@settings
class ValidationRecipe:
    """The set the best model is chosen by, `every` so many steps: mean MRR of both directions."""

    annotations: str
    every: PositiveInt = 200
    captions: Literal["first", "all", "joined"] = "first"


@settings
class Recipe:
    """A whole run. output: the run folder.

    init: a model to start from, as load_model takes it; its architecture and its text tower are
    then those of that model, and of [model] only drop_path may be set. Empty for fresh weights.
    freeze: what is not trained, patterns over the names of weights: training/freeze.py.
    precision: "auto" is bf16 on a GPU, fp32 on a CPU.

    save_as: number type of the weights in the model folders. workers: processes that decode.
    max_unreadable: share of the files above which a run stops, as it would be another run than was
    asked for; 0 stops at the first that cannot be read. decode_timeout_s: most seconds that a
    worker may take to read one, above which it counts as such; without workers there is no limit.
    engine: "plain", "deepspeed", or a dotted name of a module that is one.
    zero_stage: of deepspeed: 0, or 1 to share the optimizer's moments among processes, or 2 to
    share gradients too.
    rows: of a contrast over several processes, "local" computes in each one its own, "full" all of
    them; the gradients are equal.
    pieces: a process's pairs of a step go through the towers in so many, one after the other; the
    gradients are exact, in the memory of one piece and the time of one more forward pass.
    activation_checkpointing: the towers' blocks keep only their inputs for the backward pass and
    are computed again in it; the gradients are exact.
    compile: the video tower's blocks run as kernels that torch.compile makes at the first step.
    negatives: "all" also sets each clip against the names (first captions) of all records.
    distillation: weight of the distance to the teacher, for the data that have one.
    distillation_steps: so many steps at first learn from the teacher alone, captions come after.
    distillation_mix: share of the clips that have a box of another one in those steps.
    wandb: a project at Weights & Biases that gets the numbers of each step too; empty for none.
    save_minutes: most time between two saved states; after each validation there is one anyway.
    """

    output: str
    flux: FluxRecipe
    optimizer: OptimizerRecipe
    data: tuple[SourceRecipe, ...]
    validation: ValidationRecipe
    model: ModelRecipe = field(default_factory=ModelRecipe)
    text: TextConfig = field(default_factory=TextConfig)
    augment: Augment = field(default_factory=Augment)
    objective: str = "contrastive"
    negatives: Literal["step", "all"] = "step"
    rows: Literal["local", "full"] = "local"
    engine: str = "plain"
    zero_stage: Literal[0, 1, 2] = 1
    pieces: PositiveInt = 1
    activation_checkpointing: bool = False
    compile: bool = False
    distillation: NonNegativeFloat = 1.0
    distillation_steps: NonNegativeInt = 0
    distillation_mix: Annotated[float, Field(ge=0, le=1)] = 0.0
    init: str = ""
    freeze: tuple[str, ...] = ()
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = 0
    max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.1
    decode_timeout_s: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    save_as: Literal["fp32", "fp16"] = "fp32"
    save_minutes: NonNegativeFloat = 10.0
    wandb: str = ""

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("a recipe needs at least one [[data]] section")
        if self.workers and any(source.cache_frames for source in self.data):
            raise ValueError("a source with cache_frames is kept by one process: set workers to 0")
        if self.init:
            fresh = replace(ModelRecipe(), drop_path=self.model.drop_path)
            given = [
                f"model.{key}" for key, value in asdict(self.model).items()
                if value != getattr(fresh, key)
            ] + ["[text]"] * (self.text != TextConfig())  # fmt: skip
            if given:
                raise ValueError(
                    f"leave out {', '.join(given)}: with init, the model {self.init} brings it "
                    f"(--set model={{}} --set text={{}} empties both sections)"
                )
        if self.engine == "deepspeed" and self.zero_stage and self.optimizer.muon:
            raise ValueError(
                f"optimizer.muon needs whole matrices, and zero_stage = {self.zero_stage} cuts "
                f"them: set zero_stage=0 or optimizer.muon=0"
            )
        if self.engine == "deepspeed" and self.zero_stage == 2 and self.pieces > 1:
            raise ValueError(
                "zero_stage = 2 gives gradients away after each piece: set zero_stage=1 for "
                "pieces above 1"
            )
        if self.distillation_steps and not any(source.teacher for source in self.data):
            raise ValueError("distillation_steps needs a teacher in one of the [[data]] sections")
        if self.distillation_mix and not self.distillation_steps:
            raise ValueError("distillation_mix needs distillation_steps: captions would be untrue")
        # made once here, so that mistakes show before any step is spent
        self.sampling()
        self.model_config()

    def video_tower(self) -> VideoTowerConfig:
        m = self.model
        if self.init:
            return self._initial[1].video
        budgets = self.flux.budgets if m.projectors == "per_budget" else ()
        return preset(
            m.preset, drop_path=m.drop_path, scorer=m.scorer, gelu=m.gelu,
            projector_budgets=tuple(sorted(set(budgets), reverse=True)),
            filter=m.filter, filter_settings=m.filter_settings,
            length_encoding=m.length_encoding, pool_by_length=m.pool_by_length,
        )  # fmt: skip

    def sampling(self) -> FluxSampling:
        f, tower = self.flux, self.video_tower()
        return FluxSampling(
            frames=f.frames, sides=f.sides, tokens=f.tokens, budgets=f.budgets,
            patch=tower.patch, tubelet=tower.tubelet,
        )  # fmt: skip

    def model_config(self) -> FluxCLIPConfig:
        rows = self.flux.grids
        if self.init:
            config = self._initial[1]
            return replace(config, grids=GridTable(rows[0][1:], rows)) if rows else config
        if not rows:
            raise ValueError("flux.grids needs at least one row [token_budget, frames, side]")
        return FluxCLIPConfig(
            video=self.video_tower(),
            grids=GridTable(default=rows[0][1:], rows=rows),
            text=self.text,
            preprocess=PreprocessConfig(fit=self.model.fit),
            dim=self.model.dim,
        )

    def build(self) -> FluxCLIP:
        """The model before its first step, in training mode, what is not trained set so.

        With activation checkpointing its blocks are set to it. Raises ValueError for what `freeze`
        cannot mean.
        """
        config = self.model_config()
        if self.init:
            model = weights.load(self._initial[0], config=config)
        else:
            model = weights.build(config)
        set_trained(model, self.freeze)
        if self.activation_checkpointing:
            model.recompute_blocks()
        return model.train()

    @cached_property
    def _initial(self) -> tuple[Path, FluxCLIPConfig]:
        """Folder of the model to start from, and its config with the recipe's changes."""
        source, changes = split_settings(self.init)
        folder, _, _ = find_folder(source)
        changes["drop_path"] = self.model.drop_path
        return folder, weights.with_video(weights.read_config(folder), changes)


def read(path: str | Path, changes: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with changes such as "optimizer.lr=1e-4" applied, checked.

    Raises FileNotFoundError, or ValueError with one line per mistake.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe {path}")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    for change in changes:
        _apply(values, change)
    for section in [*_sections(values.get("data")), *_sections(values.get("validation"))]:
        if type(section.get("annotations")) is int:  # --set data.0.annotations=1000
            section["annotations"] = str(section["annotations"])
        if isinstance(name := section.get("annotations"), str) and name:
            kind = str(section.get("source", "annotations"))
            section["annotations"] = sources.located(kind, name, folder=path.parent)
        if isinstance(section.get("teacher"), str) and section["teacher"]:
            section["teacher"] = str((path.parent / section["teacher"]).resolve())
    named: tuple[tuple[Any, str], ...] = ((values.get("text"), "source"), (values, "init"))
    for section, key in named:
        if isinstance(section, dict) and isinstance(section.get(key), str) and section[key]:
            name, mark, tower = section[key].partition("?")
            for folder in (path.parent / name, Path(name)):
                if folder.is_dir():
                    section[key] = f"{folder.resolve()}{mark}{tower}"
                    break
            else:
                if key == "init" and name.startswith((".", "/")):
                    raise FileNotFoundError(
                        f"{path}: {key} = {section[key]!r}: there is no such folder; the head of "
                        f"the recipe may say how it is made"
                    )
    return parse(Recipe, values, source=str(path))


def _sections(value: Any) -> list[dict[str, Any]]:
    sections = value if isinstance(value, list) else [value]
    return [section for section in sections if isinstance(section, dict)]


def _apply(values: dict[str, Any], change: str) -> None:
    """Apply "a.b=value"; the value is read as TOML, or taken as a string if it is none."""
    name, equals, text = change.partition("=")
    if not equals or not name:
        raise ValueError(f"a change looks like optimizer.lr=1e-4, got {change!r}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, last = name.strip().split(".")
    here: Any = values
    for i, parent in enumerate(parents):
        if isinstance(here, list):
            if not parent.isdecimal() or int(parent) >= len(here):
                path = ".".join(parents[:i])
                raise ValueError(
                    f"cannot set {name!r}: {path} is a list of {len(here)}, write its number, "
                    f"as in {path}.0"
                )
            here = here[int(parent)]
        else:
            here = here.setdefault(parent, {})
        if not isinstance(here, (dict, list)):
            path = ".".join(parents[: i + 1])
            raise ValueError(f"cannot set {name!r}: {path!r} is no section")
    if isinstance(here, list):
        path = ".".join(parents)
        raise ValueError(
            f"cannot set {name!r}: {path} is a list of {len(here)}, write its number, as in "
            f"{path}.0.{last}"
        )
    here[last] = value


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML with every default written out, so that the run can be repeated."""

    def value(x: Any) -> str:
        if isinstance(x, dict):
            return "{" + ", ".join(f"{json.dumps(k)} = {value(v)}" for k, v in x.items()) + "}"
        # TOML's numbers, booleans, lists and basic strings are written as JSON writes them
        return json.dumps(x, ensure_ascii=False)

    values = asdict(recipe)
    lines = [f"{k} = {value(v)}" for k, v in values.items() if not _is_section(v)]
    for name, section in values.items():
        if _is_section(section):
            tables = [section] if isinstance(section, dict) else section
            header = f"[{name}]" if isinstance(section, dict) else f"[[{name}]]"
            for table in tables:
                lines += ["", header, *(f"{k} = {value(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _is_section(x: Any) -> bool:
    return isinstance(x, dict) or (
        isinstance(x, (list, tuple)) and bool(x) and isinstance(x[0], dict)
    )
