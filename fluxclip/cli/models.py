"""The verbs that use, change or send a model: embed, export, grids, push."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fluxclip.cli.arguments import (
    Captions,
    Cut,
    Model,
    StrideS,
    WindowS,
    key_values,
    new_folder,
    read_counts,
)
from fluxclip.cli.output import console, list_failed, progress_bar

if TYPE_CHECKING:
    from fluxclip.model.presets import FluxCLIPConfig

app = typer.Typer()


@app.command()
def embed(
    files: Annotated[
        list[str], typer.Argument(help="videos and images; with --shard folders and patterns too")
    ],
    model: Model,
    output: Annotated[
        Path, typer.Option(help="where the vectors go: an .npz file, or with --shard a folder")
    ],
    token_budget: Annotated[int | None, typer.Option(help="tokens per clip or segment")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/N, from 0/N to N-1/N: only this part, as Parquet")
    ] = None,
    cut: Cut = "windows",
    window_s: WindowS = 10.0,
    stride_s: StrideS = None,
    meta: Annotated[
        list[str] | None, typer.Option(help="with --shard: as in index add, key=value; repeatable")
    ] = None,
) -> None:
    """Write unit vectors of videos: arrays `vectors` (N, dim) and `files`, and the fingerprint.

    With --shard each segment of each video is embedded, and N jobs share the work: see docs/search.
    """
    if shard is not None:
        cutting = {"cut": cut, "window_s": window_s, "stride_s": stride_s}
        _embed_shard(files, output, shard, model, token_budget, cutting, meta or [])
        return
    if (cut, window_s, stride_s, meta) != ("windows", 10.0, None, None):
        raise ValueError("--cut, --window-s, --stride-s and --meta go with --shard i/N")
    _embed_files(files, output, model, token_budget)


def _embed_shard(
    paths: list[str],
    folder: Path,
    shard: str,
    model: str,
    token_budget: int | None,
    cutting: dict[str, Any],
    meta: list[str],
) -> None:
    from retrieval import embed_shard

    number, slash, num_shards = shard.partition("/")
    if not (number.isdecimal() and slash and num_shards.isdecimal()):
        raise ValueError(f"--shard takes i/N, as 0/16 or 15/16, got {shard!r}")
    if folder.suffix == ".npz":
        raise ValueError(f"--shard takes no .npz file: --output is a folder then, got {folder}")
    with progress_bar("embed") as advance:
        report = embed_shard(
            paths, folder, shard=(int(number), int(num_shards)), model=model,
            token_budget=token_budget, metadata=key_values(meta, "--meta"),
            progress=lambda done, total, path: advance(done, total), **cutting,
        )  # fmt: skip
    print(
        f"{report.file}: {report.videos} videos, {report.segments} segments, "
        f"{len(report.failed)} failed{'; it was done already' if report.was_done else ''}"
    )
    list_failed("not embedded", report.failed)
    if report.named_failed:
        raise typer.Exit(2)


def _embed_files(files: list[str], output: Path, model: str, token_budget: int | None) -> None:
    import numpy as np

    from fluxclip import load_model
    from fluxclip.video import VideoError

    if output.suffix != ".npz":
        raise ValueError(f"--output must end in .npz, got {output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    embedder = load_model(model)
    failed: dict[str, str] = {}
    vectors = []
    with progress_bar("embed") as advance:
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
    list_failed("not embedded", failed)
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

    `index create` does so for its collection; COLLECTION/text_encoder is where it belongs, or
    text_encoder-SPACE once that was re-embedded (`space` in index info).
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

    wanted = read_counts(budgets)
    folder, _, _ = find_folder(model)
    target = _to_rewrite(folder, model) if output is None else new_folder(output)
    config = weights.read_config(folder)
    candidates = _candidates(config, wanted, frames=frames, sides=sides)
    task = read(annotations, captions=captions)
    with distributed.together(), progress_bar("embed") as advance:
        embedder = load_model(model, device=distributed.device())
        search = token_optimization.optimize(embedder, task, candidates, on_progress=advance)
    if distributed.rank() > 0:
        return
    if output is not None:
        shutil.copytree(folder, output)
    # first what the table was chosen on: no table without it
    token_optimization.save(search, target)
    weights.write_config(replace(config, grids=config.grids.with_rows(search.rows)), target)
    token_optimization.print_trials(search, console("stdout"))
    print(f"table: {target / 'config.json'}\ntrials: {target / token_optimization.FILE}")


def _candidates(
    config: "FluxCLIPConfig", budgets: list[int], *, frames: str | None, sides: str | None
) -> dict[int, list[tuple[int, int]]]:
    """Grids (frames, side) to try at each budget, the one in use among them."""
    from fluxclip.tokens.budget import candidate_grids

    v = config.video
    of_table = {"frames": (v.tubelet, v.table_frames, v.tubelet),
                "sides": (min(2 * v.patch, v.table_side), v.table_side, v.patch)}  # fmt: skip
    given = {"frames": frames, "sides": sides}
    bounds = {
        name: of_table[name] if text is None else _bounds(text, f"--{name}")
        for name, text in given.items()
    }
    candidates = {}
    for budget in budgets:
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
    return candidates


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


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="folder, run folder or shipped name")],
    name: Annotated[str, typer.Argument(help="org/name on the hub")],
    private: Annotated[
        bool, typer.Option("--private", help="make a new repository private")
    ] = False,
) -> None:
    """Upload a model folder, with its card, to the Hugging Face hub; hf://org/name loads it."""
    from fluxclip.embedder import find_folder
    from fluxclip.model import hub

    folder, _, _ = find_folder(model)
    address = hub.push(folder, name, private=private)
    print(f"{folder} is hf://{name} now: {address}")
