"""What a text encoder is."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from fluxclip import plugins


class TextEncoder(Protocol):
    """Captions to one feature each; an `nn.Module` with these members.

    width: channels of the feature. tokenize: captions -> int64 ids (B, L), padded, cut at the
    encoder's limit. forward: ids (B, L) -> features (B, width), not normalised.
    """

    width: int

    def tokenize(self, texts: Sequence[str]) -> Tensor: ...

    def __call__(self, ids_BL: Tensor) -> Tensor: ...


def load_encoder(name: str, source: str, *, max_tokens: int) -> nn.Module:
    """The text encoder of the file `name` in fluxclip/text/encoders, with the weights of `source`.

    Raises ValueError or FileNotFoundError in one line if there is no such encoder or source.
    """
    module = plugins.load("fluxclip.text.encoders", name)
    encoder: nn.Module = module.load(source, max_tokens=max_tokens)
    return encoder
