"""The score that the best model of a run is chosen by."""

import numpy as np

from fluxclip import distributed
from fluxclip.embedder import Embedder
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.ranking import retrieval_ranks
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.training.recipe import ValidationRecipe


class Validation:
    """Retrieval on a validation set at the model's default grid, all tokens; processes share it.

    Its files are checked when this is made, so that a mistake shows before any step is spent.
    """

    def __init__(self, recipe: ValidationRecipe) -> None:
        self.task = read(recipe.annotations, captions=recipe.captions)
        if self.task.missing:
            raise FileNotFoundError(
                f"{recipe.annotations}: {len(self.task.missing)} of {self.task.num_expected} video "
                f"files not found, the first: {self.task.missing[0]}"
            )

    def score(self, model: FluxCLIP) -> dict[str, float]:
        """Mean reciprocal rank of both directions and their mean, 0-100. Leaves train mode on."""
        embedder = Embedder(model, name="validation", device=str(next(model.parameters()).device))
        rank, world_size = distributed.rank(), distributed.world_size()
        parts = distributed.gather_results(
            lambda: embedder.embed_video(self.task.videos[rank::world_size])
        )
        video_ND = np.empty((len(self.task.videos), embedder.dim), np.float32)
        for i, part_ND in enumerate(parts):
            video_ND[i::world_size] = part_ND
        text_MD = embedder.embed_text(self.task.texts)
        found = retrieval_ranks(video_ND, text_MD, self.task.video_of_text_M)
        model.train()
        t2v = 100 * float(found.text_to_video.reciprocal_Q().mean())
        v2t = 100 * float(found.video_to_text.reciprocal_Q().mean())
        return {"val_mrr_t2v": t2v, "val_mrr_v2t": v2t, "val_mrr": (t2v + v2t) / 2}
