"""Rebuild the animated emoji set (clips, stills, captions, splits) from the packages it is made of.

    python scripts/build_animated_emoji.py OUT                    # downloads with `npm pack`
    python scripts/build_animated_emoji.py OUT --packages DIR     # packages already unpacked in DIR
    diff -r assets/animated-emoji OUT                             # says what differs

The art comes from four packages of webp files: a file with several frames becomes a clip, a file
with one frame a still. Captions come from Unicode CLDR. Which clips are held out (`val.json`,
`test.json`) was drawn at random once and is read from the existing set; families, captions, the
train split and the stills follow from rules stated here and are derived anew. A train name that
would give a held-out name away is an error. With the PyAV version of constraints.txt the result
is the same to the byte; other encoder builds give other bytes and the same pictures.
"""

import argparse
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
from PIL import Image
from rich.progress import track

ART = [f"@lobehub/fluent-emoji-anim-{part}@1.0.0" for part in (1, 2, 3, 4)]
NAMES = ["cldr-annotations-full@48.2.0", "cldr-annotations-derived-full@48.2.0"]
EXISTING = Path(__file__).resolve().parents[1] / "assets" / "animated-emoji"

SIDE = 224
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
SKIN_TONES = range(0x1F3FB, 0x1F400)
KEYCAP, TEN = 0x20E3, 0x1F51F
GENDER_SIGNS = (0x2640, 0x2642)
HEART, JOINER, VARIATION = 0x2764, 0x200D, 0xFE0F
KISS, COUPLE = 0x1F48F, 0x1F491
ADULTS = (0x1F468, 0x1F469, 0x1F9D1)
CHILDREN = (0x1F466, 0x1F467)
HUMANS = (*ADULTS, *CHILDREN, 0x1F474, 0x1F475, 0x1F476, 0x1F9D2, 0x1F9D3)
CLOCKS = range(0x1F550, 0x1F568)
GENERIC_WORDS = {
    *("face", "hand", "man", "men", "people", "person", "woman", "women"),
    *("a", "and", "down", "in", "of", "on", "or", "the", "to", "up", "with", "without"),
}

Record = dict[str, str | list[str]]


def download(names: list[str], folder: Path) -> None:
    """Fetch packages with npm and unpack each into a folder of its own."""
    for number, name in enumerate(names):
        print(f"npm pack {name}", flush=True)
        try:
            command = ["npm", "pack", name, "--loglevel=error", "--pack-destination", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        except FileNotFoundError:
            raise FileNotFoundError(
                "npm is not installed: install it, or unpack the packages and give --packages DIR"
            ) from None
        except subprocess.CalledProcessError as error:
            raise ValueError(f"npm could not fetch {name} (its message is above)") from error
        with tarfile.open(folder / done.stdout.split()[-1]) as archive:
            archive.extractall(folder / str(number), filter="data")


def find_packages(folder: Path, names: list[str]) -> dict[str, Path]:
    """Folders of the unpacked packages `names` below a folder, by "name@version"."""
    found = {}
    for path in folder.rglob("package.json"):
        about = json.loads(path.read_text(encoding="utf-8"))
        found[f"{about.get('name')}@{about.get('version')}"] = path.parent
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f"no unpacked package {', '.join(missing)} below {folder}")
    return found


def code_points(stem: str) -> list[int]:
    """The code points in a file name such as "1f3c3-200d-2640-fe0f", without U+FE0F."""
    points = [int(part, 16) for part in re.split("[-_]", stem)]
    return [point for point in points if point != VARIATION]


def is_left_out(points: list[int]) -> bool:
    """Skin-tone variants, flags of countries, and keycaps."""
    variants = any(point in FLAG_LETTERS or point in SKIN_TONES for point in points)
    return variants or KEYCAP in points or points == [TEN]


def family_of(stem: str) -> str:
    """What an emoji shares with its siblings: a family is never on both sides of a split."""
    points = code_points(stem)
    people = [point for point in points if point in (*ADULTS, *CHILDREN)]
    if len(points) == 1 and points[0] in HUMANS:
        return "human"
    if points[0] in CLOCKS:
        return "clock"
    if points[0] in (KISS, COUPLE) or (HEART in points and len(people) == 2):
        return "couple"
    if len(people) > 1:
        return "family"
    ignored = (VARIATION, JOINER, *GENDER_SIGNS)
    rest = [part for part in stem.split("-") if int(part, 16) not in ignored]
    return "person-" + "-".join(rest[1:]) if points[0] in ADULTS else "-".join(rest)


