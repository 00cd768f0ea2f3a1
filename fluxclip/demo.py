"""The demo: train from scratch for a few minutes, score, index, search, and write a report.

Runs in a checkout of the repository, which holds the clips and the recipe.
"""

import json
import shutil
from pathlib import Path

from rich.console import Console

from fluxclip.embedder import load_model
from fluxclip.evaluation import page, report
from fluxclip.evaluation.budgets import evaluate
from fluxclip.evaluation.protocols import RetrievalTask
from fluxclip.evaluation.protocols.annotations import read
from fluxclip.evaluation.record import save_record
from fluxclip.training import recipe as recipes
from fluxclip.training.loop import train
from fluxclip.video import read_clip
from retrieval import Collection

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = [None, 128, 64, 32, 16]
# written before any model was trained, each for one clip of the test set
QUERIES = {
    "a dancing woman": "woman dancing",
    "a rocket taking off": "rocket",
    "someone riding a bike in the mountains": "person mountain biking",
    "a rainbow after the rain": "rainbow",
    "a shark swimming": "shark",
}
_MARK = "made by fluxclip demo; this folder is replaced when the demo runs again\n"

TRAINED = """\
A small video encoder (FluxViT, {params:.1f} million parameters) learned from scratch, for
{minutes:.0f} minutes on {machine}, which captions belong to which clips. It started from random
numbers and has never seen another picture. Captions are read by a ready-made language model
(MiniLM) that was not changed; only one linear map on top of it was trained.

In every step the encoder saw the same clips with {budgets} tokens kept of {tokens}: the token
selector keeps what moves. So one model answers at any cost, as the table shows."""
DATA = """\
{clips} short animated emoji and {stills} still ones, each with its name and keywords. The {test}
clips it is scored on, and their whole families, were left out of training: what it knows of a
rocket it has from other drawings and other words."""
CAVEAT = """\
This is cartoon art on white, and a few minutes of training on a small computer. The numbers show
that the whole path works and that the model learned something that carries over to clips it never
saw. They say nothing about camera footage. An hour of training, with more drawings and a teacher,
gave the model emoji-tiny that ships with FluxCLIP; the README has its numbers."""


def run(output: Path, *, console: Console) -> Path:
    """Do all of it in `output` and return the path of report.html.

    Raises FileNotFoundError outside a checkout, FileExistsError if `output` holds something else.
    """
    data = ROOT / "assets" / "animated-emoji"
    if not (ROOT / "configs" / "demo.toml").is_file() or not data.is_dir():
        raise FileNotFoundError(
            "the demo needs the clips and recipes of the repository: clone it, then `make demo`"
        )
    _fresh_folder(output)
    recipe = recipes.read(
        ROOT / "configs" / "demo.toml", [f"output={json.dumps(str(output / 'emoji-demo'))}"]
    )
    console.rule("1 of 4: train")
    run_folder = train(recipe, console=console)

    console.rule("2 of 4: score on clips it has never seen")
    model = load_model(run_folder)
    task = read(data / "test.json")
    record = evaluate(model, task, budgets=BUDGETS)
    save_record(record, output / "record.json")
    report.plot_curve([record], output / "curve.png")
    report.print_table(record, console)

    console.rule("3 of 4: index")
    with Collection.create(output / "collection", model=model) as collection:
        added = collection.add([str(video) for video in task.videos])
        console.print(f"{added.added} clips indexed in {output / 'collection'}")
        console.rule("4 of 4: search")
        shown = answers(collection, task)
    for answer in shown:
        hits = ", ".join(hit.caption for hit in answer.hits)
        console.print(f"{answer.query}: {hits} ({answer.verdict()})")
    page.contact_sheet(shown, output / "hits.png")
    lines = (run_folder / "metrics.jsonl").read_text().splitlines()
    seconds = json.loads(lines[-1])["seconds"]
    parameters = sum(p.numel() for p in model.model.parameters() if p.requires_grad)
    page.html_report(
        output / "report.html",
        title="FluxCLIP demo: a video-text model trained in minutes",
        trained=TRAINED.format(
            params=parameters / 1e6,
            minutes=seconds / 60,
            machine="a GPU" if model.device.type == "cuda" else "a CPU",
            budgets=" and ".join(map(str, recipe.flux.budgets)),
            tokens=" to ".join(map(str, recipe.flux.tokens)),
        ),
        data=DATA.format(
            clips=len(json.loads((data / "train.json").read_text())),
            stills=len(json.loads((data / "stills.json").read_text())),
            test=len(task.videos),
        ),
        caveat=CAVEAT,
        record=record,
        queries=shown,
    )
    return output / "report.html"


def answers(collection: Collection, task: RetrievalTask) -> list[page.QueryHits]:
    """What a collection of the task's videos answers to the demo's queries, with pictures."""
    return [_answer(collection, query, task) for query in QUERIES]


def _answer(collection: Collection, query: str, task: RetrievalTask) -> page.QueryHits:
    """The first five hits of a query with a picture from the middle of each."""
    names = {str(v.absolute()): t for v, t in zip(task.videos, task.texts, strict=True)}
    shown = []
    for hit in collection.search(query, k=5):
        clip = read_clip(hit.video, num_frames=1, start_s=hit.start_s, end_s=hit.end_s)
        name = names[hit.video]
        shown.append(
            page.ShownHit(
                clip.frames_THWC[0], name, hit.score, hit.start_s, hit.end_s,
                is_expected=name == QUERIES[query], file_name=Path(hit.video).name,
            )
        )  # fmt: skip
    return page.QueryHits(query, shown)


def _fresh_folder(folder: Path) -> None:
    """An empty folder; an earlier demo in it is removed, anything else is left alone."""
    mark = folder / "DEMO"
    if folder.exists() and any(folder.iterdir()):
        if not mark.is_file() or mark.read_text() != _MARK:
            raise FileExistsError(f"{folder} holds something else than a demo: choose --output")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(_MARK)
