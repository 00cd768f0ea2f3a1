"""Score the shipped weights on the test clips and draw the README's pictures.

    python scripts/score_shipped.py [--model emoji-tiny]

Writes benchmarks/MODEL.json (the evaluation record), docs/curve.png and docs/hits.png.
"""

import argparse
import os
import tempfile
from pathlib import Path

from rich.console import Console

from fluxclip import load_model
from fluxclip.demo import answers
from fluxclip.evaluation import page, report
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.record import save_record
from retrieval import Collection

BUDGETS = (None, 72, 36, 18, 9)  # of 144 tokens: all, a half, a quarter, ...
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="emoji-tiny")
    model = load_model(parser.parse_args().model)
    os.chdir(ROOT)  # so that the record's paths are the repository's
    task = read(Path("assets/animated-emoji/test.json"))
    record = evaluate(model, task, budgets=BUDGETS)
    report.print_table(record, Console())
    save_record(record, Path("benchmarks") / f"{model.name}.json")
    Path("docs").mkdir(exist_ok=True)
    report.plot_curve([record], Path("docs/curve.png"))
    with (
        tempfile.TemporaryDirectory() as folder,
        Collection.create(Path(folder) / "test-clips", model=model) as collection,
    ):
        collection.add([str(video) for video in task.videos])
        page.contact_sheet(answers(collection, task), Path("docs/hits.png"))


if __name__ == "__main__":
    main()
