"""The console command `fluxclip`: one thin function per verb, the work is done elsewhere.

Heavy imports are inside the verbs, so that `fluxclip --help` answers at once.
"""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fluxclip.model.checkpoints.files import Converted
    from retrieval import AddReport

app = typer.Typer(
    help="Train video-text models that run at any token budget, score them, and search with them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
index_app = typer.Typer(help="Build and keep a collection of videos.", no_args_is_help=True)
app.add_typer(index_app, name="index")
eval_app = typer.Typer(invoke_without_command=True)
app.add_typer(eval_app, name="eval")
tokenizer_app = typer.Typer(
    help="Make the vocabulary of a text encoder that is trained from scratch.",
    no_args_is_help=True,
)
app.add_typer(tokenizer_app, name="tokenizer")
convert_app = typer.Typer(
    help="Make a model folder of weights that others have published.", no_args_is_help=True
)
app.add_typer(convert_app, name="convert")

_MODEL_HELP = "folder, run folder, shipped name, hf:// or open_clip:"
Model = Annotated[str, typer.Option(help=_MODEL_HELP)]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object per line")]
Captions = Literal["first", "all", "joined"]
NewFolder = Annotated[Path, typer.Option("--output", help="a folder that does not exist yet")]


def main() -> None:
    """Run the command; a mistake of the user is one line and exit code 2, Ctrl-C exit code 130."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        code = app(arguments, standalone_mode=False)
    except typer.TyperException as error:
        message = getattr(error, "format_message", error.__str__)()
        if "\n" in message:  # no arguments: the help
            _say(message)
        else:
            _say(f"fluxclip: {message} (see fluxclip --help)")
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except SystemExit as error:  # what typer makes of Ctrl-C
        code = error.code
    except BrokenPipeError:
        # the reader of a pipe, such as head, has gone: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        for line in (str(error) or type(error).__name__).splitlines():
            _say(f"fluxclip: {line}{_notes(error)}")
        code = 2
    except Exception as error:  # ours, not the user's
        if debug:
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        reason += _notes(error)
        _say(f"fluxclip: internal error: {reason}; please report it with --debug's traceback")
        code = 2
    if code == 130:
        _say("fluxclip: stopped; what was finished is kept")
    sys.exit(code if isinstance(code, int) else 0)


def _print_version(wanted: bool) -> None:
    if wanted:
        from fluxclip import __version__

        print(f"fluxclip {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_print_version, help="print the version and stop"
        ),
    ] = False,
) -> None:
    """What every verb takes; --debug is read in `main`, before any verb can fail."""


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="a TOML file, such as configs/demo.toml")],
    set: Annotated[
        list[str] | None, typer.Option(help="change a value, as in optimizer.lr=1e-4; repeatable")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on from the newest state of the recipe's run")
    ] = False,
) -> None:
    """Pre-train a model as a recipe says.

    Ctrl-C and SIGTERM finish the step and save a state before they stop the run, with exit codes
    130 and 143; a second Ctrl-C stops at once.
    """
    from fluxclip.training import recipe as recipes
    from fluxclip.training.loop import train

    command = shlex.join(["fluxclip", *sys.argv[1:]])
    settings = recipes.read(recipe, set or ())
    folder = train(settings, resume=resume, console=_console("stderr"), command=command)
    print(f"best model: {folder / 'best'}\nlast model: {folder / 'last'}")


@tokenizer_app.command("train")
def train_tokenizer(
    captions: Annotated[
        list[Path], typer.Argument(help="annotation files (.json), or texts with a caption a line")
    ],
    output: Annotated[Path, typer.Option(help="new folder: text.source of a recipe")],
    vocabulary: Annotated[int, typer.Option(min=1, help="pieces, 256 bytes among them")] = 8000,
    width: Annotated[int, typer.Option(min=1, help="of the encoder that is trained over it")] = 256,
    depth: Annotated[int, typer.Option(min=1, help="its blocks")] = 4,
    heads: Annotated[int, typer.Option(min=1, help="its attention heads")] = 4,
) -> None:
    """Learn a SentencePiece vocabulary from captions in any language.

    A recipe names the folder in its section [text]: encoder = "sentencepiece_transformer", source =
    FOLDER, weights = "stored".
    """
    from fluxclip.text import tokenizer

    tokenizer.refuse_existing(output)
    size = tokenizer.EncoderSize(width=width, depth=depth, heads=heads)
    texts = [caption for path in captions for caption in _captions_in(path)]
    tokenizer.write(output, tokenizer.train(texts, pieces=vocabulary), size)
    print(f"{output}: {vocabulary} pieces learned from {len(texts)} captions")


@eval_app.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help=_MODEL_HELP)] = None,
    annotations: Annotated[
        Path | None,
        typer.Option("--annotations", "--data", help="a data set's file, or its folder"),
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="msrvtt, activitynet, vatex, kinetics400, ucf101, annotations")
    ] = "annotations",
    videos: Annotated[Path | None, typer.Option(help="folder of the video files")] = None,
    split: Annotated[
        str | None, typer.Option(help="one that the protocol has, or a file with an id on a line")
    ] = None,
    language: Annotated[str | None, typer.Option(help="of the captions: en, zh")] = None,
    captions: Annotated[
        Captions | None,
        typer.Option(help="queries: each video's first caption, all, or all joined"),
    ] = None,
    caption_gallery: Annotated[
        Literal["all", "best"],
        typer.Option(help="video to text among all captions, or the best one of each video"),
    ] = "all",
    clean_captions: Annotated[
        bool, typer.Option("--clean-captions", help="lower case, no punctuation")
    ] = False,
    views: Annotated[int, typer.Option(min=1, help="clips per video, for classification")] = 1,
    budgets: Annotated[
        str, typer.Option(help="token budgets, as in all,256,64; all is every token")
    ] = "all",
    output: Annotated[Path | None, typer.Option(help="folder for record.json, curve.png")] = None,
) -> None:
    """Score a model at token budgets: zero-shot retrieval, or classification.

    Vectors are kept in the output folder, so that the same command goes on where it was stopped;
    torchrun shares the work.
    """
    if context.invoked_subcommand is not None:
        return
    for option, value in (("--model", model), ("--annotations", annotations)):
        if value is None:
            raise ValueError(f"Missing option '{option}' (see fluxclip eval --help)")
    from fluxclip import distributed, load_model
    from fluxclip.evaluation import protocols, report
    from fluxclip.evaluation.budgets import evaluate
    from fluxclip.evaluation.classification import classify
    from fluxclip.evaluation.record import AnyRecord, Record, save_record

    wanted = _budgets(budgets)
    given = {"split": split, "language": language, "captions": captions}
    choices = {name: choice for name, choice in given.items() if choice is not None}
    task = protocols.read(protocol, str(annotations), videos=videos, **choices)
    chosen = [captions or "", caption_gallery.replace("all", ""), "clean" * clean_captions]
    name = "-".join(filter(None, [str(model), task.protocol, *chosen]))
    folder = output or Path("runs") / "eval" / _as_file_name(name)
    with distributed.together(), _progress("embed") as advance:
        embedder = load_model(str(model), device=distributed.device())
        folder.mkdir(parents=True, exist_ok=True)
        record: AnyRecord
        if isinstance(task, protocols.RetrievalTask):
            if views != 1:
                raise ValueError("--views is for classification; retrieval scores one clip a video")
            record = evaluate(
                embedder, task, budgets=wanted, caption_gallery=caption_gallery,
                clean_captions=clean_captions, cache=folder / "vectors", on_progress=advance,
            )  # fmt: skip
        else:
            if caption_gallery != "all":
                raise ValueError("--caption-gallery is for retrieval, not for classification")
            record = classify(
                embedder, task, budgets=wanted, num_views=views,
                clean_captions=clean_captions, cache=folder / "vectors", on_progress=advance,
            )  # fmt: skip
    if distributed.rank() > 0:
        return
    save_record(record, folder / "record.json")
    report.print_table(record, _console("stdout"))
    print(f"record: {folder / 'record.json'}")
    if isinstance(record, Record):
        report.plot_curve([record], folder / "curve.png")
        print(f"plot: {folder / 'curve.png'}")


@eval_app.command("report")
def eval_report(
    records: Annotated[list[Path], typer.Argument(help="record.json of evaluations")],
    output: Annotated[Path, typer.Option(help="folder for tokens.png, time.png")] = Path("."),
) -> None:
    """Set retrieval records and published numbers side by side, in tables and plots.

    Records of different tasks go to tables and plots of their own. Everything is made from the
    records' numbers; nothing is measured again.
    """
    from fluxclip.evaluation import report
    from fluxclip.evaluation.record import load_retrieval

    loaded = load_retrieval(records)
    report.print_comparison(loaded, _console("stdout"))
    tasks = report.by_task(loaded)
    for task, compared in tasks.items():
        for against in ("tokens", "time"):
            name = against if len(tasks) == 1 else _as_file_name(f"{against}-{task}")
            report.plot_curve(compared, output / f"{name}.png", against=against)
            print(f"plot: {output / f'{name}.png'}")


@app.command()
def embed(
    files: Annotated[list[str], typer.Argument(help="video or image files")],
    model: Model,
    output: Annotated[Path, typer.Option(help="where the vectors go: an .npz file")],
    token_budget: Annotated[int | None, typer.Option(help="tokens per clip")] = None,
) -> None:
    """Write unit vectors of videos: arrays `vectors` (N, dim) and `files`, and the fingerprint."""
    import numpy as np

    from fluxclip import load_model
    from fluxclip.video import VideoError

    if output.suffix != ".npz":
        raise ValueError(f"--output must end in .npz, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    embedder = load_model(model)
    failed: dict[str, str] = {}
    vectors = []
    with _progress("embed") as advance:
        for done, file in enumerate(files, start=1):
            try:
                vectors.append(embedder.embed_video([file], token_budget=token_budget))
            except (VideoError, OSError) as error:
                failed[file] = str(error)
            advance(done, len(files))
    if vectors:
        good = [file for file in files if file not in failed]
        np.savez(
            output, vectors=np.concatenate(vectors), files=good, fingerprint=embedder.fingerprint
        )
        print(f"{output}: {len(good)} vectors of {embedder.dim} from {embedder.name}")
    _list_failed("not embedded", failed)
    if failed:
        raise typer.Exit(2)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="as --model of other verbs")],
    output: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    captions: Annotated[
        Path | None, typer.Option(help="annotations: compare the vectors of these captions too")
    ] = None,
) -> None:
    """Write a model's text tower as ONNX: text to unit vectors without torch.

    `index create` does so for its collection; COLLECTION/text_encoder is where it belongs.
    """
    from fluxclip.data.sources import annotations
    from retrieval import export_text_encoder

    records = annotations.read(captions, check_files=False) if captions else []
    texts = [caption for record in records for caption in record.captions]
    made = export_text_encoder(model, output, captions=texts)
    print(
        f"{output}: text tower of {made['model_name']} with {made['weights']} weights; cosine to "
        f"the model's own vectors {made['lowest_cosine']} or more, {made['mean_cosine']} on "
        f"average of {made['captions']} captions"
    )


@app.command()
def grids(
    model: Annotated[str, typer.Argument(help="as --model of other verbs; open_clip has no grids")],
    annotations: Annotated[Path, typer.Option(help="validation data, never a test set")],
    budgets: Annotated[str, typer.Option(help="token budgets, as in 512,128,32")],
    frames: Annotated[
        str | None, typer.Option(help="to try: first,last,stride, as in 2,8,2")
    ] = None,
    sides: Annotated[
        str | None, typer.Option(help="to try, in pixels: first,last,stride, as in 56,112,14")
    ] = None,
    captions: Annotated[Captions, typer.Option(help="as in eval")] = "first",
    output: Annotated[
        Path | None, typer.Option(help="write a copy of the model there instead of changing it")
    ] = None,
) -> None:
    """Choose the grid of each token budget by validation loss, and store the table with the model.

    Without --frames and --sides the twelve grids nearest to twice the budget are tried, up to the
    model's position table; with them all of theirs. What the model uses now is always among them.
    """
    from dataclasses import replace

    from fluxclip import distributed, load_model
    from fluxclip.embedder import find_folder
    from fluxclip.evaluation import token_optimization
    from fluxclip.evaluation.protocols.annotations import read
    from fluxclip.model import weights
    from fluxclip.tokens.budget import candidate_grids

    wanted = [budget for budget in _budgets(budgets) if budget is not None]
    if len(wanted) != budgets.count(",") + 1:
        raise ValueError("--budgets of grids takes token counts; all has the model's default grid")
    folder, _, _ = find_folder(model)
    target = _to_rewrite(folder, model) if output is None else _new_folder(output)
    config = weights.read_config(folder)
    v = config.video
    of_table = {"frames": (v.tubelet, v.table_frames, v.tubelet),
                "sides": (min(2 * v.patch, v.table_side), v.table_side, v.patch)}  # fmt: skip
    given = {"frames": frames, "sides": sides}
    bounds = {
        name: of_table[name] if text is None else _bounds(text, f"--{name}")
        for name, text in given.items()
    }
    candidates = {}
    for budget in wanted:
        found = candidate_grids(
            budget, **bounds, patch=v.patch, tubelet=v.tubelet,
            at_most=12 if frames is None and sides is None else None,
        )  # fmt: skip
        if not found:
            ranges = " and ".join(f"{name} {list(b)}" for name, b in bounds.items())
            raise ValueError(
                f"no grid of {ranges} has {budget} tokens: give a smaller budget, or larger "
                f"--frames and --sides"
            )
        candidates[budget] = sorted({*found, config.grids.grid(budget)})
    task = read(annotations, captions=captions)
    with distributed.together(), _progress("embed") as advance:
        embedder = load_model(model, device=distributed.device())
        search = token_optimization.optimize(embedder, task, candidates, on_progress=advance)
    if distributed.rank() > 0:
        return
    if output is not None:
        shutil.copytree(folder, output)
    # first what the table was chosen on: no table without it
    token_optimization.save(search, target)
    weights.write_config(replace(config, grids=config.grids.with_rows(search.rows)), target)
    token_optimization.print_trials(search, _console("stdout"))
    print(f"table: {target / 'config.json'}\ntrials: {target / token_optimization.FILE}")


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="a model folder, run folder or shipped name")],
    name: Annotated[str, typer.Argument(help="org/name on the hub")],
    private: Annotated[bool, typer.Option("--private", help="if the repository is new")] = False,
) -> None:
    """Upload a model folder, with its card, to the Hugging Face hub; hf://org/name loads it."""
    from fluxclip.embedder import find_folder
    from fluxclip.model import hub

    folder, _, _ = find_folder(model)
    address = hub.push(folder, name, private=private)
    print(f"{folder} is hf://{name} now: {address}")


@convert_app.command("internvideo2-clip")
def convert_internvideo2_clip(
    output: NewFolder,
    complete: Annotated[Path | None, typer.Option(help="one file with everything")] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option(help="vision base; of several the one that belongs is taken"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="MobileCLIP's file")] = None,
    overlay: Annotated[Path | None, typer.Option(help="clip/X/pytorch_model.bin")] = None,
    gelu: Annotated[
        Literal["tanh", "erf"] | None, typer.Option(help="erf if complete, else tanh")
    ] = None,
) -> None:
    """InternVideo2-CLIP S/14, B/14, L/14: from --complete, or --base, --text and --overlay."""
    from fluxclip.model.checkpoints.internvideo2_clip import from_internvideo2_clip

    _new_folder(output)
    made = from_internvideo2_clip(
        complete=complete, bases=base or [], text=text, overlay=overlay, gelu=gelu
    )
    _write_converted(made, output)


