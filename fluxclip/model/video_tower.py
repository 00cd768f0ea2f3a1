"""The video tower: frames to one pooled feature, at any token budget (arXiv 2503.14237).

Shape legend: B clips, T frames, H W pixels, N time steps, L patches per step, K tokens of each
clip, M tokens of all clips that a filter left, S tokens of all clips that are encoded, D width.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxclip import plugins
from fluxclip.model.attention import Segments
from fluxclip.model.blocks import AttentionPool, Block, ClassPool, MapPool, MeanPool, norm
from fluxclip.model.presets import VideoTowerConfig
from fluxclip.settings import parse
from fluxclip.tokens.draws import Draws
from fluxclip.tokens.positions import GlobalPositions
from fluxclip.tokens.selection import Selection, check_budget, gather, take
from fluxclip.tokens.tubelets import PatchEmbedding, tubelets


@dataclass(frozen=True)
class Patches:
    """Embedded patches of clips of one shape, before positions.

    vectors: (B, N, L, D), or (M, D) of what a filter left, the clips one after the other.
    kept: which cells a filter left; None without one. run_length_BNL: int64, how many time steps
    each of them stands for, 0 where there is none. rows, columns: of the L patches of a step.
    """

    vectors: Tensor
    num_clips: int
    num_steps: int
    rows: int
    columns: int
    kept: Selection | None = None
    run_length_BNL: Tensor | None = None

    @property
    def num_cells(self) -> int:
        """Tokens per clip, those that the filter left out included."""
        return self.num_steps * self.rows * self.columns

    @property
    def most_tokens(self) -> int:
        """Tokens of the clip that has the most; a larger budget changes nothing."""
        return self.num_cells if self.kept is None else max(self.kept.lengths)

    def vectors_BNLD(self) -> Tensor:
        """A vector for every cell; one that the filter left out has that of the head of its run."""
        if self.run_length_BNL is None:
            return self.vectors
        is_kept_BNL, row_BNL = self.run_length_BNL > 0, self._row_BNL()
        # the rows of a place grow along time, so the latest kept one is the largest
        return self.vectors[torch.where(is_kept_BNL, row_BNL, 0).cummax(1).values]

    def vectors_SD(self, selection: Selection) -> Tensor:
        """The selected vectors, packed."""
        assert self.run_length_BNL is not None
        if selection is self.kept:
            return self.vectors
        row_S = self._row_BNL().flatten().index_select(0, selection.cells(self.num_cells))
        return self.vectors.index_select(0, row_S)

    def run_length_S(self, selection: Selection) -> Tensor:
        """How many time steps each selected token stands for."""
        if self.run_length_BNL is None:
            return torch.ones_like(selection.index)
        return self.run_length_BNL.flatten().index_select(0, selection.cells(self.num_cells))

    def _row_BNL(self) -> Tensor:
        """Where in `vectors` the vector of a kept cell is."""
        assert self.run_length_BNL is not None
        return (self.run_length_BNL > 0).flatten().cumsum(0).view_as(self.run_length_BNL) - 1


@dataclass(frozen=True)
class Encoded:
    """What the blocks make of selected patches, the class token first in every clip.

    tokens: (B, C + K, D) where every clip keeps K, with `segments` None; else packed (S, D).
    lengths: tokens of each clip without the class token. count_S: how many tokens each one stands
    for in the pooling; None where each is one. num_class: C, 0 in a tower without class token.
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    segments: Segments | None = None
    count_S: Tensor | None = None
    num_class: int = 1

    @property
    def patches_SD(self) -> Tensor:
        """The tokens without the class tokens, packed."""
        if self.segments is None:
            return self.tokens[:, self.num_class :].flatten(0, 1)
        if not self.num_class:
            return self.tokens
        row_S = (~_is_class_token(self.lengths)).nonzero()[:, 0]
        return self.tokens.index_select(0, row_S.to(self.tokens.device, non_blocking=True))


