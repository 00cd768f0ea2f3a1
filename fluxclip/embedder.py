"""Embedder: a model with its preprocessing and budgets; files, clips and texts to unit vectors."""

import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.frame_average import FrameAverage
from fluxclip.tokens.selection import check_budget
from fluxclip.video import Clip, read_clip
from fluxclip.video.sampling import evenly_spread
from fluxclip.video.transforms import resize, to_float

Vectors = np.ndarray[tuple[int, int], np.dtype[np.float32]]

# tokens that go through the tower at once: enough to keep a CPU or GPU busy, little memory
_TOKENS_PER_BATCH = 16384
_TEXTS_PER_BATCH = 64


class Embedder:
    """What `load_model` returns: unit vectors of videos and texts in one space.

    name: for messages and records. source: what `load_model` finds the same model by, where it came
    from there. dim: width of the vectors. fingerprint: hash over architecture,
    preprocessing and weights. fit: how a picture becomes a square. logit_scale: what cosines are
    multiplied by in training.
    """

    def __init__(
        self, model: FluxCLIP | FrameAverage, *, name: str, source: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:  # fmt: skip
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.to(self.device).eval()
        self.name, self.source = name, source or name
        self.dim = model.dim
        self.fit: Literal["crop", "squash"] = model.preprocess.fit
        self.fingerprint = fingerprint(model)

    def __repr__(self) -> str:
        return f"Embedder({self.name}@{self.fingerprint[:6]}, dim={self.dim}, {self.device})"

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach())

    def num_tokens(self, num_frames: int, side: int) -> int:
        """Tokens of a grid, class token not counted."""
        return self.model.num_tokens(num_frames, side)

    def grid(self, token_budget: int | None = None) -> tuple[int, int]:
        """(num_frames, side) that the model uses for a budget of tokens; None is its default."""
        return self.model.grid(token_budget)

    def macs(self, num_frames: int, side: int, token_budget: int | None = None) -> int:
        """Multiply-accumulates of the video tower per clip; dropped tokens are embedded too."""
        return self.model.macs(num_frames, side, token_budget)

    def embed_video(
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None
    ) -> Vectors:
        """Unit vectors, float32 (len(videos), dim), of video or image files or of clips.

        token_budget: tokens per clip, an integer of 1 or more; None uses all of the default grid.
        Files are read at the grid of the budget; a clip with more frames is thinned out evenly to
        it, one with fewer is used as it is, and its pictures are resized to the grid's side.
        Raises FileNotFoundError or VideoError naming the file that cannot be read.
        """
        check_budget(token_budget)
        if isinstance(videos, (str, Path, Clip)):
            raise ValueError(f"embed_video takes a list of files or clips, got {videos!r} alone")
        num_frames, side = self.grid(token_budget)
        per_batch = max(1, _TOKENS_PER_BATCH // self.num_tokens(num_frames, side))
        vectors = np.empty((len(videos), self.dim), dtype=np.float32)
        frames_of = enumerate(self._read_ahead(videos, num_frames, side))
        while batch := list(itertools.islice(frames_of, per_batch)):
            # clips that differ in frames (a still has one) cannot share a tensor
            by_length: dict[int, list[tuple[int, torch.Tensor]]] = {}
            for i, frames_THWC in batch:
                by_length.setdefault(len(frames_THWC), []).append((i, frames_THWC))
            for group in by_length.values():
                rows = [i for i, _ in group]
                frames_BTHWC = torch.stack([frames for _, frames in group])
                vectors[rows] = self._encode(frames_BTHWC, token_budget)
        return vectors

    def embed_text(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors, float32 (len(texts), dim)."""
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"embed_text takes a list of texts, got {texts!r}")
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        # texts of like length together: less padding
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), _TEXTS_PER_BATCH):
            rows = order[start : start + _TEXTS_PER_BATCH]
            ids = self.model.tokenize([texts[i] for i in rows]).to(self.device)
            with torch.inference_mode():
                vectors[rows] = self.model.encode_text(ids).float().cpu().numpy()
        return vectors

    @property
    def text_limit(self) -> int:
        """Text tokens that the model reads; a longer text is cut."""
        return self.model.text_limit

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts are longer than `text_limit`."""
        return self.model.are_cut(texts)

    @property
    def device_name(self) -> str:
        """The kind of device that the model runs on."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return self.device.type

    @property
    def scorer(self) -> str | None:
        """What chooses the tokens that a budget keeps; None if whole frames are dropped."""
        return self.model.scorer if isinstance(self.model, FluxCLIP) else None

    def export_text(self, folder: str | Path) -> None:
        """Write what answers texts without torch into an existing folder; takes seconds.

        `fp32.onnx` and `int8.onnx` (ids (B, L) to unit vectors (B, dim)) and `tokenizer.json`.
        Raises ValueError in one line where the text tower has no such form, as open_clip's.
        """
        if not isinstance(self.model, FluxCLIP):
            raise ValueError(
                f"the text tower of {self.name!r} is open_clip's, which stays in torch"
            )
        from fluxclip.model import text_export  # imports ONNX

        text_export.write(self.model, Path(folder))

    def _encode(self, frames_BTHWC: torch.Tensor, token_budget: int | None) -> Vectors:
        settings = self.model.preprocess
        frames = frames_BTHWC.to(self.device)
        with torch.inference_mode():
            x = to_float(frames, mean=settings.mean, std=settings.std)
            out: Vectors = self.model.encode_video(x, token_budget).float().cpu().numpy()
        return out

    def _read_ahead(
        self, videos: Sequence[str | Path | Clip], num_frames: int, side: int
    ) -> Iterator[torch.Tensor]:
        """uint8 frames (T, side, side, 3) of each video in order, decoded ahead in threads."""

        def read(video: str | Path | Clip) -> torch.Tensor:
            if not isinstance(video, (str, Path, Clip)):
                raise ValueError(f"embed_video takes files and clips, got {video!r}")
            if not isinstance(video, Clip):
                video = read_clip(video, num_frames=num_frames, side=side, fit=self.fit)
            return fit_clip(video, num_frames, side, self.fit)

        workers = os.cpu_count() or 1
        waiting: deque[Future[torch.Tensor]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            try:
                for video in videos:
                    waiting.append(pool.submit(read, video))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)


def fit_clip(
    clip: Clip, num_frames: int, side: int, fit: Literal["crop", "squash"]
) -> torch.Tensor:
    """uint8 frames (T, side, side, 3) of a clip, thinned out evenly to at most `num_frames`."""
    frames_THWC = clip.frames_THWC
    if len(frames_THWC) > num_frames:
        keep = evenly_spread(0, len(frames_THWC), num_frames).astype(int)
        frames_THWC = frames_THWC[keep]
    frames = torch.from_numpy(np.ascontiguousarray(frames_THWC))
    if tuple(frames.shape[1:3]) != (side, side):
        frames = resize(frames[None], side=side, fit=fit)[0]
    return frames


def fingerprint(model: FluxCLIP | FrameAverage) -> str:
    """SHA-256, in hex, over architecture, preprocessing, and every weight of both towers."""
    described: dict[str, Any] = {"class": type(model).__name__}
    if isinstance(model, FluxCLIP):
        described |= model.config.to_dict()
        # where the text weights lie and how training went change no vector
        del described["text"]["source"], described["text"]["weights"]
        del described["video"]["drop_path"]
        described["pooling"] = getattr(model.text, "pooling", None)
    else:
        described |= {"architecture": model.architecture, "preprocess": model.preprocess}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # bytes, not numbers: bfloat16 has no NumPy type
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return digest.hexdigest()


def load_model(source: str | Path, *, device: str | None = None) -> Embedder:
    """The model at `source` as an Embedder, on `device` (by default a GPU if there is one).

    source: a model folder or a run folder (its best model), `hf://org/name`,
    `open_clip:NAME/TAG` or `open_clip:NAME/FILE`, or the name of a model that ships with fluxclip.
    Raises ValueError or FileNotFoundError in one line that says what is known.
    """
    text = str(source)
    if text.startswith("open_clip:"):
        name, _, pretrained = text.removeprefix("open_clip:").partition("/")
        if not pretrained:
            raise ValueError(
                f"{text!r} names no weights: open_clip:NAME/TAG or open_clip:NAME/FILE"
            )
        if Path(pretrained).is_file():
            text = f"open_clip:{name}/{Path(pretrained).absolute()}"
        return Embedder(
            FrameAverage(name, pretrained), name=f"open_clip:{name}", source=text, device=device
        )
    from fluxclip.model import weights

    folder, name, source = _from_hub(text) if text.startswith("hf://") else _find_folder(text)
    if text.startswith("hf://"):
        config = weights.read_config(folder)
        if "." in config.video.scorer + config.text.encoder:
            raise ValueError(f"{text} names code outside fluxclip; a model from the hub may not")
    return Embedder(weights.load(folder), name=name, source=source, device=device)


def _find_folder(source: str) -> tuple[Path, str, str]:
    """A model's folder, its name, and by what it is found again from anywhere."""
    folder = Path(source).expanduser().absolute()
    if (folder / "best" / "config.json").is_file():
        return folder / "best", folder.name, str(folder)
    if folder.is_dir():
        name = folder.parent.name if folder.name in ("best", "last") else folder.name
        return folder, name, str(folder)
    shipped = shipped_models()
    if source in shipped:
        return shipped[source], source, source
    known = ", ".join(shipped) or "none ship with this installation"
    raise ValueError(
        f"unknown model {source!r}: not a folder, and not one of the models that ship ({known}); "
        f"also: hf://org/name, open_clip:NAME/TAG"
    )


def shipped_models() -> dict[str, Path]:
    """Models that come with fluxclip, by name: in the wheel, or in a checkout's assets folder."""
    package = Path(__file__).parent
    roots = (package / "assets" / "models", package.parent / "assets" / "models")
    configs = itertools.chain.from_iterable(sorted(root.glob("*/config.json")) for root in roots)
    return {config.parent.name: config.parent for config in configs}


def _from_hub(source: str) -> tuple[Path, str, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = source.removeprefix("hf://")
    try:
        folder = snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.md"])
        return Path(folder), name.rpartition("/")[2], source
    except HFValidationError as error:
        raise ValueError(f"{source!r} is no hub name: hf://org/name") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"cannot fetch {source}: {str(error).splitlines()[0]}") from error