@convert_app.command("fluxvit")
def convert_fluxvit(
    checkpoint: Annotated[Path, typer.Argument(help="an official FluxViT-S or -B checkpoint")],
    output: NewFolder,
    projector: Annotated[
        int | None, typer.Option(help="keep that of 3072, 2048 or 1024 tokens alone")
    ] = None,
    gelu: Annotated[Literal["tanh", "erf"], typer.Option(help="of the training")] = "tanh",
) -> None:
    """FluxViT's video tower, to be trained on: it comes without a text tower of its own."""
    from fluxclip.model.checkpoints.fluxvit import as_fluxclip

    _new_folder(output)
    _write_converted(as_fluxclip(checkpoint, gelu=gelu, projector=projector), output)


@convert_app.command("open-clip")
def convert_open_clip(
    model: Annotated[
        str, typer.Argument(help="NAME/TAG or NAME/FILE, as in ViT-B-16/laion2b_s34b_b88k")
    ],
    output: NewFolder,
    frames: Annotated[int, typer.Option(min=1, help="of the position table and by default")] = 8,
) -> None:
    """A ViT of open_clip as a video tower that attends over all frames at once."""
    from fluxclip.model.checkpoints.open_clip import from_open_clip

    _new_folder(output)
    name, _, pretrained = model.partition("/")
    if not pretrained:
        raise ValueError(f"{model!r} names no weights: NAME/TAG or NAME/FILE")
    _write_converted(from_open_clip(name, pretrained, num_frames=frames), output)