class VideoTower(nn.Module):
    """Normalised frames (B, T, H, W, 3) to pooled features (B, pooled).

    `tower(frames, budget)` is `embed`, `select`, `encode`, `pool` in this order; they are apart so
    that several budgets of one batch embed its patches once, and clips of several shapes go
    through the blocks together.

    recompute: a block keeps only its input for the backward pass, and is computed again there.
    """

    def __init__(self, config: VideoTowerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.recompute = False
        parts = c.parts
        self.scorer: Callable[..., Tensor] = plugins.load("fluxclip.tokens.scorers", c.scorer).score
        self.filter = _filter(c)
        self.patch_embed = PatchEmbedding(
            c.width, patch=c.patch, tubelet=c.tubelet, norm=parts.patch_norm, bias=parts.patch_bias
        )
        steps = -(-c.table_frames // c.tubelet)
        self.positions = GlobalPositions(
            steps, c.table_side // c.patch, c.width,
            affine=parts.scaled_positions, one_step=parts.one_step,
        )  # fmt: skip
        if c.length_encoding:
            # RLT's, by run length; runs of one have none, so that a clip in which nothing repeats
            # stays what it is, and it starts at zero, so that a trained tower does
            self.run_lengths = nn.Parameter(torch.zeros(max(1, steps - 1), c.width))
        if parts.class_token:
            self.class_token = nn.Parameter(torch.zeros(c.width))
            self.class_position = nn.Parameter(torch.zeros(c.width))
        self.norm_before = norm(c.width, parts) if parts.norm_before else nn.Identity()
        rates = [c.drop_path * i / max(1, c.depth - 1) for i in range(c.depth)]
        blocks = [
            Block(
                c.width, c.heads, mlp_ratio=c.mlp_ratio, gelu=c.gelu,
                layer_scale=c.layer_scale, drop_path=rate, anatomy=parts,
            )
            for rate in rates
        ]  # fmt: skip
        self.blocks = nn.ModuleList(blocks)
        self.norm_after = norm(c.width, parts) if parts.norm_after else nn.Identity()
        self.pools = nn.ModuleList(_pool(c) for _ in c.projector_budgets or (0,))
        self._initialise(blocks)

    def _initialise(self, blocks: list[Block]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.config.parts.class_token:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        with torch.no_grad():
            for depth, block in enumerate(blocks, start=1):
                for linear in (block.attn.proj, block.mlp.fc2):
                    linear.weight /= math.sqrt(2 * depth)

    def forward(
        self, frames_BTHWC: Tensor, budget: int | None = None, *, projector: int | None = None
    ) -> Tensor:
        """Pooled features (B, pooled) from at most `budget` tokens per clip; None keeps all."""
        patches = self.embed(frames_BTHWC)
        return self.pool(self.encode(patches, self.select(patches, budget)), projector=projector)

    def embed(self, frames_BTHWC: Tensor) -> Patches:
        """Patch vectors before positions; what the filter leaves out is not embedded."""
        c = self.config
        rows, columns = (side // c.patch for side in frames_BTHWC.shape[2:4])
        x_BNLP = tubelets(frames_BTHWC, patch=c.patch, tubelet=c.tubelet)
        b, n, length, p = x_BNLP.shape
        if self.filter is None:
            return Patches(self.patch_embed(x_BNLP), b, n, rows, columns)
        mask_BNL, run_length_BNL = self.filter(frames_BTHWC)
        kept = take(torch.zeros_like(mask_BNL, dtype=torch.float32), mask_BNL)
        x_MP = x_BNLP.view(-1, p).index_select(0, kept.cells(n * length))
        return Patches(self.patch_embed(x_MP), b, n, rows, columns, kept, run_length_BNL)

    def select(
        self, patches: Patches, budget: int | None, *, draws: Draws | None = None
    ) -> Selection:
        """The positions that filter and scorer keep for a budget (exactly, or all where fewer are).

        draws: of the clips, for a random scorer (training).
        """
        check_budget(budget)
        b, n, length = patches.num_clips, patches.num_steps, patches.rows * patches.columns
        kept = patches.kept
        if budget is None or budget >= patches.most_tokens:
            return kept or take(torch.zeros(b, n, length, device=patches.vectors.device))
        with torch.no_grad():
            score_BNL = self.scorer(patches.vectors_BNLD(), draws=draws)
            if kept is None:
                return take(score_BNL, budget=budget)
            assert patches.run_length_BNL is not None
            mask_BNL = patches.run_length_BNL > 0
            return take(score_BNL, mask_BNL, budget, available=kept.lengths)

    def encode(
        self, patches: Patches, selection: Selection, *, draws: Draws | None = None
    ) -> Encoded:
        """What the blocks make of the selected patches of clips of one shape."""
        return self.encode_packed([(patches, selection)], draws=draws)

    def encode_packed(
        self, groups: Sequence[tuple[Patches, Selection]], *, draws: Draws | None = None
    ) -> Encoded:
        """What the blocks make of several groups of clips, each of one shape, in one pass.

        No padding: clips of different lengths are packed one after the other. draws: of all clips,
        for drop path (training).
        """
        lengths = tuple(length for _, selection in groups for length in selection.lengths)
        count_S = None
        if self.config.pool_by_length and any(patches.kept for patches, _ in groups):
            count_S = torch.cat([patches.run_length_S(selection) for patches, selection in groups])
        has_class = self.config.parts.class_token
        class_D = self.class_token + self.class_position if has_class else None
        if len(set(lengths)) == 1 and count_S is None:
            x, segments = torch.cat([self._placed(*group) for group in groups]), None
            if class_D is not None:
                x = torch.cat([class_D.expand(len(lengths), 1, -1).to(x.dtype), x], dim=1)
        else:
            x = torch.cat([self._placed(*group).flatten(0, -2) for group in groups])
            segments = Segments([has_class + length for length in lengths], x.device)
            if class_D is not None:
                x = _with_class_tokens(x, class_D.to(x.dtype), lengths)
                if count_S is not None:
                    count_S = _with_class_tokens(count_S, count_S.new_ones(()), lengths)
        x = self.norm_before(x)
        for place, block in enumerate(self.blocks):
            own = draws and draws.at(place)
            if self.recompute and torch.is_grad_enabled():
                # draws of clips are the same again; only torch's generator has to be wound back
                x = checkpoint(
                    block, x, segments, draws=own, use_reentrant=False,
                    preserve_rng_state=own is None,
                )  # fmt: skip
            else:
                x = block(x, segments, draws=own)
        return Encoded(self.norm_after(x), lengths, segments, count_S, int(has_class))

    def _placed(self, patches: Patches, selection: Selection) -> Tensor:
        """Selected vectors with positions: (B, K, D) where all clips keep K, else packed (S, D)."""
        positions_ND = self.positions(patches.num_steps, patches.rows, patches.columns)
        if patches.kept is None:
            return gather(patches.vectors.flatten(1, 2) + positions_ND, selection)
        x_SD = patches.vectors_SD(selection) + positions_ND.index_select(0, selection.index)
        if self.config.length_encoding:
            repeats_S = patches.run_length_S(selection) - 1
            row_S = (repeats_S - 1).clamp(0, len(self.run_lengths) - 1)
            encoding_SD = self.run_lengths.index_select(0, row_S) * (repeats_S > 0)[:, None]
            x_SD = x_SD + encoding_SD.to(x_SD.dtype)
        is_even = len(set(selection.lengths)) == 1
        return x_SD.view(patches.num_clips, -1, x_SD.shape[1]) if is_even else x_SD

    def pool(self, encoded: Encoded, *, projector: int | None = None) -> Tensor:
        """Pooled features (B, pooled). projector: which pooling, where there is one per budget;

        None takes, clip by clip, the nearest to the number of its tokens.
        """
        if projector is not None or len(self.pools) == 1:
            return self._pool(encoded, projector or 0)
        wanted = [self.projector_for(length) for length in encoded.lengths]
        pooled = {i: self._pool(encoded, i) for i in sorted(set(wanted))}
        if len(pooled) == 1:
            return pooled[wanted[0]]
        return torch.stack([pooled[i][clip] for clip, i in enumerate(wanted)])

    def _pool(self, encoded: Encoded, projector: int) -> Tensor:
        pooled_BP: Tensor = self.pools[projector](encoded.tokens, encoded.segments, encoded.count_S)
        return pooled_BP

    def compile_blocks(self) -> None:
        """Compile the blocks for training, at its first step (a minute); weights keep their names.

        It needs a C++ compiler, and on a GPU Triton, which comes with torch there.
        """
        # a kernel for each kind of step: with a graph or without, frozen blocks, packed clips,
        # stills, one clip alone; torch gives up after 8
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 64)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.is_compiled = True

    @torch.no_grad()
    def count(self, frames_BTHWC: Tensor, budget: int | None = None) -> list[tuple[int, int]]:
        """(embedded, encoded) tokens of each clip, without running the network."""
        c = self.config
        b, t, height, width = frames_BTHWC.shape[:4]
        embedded = [c.num_tokens(t, height, width)] * b
        if self.filter is not None:
            embedded = self.filter(frames_BTHWC)[0].flatten(1).sum(1).tolist()
        return [(have, min(have, budget or have)) for have in embedded]

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
        n, d = kept + c.parts.class_token, c.width
        values = 3 * c.tubelet * c.patch**2
        hidden = int(d * c.mlp_ratio)
        block = n * (4 * d * d + 2 * d * hidden) + 2 * n * n * d
        pool = 0
        if c.parts.pooling in ("attention", "map"):
            pool = 2 * n * d * d + 2 * n * d + c.pooled * d
        if c.parts.pooling == "map":
            pool += 2 * d * hidden
        return c.depth * block + num_tokens * values * d + pool


def _filter(config: VideoTowerConfig) -> Callable[[Tensor], tuple[Tensor, Tensor]] | None:
    """The pixel filter of a config, or None; ValueError for an unknown one or wrong settings."""
    if not config.filter:
        return None
    module = plugins.load("fluxclip.tokens.filters", config.filter)
    chosen = parse(module.Settings, config.filter_settings, source=f"filter {config.filter!r}")

    def keep(frames_BTHWC: Tensor) -> tuple[Tensor, Tensor]:
        kept: tuple[Tensor, Tensor] = module.keep(
            frames_BTHWC, chosen, patch=config.patch, tubelet=config.tubelet
        )
        return kept

    return keep


def _pool(config: VideoTowerConfig) -> nn.Module:
    """The pooling of a config's anatomy."""
    c = config
    if c.parts.pooling == "attention":
        return AttentionPool(c.width, c.pool_heads, c.pooled)
    if c.parts.pooling == "map":
        return MapPool(
            c.width, c.pool_heads, mlp_ratio=c.mlp_ratio, gelu=c.gelu, eps=c.parts.norm_eps
        )
    return ClassPool() if c.parts.pooling == "class" else MeanPool()


def _is_class_token(lengths: Sequence[int]) -> Tensor:
    """bool (S,) on the CPU: which rows of a packed batch are class tokens, one ahead of a clip."""
    length_B = torch.tensor(lengths) + 1
    is_first_S = torch.zeros(int(length_B.sum()), dtype=torch.bool)
    is_first_S[length_B.cumsum(0) - length_B] = True
    return is_first_S


def _with_class_tokens(x: Tensor, first: Tensor, lengths: Sequence[int]) -> Tensor:
    """Packed rows with one more, `first`, before those of each clip."""
    is_first_S = _is_class_token(lengths)
    # row 0 is the class token, the others follow in order
    row_S = torch.where(is_first_S, 0, (~is_first_S).cumsum(0)).to(x.device, non_blocking=True)
    return torch.cat([first[None], x]).index_select(0, row_S)


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
