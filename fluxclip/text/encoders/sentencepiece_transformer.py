"""Text encoder `sentencepiece_transformer`: small, trained from scratch, over its own vocabulary.

Shape legend: B captions, L tokens, D width, H heads, E width of a head.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxclip.text import tokenizer
from fluxclip.text.encoder import TextEncoder
from fluxclip.text.tokenizer import EncoderSize


class SentencePieceTransformer(TextEncoder):
    """Pre-norm transformer with learned positions; the feature is the mean over the tokens.

    vocabulary: the content of a SentencePiece model that has pieces for padding and for the end of
    a text, as those of fluxclip/text/tokenizer.py have. Captions are folded as they are there, and
    end with the latter piece, so that an empty one has a token too. Padding changes no feature.
    """

    def __init__(self, vocabulary: bytes, size: EncoderSize, *, max_tokens: int) -> None:
        super().__init__()
        import sentencepiece

        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
        self.pad_id: int = self.pieces.pad_id()
        if self.pad_id < 0 or self.pieces.eos_id() < 0:
            raise ValueError("the SentencePiece model has no <pad> or no </s>")
        self.vocabulary, self.size = vocabulary, size
        self.width, self.max_tokens, self.is_fresh = size.width, max_tokens, True
        self.embedding = nn.Embedding(self.pieces.get_piece_size(), size.width)
        self.positions = nn.Parameter(torch.empty(max_tokens, size.width))
        self.blocks = nn.ModuleList(_Block(size.width, size.heads) for _ in range(size.depth))
        self.norm = nn.LayerNorm(size.width)
        self.recompute = False
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Ids (B, L), L the tokens of the longest caption, `max_tokens` at most."""
        rows = [own[: self.max_tokens - 1] + [self.pieces.eos_id()] for own in self._encode(texts)]
        length = max(map(len, rows), default=0)
        padded = [row + [self.pad_id] * (length - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int64).view(len(rows), length)

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        return [len(own) + 1 > self.max_tokens for own in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.pieces.encode([tokenizer.fold(text) for text in texts])
        return ids

    def tokenizer_json(self) -> str:
        return tokenizer.to_json(self.vocabulary, max_tokens=self.max_tokens)

    def files(self) -> dict[str, bytes]:
        return tokenizer.contents(self.vocabulary, self.size)

    def recompute_blocks(self) -> None:
        self.recompute = True

    def forward(self, ids_BL: Tensor) -> Tensor:
        is_token_BL = ids_BL != self.pad_id
        x_BLD = self.embedding(ids_BL) + self.positions[: ids_BL.shape[1]]
        for block in self.blocks:
            inputs = x_BLD, is_token_BL[:, None, None]
            if self.recompute and torch.is_grad_enabled():
                x_BLD = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BLD = block(*inputs)
        weight_BL1 = is_token_BL[..., None].to(x_BLD.dtype)
        return (self.norm(x_BLD) * weight_BL1).sum(1) / weight_BL1.sum(1).clamp(min=1)


class _Block(nn.Module):
    """Attention and MLP, each on normalised input and added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BLD: Tensor, is_key_B11L: Tensor) -> Tensor:
        qkv_BLHE = self.qkv(self.norm1(x_BLD)).unflatten(-1, (3 * self.heads, -1))
        q, k, v = qkv_BLHE.transpose(1, 2).chunk(3, dim=1)
        seen_BHLE = F.scaled_dot_product_attention(q, k, v, attn_mask=is_key_B11L)
        x_BLD = x_BLD + self.proj(seen_BHLE.transpose(1, 2).flatten(2))
        out_BLD: Tensor = x_BLD + self.mlp(self.norm2(x_BLD))
        return out_BLD


def load(source: str, *, max_tokens: int) -> SentencePieceTransformer:
    """An encoder with random weights, of the size and vocabulary in the tokenizer folder `source`.

    Raises FileNotFoundError or ValueError in one line if it is none.
    """
    vocabulary, size = tokenizer.read(source)
    try:
        return SentencePieceTransformer(vocabulary, size, max_tokens=max_tokens)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        path = Path(source) / tokenizer.VOCABULARY
        raise ValueError(f"{path} cannot be used: {reason}") from error


def example(folder: Path) -> str:
    """A tokenizer folder learned from a few captions, written into `folder`."""
    animals, acts = ("dog", "cat", "bird", "horse", "child"), ("runs", "sleeps", "plays", "jumps")
    captions = [f"a {animal} {act} in the park" for animal in animals for act in acts]
    target = folder / "tokenizer"
    tokenizer.write(target, tokenizer.train(captions, pieces=400), EncoderSize(width=64, depth=2))
    return str(target)
