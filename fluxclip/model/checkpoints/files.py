"""Checkpoint files of other systems: their tensors by name, and a report of what became of them."""

import argparse
import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.weights import CARD_HEADER

_WRAPPERS = ("module", "model")  # what DeepSpeed and plain training loops save around the tensors


@dataclass(frozen=True)
class Part:
    """What one file gave: the names of the tensors used, and why each other one is not."""

    role: str
    name: str
    sha256: str
    used: tuple[str, ...]
    ignored: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """Where a model's weights come from.

    about: what the model is, a sentence. missing: tensors that a complete file has and these have
    not, and that are not needed. notes: what else its user should know, a sentence each.
    """

    about: str
    parts: tuple[Part, ...]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as text."""
        lines = []
        for part in self.parts:
            lines.append(f"{part.role}: {part.name}, {len(part.used)} tensors used")
            lines.append(f"  sha256 {part.sha256}")
            for reason in dict.fromkeys(part.ignored.values()):
                names = [name for name, why in part.ignored.items() if why == reason]
                lines.append(f"  {len(names)} not used, {reason}: {_few(names)}")
        if self.missing:
            lines.append(f"{len(self.missing)} missing and not needed: {_few(self.missing)}")
        return lines + list(self.notes)


class Converted(NamedTuple):
    """A model of ours with weights of others, in eval mode, and where they come from."""

    model: FluxCLIP
    report: Report


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file by name, containers opened and prefixes gone."""

    path: Path
    tensors: Mapping[str, Tensor]

    def part(
        self, role: str, why_not: Callable[[str], str | None]
    ) -> tuple[dict[str, Tensor], Part]:
        """The tensors to use, as fp32, and the file's entry in the report.

        why_not: the reason for which a tensor is not used; None for one that is.
        """
        reasons = {name: why_not(name) for name in self.tensors}
        ignored = {name: reason for name, reason in reasons.items() if reason is not None}
        used = {name: x.float() for name, x in self.tensors.items() if name not in ignored}
        return used, Part(role, short_name(self.path), sha256(self.path), tuple(used), ignored)


def read(path: str | Path, *, prefixes: Iterable[str] = ()) -> Checkpoint:
    """Read a .pth, .pt, .bin or .safetensors file without running any code that is in it.

    A level `module` or `model` around the tensors is opened; of the prefixes, one that all names
    share is taken away. Raises FileNotFoundError, or ValueError in one line for what is no
    dictionary of tensors, or needs code to be loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such weights file: {path}")
    content = _load(path)
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no tensors by name, but a {type(content).__name__}")
    tensors = {str(name): x for name, x in content.items() if isinstance(x, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors by name; keys: {_few(list(map(str, content)))}")
    for prefix in prefixes:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): x for name, x in tensors.items()}
    return Checkpoint(path, tensors)


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # plain training loops save their options beside the weights: an object with attributes only
        with torch.serialization.safe_globals([argparse.Namespace]):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except (RuntimeError, ValueError):  # the format of before torch 1.6 cannot be mapped
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no file of plain tensors: it would run code when loaded, or is damaged. "
            f"Save its state dict with safetensors, on a machine where you trust it"
        ) from error
    except Exception as error:  # a damaged file can fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no readable weights file: {reason[:200]}") from error


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_name(path: Path) -> str:
    """A file's name with that of its folder, since many published files are named alike."""
    return "/".join(path.absolute().parts[-2:])


def card(title: str, report: Report) -> str:
    """README.md of a converted model folder."""
    lines = "\n".join(f"- {line}".replace("-   ", "  - ") for line in report.lines())
    return (
        f"{CARD_HEADER}# {title}\n\n{report.about}\n\n"
        f"Written by `fluxclip convert`; nothing was trained. The weights keep the licence under "
        f"which they were published: add it, and whom to cite, before you pass this folder on."
        f"\n\n{lines}\n"
    )


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
