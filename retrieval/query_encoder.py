"""The exported text tower: text -> unit vector with onnxruntime, in a second from a cold shell.

A folder with `text.onnx` (ids to unit vectors), `tokenizer.json` and `manifest.json`, which says of
which model it is and how near its vectors are to that model's own. The files come from the model;
here they are compared with it, chosen, and run.
Shape legend: N texts, L tokens, D width.
"""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .database import refuse_existing

FOLDER = "text_encoder"  # in a collection's folder, of its first model
MANIFEST = "manifest.json"
FORMAT = 1
MIN_COSINE = 0.99  # of 8-bit weights, at worst, to the model's own vectors

_MODEL, _TOKENIZER = "text.onnx", "tokenizer.json"
# by weights, the smallest first; less in fp32 is not rounding, it would be another function
_LEAST_COSINE = {"int8": MIN_COSINE, "fp32": 0.9999}
_KEYS = {"fingerprint", "dim", "weights", "captions", "lowest_cosine", "mean_cosine", "sha256"}
_TEXTS_PER_BATCH = 32

# What every export is compared on, beside the captions given: subjects, lengths, scripts, junk.
CAPTIONS = (
    "a dog",
    "Rocket!",
    "fire",
    "a woman dancing in the rain",
    "two men play chess in a park while children watch",
    "a red car turns left at a crossing at night",
    "someone cuts an onion, then fries it in a pan with butter",
    "the camera slowly zooms in on a lighthouse",
    "a goal is scored and the crowd goes wild",
    "birds fly over the sea at sunset",
    "a person is not wearing a helmet",
    "three of the five cats are black",
    "an old film of a train arriving at a station",
    "how to replace the chain of a bicycle",
    "close-up of hands kneading dough",
    "a cartoon fox waves goodbye",
    "snow falls on an empty street",
    "surgeon in blue gloves holds a scalpel",
    "person, bicycle, mountain, sport",
    "a rollercoaster loops upside down",
    "the year 1969, moon landing, black and white",
    "a girl blows out 10 candles on a birthday cake",
    "slow motion of a drop falling into water",
    "news presenter talks about the weather",
    "a robot arm welds the door of a car",
    "horse and rider jump over a fence",
    "a screen shows source code being typed",
    "ein Hund fängt einen Ball",
    "une femme qui danse sous la pluie",
    "niño jugando al fútbol en la playa",
    "собака бежит по снегу",
    "一只猫在睡觉",
    "犬が走っている",
    "كلب يجري في الحديقة",
    "कुत्ता दौड़ रहा है",
    "😀 party 🎉🎉",
    "IMG_2024-05-01 (final) v2.mp4",
    "??? ... !!!",
    "x",
    "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "A man walks into a kitchen, opens the fridge and takes out milk, eggs and flour; he mixes "
    "them in a bowl, heats a pan, and makes a tall pile of pancakes, which he then carries to a "
    "table in the garden, where his family has been waiting for quite a while and the dog has "
    "fallen asleep under a chair in the shade of an old apple tree that is full of ripe fruit.",
)


class QueryEncoder:
    """A text tower in onnxruntime: the same texts give the same vectors, up to the rounding stated.

    folder: one that `export_text_encoder` made. manifest: what its manifest.json says. Raises
    OSError for a folder that lacks a file, ValueError for one whose files are not those that were
    written, or cannot be read by what is installed.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.manifest = _read_manifest(folder)
        self.dim: int = self.manifest["dim"]
        content = {}
        for name in (_MODEL, _TOKENIZER):
            content[name] = (folder / name).read_bytes()
            if hashlib.sha256(content[name]).hexdigest() != self.manifest["sha256"][name]:
                raise ValueError(f"{folder / name} is damaged: delete the folder, export anew")
        self._run = _Tower(content[_MODEL], content[_TOKENIZER])

    def embed_text(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors, float32 (N, dim)."""
        return self._run(texts) if texts else np.empty((0, self.dim), np.float32)


