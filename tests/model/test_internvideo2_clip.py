"""InternVideo2-CLIP against reference outputs of the official classes, and its files."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize

from fluxclip.model.checkpoints.files import Converted
from fluxclip.model.checkpoints.internvideo2_clip import SIZES, from_internvideo2_clip
from fluxclip.model.fluxclip import FluxCLIP
from fluxclip.model.presets import VideoTowerConfig

GOLDEN = dict(np.load(Path(__file__).parents[1] / "data" / "internvideo2_clip_tiny.npz"))
META = json.loads(GOLDEN["meta"].tobytes())
CASES = list(enumerate(META["cases"]))
VIDEO = VideoTowerConfig(
    anatomy="internvideo2", width=48, depth=3, heads=4, pool_heads=4, pooled=32,
    table_frames=8, table_side=56,
)  # fmt: skip
TOLERANCE: dict[str, Any] = {"atol": 1e-5, "rtol": 0}
TEXT_TOWER = "internvideo2-test-tower"
ALIGN = ("vision_align.", "temp")
POOL = "vision_encoder.clip_projector."


def wrapper() -> dict[str, Tensor]:
    """The official wrapper's state dict, one complete file."""
    names = {"state/": "", "text_state/": "text_encoder."}
    return {
        ours + key.removeprefix(theirs): torch.from_numpy(GOLDEN[key].copy())
        for theirs, ours in names.items()
        for key in GOLDEN
        if key.startswith(theirs)
    }


