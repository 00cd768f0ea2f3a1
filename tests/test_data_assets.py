"""The data that ships with the repository keeps the promises of its README."""

import importlib.util
import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

COUNTS = {"all": 734, "train": 412, "val": 50, "test": 150, "stills": 831}
HELD_OUT = ("val", "test")

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def splits(emoji: Path) -> dict[str, Records]:
    return {name: json.loads((emoji / f"{name}.json").read_text("utf-8")) for name in COUNTS}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """scripts/build_animated_emoji.py as a module."""
    path = Path(__file__).resolve().parents[1] / "scripts" / "build_animated_emoji.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_counts(splits: dict[str, Records]) -> None:
    assert {name: len(records) for name, records in splits.items()} == COUNTS


def test_files_and_records_are_the_same_set(emoji: Path, splits: dict[str, Records]) -> None:
    named = [record["video"] for name in ("all", "stills") for record in splits[name]]
    files = [f"{path.parent.name}/{path.name}" for path in emoji.glob("*/*")]
    assert sorted(named) == sorted(files)


def test_splits_are_disjoint_parts_of_all(splits: dict[str, Records]) -> None:
    whole = {record["video"]: record for record in splits["all"]}
    parts = [record for name in ("train", *HELD_OUT) for record in splits[name]]
    assert all(whole[record["video"]] == record for record in parts)
    assert len({record["video"] for record in parts}) == len(parts)


def test_families_are_disjoint_and_one_clip_each_where_held_out(
    splits: dict[str, Records],
) -> None:
    families = {name: {record["family"] for record in splits[name]} for name in splits}
    assert [len(families[name]) for name in HELD_OUT] == [COUNTS[name] for name in HELD_OUT]
    assert not families["val"] & families["test"]
    for trained, held_out in itertools.product(("train", "stills"), HELD_OUT):
        assert not families[trained] & families[held_out]


def test_no_training_name_contains_a_held_out_name(splits: dict[str, Records]) -> None:
    """All content words of it: "tiger face" is not trained on where "tiger" is tested."""
    function_words = {"a", "and", "in", "of", "on", "or", "the", "to", "with", "without"}
    generic_words = {"face", "hand", "man", "person", "woman", "up", "down"}

    def words(record: dict[str, Any]) -> set[str]:
        return set(re.findall(r"[^\W_]+", record["caption"][0].lower()))

    held_out = {
        record["caption"][0]: words(record) - function_words - generic_words
        for name in HELD_OUT
        for record in splits[name]
    }
    assert all(held_out.values())
    leaks = [
        (record["caption"][0], name)
        for split in ("train", "stills")
        for record in splits[split]
        for name, content in held_out.items()
        if content <= words(record)
    ]
    assert leaks == []


def test_captions_are_a_name_and_at_most_one_list_of_keywords(
    splits: dict[str, Records],
) -> None:
    captions = [record["caption"] for name in ("all", "stills") for record in splits[name]]
    assert all(len(caption) in (1, 2) and all(map(str.strip, caption)) for caption in captions)
    assert all(name not in keywords.split(", ") for name, *rest in captions for keywords in rest)


def test_sampled_clips_and_stills_decode(emoji: Path, splits: dict[str, Records]) -> None:
    for record in splits["all"][::60]:
        with av.open(str(emoji / record["video"])) as container:
            frames = list(container.decode(video=0))
        times_s = np.array([frame.time for frame in frames])
        assert 13 <= len(frames) <= 97
        assert (frames[0].width, frames[0].height) == (224, 224)
        assert times_s[0] == 0
        assert (np.diff(times_s) > 0).all()
        assert 0.4 < times_s[-1] < 4.2
    for record in splits["stills"][::80]:
        with Image.open(emoji / record["video"]) as image:
            assert image.size == (224, 224)
            assert np.asarray(image.convert("RGB")).std() > 0


def test_film_excerpts_are_what_their_readme_says(assets: Path) -> None:
    for name, size, frames in (("360p", (640, 360), 1800), ("720p", (1280, 720), 576)):
        with av.open(str(assets / "film" / f"film_{name}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.width, stream.height) == size
            assert stream.frames == frames
            assert stream.average_rate == 24


def test_attribution_ships_with_the_data(assets: Path) -> None:
    notice = (assets.parent / "NOTICE").read_text("utf-8")
    emoji = (assets / "animated-emoji" / "README.md").read_text("utf-8")
    film = (assets / "film" / "README.md").read_text("utf-8")
    for text in (notice, emoji):
        assert "Microsoft Fluent Emoji" in text
        assert "MIT" in text
        assert "Unicode-3.0" in text
    for text in (notice, film):
        assert "Big Buck Bunny" in text
        assert "Blender Foundation" in text
        assert "Creative Commons Attribution 3.0" in text


def test_script_derives_families_train_and_stills_as_they_are(
    script: ModuleType, emoji: Path, splits: dict[str, Records]
) -> None:
    for record in splits["all"] + splits["stills"]:
        assert script.family_of(Path(record["video"]).stem) == record["family"]
    clips = splits["all"]
    assert script.split(clips, splits["stills"], emoji) == splits
    leaked = {"video": "x", "caption": [splits["test"][0]["caption"][0]], "family": "new"}
    assert script.split(clips, [leaked], emoji)["stills"] == []


def test_script_keeps_true_frame_times(script: ModuleType, tmp_path: Path) -> None:
    """Uneven times survive, transparent becomes white, and a frame keeps its picture."""
    durations_ms = [40, 120, 80, 200]
    greys = [20, 90, 160, 230]
    pictures = []
    for grey in greys:
        pixels_HWC = np.full((256, 256, 4), (grey, grey, grey, 255), dtype=np.uint8)
        pixels_HWC[:64, :, 3] = 0
        pictures.append(Image.fromarray(pixels_HWC))
    source = tmp_path / "animated.webp"
    pictures[0].save(
        source, save_all=True, append_images=pictures[1:], duration=durations_ms, lossless=True
    )
    script.write_clip(source, tmp_path / "clip.mp4")
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([0, 0.04, 0.16, 0.24])
    for frame, grey in zip(frames, greys, strict=True):
        pixels_HWC = frame.to_ndarray(format="rgb24")
        assert pixels_HWC.shape == (224, 224, 3)
        assert abs(int(pixels_HWC[150, 100, 0]) - grey) <= 4
        assert pixels_HWC[20, 100, 0] >= 250
