"""What the protocols share: reading annotation files and id lists, finding videos, making tasks."""

import csv
import json
import os
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fluxclip.evaluation.protocols import Captions, ClassificationTask, RetrievalTask
from fluxclip.video import VIDEO_SUFFIXES

_SHOWN = 5  # ids or columns named in an error
_DELIMITERS = (",", ";", "\t")
# a YouTube id is 11 characters, "_" and "-" among them: only the right end tells what is what
_YOUTUBE_CLIP = re.compile(r"([A-Za-z0-9_-]{11})_([0-9]+)_([0-9]+)")


def annotation_file(path: Path, *names: str, holds: str) -> Path:
    """`path` itself if it is a file, else the first of `names` that is in that folder.

    holds: what is in such a file, for the error. Raises FileNotFoundError.
    """
    for found in [path, *(path / name for name in names)]:
        if found.is_file():
            return found
    wanted = " or ".join(names)
    what = f"the folder {path} has no {wanted}" if path.is_dir() else f"{path} not found"
    raise FileNotFoundError(f"{what}; wanted: {wanted}, {holds}")


def wrong_file(path: Path, problem: str, wanted: str) -> ValueError:
    """The error for a file that cannot be what the protocol reads."""
    return ValueError(f"{path} {problem}; wanted: {wanted}")


def load_json(path: Path, wanted: str) -> Any:
    """What a JSON file holds; ValueError if it is not JSON or an object has a key twice."""

    def object_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # json would keep the last and lose captions without a word
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise wrong_file(path, f"has the key {twice!r} twice in one object", wanted)
        return found

    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=object_once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise wrong_file(path, f"is not JSON ({error})", wanted) from error


