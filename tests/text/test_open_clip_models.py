"""Weights of open_clip, whoever asks for them: what does not belong together is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fluxclip import load_model
from fluxclip.model.checkpoints.open_clip import from_open_clip
from fluxclip.text.encoder import load_encoder


def as_frames(name: str, pretrained: str) -> object:
    return load_model(f"open_clip:{name}/{pretrained}")


def as_text(name: str, pretrained: str) -> object:
    return load_encoder("open_clip_tower", f"{name}/{pretrained}", max_tokens=77)


@pytest.mark.parametrize("load", [as_frames, as_text, from_open_clip])
def test_what_does_not_fit_is_one_line_with_the_way_out(
    load: Callable[[str, str], object], tmp_path: Path
) -> None:
    """Nothing is fetched for it."""
    with pytest.raises(ValueError, match="whose GELU is another: use ViT-B-16-quickgelu/openai"):
        load("ViT-B-16", "openai")
    with pytest.raises(FileNotFoundError, match="no tag of ViT-B-16-quickgelu; its tags: openai"):
        load("ViT-B-16-quickgelu", "datacomp_xl_s13b_b90k")
    save_file({"stray": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors does not load: .*Missing") as error:
        load("ViT-S-32-alt", str(tmp_path / "other.safetensors"))
    assert "\n" not in str(error.value)
