"""What a hit looks like: its thumbnail, its preview, the moment cut out of its video, a table."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

from fluxclip.video import VideoError, is_image, is_there, read_clip

from .search import Hit

COLUMNS = ("id", "video", "start_s", "end_s", "score", "metadata")
_JPEG_QUALITY = 85
_STEM_BYTES = 120  # of a name, which may have 255


def thumbnail(hit: Hit, *, side: int = 320) -> bytes:
    """The frame on screen in the middle of a moment, as a JPEG, its longer side at most `side`.

    Raises FileNotFoundError where the video is not there any more, ValueError where it cannot be
    read, is shorter now, or the hit is a text.
    """
    from PIL import Image  # a search does without

    clip = read_clip(_video(hit), times_s=[(hit.start_s + hit.end_s) / 2])
    picture = Image.fromarray(clip.frames_THWC[0])
    picture.thumbnail((side, side), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=_JPEG_QUALITY)
    return file.getvalue()


def preview(hit: Hit, *, seconds: float = 3.0, side: int = 320) -> bytes:
    """The middle `seconds` of a moment, or all of a shorter one, as a silent mp4 (H.264, yuv420p).

    Its longer side is at most `side` pixels. A still is shown for `seconds`. Raises what
    `thumbnail` does.
    """
    from fluxclip.video.excerpt import write_excerpt  # imports PyAV

    if not 0 < seconds < float("inf"):
        raise ValueError(f"a preview takes more than 0 seconds, got {seconds!r}")
    video = _video(hit)
    start_s, end_s = hit.start_s, hit.end_s
    if is_image(video):
        start_s, end_s = 0.0, seconds
    elif end_s - start_s > seconds:
        start_s = (start_s + end_s - seconds) / 2
        end_s = start_s + seconds
    file = io.BytesIO()
    write_excerpt(video, file, start_s=start_s, end_s=end_s, side=side, sound="drop")
    return file.getvalue()


def save_clip(hit: Hit, path: str | Path) -> None:
    """Write a moment to a file of its own, all of it or nothing: [start_s, end_s), with its sound.

    path: ends in ".mp4" (H.264, AAC); of a still, which is copied, as the still does. A file of
    that name is replaced, but never the video itself. Raises what `thumbnail` does, and OSError
    where the file cannot be written.
    """
    from fluxclip.video.excerpt import write_excerpt  # imports PyAV

    video, path = _video(hit), Path(path)
    suffix = clip_suffix(hit)
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: a moment of {video.name} is saved as {suffix}: name it so")
    if path.exists() and path.samefile(video):
        raise ValueError(f"{path} is the video itself: save its moments under another name")
    unfinished = path.with_name(f".{sha256(path.name.encode()).hexdigest()[:16]}.{os.getpid()}.tmp")
    try:
        with open(unfinished, "w+b") as file:
            if is_image(video):
                with _opened(video) as still:
                    shutil.copyfileobj(still, file)
            else:
                write_excerpt(video, file, start_s=hit.start_s, end_s=hit.end_s)
        unfinished.replace(path)
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


def save_all(
    hits: Iterable[Hit], folder: str | Path, *, what: Literal["clips", "thumbnails"]
) -> dict[str, str]:
    """One file for each hit, best first, named by `file_name`; returns which failed: name -> why.

    The folder is made if it is not there. Raises OSError where nothing can be written to it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    for rank, hit in enumerate(hits, start=1):
        name = file_name(hit, rank=rank, suffix=clip_suffix(hit) if what == "clips" else ".jpg")
        try:
            if what == "clips":
                save_clip(hit, folder / name)
            else:
                (folder / name).write_bytes(thumbnail(hit))
        except (ValueError, FileNotFoundError) as error:
            failed[name] = str(error)
    return failed


def file_name(hit: Hit, *, rank: int, suffix: str) -> str:
    """A name that no other hit has, nor the same moment of another video: "003-cat-12.00-22.00-..".

    Rank, the name of the video without what file systems take amiss, seconds, and eight digits that
    tell videos of one name in different folders apart.
    """
    stem = Path(hit.video).stem.encode("utf-8", "replace").decode()
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in stem)
    safe = safe.encode()[:_STEM_BYTES].decode(errors="ignore")
    digest = sha256(hit.video.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return f"{rank:03d}-{safe}-{hit.start_s:.2f}-{hit.end_s:.2f}-{digest}{suffix}"


def clip_suffix(hit: Hit) -> str:
    """What the name of a file from `save_clip` ends in: ".mp4", or what that of the still does."""
    return Path(hit.video).suffix.lower() if is_image(hit.video) else ".mp4"


def write_csv(hits: Iterable[Hit], file: TextIO) -> None:
    """A table of hits, best first, with a head: `COLUMNS`, metadata as JSON.

    file: open for text with `newline=""`.
    """
    table = csv.writer(file)
    table.writerow(COLUMNS)
    for hit in hits:
        row = hit.to_dict()
        row["metadata"] = json.dumps(hit.metadata, ensure_ascii=False)
        table.writerow([row[column] for column in COLUMNS])


def _video(hit: Hit) -> Path:
    """Where the video of a hit is; raises where there is none."""
    if not hit.video:
        raise ValueError("a hit among texts has no picture")
    path = Path(hit.video)
    try:
        is_gone = not is_there(path)
    except OSError as error:  # as of a folder that cannot be entered
        raise _not_readable(path, error) from error
    if is_gone:
        raise FileNotFoundError(
            f"{path}: not there any more; if it has moved, add it from where it is now"
        )
    return path


def _opened(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise _not_readable(path, error) from error


def _not_readable(path: Path, error: OSError) -> VideoError:
    return VideoError(path, f"cannot be opened ({error.strerror})", kind="not readable")
