"""Known moments in long videos: are cuts found, and does a hit say where in the video it is?

    python scripts/bench_moments.py [--model emoji-tiny] [--out benchmarks/moments-cpu.json]
        [--sheet docs/search-hits.png]

40 clips of the animated emoji's test set, drawn by the seed, are joined to 4 long videos of 10 at
known times, with hard cuts. These are added to one collection by shots and to one by windows. Then:

- cuts: the shots' first instants against the times of the joints. A cut is right within
  `TOLERANCE_S`, and each joint counts once: precision, recall, F1.
- moments: the name of each clip is searched for. The right clip wins where the middle of the best
  hit lies in it: among all hits ("overall"), or among those of the video it is in ("of_its_video",
  more cases). There the hit's [start, end) and the clip's are compared: intersection over union.
- cost: seconds of finding cuts alone, on one thread, against the whole of `add`, which does so
  beside embedding. Also for real footage, where decoding costs more: the film of the assets.

Length and stride of the windows are chosen on 80 clips of the training set, joined likewise, as are
the thresholds of `fluxclip.video.shots`. The test clips chose nothing. Emoji last 0.5 to 4 s: what
is best for them is not for films, and the defaults of a collection, 10 s, stay.
"""

import argparse
import io
import json
import os
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
from bench_encoder import cpu_name
from PIL import Image
from rich.console import Console

from fluxclip import load_model
from fluxclip.evaluation.page import QueryHits, ShownHit, contact_sheet
from fluxclip.video import Segment, encoder, probe
from fluxclip.video import shots as shots_module
from fluxclip.video.decoders.pyav import open_video
from fluxclip.video.segments import shots
from fluxclip.video.shots import cut_times_s
from retrieval import Collection, Hit
from retrieval.hits import thumbnail

ROOT = Path(__file__).resolve().parents[1]
EMOJI = ROOT / "assets" / "animated-emoji"
FILM = ROOT / "assets" / "film" / "film_360p.mp4"
TICK = Fraction(1, 12_800)
GOP = 48
CLIPS_A_VIDEO = 10
TOLERANCE_S = 0.25
REPEATS = 3  # of what is timed, in turns
LEAST_CHANGES = [9.0, 12.0, 15.0, 18.0, 21.0, 24.0, 27.0]
CHOICES = [(2.0, 1.0), (3.0, 1.0), (3.0, 1.5), (4.0, 2.0), (10.0, 10.0)]  # length, stride