def _write_converted(made: "Converted", output: Path) -> None:
    from fluxclip.model import weights
    from fluxclip.model.checkpoints.files import card

    weights.save(made.model, output, card=card(output.name, made.report))
    print("\n".join([made.report.about, *made.report.lines()]))
    print(f"model folder: {output}")


@index_app.command("create")
def index_create(
    collection: Annotated[Path, typer.Argument(help="a folder that does not exist yet")],
    model: Model,
    token_budget: Annotated[int | None, typer.Option(help="tokens per segment")] = None,
    window_s: Annotated[
        float, typer.Option(help="longer videos are cut into windows of so many seconds")
    ] = 10.0,
) -> None:
    """Make an empty collection for the vectors of one model."""
    from retrieval import Collection

    with Collection.create(
        collection, model=model, token_budget=token_budget, window_s=window_s
    ) as made:
        info = made.info()
    print(
        f"{collection}: an empty collection for {info['model_name']}, {info['dim']} numbers "
        f"a segment"
    )
    if not info["text_encoder"]:
        _say(
            "note: a search by text will load the model, which takes seconds; "
            "fluxclip export says why"
        )


@index_app.command("add")
def index_add(
    collection: Path,
    paths: Annotated[list[str], typer.Argument(help="files, folders, patterns")],
    meta: Annotated[
        list[str] | None, typer.Option(help="metadata of these videos, key=value; repeatable")
    ] = None,
    json: AsJson = False,
) -> None:
    """Add videos and images; what is there already and unchanged is skipped."""
    from retrieval import Collection

    metadata = _key_values(meta or [], "--meta")
    with Collection.open(collection) as opened, _progress("add") as advance:
        report = opened.add(
            paths, metadata=metadata,
            progress=lambda done, total, path: advance(done, total),
        )  # fmt: skip
        segments = len(opened)
    if json:
        _print_json(
            {
                "added": report.added,
                "skipped": report.skipped,
                "failed": report.failed,
                "segments": segments,
            }
        )
    else:
        print(
            f"{collection}: {report.added} added, {report.skipped} skipped, "
            f"{len(report.failed)} failed; {segments} segments now"
        )
    _report_failures(report)


