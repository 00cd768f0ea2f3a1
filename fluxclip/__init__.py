"""FluxCLIP: a video-text encoder that is trained once and runs at any token budget."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .embedder import Embedder, load_model

__version__ = "0.1.0"
__all__ = ["Embedder", "__version__", "load_model"]


def __getattr__(name: str) -> object:
    """Import `load_model` and `Embedder` on first use: they load torch, which takes seconds."""
    if name in ("Embedder", "load_model"):
        from . import embedder

        return getattr(embedder, name)
    raise AttributeError(f"module 'fluxclip' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