@dataclass(frozen=True)
class Moment:
    """A clip in a joined video, and its name."""

    name: str
    video: str
    at: Segment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-tiny")
    parser.add_argument("--seed", type=int, default=0, help="which clips, in which order")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--sheet", type=Path, help="draw hits of some queries as a PNG")
    arguments = parser.parse_args()
    model = load_model(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        train = joined_videos("train", 80, Path(folder) / "train", seed=arguments.seed)
        choice = chosen_windows(model, train, Path(folder))
        test = joined_videos("test", 40, Path(folder) / "test", seed=arguments.seed)
        record = {
            "benchmark": "moments", "command": shlex.join(["python", *sys.argv]),
            "date": date.today().isoformat(), "seed": arguments.seed,
            "model": arguments.model, "fingerprint": model.fingerprint,
            "cores": os.cpu_count(), "device": str(model.device), "device_name": cpu_name(),
            "versions": {name: version(name) for name in ("av", "torch", "scenedetect-headless")},
            "clips": len(test), "videos": len({moment.video for moment in test}),
            "cut_tolerance_s": TOLERANCE_S,
            "cuts": cuts_found(test), "least_change_on_train": least_changes(train),
            "windows_on_train": choice,
        }  # fmt: skip
        window_s, stride_s = choice["chosen"]["window_s"], choice["chosen"]["stride_s"]
        moments: dict[str, Any] = {}
        for cut in ("windows", "shots"):
            where = Path(folder) / cut
            options = {"window_s": window_s, "stride_s": stride_s} if cut == "windows" else {}
            with Collection.create(where, model=model, cut=cut, **options) as collection:
                collection.add(sorted({moment.video for moment in test}))
                moments[cut] = {"segments": len(collection), **compared(collection, test)}
                if cut == "shots" and arguments.sheet:
                    draw(collection, test, arguments.sheet)
        record |= {"moments": moments, "cost": cost(model, test, Path(folder))}
    Console().print_json(json.dumps(record))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


def joined_videos(
    split: Literal["train", "test"], num_clips: int, folder: Path, *, seed: int
) -> list[Moment]:
    """Draw clips of a split and join them, ten a video, in a new folder."""
    records = json.loads((EMOJI / f"{split}.json").read_text(encoding="utf-8"))
    drawn = random.Random(seed).sample(records, num_clips)
    folder.mkdir()
    moments: list[Moment] = []
    for at in range(0, num_clips, CLIPS_A_VIDEO):
        part = drawn[at : at + CLIPS_A_VIDEO]
        path = folder / f"joined-{at // CLIPS_A_VIDEO + 1}.mp4"
        spans = join([EMOJI / entry["video"] for entry in part], path)
        moments += [
            Moment(entry["caption"][0], str(path), span)
            for entry, span in zip(part, spans, strict=True)
        ]
    return moments


def join(clips: Sequence[Path], path: Path) -> list[Segment]:
    """Write clips one after the other into one mp4; where each of them is in it."""
    ends = np.cumsum([round(probe(clip).duration_s / TICK) for clip in clips]).tolist()

    def frames() -> Iterator[tuple[int, av.VideoFrame]]:
        for clip, start in zip(clips, [0, *ends], strict=False):
            with open_video(clip) as video:
                for ticks, frame in video.walk(0.0):
                    yield start + round(ticks * video.tick / TICK), frame

    info = probe(clips[0])
    file = io.BytesIO()
    encoder.encode(
        file, frames(), end_ticks=ends[-1], tick=TICK, size=(info.width, info.height), gop=GOP
    )
    path.write_bytes(file.getvalue())
    starts = [0, *ends]
    return [
        Segment(float(start * TICK), float(end * TICK))
        for start, end in zip(starts, ends, strict=False)
    ]


def cuts_found(moments: Sequence[Moment]) -> dict[str, Any]:
    """Precision, recall and F1 of cuts, over all videos."""
    right = found = there = 0
    error_s = 0.0
    for video in sorted({moment.video for moment in moments}):
        joints_s = [m.at.start_s for m in moments if m.video == video and m.at.start_s > 0]
        duration_s = probe(video).duration_s
        pieces = shots(duration_s, cut_times_s(video), longest_s=duration_s)
        left_s = [piece.start_s for piece in pieces[1:]]
        found, there = found + len(left_s), there + len(joints_s)
        for joint_s in joints_s:
            nearest_s = min(left_s, key=lambda cut_s: abs(cut_s - joint_s), default=np.inf)
            if abs(nearest_s - joint_s) <= TOLERANCE_S:
                left_s.remove(nearest_s)
                right, error_s = right + 1, max(error_s, abs(nearest_s - joint_s))
    return {
        "joints": there, "found": found, "right": right,
        "precision": right / max(1, found), "recall": right / there,
        "f1": 2 * right / (found + there), "largest_error_of_right_s": error_s,
    }  # fmt: skip


def compared(collection: Collection, moments: Sequence[Moment]) -> dict[str, Any]:
    """How often the right clip wins, and how well the hit's times fit it where it does."""
    overlaps: dict[str, list[float]] = {"overall": [], "of_its_video": []}
    answers = collection.search_many(
        [moment.name for moment in moments], k=len(moments), group_by="video"
    )
    for moment, hits in zip(moments, answers, strict=True):
        of_its_video = next(hit for hit in hits if hit.video == moment.video)
        for kind, hit in (("overall", hits[0]), ("of_its_video", of_its_video)):
            if is_right(hit, moment):
                overlaps[kind].append(overlap(hit, moment.at))
    return {
        kind: {
            "wins": len(values), "of": len(moments),
            "mean_iou": float(np.mean(values)) if values else 0.0,
            "lowest_iou": min(values, default=0.0),
        }
        for kind, values in overlaps.items()
    }  # fmt: skip


def least_changes(moments: Sequence[Moment]) -> dict[str, Any]:
    """How well cuts are found with other thresholds than that of `fluxclip.video.shots`."""
    chosen, tried = shots_module.LEAST_CHANGE, {}
    for least_change in LEAST_CHANGES:
        shots_module.LEAST_CHANGE = least_change
        tried[str(least_change)] = cuts_found(moments)
    shots_module.LEAST_CHANGE = chosen
    return {"chosen": chosen, "tried": tried}


def is_right(hit: Hit, moment: Moment) -> bool:
    middle_s = (hit.start_s + hit.end_s) / 2
    return hit.video == moment.video and moment.at.start_s <= middle_s < moment.at.end_s


def overlap(hit: Hit, truth: Segment) -> float:
    """Intersection over union of two intervals."""
    both_s = min(hit.end_s, truth.end_s) - max(hit.start_s, truth.start_s)
    either_s = max(hit.end_s, truth.end_s) - min(hit.start_s, truth.start_s)
    return max(0.0, both_s) / either_s


def chosen_windows(model: Any, moments: Sequence[Moment], folder: Path) -> dict[str, Any]:
    """Length and stride with the best overlap where the right clip wins in its video."""
    tried = []
    for number, (window_s, stride_s) in enumerate(CHOICES):
        where = folder / f"choice-{number}"
        with Collection.create(
            where, model=model, window_s=window_s, stride_s=stride_s
        ) as collection:
            collection.add(sorted({moment.video for moment in moments}))
            result = compared(collection, moments)["of_its_video"]
        tried.append({"window_s": window_s, "stride_s": stride_s, **result})
    return {"chosen": max(tried, key=lambda entry: entry["mean_iou"]), "tried": tried}


def cost(model: Any, moments: Sequence[Moment], folder: Path) -> dict[str, Any]:
    """Seconds (medians) of finding cuts, on one thread, and of adding by shots and by windows."""
    costs: dict[str, Any] = {}
    joined = sorted({moment.video for moment in moments})
    for name, videos in (("joined emoji", joined), (FILM.name, [str(FILM)])):
        taken_s: dict[str, list[float]] = {"cuts": [], "windows": [], "shots": []}
        for repeat in range(REPEATS):
            begun = time.perf_counter()
            for video in videos:
                cut_times_s(video)
            taken_s["cuts"].append(time.perf_counter() - begun)
            for cut in ("windows", "shots"):
                where = folder / f"{name} {cut} {repeat}"
                with Collection.create(where, model=model, cut=cut) as collection:
                    begun = time.perf_counter()
                    collection.add(videos)
                    taken_s[cut].append(time.perf_counter() - begun)
        medians_s = {kind: statistics.median(seconds) for kind, seconds in taken_s.items()}
        costs[name] = {
            "video_s": sum(probe(video).duration_s for video in videos),
            "finding_cuts_s": medians_s["cuts"],
            "add_by_shots_s": medians_s["shots"],
            "add_by_windows_s": medians_s["windows"],
            "finding_to_add_by_shots": medians_s["cuts"] / medians_s["shots"],
        }
    return costs


def draw(collection: Collection, moments: Sequence[Moment], path: Path) -> None:
    """Hits of the three names whose clip wins by most, and of the first whose clip does not win."""
    answers = {m.name: (m, collection.search(m.name, k=5)) for m in moments}
    won = [name for name, (m, hits) in answers.items() if is_right(hits[0], m)]
    won.sort(key=lambda name: answers[name][1][1].score - answers[name][1][0].score)
    lost = [name for name, (m, hits) in answers.items() if not is_right(hits[0], m)]
    sheet = []
    for name in [*won[:3], *lost[:1]]:
        moment, hits = answers[name]
        shown = [
            ShownHit(
                np.asarray(Image.open(io.BytesIO(thumbnail(hit)))),
                caption=next((m.name for m in moments if is_right(hit, m)), ""),
                score=hit.score,
                start_s=hit.start_s,
                end_s=hit.end_s,
                is_expected=is_right(hit, moment),
                file_name=Path(hit.video).name,
            )
            for hit in hits
        ]
        sheet.append(QueryHits(name, shown))
    contact_sheet(sheet, path)


if __name__ == "__main__":
    main()