class _Tower:
    """Tokenizer and network, from the content of their files."""

    def __init__(self, model: bytes, tokenizer: bytes) -> None:
        try:
            import onnxruntime
            from tokenizers import Tokenizer
        except ImportError as error:
            raise ValueError(f"{error.name} is not installed: pip install {error.name}") from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a query is too little work to share
        # beyond this level it rounds what is multiplied with 8-bit weights too, which costs more
        # than the weights did
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        try:
            self._tokenizer = Tokenizer.from_buffer(tokenizer)
            self._session = onnxruntime.InferenceSession(
                model, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # both raise bare Exceptions of their own, as for newer formats
            reason = " ".join(str(error).split())
            raise ValueError(f"onnxruntime or tokenizers cannot read it: {reason}") from error

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        vectors = []
        for start in range(0, len(texts), _TEXTS_PER_BATCH):
            batch = self._tokenizer.encode_batch(list(texts[start : start + _TEXTS_PER_BATCH]))
            ids_NL = np.array([encoding.ids for encoding in batch], np.int64)
            vectors.append(self._session.run(["vectors"], {"ids": ids_NL})[0])
        return np.concatenate(vectors)


def text_encoder_folder(space: int) -> str:
    """Name of the folder, inside a collection's, of the text tower that serves this space."""
    return FOLDER if space == 1 else f"{FOLDER}-{space}"


def export_text_encoder(
    model: Any, folder: str | Path, *, captions: Sequence[str] = ()
) -> dict[str, Any]:
    """Write a model's text tower into a new folder, in one step, and return its manifest.

    model: what `fluxclip.load_model` takes or returns. The weights are 8-bit integers where every
    one of `CAPTIONS` and `captions` gets a vector whose cosine to the model's own is at least
    MIN_COSINE, else fp32. Raises FileExistsError if the folder exists, ValueError in one line for
    a model whose text tower cannot be exported.
    """
    folder = Path(folder)
    refuse_existing(folder)  # before the model is loaded, which may take seconds
    if isinstance(model, str | Path):
        from fluxclip import load_model  # imports torch

        model = load_model(model)
    write = getattr(model, "export_text", None)
    if write is None:
        raise ValueError(f"model {model.name!r} has no export_text")
    compared = [*CAPTIONS, *captions]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        unfinished = Path(temporary) / folder.name  # with ordinary rights, unlike its parent
        unfinished.mkdir()
        write(unfinished)
        weights, cosines_N = _choose(unfinished, model.embed_text(compared), compared)
        (unfinished / f"{weights}.onnx").rename(unfinished / _MODEL)
        for other in _LEAST_COSINE:
            (unfinished / f"{other}.onnx").unlink(missing_ok=True)
        manifest = {
            "format": FORMAT,
            "model_name": model.name,
            "fingerprint": model.fingerprint,
            "dim": model.dim,
            "weights": weights,
            "captions": len(compared),
            "lowest_cosine": round(float(cosines_N.min()), 6),
            "mean_cosine": round(float(cosines_N.mean()), 6),
            "sha256": {
                name: hashlib.sha256((unfinished / name).read_bytes()).hexdigest()
                for name in (_MODEL, _TOKENIZER)
            },
            "versions": {
                name: version(name)
                for name in ("fluxclip", "torch", "onnx", "onnxruntime", "tokenizers")
            },
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (unfinished / MANIFEST).write_text(text, encoding="utf-8")
        unfinished.rename(folder)
    return manifest


def _choose(folder: Path, wanted_ND: np.ndarray, texts: Sequence[str]) -> tuple[str, np.ndarray]:
    """The smallest weights that are near enough, and their cosines (N,) to `wanted_ND`."""
    tokenizer = (folder / _TOKENIZER).read_bytes()
    for weights, least in _LEAST_COSINE.items():
        tower = _Tower((folder / f"{weights}.onnx").read_bytes(), tokenizer)
        cosines_N = (tower(texts) * wanted_ND).sum(axis=1)
        if cosines_N.min() >= least:  # false for what is not a number
            return weights, cosines_N
    worst = int(np.argmin(cosines_N))
    raise ValueError(
        f"the exported text tower differs from the model's own: cosine {cosines_N[worst]:.4f} "
        f"for {texts[worst][:60]!r}"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of format {manifest['format']}, not {FORMAT}")
        lacking = _KEYS - manifest.keys() or {_MODEL, _TOKENIZER} - manifest["sha256"].keys()
        if lacking:
            raise ValueError(f"it does not say {', '.join(sorted(lacking))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return manifest
