"""Naming the class of real clips: accuracy is that of a plain loop over videos and classes."""

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from colour_embedder import ColourEmbedder
from rich.console import Console

from fluxclip.evaluation.captions import clean_up
from fluxclip.evaluation.classification import TEMPLATES, classify
from fluxclip.evaluation.protocols import ClassificationTask, RetrievalTask
from fluxclip.evaluation.record import load_record, save_record
from fluxclip.evaluation.report import print_table
from fluxclip.video import read_clip

COLOURS = ["red", "blue", "green", "yellow", "purple", "brown"]


@pytest.fixture
def task(hearts: RetrievalTask) -> ClassificationTask:
    """The hearts by their colour."""
    named = {text.removesuffix(" heart"): i for i, text in enumerate(hearts.texts)}
    rows = [named[colour] for colour in COLOURS]
    return ClassificationTask(
        protocol="hearts",
        videos=[hearts.videos[row] for row in rows],
        ids=COLOURS,
        missing=[],
        num_expected=len(rows),
        sources=hearts.sources,
        choices={},
        classes=COLOURS,
        class_of_video_N=np.arange(len(rows)),
    )


def test_accuracy_is_that_of_a_plain_loop(task: ClassificationTask) -> None:
    model = ColourEmbedder()
    record = classify(model, task, budgets=[8], templates=["a {} heart", "{}"])
    ranks = []
    for video, right in zip(task.videos, task.class_of_video_N, strict=True):
        vector = model.embed_video([read_clip(video, num_frames=2, side=112)], token_budget=8)[0]
        scores = [
            np.mean([vector @ text for text in model.embed_text([f"a {name} heart", name])])
            for name in task.classes
        ]
        ranks.append(1 + sum(score > scores[right] for score in scores))
    result = record.results[0]
    assert result.ranks == ranks
    assert result.accuracy.top1 == pytest.approx(100 * np.mean(np.array(ranks) == 1))
    assert result.accuracy.top5 == pytest.approx(100 * np.mean(np.array(ranks) <= 5))
    assert result.accuracy.top1 > 60
    assert record.data.texts.num_texts == 12


def test_record_survives_its_file_and_has_what_the_numbers_are_made_of(
    task: ClassificationTask, tmp_path: Path
) -> None:
    record = classify(ColourEmbedder(), task, num_views=2)
    save_record(record, tmp_path / "record.json")
    loaded = load_record(tmp_path / "record.json")
    assert loaded == record
    result = record.results[0]
    assert result.to_ranks().recall(1) == result.accuracy.top1
    assert (record.num_views, record.num_classes, len(record.templates)) == (2, 6, 16)


def test_table_gives_accuracy_and_cost(task: ClassificationTask) -> None:
    record = classify(ColourEmbedder(), task, budgets=[8, 2], templates=["{}"])
    console = Console(file=StringIO(), width=100)
    print_table(record, console)
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "6 classes by 1 templates, 6 videos in 1 views" in shown
    assert f"{record.results[0].accuracy.top1:.1f} " in shown and "decode ms" in shown


@pytest.mark.parametrize("templates", [["no place"], ["{} and {}"], []])
def test_templates_without_a_place_are_refused(
    task: ClassificationTask, templates: list[str]
) -> None:
    with pytest.raises(ValueError, match="template"):
        classify(ColourEmbedder(), task, templates=templates)


def test_templates_are_sixteen_and_clean_up_is_that_of_internvideo2() -> None:
    assert len(set(TEMPLATES)) == 16
    assert clean_up("  The Man's dog - a 'blue/grey' one;  runs!\n") == (
        "the mans dog a blue grey one runs"
    )
    assert clean_up("<person> A.B: (c) #1 ~*?") == "person ab c 1"
