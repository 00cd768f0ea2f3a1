"""FluxViT: frames to one pooled feature, at any token budget (arXiv 2503.14237).

Shape legend: B clips, T frames, H W pixels, N time steps, L patches per step, K kept tokens,
D width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fluxclip import plugins
from fluxclip.model.blocks import AttentionPool, Block
from fluxclip.model.presets import VideoTowerConfig
from fluxclip.tokens.positions import GlobalPositions
from fluxclip.tokens.selection import Selection, check_budget, gather, take
from fluxclip.tokens.tubelets import PatchEmbedding


class VideoTower(nn.Module):
    """Normalised frames (B, T, H, W, 3) to pooled features (B, pooled).

    `tower(frames, budget)` is `tower.encode(tower.embed(frames), budget)`; the two steps are apart
    so that several budgets of one batch embed its patches once.
    """

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.scorer: Callable[..., Tensor] = plugins.load("fluxclip.tokens.scorers", c.scorer).score
        self.patch_embed = PatchEmbedding(c.width, patch=c.patch, tubelet=c.tubelet)
        steps = -(-c.table_frames // c.tubelet)
        self.positions = GlobalPositions(steps, c.table_side // c.patch, c.width)
        self.class_token = nn.Parameter(torch.zeros(c.width))
        self.class_position = nn.Parameter(torch.zeros(c.width))
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        blocks = [
            Block(
                c.width, c.heads, mlp_ratio=c.mlp_ratio, gelu=c.gelu,
                layer_scale=c.layer_scale, drop_path=rate,
            )
            for rate in rates
        ]  # fmt: skip
        self.blocks = nn.ModuleList(blocks)
        self.pools = nn.ModuleList(
            AttentionPool(c.width, c.pool_heads, c.pooled) for _ in c.projector_budgets or (0,)
        )
        self._initialise(blocks)

    def _initialise(self, blocks: list[Block]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)
        with torch.no_grad():
            for depth, block in enumerate(blocks, start=1):
                for linear in (block.attn.proj, block.mlp.fc2):
                    linear.weight /= math.sqrt(2 * depth)

    def forward(
        self, frames_BTHWC: Tensor, budget: int | None = None, *, projector: int | None = None
    ) -> Tensor:
        """Pooled features (B, pooled) from at most `budget` tokens per clip; None keeps all."""
        rows, columns = (side // self.config.patch for side in frames_BTHWC.shape[2:4])
        return self.encode(
            self.embed(frames_BTHWC), budget, rows=rows, columns=columns, projector=projector
        )

    def embed(self, frames_BTHWC: Tensor) -> Tensor:
        """Patch vectors (B, N, L, D), before positions."""
        return self.patch_embed(frames_BTHWC)

    def select(
        self, patches_BNLD: Tensor, budget: int | None, *, generator: torch.Generator | None = None
    ) -> Selection:
        """The positions that the scorer keeps for a budget (exactly, or all where fewer exist)."""
        check_budget(budget)
        b, n, length, _ = patches_BNLD.shape
        if budget is None or budget >= n * length:
            return take(patches_BNLD.new_zeros(b, n, length))
        with torch.no_grad():
            return take(self.scorer(patches_BNLD, generator=generator), budget=budget)

    def encode(
        self, patches_BNLD: Tensor, budget: int | None = None, *, rows: int, columns: int,
        selection: Selection | None = None, projector: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Pooled features (B, pooled) of embedded patches, whose L is rows x columns.

        selection: given positions instead of the scorer's choice. projector: which pooling, where
        there is one per budget; None takes the nearest to the number of tokens kept.
        generator: makes a random scorer draw anew (training).
        """
        selection = selection or self.select(patches_BNLD, budget, generator=generator)
        x_BKD = self.encode_tokens(patches_BNLD, selection, rows=rows, columns=columns)
        return self.pool(x_BKD, projector=projector)

    def encode_tokens(
        self, patches_BNLD: Tensor, selection: Selection, *, rows: int, columns: int
    ) -> Tensor:
        """What the blocks make of the selected patches: (B, 1 + K, D), the class token first."""
        n = patches_BNLD.shape[1]
        positions_1ND = self.positions(n, rows, columns)[None]
        x_BKD = gather(patches_BNLD.flatten(1, 2) + positions_1ND, selection)
        class_BKD = (self.class_token + self.class_position).expand(x_BKD.shape[0], 1, -1)
        x_BKD = torch.cat([class_BKD.to(x_BKD.dtype), x_BKD], dim=1)
        for block in self.blocks:
            x_BKD = block(x_BKD)
        return x_BKD

    def pool(self, x_BKD: Tensor, *, projector: int | None = None) -> Tensor:
        """Pooled features (B, pooled) of the blocks' output, the class token included."""
        if projector is None:
            projector = self.projector_for(x_BKD.shape[1] - 1)
        pooled_BP: Tensor = self.pools[projector](x_BKD)
        return pooled_BP

    def projector_for(self, num_tokens: int) -> int:
        """Index of the pooling trained at the budget nearest in log tokens."""
        budgets = self.config.projector_budgets or (1,)
        return min(range(len(budgets)), key=lambda i: abs(math.log(budgets[i] / num_tokens)))

    def macs(self, num_tokens: int, kept: int) -> int:
        """Multiply-accumulates per clip of a grid with `num_tokens`, of which `kept` are encoded.

        The count behind the paper's GFLOPs column, plus the embedding of the discarded tokens,
        which the paper leaves out.
        """
        c = self.config
        n, d = kept + 1, c.width
        values = 3 * c.tubelet * c.patch**2
        hidden = int(d * c.mlp_ratio)
        block = n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d
        pool = 2 * n * d * d + 2 * n * d + c.pooled * d
        return c.depth * block + num_tokens * values * d + pool


class FluxViTClassifier(nn.Module):
    """A video tower with the heads of the official checkpoints: classifiers and aligners.

    classify: pooled (B, P) -> logits (B, classes), one head per budget over a shared LayerNorm.
    align: pooled (B, P) -> unit vectors (B, P), the self-distillation heads of Flux-Multi.
    """

    def __init__(self, config: VideoTowerConfig, *, num_classes: int, num_aligners: int) -> None:
        super().__init__()
        self.tower = VideoTower(config)
        self.norm = nn.LayerNorm(config.pooled)
        self.heads = nn.ModuleList(
            nn.Linear(config.pooled, num_classes) for _ in config.projector_budgets
        )
        self.aligners = nn.ModuleList(
            nn.Sequential(nn.Linear(config.pooled, config.pooled), nn.LayerNorm(config.pooled))
            for _ in range(num_aligners)
        )

    def classify(self, pooled_BP: Tensor, head: int) -> Tensor:
        return self.heads[head](self.norm(pooled_BP))

    def align(self, pooled_BP: Tensor, aligner: int) -> Tensor:
        aligned = self.aligners[aligner](pooled_BP)
        return aligned / aligned.norm(dim=-1, keepdim=True)
