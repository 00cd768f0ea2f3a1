"""One training step up to its loss: both towers over all pairs of the step.

Shape legend: B pairs of this process, D shared width.
"""

import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip import distributed, plugins
from fluxclip.data.batch import Batch, Step
from fluxclip.data.loader import Source
from fluxclip.model.fluxclip import FluxCLIP, View
from fluxclip.tokens.draws import Draws
from fluxclip.training.distillation import Distillation
from fluxclip.training.flops import caption_macs, clip_macs, passes
from fluxclip.training.recipe import Recipe

CAPTIONS_KEPT = 200_000  # features of so many take about 300 MB
RECORDS_READ = 1_000_000  # of more records, nobody looks whether they share so few captions


# of a loss, for the log; those that a GPU is still at work on stay there until they are wanted
Parts = Mapping[str, Tensor | float]


@dataclass(frozen=True)
class Features:
    """What the loss needs of some pairs, in this order and by nothing but it.

    views_BD: unit vectors of the clips, one tensor per budget. text_BD: of their captions.
    distance_B: to the teacher, of the clips that have one. captions, names: as in `Batch`.
    num_tokens: that went into the blocks, of all views. flops: of a training step of the towers,
    see fluxclip/training/flops.py; what is looked up takes none.
    """

    views_BD: tuple[Tensor, ...]
    text_BD: Tensor
    distance_B: Tensor
    captions: tuple[str, ...]
    names: tuple[str, ...]
    num_tokens: int
    flops: float

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.views_BD, self.text_BD, self.distance_B)


