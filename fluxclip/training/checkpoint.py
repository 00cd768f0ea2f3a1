"""States on disk: names and tensors and where the run stands, whole or not there at all.

A state is a folder state/step-N: tensors.safetensors, whose names are `parameters/NAME`,
`exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` for a parameter NAME; and state.json, which is a
`Progress`. Nothing random is in it: draws are functions of seed, step and process. Whatever trains
a model gives and takes these names, so a state does not depend on what wrote it. Nothing in it is
a pickle.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, field
from pathlib import Path

from pydantic import NonNegativeFloat, NonNegativeInt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxclip.settings import parse, settings

FORMAT = 1
_OLDER = "random/"  # what earlier versions kept besides
KEPT = 2  # states; the second is there in case the disk damages the first


@settings
class Progress:
    """Where a run stands. step: steps done, which is also the place in the data.

    best: highest validation score so far. seconds: of training.
    command: what started the run. annotations: key in the recipe -> SHA-256 of the file's bytes.
    """

    step: NonNegativeInt = 0
    best: float | None = None
    seconds: NonNegativeFloat = 0.0
    command: str = ""
    annotations: dict[str, str] = field(default_factory=dict)


def save(folder: Path, progress: Progress, *, tensors: Mapping[str, Tensor]) -> Path:
    """Write the state `folder`/step-N, then remove all but the newest two; returns its path.

    It is written beside its place and moved there once the disk has it, so a kill at any moment
    leaves the older states as they were. Raises OSError, one line, on a disk that is full.
    """
    final = folder / f"step-{progress.step}"
    partial = folder / f".{final.name}.partial"
    with writing(final):
        _remove_partial(folder)
        partial.mkdir(parents=True)
        try:
            cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(cpu, partial / "tensors.safetensors")
            values = {"format": FORMAT, **asdict(progress)}
            (partial / "state.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
            for path in (partial / "tensors.safetensors", partial / "state.json", partial):
                _to_disk(path)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)  # what it took may be what the disk lacks
            raise
        partial.rename(final)
        _to_disk(folder)
    for old in states(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def states(folder: Path) -> list[Path]:
    """The whole states in a folder, the newest last."""
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := re.fullmatch(r"step-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def read_progress(path: Path) -> Progress:
    """Where the run of a state stood. Raises ValueError, one line, if that cannot be read."""
    try:
        values = json.loads((path / "state.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise ValueError(f"{path} is not of state format {FORMAT}, the one this version reads")
    values.pop("unreadable", None)  # where earlier versions listed files
    return parse(Progress, values, source=str(path / "state.json"))


def read_tensors(path: Path, *, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state, on the CPU, with the names and shapes of `expected` exactly.

    Raises ValueError, one line, that names what is missing, unexpected or misshapen.
    """
    try:
        found = load_file(path / "tensors.safetensors")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    found = {name: tensor for name, tensor in found.items() if not name.startswith(_OLDER)}
    wrong = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    wrong += [
        f"{name} has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{path} is no state of this run: {'; '.join(wrong[:3])}{more}")
    return found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make one line that names `path` of whatever keeps it from being written."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        # safetensors puts the system's words at the end of its own
        reason = getattr(error, "strerror", None) or str(error).rpartition("I/O error: ")[2]
        raise OSError(
            f"cannot write {path}: {reason}; what was saved before is whole, and --resume "
            f"continues from it"
        ) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(
        f"state {path} cannot be read ({reason}): delete that folder to continue from the one "
        f"before it"
    )


def _remove_partial(folder: Path) -> None:
    """Remove what a kill left half-written."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path)


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
