"""Time and memory of ranking a gallery that does not fit as one matrix of scores.

    python scripts/bench_ranking.py [--texts 100000] [--videos 20000] [--out ranking.json]

Random unit vectors of 512 numbers, seed 0, every text a noisy copy of its video; both directions,
raw cosine, then dual softmax. The matrix alone would take 4 bytes x texts x videos: 8 GB.
"""

import argparse
import json
import platform
import resource
import shlex
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np

from fluxclip.evaluation.ranking import retrieval_ranks

DIM = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--videos", type=int, default=20_000)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    video_ND = rng.standard_normal((arguments.videos, DIM), dtype=np.float32)
    video_ND /= np.linalg.norm(video_ND, axis=1, keepdims=True)
    video_of_text_M = np.arange(arguments.texts) % arguments.videos
    text_MD = rng.standard_normal((arguments.texts, DIM), dtype=np.float32) / DIM**0.5
    text_MD += video_ND[video_of_text_M] / 10
    text_MD /= np.linalg.norm(text_MD, axis=1, keepdims=True)
    rows = []
    for temperature in (None, 1.0):
        start = time.perf_counter()
        ranks = retrieval_ranks(
            video_ND, text_MD, video_of_text_M, dual_softmax_temperature=temperature
        )
        rows.append(
            {
                "scores": "cosine" if temperature is None else "dual softmax",
                "seconds": time.perf_counter() - start,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "mrr_text_to_video": ranks.text_to_video.mrr,
                "mrr_video_to_text": ranks.video_to_text.mrr,
            }
        )
        print(rows[-1])
    record = {
        "benchmark": "ranking", "command": shlex.join(["python", *sys.argv]), "seed": 0,
        "texts": arguments.texts, "videos": arguments.videos, "dim": DIM,
        "numpy": np.__version__, "machine": platform.machine(),
        "date": date.today().isoformat(), "rows": rows,
    }  # fmt: skip
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
