"""Search videos: embedding -> index -> answer. A `Collection` is a folder, a `Hit` an answer."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .collection import AddReport, CheckReport, Collection
    from .exchange import ExportReport, ImportReport, ShardReport, embed_shard
    from .hits import preview, save_all, save_clip, thumbnail, write_csv
    from .queries import Query
    from .query_encoder import export_text_encoder
    from .reembed import ReEmbedReport
    from .search import Hit

__all__ = [
    "AddReport", "CheckReport", "Collection", "ExportReport", "Hit", "ImportReport", "Query",
    "ReEmbedReport", "ShardReport", "embed_shard", "export_text_encoder", "preview", "save_all",
    "save_clip", "thumbnail", "write_csv",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("AddReport", "CheckReport", "Collection"), "collection"),
    **dict.fromkeys(("ExportReport", "ImportReport", "ShardReport", "embed_shard"), "exchange"),
    "Hit": "search",
    "Query": "queries",
    "ReEmbedReport": "reembed",
    "export_text_encoder": "query_encoder",
    **dict.fromkeys(("preview", "save_all", "save_clip", "thumbnail", "write_csv"), "hits"),
}


def __getattr__(name: str) -> object:
    """Import the names above on first use, so that `import retrieval` itself costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'retrieval' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
