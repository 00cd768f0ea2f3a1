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
        self, videos: Sequence[str | Path | Clip], *, token_budget: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Vectors:  # fmt: skip
        """Unit vectors, float32 (len(videos), dim), of video or image files or of clips.

        token_budget: tokens per clip, an integer of 1 or more; None uses all of the grid.
        grid: (num_frames, side), by default what the model's table gives for the budget.
        Files are read at the grid; a clip with more frames is thinned out evenly to
        it, one with fewer is used as it is, and its pictures are resized to the grid's side.
        Raises FileNotFoundError or VideoError naming the file that cannot be read.
        """
        check_budget(token_budget)
        if isinstance(videos, (str, Path, Clip)):
            raise ValueError(f"embed_video takes a list of files or clips, got {videos!r} alone")
        num_frames, side = grid or self.grid(token_budget)
        self.num_tokens(num_frames, side)  # raises where it is no grid of the model
        vectors = np.empty((len(videos), self.dim), dtype=np.float32)
        start, batch, num_tokens = 0, [], 0
        for frames_THWC in self._read_ahead(videos, num_frames, side):
            batch.append(frames_THWC)
            num_tokens += self.num_tokens(len(frames_THWC), side)
            if num_tokens >= _TOKENS_PER_BATCH or start + len(batch) == len(videos):
                vectors[start : start + len(batch)] = self._encode(batch, token_budget)
                start, batch, num_tokens = start + len(batch), [], 0
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
    def filter(self) -> str | None:
        """What leaves out tokens by the pixels, with its settings; None if nothing does."""
        return self.model.filter if isinstance(self.model, FluxCLIP) else None

    def clip_costs(
        self, clips: Sequence[Clip], *, token_budget: int | None = None
    ) -> list[tuple[int, int]]:
        """(tokens, multiply-accumulates) of the video tower for each clip, filter applied."""
        if not isinstance(self.model, FluxCLIP):
            raise ValueError(f"the tokens of {self.name!r} do not depend on the clip")
        num_frames, side = self.grid(token_budget)
        settings, costs = self.model.preprocess, []
        for clip in clips:
            frames = fit_clip(clip, num_frames, side, self.fit)[None].to(self.device)
            x_1THWC = to_float(frames, mean=settings.mean, std=settings.std)
            costs += self.model.clip_costs(x_1THWC, token_budget)
        return costs

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

    def _encode(self, clips: Sequence[torch.Tensor], token_budget: int | None) -> Vectors:
        """Unit vectors of clips as uint8 (T, H, W, 3), which may differ in T (a still has one)."""
        settings = self.model.preprocess
        by_length: dict[int, list[int]] = {}
        for i, frames_THWC in enumerate(clips):
            by_length.setdefault(len(frames_THWC), []).append(i)
        order = [i for rows in by_length.values() for i in rows]
        out = np.empty((len(clips), self.dim), dtype=np.float32)
        with torch.inference_mode():
            groups_BTHWC = [
                to_float(
                    torch.stack([clips[i] for i in rows]).to(self.device),
                    mean=settings.mean, std=settings.std,
                )
                for rows in by_length.values()
            ]  # fmt: skip
            out[order] = self.model.encode_clips(groups_BTHWC, token_budget).float().cpu().numpy()
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
        # defaults are left out, so that a setting that is new leaves older models what they were
        described |= model.config.to_dict(defaults=False)
        # where the text weights lie and how training went change no vector
        for section, name in (("text", "source"), ("text", "weights"), ("video", "drop_path")):
            described.get(section, {}).pop(name, None)
        described["pooling"] = getattr(model.text, "pooling", None)
        if configuration := getattr(model.text, "configuration", None):  # of open_clip
            described["text_configuration"] = configuration
        for name, content in model.text.files().items():  # a vocabulary
            described[name] = hashlib.sha256(content).hexdigest()
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

    source: a model folder or a run folder (its best model), `hf://org/name` or
    `hf://org/name@revision`, `open_clip:NAME/TAG` or `open_clip:NAME/FILE`, or the name of a model
    that ships with fluxclip. After a "?" may follow how the video tower chooses tokens, where it
    is not to be as stored: "emoji-tiny?filter=run_length,threshold=0.05" or "?scorer=uniform"; what
    is no setting of the tower (filter, scorer, pool_by_length) is one of the filter.
    Raises ValueError or FileNotFoundError in one line that says what is known.
    """
    text, changes = split_settings(str(source))
    if changes and text.startswith("open_clip:"):
        raise ValueError(f"{source}: a model of open_clip drops whole frames, not tokens")
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

    folder, name, found = find_folder(text)
    suffix = str(source).removeprefix(text).rstrip("?")
    model = weights.load(folder, config=weights.with_video(weights.read_config(folder), changes))
    return Embedder(model, name=name + suffix, source=found + suffix, device=device)


def split_settings(source: str) -> tuple[str, dict[str, Any]]:
    """A model's source without what follows its "?", and that as settings of the video tower.

    source: as `load_model` takes it. Raises ValueError for what is not key=value,key=value.
    """
    text, _, changes = source.partition("?")
    video: dict[str, Any] = {}
    for change in filter(None, changes.split(",")):
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise ValueError(f"what follows the ? of a model is key=value, got {change!r}")
        if key in ("filter", "scorer"):
            video[key] = value
        elif key == "pool_by_length":
            if value not in ("true", "false"):
                raise ValueError(f"pool_by_length is true or false, got {value!r}")
            video[key] = value == "true"
        else:
            number = value.removeprefix("-").replace(".", "", 1).isdecimal()
            video.setdefault("filter_settings", {})[key] = float(value) if number else value
    if "filter" in video:  # another filter has settings of its own
        video.setdefault("filter_settings", {})
    return text, video


def find_folder(source: str) -> tuple[Path, str, str]:
    """A model's folder, its name, and by what it is found again from anywhere.

    source: as `load_model` takes it; one of the hub is fetched. Raises ValueError for a model that
    is no folder, as those of open_clip, or that is unknown.
    """
    if source.startswith("hf://"):
        from fluxclip.model import hub

        name = source.partition("@")[0].rpartition("/")[2]
        return hub.fetch(source), name, source
    if source.startswith("open_clip:"):
        raise ValueError(f"{source} is weights of open_clip, not a model folder")
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
