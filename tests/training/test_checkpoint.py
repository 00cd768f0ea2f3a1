"""States on disk: what is written comes back bit for bit, whole, or is refused by name."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fluxclip.training import checkpoint, optimizer
from fluxclip.training.checkpoint import Progress

PROGRESS = Progress(
    step=7, best=31.25, seconds=1.5, command="fluxclip train x",
    annotations={"data.0.annotations": "ab12"},
)  # fmt: skip


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    torch.manual_seed(3)
    return {
        "parameters/w": torch.randn(4, 3).T,
        "parameters/odd": torch.tensor([0.0, -0.0, 1e-45, float("inf"), float("nan")]),
        "exp_avg/w": torch.randn(3, 4),
        "step/w": torch.tensor(7.0),
    }


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_a_state_comes_back_bit_for_bit(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = checkpoint.save(tmp_path / "state", PROGRESS, tensors=tensors)
    assert path == tmp_path / "state" / "step-7"
    assert checkpoint.read_progress(path) == PROGRESS
    found = checkpoint.read_tensors(path, expected=tensors)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert bits(found[name]) == bits(tensor)


def test_the_newest_two_stay_and_leftovers_go(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = tmp_path / "state"
    assert checkpoint.states(folder) == []
    (folder / ".step-3.partial").mkdir(parents=True)
    for step in (2, 9, 10):  # 10 is newer than 9, whatever their names sort like
        checkpoint.save(folder, replace(PROGRESS, step=step), tensors=tensors)
    assert [path.name for path in checkpoint.states(folder)] == ["step-9", "step-10"]
    assert {path.name for path in folder.iterdir()} == {"step-9", "step-10"}


def test_what_does_not_fit_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = checkpoint.save(tmp_path, PROGRESS, tensors=tensors)
    more = {**tensors, "exp_avg/new": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"step-7 is no state of this run: missing exp_avg/new$"):
        checkpoint.read_tensors(path, expected=more)
    less = {name: tensor for name, tensor in tensors.items() if name != "step/w"}
    with pytest.raises(ValueError, match="unexpected step/w$"):
        checkpoint.read_tensors(path, expected=less)
    other = {**tensors, "parameters/w": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"parameters/w has shape \(3, 4\), not \(3, 5\)"):
        checkpoint.read_tensors(path, expected=other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "delete that folder to continue from the one before it"),
        ('{"format": 1, "step', "delete that folder to continue from the one before it"),
        ('{"format": 2}', "not of state format 1"),
        ('{"format": 1, "steps": 3}', "did you mean 'step'"),
        ('{"format": 1, "step": -3}', "step: .*greater than or equal to 0"),
    ],
)
def test_a_damaged_state_says_so(
    tmp_path: Path, tensors: dict[str, Tensor], text: str | None, message: str
) -> None:
    path = checkpoint.save(tmp_path, PROGRESS, tensors=tensors)
    (path / "state.json").unlink()
    if text is not None:
        (path / "state.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.read_progress(path)
    assert "\n" not in str(error.value)


def test_a_pickle_is_not_loaded(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    path = checkpoint.save(tmp_path, PROGRESS, tensors=tensors)
    torch.save(tensors, path / "tensors.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read_tensors(path, expected=tensors)


def test_what_fails_to_be_written_leaves_what_was_there(
    tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    checkpoint.save(tmp_path, PROGRESS, tensors=tensors)
    (tmp_path / "step-8").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write .*step-8: .*; what was saved before is whole"):
        checkpoint.save(tmp_path, replace(PROGRESS, step=8), tensors=tensors)
    found = checkpoint.read_tensors(tmp_path / "step-7", expected=tensors)
    assert bits(found["exp_avg/w"]) == bits(tensors["exp_avg/w"])


def test_adamw_goes_on_as_if_it_had_never_stopped() -> None:
    """With a parameter that has no gradient, and so no moments, until after the break."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.early, self.late = nn.Linear(5, 3), nn.Linear(5, 3)
            self.frozen = nn.Linear(5, 3).requires_grad_(False)

        def forward(self, x: Tensor, step: int) -> Tensor:
            y = self.early(x) + (self.late(x) if step > 2 else 0)
            return y.square().sum()

    def run(model: Late, adamw: torch.optim.AdamW, steps: range) -> None:
        for step in steps:
            x = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
            adamw.zero_grad()
            model(x, step).backward()
            optimizer.step_down(adamw, model, lr=0.1 / (step + 1), clip_norm=1.0)

    def fresh() -> tuple[Late, torch.optim.AdamW]:
        model = Late()
        return model, optimizer.build(model, lr=0.1, betas=(0.9, 0.98), weight_decay=0.02)

    whole, broken, resumed = fresh(), fresh(), fresh()
    run(*whole, range(6))
    run(*broken, range(2))
    tensors = optimizer.moments(broken[1], broken[0])
    assert not any("frozen" in name for name in tensors)
    resumed[0].load_state_dict(broken[0].state_dict())
    optimizer.set_moments(resumed[1], resumed[0], tensors)
    run(*resumed, range(2, 6))
    for a, b in zip(whole[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