class Forward(nn.Module):
    """Clips and stills of a step in one contrast, once per token budget.

    With several processes each one has its own pairs of the step, and the contrast is over those of
    all: the mean over processes of the gradients is the gradient of one process with all pairs.
    Features of a frozen text tower are computed once per caption, here, and looked up later, if
    there are at most CAPTIONS_KEPT of them, in at most RECORDS_READ records.
    `distillation`: heads that are trained with the model, where a source has a teacher. bf16: the
    towers run in it, the losses do not. Raises ValueError for negatives "all" with a text tower
    that is trained, and for `compile` without a compiler.
    """

    def __init__(
        self, model: FluxCLIP, sources: Sequence[Source], recipe: Recipe, *, bf16: bool = False
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.bf16 = model, recipe, bf16
        self.device = next(model.parameters()).device
        made = plugins.load("fluxclip.training.objectives", recipe.objective).make()
        self.objective: nn.Module = made.to(self.device)
        self.rows: dict[str, int] = {}
        self._caption_macs: dict[int, int] = {}  # by number of text tokens
        if recipe.compile:
            refuse_without_compiler()
            model.video.compile_blocks()
        captions = _few_captions(sources) if model.text_is_frozen else None
        if captions is not None:
            self.table_NW = self._features_of_all(captions)
        elif model.text_is_frozen and recipe.negatives == "all":
            many = sum(len(source.records) for source in sources) > RECORDS_READ
            more = f"{RECORDS_READ:,} records" if many else f"{CAPTIONS_KEPT:,} captions"
            raise ValueError(
                f'negatives = "all" is for sets of at most {CAPTIONS_KEPT:,} captions in at most '
                f"{RECORDS_READ:,} records, and these have more than {more}"
            )
        elif recipe.negatives == "all":
            raise ValueError(
                'negatives = "all" needs text.weights = "reference" or freeze = ["text.*"]: a text '
                "tower that is frozen"
            )
        self.names: dict[str, int] = {}
        if recipe.negatives == "all":
            names = {record.captions[0] for source in sources for record in source.records}
            self.names = {name: i for i, name in enumerate(sorted(names))}
        self.distillation = _distillation(model, sources)

    @property
    def some_unused(self) -> bool:
        """Whether a step may leave out some of what is trained."""
        return self.distillation is not None or bool(self.model.config.video.projector_budgets)

    @property
    def heads(self) -> list[nn.Parameter]:
        """What is trained in the loss itself, behind the features."""
        behind = [self.model.log_scale, *self.objective.parameters()]
        if self.recipe.negatives == "all":
            behind += self.model.text_projection.parameters()
        return [parameter for parameter in behind if parameter.requires_grad]

    def state(self) -> dict[str, Tensor]:
        """All weights, parameters/NAME, but those of a text tower that is only referred to."""
        referred = "\0" if self.model.text_is_stored else "model.text."
        return {
            f"parameters/{name}": tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(referred)
        }

    def forward(
        self, step: Step, then: Callable[[Features], Tensor] | None = None
    ) -> tuple[Tensor, Parts]:
        """The loss of a step and its parts by name; or what `then` makes of its features."""
        features = self.encode(step)
        return self.loss(features, number=step.number) if then is None else (then(features), {})

    def encode(self, step: Step) -> Features:
        """The features of a step's pairs, the same in a part of the step as in the whole.

        But for the dropout of a text tower that has some and is trained: it is drawn by part.
        """
        process = [self.recipe.seed, step.number, distributed.rank(), step.part]
        torch.manual_seed(_number(process))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            views = [self._views(step, batch) for batch in step.batches]
            captions = tuple(caption for batch in step.batches for caption in batch.captions)
            text_BW, text_flops = self._text_features(captions)
            text_BD = self.model.project_text(text_BW)
        with torch.autocast(self.device.type, enabled=False):
            distances = self._distances(step.batches, views)
        # budgets that no clip has tokens for share a view
        made = [list({id(view): view for view in of_batch}.values()) for of_batch in views]
        clip_flops = [self._clip_flops(*of) for of in zip(step.batches, made, strict=True)]
        # a step may have drawn no source that has a teacher
        nothing = text_BD.new_zeros(0, dtype=torch.float32)
        return Features(
            views_BD=tuple(
                torch.cat([view.vector_BD for view in of_budget])
                for of_budget in zip(*views, strict=True)
            ),
            text_BD=text_BD,
            distance_B=torch.cat(distances) if distances else nothing,
            captions=captions,
            names=tuple(name for batch in step.batches for name in batch.names),
            num_tokens=sum(sum(v.selection.lengths) for of_batch in made for v in of_batch),
            flops=sum(clip_flops) + text_flops,
        )

    def loss(self, features: Features, *, number: int) -> tuple[Tensor, Parts]:
        """The loss of all pairs of step `number`, and its parts by name, scalars or numbers."""
        pairs = zip(features.names, features.captions, strict=True)
        labels_BK = torch.tensor([[_label(name), _label(caption)] for name, caption in pairs])
        # in bf16, scaled cosines near 100 are half a unit apart: hard negatives would blur
        with torch.autocast(self.device.type, enabled=False):
            loss: Tensor
            loss, parts = self.objective(
                features.views_BD, features.text_BD, self.model.logit_scale,
                labels_BK.to(self.device),
                align=self.recipe.flux.align, negatives=self.recipe.rows,
            )  # fmt: skip
            if self.recipe.negatives == "all":
                named = self._against_all_names(features.views_BD, features.names)
                loss, parts["named"] = loss + named, named.detach()
            if number < self.recipe.distillation_steps:
                loss = 0 * loss  # zero, not absent: every weight has its moments from the start
            if self.distillation is not None:
                distance = features.distance_B.sum() / max(1, len(features.distance_B))
                loss = loss + self.recipe.distillation * distance
                parts["distance"] = distance.detach()
        work = {"tokens": float(features.num_tokens), "flops": float(features.flops)}
        return loss, {**parts, **work}

    def _views(self, step: Step, batch: Batch) -> list[View]:
        settings = self.model.preprocess
        clips_B = torch.tensor(batch.places).to(self.device, non_blocking=True)
        return self.model.encode_video_views(
            batch.to_float(self.device, mean=settings.mean, std=settings.std),
            step.draw.budgets,
            draws=Draws(_number([self.recipe.seed, step.number]), clips_B),
        )

    def _clip_flops(self, batch: Batch, views: Sequence[View]) -> float:
        """Operations of a training step on a batch's clips, of which each view kept so many."""
        tower = self.model.video
        whole = tower.config.num_tokens(*batch.frames_BTHWC.shape[1:4])
        kept = Counter(zip(*(view.selection.lengths for view in views), strict=True))
        # a filter embeds what it left, at least as much as the largest view has
        macs = sum(
            number * clip_macs(tower, embedded=max(own) if tower.filter else whole, views=own)
            for own, number in kept.items()
        )
        return 2 * passes(tower) * macs

    def _distances(self, batches: Sequence[Batch], views: Sequence[Sequence[View]]) -> list[Tensor]:
        """To the teacher, of the clips of each batch that has its features."""
        if self.distillation is None:
            return []
        return [
            self.distillation(of_batch, batch.teacher_BLC.to(self.device, non_blocking=True))
            for batch, of_batch in zip(batches, views, strict=True)
            if batch.teacher_BLC is not None
        ]

    def _against_all_names(self, views_BD: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Cross-entropy of finding a clip's name among those of all records, not of the step only.

        Few pairs fit a step on small machines; against all names the batch need not be large.
        """
        all_ND = self.model.project_text(self._text_features(list(self.names))[0])
        right_B = torch.tensor([self.names[name] for name in names], device=self.device)
        logits = [self.model.logit_scale * view_BD @ all_ND.T for view_BD in views_BD]
        return torch.stack([F.cross_entropy(logits_BN, right_B) for logits_BN in logits]).mean()

    def _text_features(self, captions: Sequence[str]) -> tuple[Tensor, float]:
        """Features (B, W) of captions, and the operations that they take in a training step."""
        if self.rows:
            return self.table_NW[[self.rows[caption] for caption in captions]], 0.0
        encoder, ids_BL = self.model.text, self.model.tokenize(captions).to(self.device)
        length = ids_BL.shape[1]
        if length not in self._caption_macs:
            self._caption_macs[length] = caption_macs(encoder, ids_BL)
        flops = 2 * passes(encoder) * len(captions) * self._caption_macs[length]
        return self.model.text_features(ids_BL), flops

    @torch.no_grad()
    def _features_of_all(self, captions: Iterable[str]) -> Tensor:
        # captions of like length together: less padding
        ordered = sorted(captions, key=lambda caption: (len(caption), caption))
        self.rows = {caption: i for i, caption in enumerate(ordered)}
        chunks = [ordered[i : i + 64] for i in range(0, len(ordered), 64)]
        tokenize, encode = self.model.tokenize, self.model.text_features
        return torch.cat([encode(tokenize(chunk).to(self.device)) for chunk in chunks])


def _few_captions(sources: Sequence[Source]) -> set[str] | None:
    """All captions of the sources; None if there are, or may be, more than CAPTIONS_KEPT."""
    if sum(len(source.records) for source in sources) > RECORDS_READ:
        return None
    captions: set[str] = set()
    for record in (record for source in sources for record in source.records):
        captions.update(record.captions)
        if len(captions) > CAPTIONS_KEPT:
            return None
    return captions


def refuse_without_compiler() -> None:
    """ValueError where torch.compile would fail in the first step, as it finds no C++ compiler."""
    # the one that it takes
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(name) is None:
        raise ValueError(
            f"compile = true needs the C++ compiler {name}, which is not there: install it, name "
            f"another in the environment variable CXX, or leave compile out"
        )


def _distillation(model: FluxCLIP, sources: Sequence[Source]) -> Distillation | None:
    """Heads for the teacher of the sources; ValueError if their teachers differ in width."""
    widths = {source.teacher.path: source.teacher.channels for source in sources if source.teacher}
    if not widths:
        return None
    if len(set(widths.values())) > 1:
        found = ", ".join(f"{path}: {channels}" for path, channels in widths.items())
        raise ValueError(f"teacher features must have equally many channels: {found}")
    video = model.config.video
    heads = Distillation(
        token_width=video.width, pooled_width=video.pooled, channels=next(iter(widths.values()))
    )
    return heads.to(next(model.parameters()).device)


def _label(text: str) -> int:
    """A number that is equal for equal texts only, in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)


def _number(parts: Sequence[int]) -> int:
    """A number of 64 bits for several small ones."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0])
