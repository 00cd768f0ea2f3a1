"""Search videos: embedding -> index -> answer. A `Collection` is a folder, a `Hit` an answer."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .collection import AddReport, Collection, Hit
    from .query_encoder import export_text_encoder

__all__ = ["AddReport", "Collection", "Hit", "export_text_encoder"]


def __getattr__(name: str) -> object:
    """Import the names above on first use, so that `import retrieval` itself costs nothing."""
    if name == "export_text_encoder":
        from .query_encoder import export_text_encoder

        return export_text_encoder
    if name in __all__:
        from . import collection

        return getattr(collection, name)
    raise AttributeError(f"module 'retrieval' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
