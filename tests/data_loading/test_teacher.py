"""Teacher features are cut where the tokens of a sample lie, and are of the records they claim."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fluxclip.data.sources import Record
from fluxclip.data.teacher import TeacherFeatures

ROWS = 16


def records(count: int) -> list[Record]:
    return [Record(Path(f"clips/{i}.mp4"), (f"clip {i}",), None) for i in range(count)]


def write(path: Path, features: torch.Tensor, names: list[str]) -> Path:
    save_file({"features": features}, path, metadata={"videos": json.dumps(names)})
    return path


@pytest.fixture
def places(tmp_path: Path) -> TeacherFeatures:
    """Features that say where they are: channels (record, frame, x, y), x and y 0-1."""
    middles = (torch.arange(ROWS) + 0.5) / ROWS
    features = torch.zeros(3, 4, ROWS, ROWS, 4)
    features[..., 0] = torch.arange(3.0)[:, None, None, None]
    features[..., 1] = torch.arange(4.0)[:, None, None]
    features[..., 2] = middles
    features[..., 3] = middles[:, None]
    path = write(tmp_path / "t.safetensors", features.half(), [f"x/{i}.mp4" for i in range(3)])
    return TeacherFeatures(path, records(3))


def test_features_lie_where_the_tokens_do(places: TeacherFeatures) -> None:
    crop = (0.25, 0.125, 0.75, 0.875)  # top, left, bottom, right
    shares = np.array([0.1, 0.6, 0.99])
    rows = 4
    cut = places.cut(2, shares_T=shares, crop=crop, rows=rows, mirror=False).float()
    assert cut.shape == (3, rows * rows, places.channels)
    assert (cut[..., 0] == 2).all()
    assert cut[:, 0, 1].tolist() == [0, 2, 3]  # the frame that shows that share of the clip
    at = (torch.arange(rows) + 0.5) / rows
    x = (0.125 + at * 0.75).expand(rows, rows).flatten()
    y = (0.25 + at * 0.5)[:, None].expand(rows, rows).flatten()
    torch.testing.assert_close(cut[0, :, 2], x, atol=1e-3, rtol=0)
    torch.testing.assert_close(cut[0, :, 3], y, atol=1e-3, rtol=0)
    mirrored = places.cut(2, shares_T=shares, crop=crop, rows=rows, mirror=True).float()
    as_rows = cut.view(3, rows, rows, -1)
    torch.testing.assert_close(mirrored.view(3, rows, rows, -1), as_rows.flip(2), atol=1e-3, rtol=0)


def test_it_travels_to_worker_processes(places: TeacherFeatures) -> None:
    arguments = dict(shares_T=np.array([0.5]), crop=(0.0, 0.0, 1.0, 1.0), rows=2, mirror=False)
    before = pickle.loads(pickle.dumps(places)).cut(1, **arguments)
    assert torch.equal(before, places.cut(1, **arguments))
    again = pickle.loads(pickle.dumps(places))  # also once it has been read from
    assert torch.equal(before, again.cut(1, **arguments))


@pytest.mark.parametrize("names", [["a.mp4", "b.mp4"], ["0.mp4"], []])
def test_features_of_other_files_are_refused(tmp_path: Path, names: list[str]) -> None:
    path = write(tmp_path / "t.safetensors", torch.zeros(2, 1, 2, 2, 3), names)
    with pytest.raises(ValueError, match=r"t\.safetensors holds features of .* files"):
        TeacherFeatures(path, records(2))


def test_what_is_no_file_of_features_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"teacher_features\.py"):
        TeacherFeatures(tmp_path / "none.safetensors", records(2))
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(ValueError, match="holds no teacher features"):
        TeacherFeatures(tmp_path / "bad.safetensors", records(2))