def pieces() -> dict[str, dict[str, Tensor]]:
    """The same weights as three files: vision base, MobileCLIP, overlay."""
    torch.manual_seed(1)
    state = wrapper()
    vision = "vision_encoder."
    base = {k.removeprefix(vision): x for k, x in state.items() if k.startswith(vision)}
    trained_from = {
        k: x + 0.3 * x.std() * torch.randn_like(x) if "clip_projector" in k and x.ndim > 1 else x
        for k, x in base.items()
    }
    return {
        "base": {**trained_from, "clip_pos_embed": torch.zeros(1), "head.bias": torch.zeros(7),
                 "mae_decoder.0.head.weight": torch.zeros(2, 2), "fc_norm.weight": torch.ones(3)},
        "text": {**{k: x for k, x in state.items() if k.startswith("text_encoder.")},
                 "image_encoder.model.weight": torch.zeros(3), "logit_scale": torch.ones(())},
        "overlay": {k: x for k, x in state.items() if k.startswith((POOL, *ALIGN))},
    }  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def text_tower(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The text tower's tiny size made known to open_clip."""
    theirs = META["config"]["text"]
    size = {"context_length": 77, "vocab_size": 512, "width": 64, "heads": 4, "layers": 2}
    images = {"image_size": 32, "patch_size": 32, "width": 64, "layers": 1}
    path = tmp_path_factory.mktemp("configurations") / f"{TEXT_TOWER}.json"
    path.write_text(
        json.dumps({"embed_dim": theirs["embed_dim"], "vision_cfg": images, "text_cfg": size})
    )
    open_clip.add_model_config(path)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a state dict as a .pth file."""

    def save(name: str, state: Any) -> Path:
        torch.save(state, tmp_path / f"{name}.pth")
        return tmp_path / f"{name}.pth"

    return save


def convert(**files: Any) -> Converted:
    return from_internvideo2_clip(video=VIDEO, text_tower=TEXT_TOWER, **files)


@pytest.fixture(scope="module", params=["erf", "tanh"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FluxCLIP:
    path = tmp_path_factory.mktemp("complete") / "model.safetensors"
    save_file(wrapper(), path)
    return convert(complete=path, gelu=request.param).model


def frames_of(case: dict[str, Any]) -> Tensor:
    shape = (case["batch"], case["frames"], 3, case["side"], case["side"])
    x = np.random.default_rng(case["input_seed"]).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(x).permute(0, 1, 3, 4, 2)


@pytest.mark.parametrize(("i", "case"), CASES)
@torch.no_grad()
def test_videos_and_images_as_the_official_class(
    model: FluxCLIP, i: int, case: dict[str, Any]
) -> None:
    frames, suffix = frames_of(case), "_tanh" if model.config.video.gelu == "tanh" else ""
    patches = model.video.embed(frames)
    encoded = model.video.encode(patches, model.video.select(patches, None))
    tokens_mean = encoded.tokens.mean(1)
    if not suffix:
        np.testing.assert_allclose(tokens_mean, GOLDEN[f"case{i}/tokens_mean"], **TOLERANCE)
    pooled = model.video(frames)
    np.testing.assert_allclose(pooled, GOLDEN[f"case{i}/pooled{suffix}"], **TOLERANCE)
    aligned = model.encode_video(frames)
    np.testing.assert_allclose(aligned, GOLDEN[f"case{i}/aligned{suffix}"], **TOLERANCE)
    raw = model.video_projection(pooled)
    np.testing.assert_allclose(raw, GOLDEN[f"case{i}/align_raw{suffix}"], **TOLERANCE)
    other = GOLDEN[f"case{i}/pooled{'' if suffix else '_tanh'}"]
    assert np.abs(pooled.numpy() - other).max() > 1e-4  # the two GELUs are told apart


@torch.no_grad()
def test_texts_as_the_official_class(model: FluxCLIP) -> None:
    for case in ("text/case0", "text/case1"):
        ids = torch.from_numpy(GOLDEN[f"{case}_ids"]).long()
        np.testing.assert_allclose(model.text_features(ids), GOLDEN[case], **TOLERANCE)
        np.testing.assert_allclose(model.encode_text(ids), GOLDEN[f"{case}_norm"], **TOLERANCE)
    assert abs(model.logit_scale.item() - 1 / GOLDEN["state/temp"].item()) < 1e-3


@pytest.mark.parametrize("budget", [1, 20, 63])
@torch.no_grad()
def test_packed_with_other_clips_a_vector_stays(model: FluxCLIP, budget: int) -> None:
    groups = [torch.randn(2, 4, 56, 56, 3), torch.randn(1, 1, 56, 56, 3)]
    together = model.encode_clips(groups, budget)
    apart = torch.cat([model.encode_video(frames, budget) for frames in groups])
    torch.testing.assert_close(together, apart, **TOLERANCE)


def published(width: int, depth: int) -> dict[str, Tensor]:
    """The wrapper of a published size, without values: the tiny one, grown."""
    vision = {48: width, 144: 3 * width, 192: 4 * width, 32: 768, 24: 512, 129: 2049}
    text = {512: 49408, 64: 512, 192: 1536, 256: 2048, 24: 512}
    state = {}
    for name, tensor in wrapper().items():
        sizes = text if name.startswith("text_encoder.") else vision
        shape = [sizes.get(size, size) for size in tensor.shape]
        part, _, rest = name.partition(".0.")
        if part.endswith(".blocks"):
            names = [f"{part}.{i}.{rest}" for i in range(depth)]
        elif part.endswith(".transformer"):
            names = [f"{part}.{i}.{rest}" for i in range(12)]
        elif ".blocks." in name or ".transformer." in name:
            continue
        else:
            names = [name]
        state |= {each: torch.empty(shape, device="meta") for each in names}
    return state


@pytest.mark.parametrize(
    ("size", "entries", "values"),
    [("S/14", 328, 86_867_201), ("B/14", 328, 153_262_337), ("L/14", 484, 372_752_641)],
)
def test_the_published_sizes_load(
    write: Callable[..., Path], size: str, entries: int, values: int
) -> None:
    expected = SIZES[size]
    state = published(expected.width, expected.depth)
    assert len(state) == entries
    with torch.device("meta"):
        model, report = from_internvideo2_clip(complete=write("whole", state))
    assert sum(p.numel() for p in model.parameters()) == values
    vision = {"S/14": 23_043_840, "B/14": 89_438_976, "L/14": 308_929_280}
    assert sum(p.numel() for p in model.video.parameters()) == vision[size]
    assert model.grid(None) == (8, 224)
    assert model.num_tokens(8, 224) == 2048
    assert len(report.parts[0].used) == entries


@pytest.mark.parametrize("container", [None, "module", "model"])
@torch.no_grad()
def test_base_text_and_overlay_make_the_complete_model(
    write: Callable[..., Path], container: str | None
) -> None:
    def wrap(state: dict[str, Tensor]) -> Any:
        half = {k: x.bfloat16() for k, x in state.items()}
        return half if container is None else {container: half, "epoch": 3}

    files = {name: write(name, wrap(state)) for name, state in pieces().items()}
    made, report = convert(bases=[files["base"]], text=files["text"], overlay=files["overlay"])
    whole = write("whole", {k: x.bfloat16() for k, x in wrapper().items()})
    expected = convert(complete=whole, gelu="tanh").model
    assert made.config == expected.config
    assert made.config.video.gelu == "tanh"
    for name, tensor in expected.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(made.state_dict()[name], tensor), name
    base, text, overlay = report.parts
    assert len(overlay.used) == len(pieces()["overlay"]) == 19
    assert not overlay.ignored
    assert set(text.ignored) == {"image_encoder.model.weight", "logit_scale"}
    assert set(base.ignored) == {
        "clip_pos_embed", "mae_decoder.0.head.weight", "head.bias", "fc_norm.weight",
    }  # fmt: skip
    assert convert(complete=whole).model.config.video.gelu == "erf"


def test_the_base_that_the_overlay_was_trained_from_is_told(
    write: Callable[..., Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    files = {name: write(name, state) for name, state in pieces().items()}
    stranger = {
        k: torch.randn_like(x) * x.std() if x.ndim > 1 else x for k, x in pieces()["base"].items()
    }
    other = write("stranger", stranger)
    rest = {"text": files["text"], "overlay": files["overlay"]}
    for bases in ([files["base"], other], [other, files["base"]]):
        notes = convert(bases=bases, **rest).report.notes
        assert f"Base taken: {tmp_path.name}/base.pth, the nearest." in notes
        cosines = [float(note.split("cosine ")[1][:6]) for note in notes if "cosine" in note]
        assert max(cosines) > 0.9 > 0.1 > min(cosines)
    with pytest.raises(
        ValueError, match=r"was not trained from .*stranger\.pth.*--base may be"
    ) as error:
        convert(bases=[other], **rest)
    assert "\n" not in str(error.value)


def spoil(**changes: Tensor | None) -> dict[str, Tensor]:
    state = {**wrapper(), **{k: x for k, x in changes.items() if x is not None}}
    return {k: x for k, x in state.items() if changes.get(k, x) is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (pieces()["overlay"], r"only an overlay, 19 tensors: give a vision base.*--base"),
        (spoil(stray=torch.ones(2)), "unexpected stray"),
        (spoil(temp=None), "no temp"),
        (
            spoil(**{"vision_encoder.blocks.1.attn.qkv.weight": None}),
            r"missing video\.blocks\.1\.attn\.qkv\.weight",
        ),
        (spoil(**{"text_encoder.projection_layer": None}), "missing projection_layer"),
        (
            spoil(**{"vision_encoder.pos_embed": torch.zeros(1, 65, 48)}),
            r"pos_embed has shape \(1, 65, 48\), not \(1, \d+, 48\)",
        ),
        (spoil(**{"vision_encoder.cls_token": torch.zeros(1, 1, 64)}), r"\(64,\), not \(48,\)"),
        ({"weight": torch.ones(2)}, "no InternVideo2-CLIP"),
        ([1, 2], "no tensors by name"),
    ],
)
def test_files_that_do_not_fit_are_named(
    write: Callable[..., Path], state: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        convert(complete=write("complete", state))
    assert "\n" not in str(error.value)


def test_mistakes_about_the_three_files(write: Callable[..., Path], tmp_path: Path) -> None:
    files = {name: write(name, state) for name, state in pieces().items()}
    base, text, overlay = files["base"], files["text"], files["overlay"]
    with pytest.raises(ValueError, match="no model alone: --base and --text missing"):
        convert(overlay=overlay)
    with pytest.raises(ValueError, match="one or the other"):
        convert(complete=base, overlay=overlay)
    with pytest.raises(ValueError, match="is no MobileCLIP file"):
        convert(bases=[base], text=base, overlay=overlay)
    with pytest.raises(ValueError, match=r"text\.pth is no vision base"):
        convert(bases=[text], text=text, overlay=overlay)
    with pytest.raises(ValueError, match=r"base\.pth is no overlay"):
        convert(bases=[base], text=text, overlay=base)
    wide = {
        k: torch.zeros(64, 64) if x.shape == (48, 48) else x for k, x in pieces()["base"].items()
    }
    with pytest.raises(ValueError, match=r"base of another size: .*\(64, 64\), in the overlay"):
        convert(bases=[write("wide", wide)], text=text, overlay=overlay)
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        convert(complete=tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"width 48 with 3 blocks; known are S/14 \(384, 12\)"):
        from_internvideo2_clip(complete=write("whole", wrapper()))


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_no_code_of_a_file_runs(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare.bin"
    bare.write_bytes(pickle.dumps(Evil(), protocol=2))
    for path in (write("evil", {"temp": torch.ones(()), "more": Evil()}), bare):
        with pytest.raises(ValueError, match="would run code when loaded") as error:
            convert(complete=path)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="no readable weights file"):
        convert(complete=tmp_path / "cut.safetensors")


def test_the_unit_length_is_of_the_shared_space(model: FluxCLIP) -> None:
    with torch.no_grad():
        vectors = model.encode_video(torch.randn(2, 8, 56, 56, 3), 30)
    torch.testing.assert_close(vectors, normalize(vectors, dim=-1))
    assert vectors.shape == (2, 24)
