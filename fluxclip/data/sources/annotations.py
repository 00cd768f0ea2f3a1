"""Annotations in JSON: `[{"video": path, "caption": str | [str, ...]}]`, as UMT and VindLU do.

An image is a clip of one frame and stands under "video" too. Other keys than "video", "caption"
and "family" are left alone.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxclip.data.sources import Record, Records

_SHOWN = 3  # missing files named in an error


def read(path: str | Path, *, check_files: bool = True, folder: Path | None = None) -> Records:
    """The records of an annotation file, in its order.

    Relative paths count from `folder`, by default the annotation file's own. Raises
    FileNotFoundError if the file is missing or, with `check_files`, if a video of it is (with the
    count and the first names), and ValueError, with line or record number from 1, if the file is
    not in this form.
    """
    path = Path(path)
    items = _load(path)
    folder = folder or path.parent
    records = [
        _record(item, folder=folder, where=f"record {number} of {len(items)} in {path}")
        for number, item in enumerate(items, start=1)
    ]
    if check_files:
        _require_files([record.video for record in records], path, folder)
    return Records(records)


def _load(path: Path) -> list[Any]:
    """The list in a JSON file; raises if it is missing, not JSON, no list or empty."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "not found"
        raise FileNotFoundError(f"annotation file {path}: {what}; expected a JSON file")
    form = 'expected a list of {"video": path, "caption": text or list of texts}'
    try:
        items = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; {form} in JSON") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}; {form}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; {form}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path} holds a JSON {_json_type(items)}; {form}")
    if not items:
        raise ValueError(f"{path} is an empty list; {form}")
    return items


def _record(item: object, *, folder: Path, where: str) -> Record:
    """One item of the list, checked."""
    if not isinstance(item, dict):
        raise ValueError(
            f'{where} is a {_json_type(item)}; expected an object with "video" and "caption"'
        )
    for key in ("video", "caption"):
        if key not in item:
            raise ValueError(f"{where} has no {key!r}; it has: {', '.join(item) or 'nothing'}")
    video, caption, family = item["video"], item["caption"], item.get("family")
    if not isinstance(video, str) or not video:
        raise ValueError(f"{where}: 'video' must be a path, got {_shown(video)}")
    captions = caption if isinstance(caption, list) else [caption]
    if not captions:
        raise ValueError(f"{where}: 'caption' is an empty list; at least one text is needed")
    for text in captions:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}: a caption must be a text, got {_shown(text)}")
    if family is not None and not isinstance(family, str):
        raise ValueError(f"{where}: 'family' must be a string, got {_shown(family)}")
    return Record(video=folder / video, captions=tuple(captions), family=family)


def _require_files(videos: Sequence[Path], path: Path, folder: Path) -> None:
    """Raise FileNotFoundError if any file of the annotations `path` does not exist."""
    missing = [str(video) for video in dict.fromkeys(videos) if not video.is_file()]
    if missing:
        more = ", ..." if len(missing) > _SHOWN else ""
        raise FileNotFoundError(
            f"{path}: {len(missing)} of {len(set(videos))} video files not found: "
            f"{', '.join(missing[:_SHOWN])}{more}; relative paths count from {folder}/"
        )


def _json_type(value: object) -> str:
    """What JSON calls the type of a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shown(value: object) -> str:
    """A value as JSON on one line, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
