"""Model folders to and from a hub, through huggingface_hub.

What comes from the hub is somebody else's: it may name no code outside fluxclip, and it is loaded
as strictly as any other folder. What goes there has to load first.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fluxclip.model import weights
from fluxclip.model.presets import FluxCLIPConfig

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# of a model folder: config, weights, card, how its grids were chosen, files of a stored text tower
_FILES = ["config.json", "model.safetensors", "README.md", "token_optimization.json", "text/*"]


def fetch(source: str) -> Path:
    """The folder of `hf://org/name` or `hf://org/name@revision`, fetched unless it is there.

    revision: a branch, a tag or a commit. Raises ValueError in one line for another form, for what
    cannot be fetched and for a config that names code outside fluxclip.
    """
    from huggingface_hub import snapshot_download

    name, at, revision = source.removeprefix("hf://").partition("@")
    if not _is_repository(name) or (at and not revision):
        raise ValueError(f"{source!r} is no hub name: hf://org/name or hf://org/name@revision")
    try:
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=_FILES))
    except _hub_errors() as error:
        raise ValueError(f"cannot fetch {source}: {_reason(error)}") from error
    outside = _code_outside(weights.read_config(folder))
    if outside:
        raise ValueError(
            f"{source} names code outside fluxclip, {outside!r}; a model from the hub may not"
        )
    return folder


def push(
    folder: str | Path, name: str, *, private: bool = False, api: "HfApi | None" = None
) -> str:
    """Upload a model folder to the hub as org/name, in one commit, and return the commit's address.

    The repository is made where there is none, `private` or not; what it held of an older model
    folder and this one has not is deleted from it. api: by default that of huggingface_hub's
    settings and saved token. Before anything is sent the folder has to load, to have a card, and to
    mean the same on another machine: ValueError or FileNotFoundError in one line if not. ValueError
    too for what the hub refuses.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    if not _is_repository(name):
        raise ValueError(f"{name!r} is no name on the hub: org/name")
    config = weights.read_config(folder)
    card = folder / "README.md"
    if not card.is_file() or not card.read_text(encoding="utf-8").strip():
        raise FileNotFoundError(f"{folder} has no card: write README.md, what the model is, first")
    outside = _code_outside(config)
    if outside:
        raise ValueError(
            f"{folder} names code outside fluxclip, {outside!r}, which load_model refuses from a "
            f"hub: share the folder and that code some other way"
        )
    text = config.text.source
    if _is_local(text) and not _is_inside(folder, text):
        raise ValueError(
            f"the text tower of {folder} is the path {text!r}, which others have not: use "
            f'text.weights = "stored" with its files in the folder, or a package: or hub name'
        )
    weights.load(folder)
    api = api or HfApi()
    try:
        repository = api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id, folder_path=folder, allow_patterns=_FILES,
            delete_patterns=_FILES, commit_message="Upload by fluxclip push",
        )  # fmt: skip
    except _hub_errors() as error:
        raise ValueError(f"cannot push to {name}: {_reason(error)}") from error
    return str(commit.commit_url)


def _is_repository(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) is not None


def _code_outside(config: FluxCLIPConfig) -> str | None:
    """The first plugin of a config that is a dotted name, code that fluxclip does not bring."""
    plugins = (config.video.scorer, config.video.filter, config.text.encoder)
    return next((name for name in plugins if "." in name), None)


def _is_local(source: str) -> bool:
    """Whether a text tower's source is a path here rather than the name of something elsewhere."""
    _, _, file = source.partition("/")  # of NAME/FILE, as open_clip_tower takes it
    paths = (source, file) if file else (source,)
    return source.startswith((".", "/", "~")) or any(Path(path).exists() for path in paths)


def _is_inside(folder: Path, source: str) -> bool:
    """Whether a source is the part of a model folder that is sent with it."""
    return source == weights.OWN_TEXT and (folder / source).is_dir()


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where a server, a network, a token or a name is not as needed."""
    from huggingface_hub.errors import HfHubHTTPError

    # the first base of its own errors is that of its HTTP library, whichever it is
    return (HfHubHTTPError.__bases__[0], OSError, ValueError)


def _reason(error: Exception) -> str:
    """An error of the hub as one line, with the way out where a token is what lacks."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("For more information")]
    # the first line says what kind of error it is, the second what it is about
    reason = " ".join(lines[:2]) or type(error).__name__
    if status in (401, 403) or "LocalTokenNotFound" in type(error).__name__:
        reason += "; give a token that may do so: hf auth login, or HF_TOKEN"
    return reason
