"""The verbs that train a model and score it: train, eval, eval report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fluxclip.cli.arguments import MODEL_HELP, Captions, read_budgets
from fluxclip.cli.output import console, progress_bar
from fluxclip.training.signals import nothing_saved_yet

app = typer.Typer()
eval_app = typer.Typer(invoke_without_command=True)
app.add_typer(eval_app, name="eval")


@app.command()
@nothing_saved_yet()
def train(
    recipe: Annotated[str, typer.Argument(help="a TOML file, such as configs/demo.toml")],
    set: Annotated[
        list[str] | None, typer.Option(help="change a value, as in optimizer.lr=1e-4; repeatable")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="a model to start from, in place of the recipe's init")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print what it would train, and every missing file")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="print where the time of a step goes, and train no further"),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="go on from the newest state of the recipe's run, if any"),
    ] = False,
) -> None:
    """Pre-train a model as a recipe says.

    Ctrl-C and SIGTERM finish the step and save a state before they stop the run, with exit codes
    130 and 143; a second Ctrl-C stops at once, and SIGTERM before the first step ends it with 1.
    Several processes (torchrun --no-python fluxclip train ...) train as one.
    """
    from fluxclip import distributed
    from fluxclip.training import recipe as recipes
    from fluxclip.training.loop import train
    from fluxclip.training.plan import plan
    from fluxclip.training.profile import profile as profile_steps

    if profile and (dry_run or resume):
        raise ValueError("--profile writes and resumes no run: leave out --dry-run and --resume")
    command = shlex.join(["fluxclip", *sys.argv[1:]])
    changes = list(set or ())
    if init is not None:
        # a folder given here is one of where the command runs, not of where the recipe lies
        name, mark, tower = init.partition("?")
        init = f"{Path(name).absolute()}{mark}{tower}" if Path(name).is_dir() else init
        changes.append(f"init={init}")
    settings = recipes.read(recipe, changes)
    if dry_run:
        found = plan(settings)
        if distributed.rank() == 0:
            print("\n".join([*found.lines, *map(str, found.missing)]))
        if found.missing:
            count = len(found.missing)
            files = "1 file" if count == 1 else f"{count:,} files"
            distributed.stop_all(FileNotFoundError(f"{recipe}: {files}, listed above, not found"))
        return
    if profile:
        measured = profile_steps(settings)
        if distributed.rank() == 0:
            print("\n".join(measured.lines()))
        return
    folder = train(settings, resume=resume, console=console("stderr"), command=command)
    if distributed.rank() == 0:
        print(f"best model: {folder / 'best'}\nlast model: {folder / 'last'}")


@eval_app.callback()
def evaluate(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help=MODEL_HELP)] = None,
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

    wanted = read_budgets(budgets)
    given = {"split": split, "language": language, "captions": captions}
    choices = {name: choice for name, choice in given.items() if choice is not None}
    task = protocols.read(protocol, str(annotations), videos=videos, **choices)
    chosen = [captions or "", caption_gallery.replace("all", ""), "clean" * clean_captions]
    name = "-".join(filter(None, [str(model), task.protocol, *chosen]))
    folder = output or Path("runs") / "eval" / _as_file_name(name)
    with distributed.together(), progress_bar("embed") as advance:
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
    report.print_table(record, console("stdout"))
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
    report.print_comparison(loaded, console("stdout"))
    tasks = report.by_task(loaded)
    for task, compared in tasks.items():
        for against in ("tokens", "time"):
            name = against if len(tasks) == 1 else _as_file_name(f"{against}-{task}")
            report.plot_curve(compared, output / f"{name}.png", against=against)
            print(f"plot: {output / f'{name}.png'}")


def _as_file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in name)
