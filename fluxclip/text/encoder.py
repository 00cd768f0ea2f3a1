"""What a text encoder is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from fluxclip import plugins


class TextEncoder(nn.Module, ABC):
    """Captions to one feature each.

    width: channels of the feature. max_tokens: length after which a caption is cut. is_fresh: the
    weights were drawn at random, so that another load would give others.
    """

    width: int
    max_tokens: int
    is_fresh: bool = False

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Captions to int64 ids (B, L), padded, cut at the encoder's limit."""

    @abstractmethod
    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which captions are longer than `max_tokens`."""

    @abstractmethod
    def forward(self, ids_BL: Tensor) -> Tensor:
        """Ids (B, L) to features (B, width), not normalised."""

    def recompute_blocks(self) -> None:
        """Keep only the inputs of the blocks for the backward pass, which computes them again.

        Nothing, as here, for an encoder whose library does not offer it.
        """

    def tokenizer_json(self) -> str:
        """What `tokenize` does as a file of the `tokenizers` library, padding and cut included.

        Raises ValueError, as here, for an encoder that has no such form: it works all the same,
        but queries by text need torch.
        """
        raise ValueError(f"the tokenizer of {type(self).__name__} has no tokenizer.json")

    def files(self) -> dict[str, bytes]:
        """What a folder must hold, by file name, to be the source of this encoder, weights aside.

        A model folder that stores the weights stores these beside them. Empty, as here, for an
        encoder whose source names what is installed or found on a hub.
        """
        return {}


def load_encoder(name: str, source: str, *, max_tokens: int) -> TextEncoder:
    """The text encoder of the file `name` in fluxclip/text/encoders, with the weights of `source`.

    Raises ValueError or FileNotFoundError in one line if there is no such encoder or source.
    """
    module = plugins.load("fluxclip.text.encoders", name)
    encoder: TextEncoder = module.load(source, max_tokens=max_tokens)
    return encoder
