"""One training step up to its loss: both towers over all pairs of the step.

Shape legend: B pairs of a step, W text feature width, D shared width.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fluxclip import plugins
from fluxclip.data.loader import Source, Step
from fluxclip.model.fluxclip import FluxCLIP, View
from fluxclip.training.distillation import Distillation
from fluxclip.training.recipe import Recipe


class Forward(nn.Module):
    """Clips and stills of a step in one contrast, once per token budget.

    With several processes each one has its own pairs of the step, and the contrast is over those of
    all: the mean over processes of the gradients is the gradient of one process with all pairs.
    Features of a frozen text tower are computed once per caption, here, and looked up later.
    `distillation`: heads that are trained with the model, where a source has a teacher.
    Raises ValueError for negatives "all" with a text tower that is trained.
    """

    def __init__(self, model: FluxCLIP, sources: Sequence[Source], recipe: Recipe) -> None:
        super().__init__()
        self.model, self.recipe = model, recipe
        self.device = next(model.parameters()).device
        made = plugins.load("fluxclip.training.objectives", recipe.objective).make()
        self.objective: nn.Module = made.to(self.device)
        self.rows: dict[str, int] = {}
        records = [record for source in sources for record in source.records]
        if model.text_is_frozen:
            self.table_NW = self._features_of_all({c for r in records for c in r.captions})
        elif recipe.negatives == "all":
            raise ValueError('negatives = "all" needs text.weights = "reference", a frozen tower')
        self.names = {name: i for i, name in enumerate(sorted({r.captions[0] for r in records}))}
        self.distillation = _distillation(model, sources)

    @property
    def some_unused(self) -> bool:
        """Whether a step may leave out some of what is trained."""
        return self.distillation is not None or bool(self.model.config.video.projector_budgets)

    def state(self) -> dict[str, Tensor]:
        """All weights, parameters/NAME, but those of a text tower that is only referred to."""
        referred = "model.text." if self.model.text_is_frozen else "\0"
        return {
            f"parameters/{name}": tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith(referred)
        }

    def forward(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, and its parts by name."""
        settings = self.model.preprocess
        # a scorer that draws tokens at random draws anew in each step, and the same in a repeat
        generator = torch.Generator(self.device).manual_seed(
            self.recipe.seed * 1_000_003 + step.number
        )
        views = [
            self.model.encode_video_views(
                batch.to_float(self.device, mean=settings.mean, std=settings.std),
                step.draw.budgets,
                generator=generator,
            )
            for batch in step.batches
        ]
        views_BD = [
            torch.cat([view.vector_BD for view in of_budget])
            for of_budget in zip(*views, strict=True)
        ]
        captions = [caption for batch in step.batches for caption in batch.captions]
        names = [name for batch in step.batches for name in batch.names]
        text_BD = self.model.project_text(self._text_features(captions))
        labels_BK = torch.tensor(
            [[_label(n), _label(c)] for n, c in zip(names, captions, strict=True)]
        )
        loss: Tensor
        # in bf16, scaled cosines near 100 are half a unit apart: hard negatives would blur
        with torch.autocast(self.device.type, enabled=False):
            loss, parts = self.objective(
                views_BD, text_BD, self.model.logit_scale, labels_BK.to(self.device),
                align=self.recipe.flux.align, negatives=self.recipe.rows,
            )  # fmt: skip
            if self.recipe.negatives == "all":
                named = self._against_all_names(views_BD, names)
                loss, parts["named"] = loss + named, named.item()
            if step.number < self.recipe.distillation_steps:
                loss = 0 * loss  # zero, not absent: every weight has its moments from the start
            if self.distillation is not None:
                distance = self._distance_to_teacher(step, views)
                loss, parts["distance"] = (
                    loss + self.recipe.distillation * distance,
                    distance.item(),
                )
        return loss, parts

    def _against_all_names(self, views_BD: Sequence[Tensor], names: Sequence[str]) -> Tensor:
        """Cross-entropy of finding a clip's name among those of all records, not of the step only.

        Few pairs fit a step on small machines; against all names the batch need not be large.
        """
        all_ND = self.model.project_text(self._text_features(list(self.names)))
        right_B = torch.tensor([self.names[name] for name in names], device=self.device)
        logits = [self.model.logit_scale * view_BD @ all_ND.T for view_BD in views_BD]
        return torch.stack([F.cross_entropy(logits_BN, right_B) for logits_BN in logits]).mean()

    def _distance_to_teacher(self, step: Step, views: Sequence[Sequence[View]]) -> Tensor:
        """Mean distance of the clips that have a teacher's features."""
        assert self.distillation is not None
        distances = [
            self.distillation(of_batch, batch.teacher_BLC.to(self.device, non_blocking=True))
            for batch, of_batch in zip(step.batches, views, strict=True)
            if batch.teacher_BLC is not None
        ]
        # a step may have drawn no source that has a teacher
        return torch.cat(distances).mean() if distances else views[0][0].vector_BD.sum() * 0

    def _text_features(self, captions: Sequence[str]) -> Tensor:
        if self.rows:
            return self.table_NW[[self.rows[caption] for caption in captions]]
        return self.model.text_features(self.model.tokenize(captions).to(self.device))

    @torch.no_grad()
    def _features_of_all(self, captions: Iterable[str]) -> Tensor:
        # captions of like length together: less padding
        ordered = sorted(captions, key=lambda caption: (len(caption), caption))
        self.rows = {caption: i for i, caption in enumerate(ordered)}
        chunks = [ordered[i : i + 64] for i in range(0, len(ordered), 64)]
        tokenize, encode = self.model.tokenize, self.model.text_features
        return torch.cat([encode(tokenize(chunk).to(self.device)) for chunk in chunks])


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
