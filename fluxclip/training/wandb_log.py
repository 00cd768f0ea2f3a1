"""A copy of a run's numbers at Weights & Biases, where a recipe asks for one; the home of wandb.

It stops no run: what goes wrong with it is said once, and metrics.jsonl has the numbers anyway.
"""

import re
import uuid
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

_LONGEST_END_S = 60.0  # for what has not been sent yet; `wandb sync` sends what remains


def refuse_without() -> None:
    """Raise ValueError, with the way out, if the package wandb is not installed."""
    try:
        version("wandb")
    except PackageNotFoundError as error:
        raise ValueError(
            "wandb is not installed: pip install 'fluxclip[wandb]', or leave `wandb` out of the "
            "recipe"
        ) from error


class WandbLog:
    """Logs to `project`; a resumed run goes on in the run it had there.

    The id is kept in `folder`/wandb-id, and wandb's own files beside it. settings: shown with the
    run. Without a network, WANDB_MODE=offline keeps everything for `wandb sync`.
    """

    def __init__(self, project: str, *, folder: Path, settings: Mapping[str, Any]) -> None:
        self.project, self.folder, self.settings = project, folder, settings
        self._run: Any = None

    def start(self, *, say: Callable[[str], None]) -> None:
        """Begin, or go on. say: where to tell the address, and what goes wrong."""
        self._say = say

        def init() -> None:
            import wandb

            self._run = wandb.init(
                project=self.project, id=self._id(), name=self.folder.name, dir=str(self.folder),
                config=dict(self.settings), resume="allow", reinit="create_new",
                settings=wandb.Settings(
                    silent=True, console="off", finish_timeout=_LONGEST_END_S
                ),
            )  # fmt: skip
            kept = f"offline, kept in {self.folder / 'wandb'} for `wandb sync`"
            say(f"wandb: {kept if self._run.offline else self._run.url}")

        self._try(init)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Numbers of a step, 0 being the first; those of one step may come in several calls."""
        if self._run is not None:
            self._try(lambda: self._run.log(dict(numbers), step=step))

    def end(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """Send what is left, for a minute at most; an error makes it a failed run."""
        if self._run is not None:
            self._try(lambda: self._run.finish(exit_code=int(kind is not None)))

    def _try(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of wandb's many kinds none is a reason to stop a training
            self._run = None
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            self._say(f"wandb: {reason}; the run goes on without it")

    def _id(self) -> str:
        path = self.folder / "wandb-id"
        if not path.exists():
            name = re.sub(r"[^\w-]+", "-", self.folder.name)[:64]
            path.write_text(f"{name}-{uuid.uuid4().hex[:8]}", "utf-8")
        return path.read_text("utf-8")
