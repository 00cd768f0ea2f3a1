"""One training step up to its loss: both towers over all pairs of the step.

Shape legend: B pairs of a step, W text feature width, D shared width.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fluxclip import plugins
from fluxclip.data.loader import Source, Step
from fluxclip.model.fluxclip import FluxCLIP


class Forward:
    """Clips and stills of a step in one contrast, once per token budget.

    Features of a frozen text tower are computed once per caption, here, and looked up later.
    """

    def __init__(
        self, model: FluxCLIP, sources: Sequence[Source], *, objective: str, align: float, seed: int
    ) -> None:
        self.model, self.align, self.seed = model, align, seed
        self.objective = plugins.load("fluxclip.training.objectives", objective).loss
        self.device = next(model.parameters()).device
        self.rows: dict[str, int] = {}
        if model.text_is_frozen:
            records = [record for source in sources for record in source.records]
            self.table_NW = self._features_of_all({c for r in records for c in r.captions})

    def __call__(self, step: Step) -> tuple[Tensor, dict[str, float]]:
        """The loss of a step, and its parts by name."""
        settings = self.model.preprocess
        # a scorer that draws tokens at random draws anew in each step, and the same in a repeat
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step.number)
        views = [
            self.model.encode_video_views(
                batch.to_float(self.device, mean=settings.mean, std=settings.std),
                step.draw.budgets,
                generator=generator,
            )
            for batch in step.batches
        ]
        views_BD = [torch.cat(view) for view in zip(*views, strict=True)]
        captions = [caption for batch in step.batches for caption in batch.captions]
        names = [name for batch in step.batches for name in batch.names]
        text_BD = self.model.project_text(self._text_features(captions))
        same_BB = (_equal(names) | _equal(captions)).to(self.device)
        loss: Tensor
        # in bf16, scaled cosines near 100 are half a unit apart: hard negatives would blur
        with torch.autocast(self.device.type, enabled=False):
            loss, parts = self.objective(
                views_BD, text_BD, self.model.logit_scale, same_BB, align=self.align
            )
        return loss, parts

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


def _equal(texts: Sequence[str]) -> Tensor:
    """bool (B, B): which of the texts are the same."""
    numbers: dict[str, int] = {}
    ids = torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])
    return ids[:, None] == ids[None]