def read_captions(folders: list[Path]) -> dict[str, list[str]]:
    """[name, "keyword, keyword, ..."] of every emoji, by its characters without U+FE0F."""
    captions: dict[str, list[str]] = {}
    for folder in folders:
        (path,) = folder.glob("*/en/annotations.json")
        (root,) = json.loads(path.read_text(encoding="utf-8")).values()
        for characters, about in root["annotations"].items():
            name = about["tts"][0]
            keywords = [word for word in about.get("default", []) if word.lower() != name.lower()]
            caption = [name, ", ".join(keywords)] if keywords else [name]
            captions.setdefault(characters.replace(chr(VARIATION), ""), caption)
    return captions


def words(name: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", name.lower()))


def gives_away(name: str, held_out: list[Record]) -> bool:
    """Whether a name contains all content words of the name of a held-out record."""
    contents = (words(record["caption"][0]) - GENERIC_WORDS for record in held_out)
    return any(content <= words(name) for content in contents)


def split(clips: list[Record], stills: list[Record], existing: Path) -> dict[str, list[Record]]:
    """The records of every JSON file; val and test membership come from the existing ones."""
    by_video = {record["video"]: record for record in clips}
    splits = {"all": clips}
    for name in ("val", "test"):
        members = json.loads((existing / f"{name}.json").read_text(encoding="utf-8"))
        splits[name] = [by_video[record["video"]] for record in members]
    held_out = splits["val"] + splits["test"]
    families = {record["family"] for record in held_out}
    if len(families) != len(held_out):
        raise ValueError(f"{existing}: two held-out clips are of one family")

    def may_be_trained_on(record: Record) -> bool:
        return record["family"] not in families and not gives_away(record["caption"][0], held_out)

    splits["train"] = [record for record in clips if may_be_trained_on(record)]
    splits["stills"] = [record for record in stills if may_be_trained_on(record)]
    return splits


def flatten(image: Image.Image) -> Image.Image:
    """A picture over white, SIDE x SIDE, RGB."""
    layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    return canvas.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def frames_of(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """Every frame of an animated webp with the time at which it appears, in milliseconds."""
    with Image.open(path) as animation:
        time_ms = 0
        for number in range(animation.n_frames):
            animation.seek(number)
            animation.load()
            yield flatten(animation), time_ms
            time_ms += animation.info["duration"]


def write_clip(source: Path, target: Path) -> None:
    """Encode an animated webp as H.264 with its own frame times."""
    millisecond = Fraction(1, 1000)
    options = {"crf": "30", "preset": "veryslow", "g": "48"}
    with av.open(str(target), "w") as container:
        stream = container.add_stream("libx264", rate=24, options=options)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = millisecond
        stream.codec_context.thread_count = 2  # x264 cuts frames in as many slices: fixed bytes
        for image, time_ms in frames_of(source):
            frame = av.VideoFrame.from_image(image)
            frame.pts, frame.time_base = time_ms, millisecond
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_still(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        flatten(image).save(target, quality=82, method=6)


def build(packages: dict[str, Path], existing: Path, out: Path) -> None:
    """Write the whole set into the empty folder `out`."""
    captions = read_captions([packages[name] for name in NAMES])
    art = {path.stem: path for name in ART for path in (packages[name] / "assets").glob("*.webp")}
    clips: list[Record] = []
    stills: list[Record] = []
    for stem in sorted(art):
        points = code_points(stem)
        caption = captions.get("".join(map(chr, points)))
        if caption is None or is_left_out(points):
            continue
        with Image.open(art[stem]) as image:
            animated = getattr(image, "n_frames", 1) > 1
        video = f"clips/{stem}.mp4" if animated else f"stills/{stem}.webp"
        record: Record = {"video": video, "caption": caption, "family": family_of(stem)}
        (clips if animated else stills).append(record)

    splits = split(clips, stills, existing)
    for name, records in splits.items():
        text = json.dumps(records, ensure_ascii=False, indent=0)
        (out / f"{name}.json").write_text(text, encoding="utf-8")
    (out / "clips").mkdir()
    (out / "stills").mkdir()
    for record in track(splits["all"], description="clips"):
        video = str(record["video"])
        write_clip(art[Path(video).stem], out / video)
    for record in track(splits["stills"], description="stills"):
        video = str(record["video"])
        write_still(art[Path(video).stem], out / video)
    print(", ".join(f"{name}: {len(records)}" for name, records in splits.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--packages", type=Path, help="folder that holds the unpacked packages")
    parser.add_argument("--existing", type=Path, default=EXISTING, help="set with val and test")
    arguments = parser.parse_args()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if any(arguments.out.iterdir()):
            raise FileExistsError(f"{arguments.out} is not empty: give a new folder")
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.packages or Path(scratch)
            if arguments.packages is None:
                download([*ART, *NAMES], folder)
            build(find_packages(folder, [*ART, *NAMES]), arguments.existing, arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"build_animated_emoji: {error}")


if __name__ == "__main__":
    main()