@index_app.command("remove")
def index_remove(
    collection: Path, videos: Annotated[list[str], typer.Argument(help="paths as added")]
) -> None:
    """Remove videos from a collection; the files themselves stay."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        for video in videos:
            removed = opened.remove(video=video)
            print(f"{video}: {removed} segments removed")


@index_app.command("info")
def index_info(collection: Path, json: AsJson = False) -> None:
    """Say what a collection holds and which model made it."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        info = opened.info()
    if json:
        _print_json(info)
        return
    for key, value in info.items():
        if isinstance(value, dict):
            value = ", ".join(f"{part} {number}" for part, number in value.items())
        print(f"{key}: {value}")


@index_app.command("check")
def index_check(collection: Path) -> None:
    """Verify a collection and repair its index; exit code 2 if something cannot be mended."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        found = opened.check()
    for kind in ("problems", "fixed", "missing_files"):
        for line in getattr(found, kind):
            print(f"{kind.replace('_', ' ')}: {line}")
    if found.problems:
        raise typer.Exit(2)
    print(f"{collection} is sound")


@index_app.command("rebuild")
def index_rebuild(
    collection: Path,
    index: Annotated[str | None, typer.Option(help="a FAISS factory string, such as Flat")] = None,
) -> None:
    """Make the index anew from what is stored."""
    from retrieval import Collection

    with Collection.open(collection) as opened:
        opened.rebuild(index=index)
        print(f"{collection}: {opened.info()['index']} index of {len(opened)} segments")


@app.command()
def search(
    collection: Path,
    text: Annotated[str | None, typer.Argument(help="what to look for")] = None,
    video: Annotated[str | None, typer.Option(help="look for what is like this video")] = None,
    image: Annotated[str | None, typer.Option(help="look for what is like this picture")] = None,
    k: Annotated[int, typer.Option("-k", help="hits")] = 10,
    where: Annotated[
        list[str] | None, typer.Option(help="only with this metadata, key=value; repeatable")
    ] = None,
    group_by: Annotated[
        Literal["video"] | None, typer.Option(help="video: the best segment of each only")
    ] = None,
    json: AsJson = False,
) -> None:
    """Find the moments that answer a sentence, a video or a picture."""
    from retrieval import Collection

    conditions = _key_values(where or [], "--where")
    with Collection.open(collection) as opened:
        hits = opened.search(
            text, video=video, image=image, k=k, where=conditions or None, group_by=group_by
        )
        size = len(opened)
    if json:
        for hit in hits:
            _print_json(hit.to_dict())
    for place, hit in enumerate([] if json else hits, start=1):
        span = f"{hit.start_s:7.2f} - {hit.end_s:7.2f} s"
        print(f"{place:3d}  {hit.score:.3f}  {span}  {hit.video}")
    if len(hits) < k:
        what = "that match" if conditions else f"in a collection of {size} segments"
        _say(f"note: {len(hits)} hits {what}; {k} were asked for")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for everything the demo makes")] = Path(
        "runs/demo"
    ),
) -> None:
    """Train, score, index and search on real clips in a few minutes, and write a report."""
    from fluxclip.demo import run

    report = run(output, console=_console("stderr"))
    print(f"report: {report}")


@app.command()
def doctor(json: AsJson = False) -> None:
    """Say what is installed, what it can do, and what is missing for what."""
    from fluxclip.doctor import findings

    found = findings()
    if json:
        _print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


def _budgets(text: str) -> list[int | None]:
    budgets: list[int | None] = []
    for part in text.split(","):
        word = part.strip()
        if word == "all":
            budgets.append(None)
        elif word.isdecimal() and int(word) > 0:
            budgets.append(int(word))
        else:
            raise ValueError(f"--budgets takes token counts of 1 or more, or all, got {word!r}")
    return budgets


def _captions_in(path: Path) -> list[str]:
    """Every caption of an annotation file; of another file, every line that is not blank."""
    if path.suffix == ".json":
        from fluxclip.data.sources import annotations

        records = annotations.read(path, check_files=False)
        return [caption for record in records for caption in record.captions]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text with a caption on each line") from error
    return [line for line in lines if line.strip()]


def _bounds(text: str, option: str) -> tuple[int, int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option} takes first,last,stride, as in 2,8,2, got {text!r}")
    first, last, stride = map(int, parts)
    return first, last, stride


def _to_rewrite(folder: Path, model: str) -> Path:
    """The model folder itself, unless it is not the user's to change."""
    from fluxclip.embedder import shipped_models

    shipped = {path.resolve() for path in shipped_models().values()}
    if model.startswith("hf://") or folder.resolve() in shipped:
        raise ValueError(f"{model} is not changed in place: write a copy with --output FOLDER")
    return folder