def load_csv(path: Path, columns: Sequence[str], wanted: str) -> list[dict[str, str]]:
    """The rows of a file with a header, by column; delimited by comma, semicolon or tab.

    columns: those the header must have. Raises ValueError if it lacks one, if a row has more or
    fewer fields than the header, or if quotes do not match.
    """
    line = 1
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            delimiter = max(_DELIMITERS, key=file.readline().count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = next(reader, [])
            lacking = [name for name in columns if name not in header]
            if lacking:
                has = f"has no column {', '.join(lacking)} (it has: {_named(header) or 'none'})"
                raise wrong_file(path, has, wanted)
            rows = []
            for fields in reader:
                line = reader.line_num
                if fields and len(fields) != len(header):
                    raise ValueError(
                        f"{path}, line {line}: {len(fields)} fields for {len(header)} columns; "
                        f"a text that holds {delimiter!r} must be in double quotes"
                    )
                if fields:  # not a blank line
                    rows.append(dict(zip(header, fields, strict=True)))
            return rows
    except UnicodeDecodeError as error:
        raise wrong_file(path, "is not UTF-8 text", wanted) from error
    except csv.Error as error:
        raise wrong_file(path, f"is no csv file: {error} (after line {line})", wanted) from error


def read_lines(path: Path, wanted: str) -> list[str]:
    """The lines of a text file without white space around them and without blank ones."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise wrong_file(path, "is not UTF-8 text", wanted) from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise wrong_file(path, "is empty", wanted)
    return lines


def listed_ids(split: str, known: Sequence[str]) -> list[str] | None:
    """The ids of the list that `split` is the path of, each once; None if it is a `known` split.

    Raises ValueError if it is neither, and if a list is called like a known split, because its
    results would be.
    """
    if split in known:
        return None
    path = Path(split)
    if not path.is_file():
        raise ValueError(
            f"unknown split {split!r}: expected {', '.join(known)} or the path of an id list"
        )
    if path.stem in known:
        raise ValueError(
            f"id list {path} is called like the split {path.stem!r}: give it another name, "
            "because results carry it"
        )
    return list(dict.fromkeys(read_lines(path, "an id list, text with an id on each line")))


def require_known(ids: Iterable[str], known: Mapping[str, object], *, where: str, of: Path) -> None:
    """Raise ValueError if the list `where` has an id that the annotations `of` do not have."""
    unknown = [video for video in ids if video not in known]
    if unknown:
        raise ValueError(f"{where}: {len(unknown)} ids are not in {of}: {_named(unknown)}")


def youtube_clip(name: str) -> str | None:
    """The official spelling of a clip's name, `<YouTube id>_<start>_<end>` with six digits each.

    start and end are seconds; names with fewer digits are common. None if `name` is no such name.
    """
    match = _YOUTUBE_CLIP.fullmatch(name)
    return f"{match[1]}_{int(match[2]):06d}_{int(match[3]):06d}" if match else None


def captions_by_video(
    pairs: Iterable[tuple[str, Sequence[str]]], path: Path
) -> dict[str, list[str]]:
    """id -> its captions, all of them where a video comes more than once, without empty ones.

    A caption without a visible character is dropped: it asks for nothing. Raises ValueError for
    what is no list of texts, and for a video that is left without a caption.
    """
    captions_of: dict[str, list[str]] = {}
    for video, captions in pairs:
        if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            raise ValueError(f"{path}: the captions of {video} are not a list of texts")
        captions_of.setdefault(video, []).extend(text for text in captions if text.strip())
    bare = [video for video, captions in captions_of.items() if not captions]
    if bare:
        raise ValueError(
            f"{path}: {len(bare)} videos have no caption, or empty ones: {_named(bare)}"
        )
    return captions_of


def find_videos(
    folder: Path | None, ids: Iterable[str], *, key: Callable[[str], Hashable] = str
) -> dict[str, Path]:
    """The file of each id that has one, in a folder and its subfolders, by name without suffix.

    key: what must be equal of an id and of a file's name, where spellings differ. Links are
    followed; one that leads nowhere is no file. Raises ValueError if no folder is given or an id
    has two files, FileNotFoundError if no id has one.
    """
    if folder is None:
        raise ValueError("the protocol needs the folder of its video files: --videos DIR")
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of videos {folder} not found")
    ids = list(ids)
    wanted = {key(video): video for video in ids}
    assert len(wanted) == len(ids), "two ids that stand for one file"
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(parent)) in seen:  # a link back up, or a second link
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() not in VIDEO_SUFFIXES:
                continue
            video = wanted.get(key(stem))
            path = Path(parent, name)
            if video is None or not path.is_file():
                continue
            if video in found:
                raise ValueError(
                    f"two files for video {video}: {found[video]} and {path}; leave one in {folder}"
                )
            found[video] = path
    if not found:
        raise FileNotFoundError(
            f"none of the {len(ids)} videos is in {folder}; looked for names such as {ids[0]}.mp4"
        )
    return {video: found[video] for video in ids if video in found}


def retrieval_task(
    protocol: str,
    captions_of: Mapping[str, Sequence[str]],
    files: Mapping[str, Path],
    *,
    captions: Captions,
    num_expected: int,
    num_texts_expected: int | None = None,
    sources: list[Path],
    choices: dict[str, str],
) -> RetrievalTask:
    """A task of the videos that have a file, in the order of their captions' ids.

    captions_of: id -> its captions. files: id -> its file. Raises FileNotFoundError if no id has a
    file.
    """
    ids = [video for video in captions_of if video in files]
    missing = [video for video in captions_of if video not in files]
    if not ids:
        raise FileNotFoundError(
            f"{sources[0]}: none of its {len(missing)} video files was found: {_named(missing)}"
        )
    texts: list[str] = []
    video_of_text_M: list[int] = []
    for index, video in enumerate(ids):
        own = captions_of[video]
        queries = {
            "first": own[:1],
            "all": own,
            "joined": [" ".join(text.strip() for text in own)],
        }[captions]
        texts += queries
        video_of_text_M += [index] * len(queries)
    return RetrievalTask(
        protocol=protocol,
        videos=[files[video] for video in ids],
        ids=ids,
        missing=missing,
        num_expected=num_expected,
        num_texts_expected=num_texts_expected,
        sources=sources,
        choices=choices,
        texts=texts,
        video_of_text_M=np.array(video_of_text_M, dtype=np.int64),
        captions=captions,
    )


def classification_task(
    protocol: str,
    class_of: Mapping[str, int],
    files: Mapping[str, Path],
    *,
    classes: list[str],
    num_expected: int,
    sources: list[Path],
    choices: dict[str, str],
) -> ClassificationTask:
    """A task of the videos that have a file (at least one), in the order of `class_of`.

    class_of: id -> index of its class in `classes`. files: id -> its file.
    """
    ids = [video for video in class_of if video in files]
    return ClassificationTask(
        protocol=protocol,
        videos=[files[video] for video in ids],
        ids=ids,
        missing=[video for video in class_of if video not in files],
        num_expected=num_expected,
        sources=sources,
        choices=choices,
        classes=classes,
        class_of_video_N=np.array([class_of[video] for video in ids], dtype=np.int64),
    )


def _named(ids: Sequence[str]) -> str:
    """The first few ids, each cut short, and a sign that there are more."""
    return ", ".join(f"{video:.80}" for video in ids[:_SHOWN]) + ", ..." * (len(ids) > _SHOWN)