def _new_folder(folder: Path) -> Path:
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: choose another --output")
    return folder


def _key_values(pairs: list[str], option: str) -> dict[str, str | int | float | bool]:
    """key=value pairs; a value that reads as a JSON number or true/false is one."""
    values: dict[str, str | int | float | bool] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} takes key=value, got {pair!r}")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        values[key] = value if isinstance(value, (str, int, float, bool)) else text
    return values


def _report_failures(report: "AddReport") -> None:
    """List what could not be added; exit code 2 if it was named directly."""
    _list_failed("not added", report.failed)
    if report.named_failed:
        raise typer.Exit(2)


def _list_failed(what: str, failed: Mapping[str, str]) -> None:
    for path, reason in failed.items():
        _say(f"fluxclip: {what}: {reason if path in reason else f'{path}: {reason}'}")


def _notes(error: Exception) -> str:
    """What was noted on an error's way up, such as the file that was being read, in brackets."""
    notes = dict.fromkeys(getattr(error, "__notes__", ()))
    return f" ({'; '.join(' '.join(note.split()) for note in notes)})" if notes else ""


def _say(text: str) -> None:
    """What is said on the way; results alone go to standard output."""
    print(text, file=sys.stderr)


def _console(stream: Literal["stdout", "stderr"]) -> "Console":
    """For tables and what moves. Names of files come out as they are, brackets or not."""
    from rich.console import Console  # a search does without

    return Console(
        stderr=stream == "stderr", markup=False, emoji=False, highlight=False, soft_wrap=True
    )


def _as_file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)


def _print_json(value: dict[str, Any]) -> None:
    # a path that is not UTF-8 is escaped: standard output could not carry it
    text = json.dumps(value, ensure_ascii=False, default=str)
    print(text.encode("utf-8", "backslashreplace").decode("utf-8"))


@contextmanager
def _progress(verb: str) -> Iterator[Any]:
    """A bar on a terminal's standard error; yields `advance(done, total)`."""
    from rich import progress

    from fluxclip.distributed import rank

    console = _console("stderr")
    bar = progress.Progress(
        progress.TextColumn(verb), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal or rank() > 0,
    )  # fmt: skip
    task = bar.add_task(verb, total=None)
    with bar:
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
