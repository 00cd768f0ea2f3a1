"""The files that a run cannot read: counted by kind, listed in its folder, and how many it bears.

unreadable.jsonl has one JSON object per file, in the order met: "step", "path", "kind", "reason".
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from fluxclip import distributed
from fluxclip.data.batch import Step
from fluxclip.data.faults import Fault
from fluxclip.data.loader import Steps
from fluxclip.training.checkpoint import writing
from fluxclip.training.monitor import cut_back


class UnreadableFiles:
    """Those that any process of a run has met, the same in all of them.

    A run that goes on after `start` steps knows those that it had met by then; `data` then passes
    over those among them that hung or crashed a worker. most: share of the files of `data`, 0-1.
    """

    def __init__(self, folder: Path, data: Steps, *, start: int, most: float) -> None:
        self.path, self.data, self.most = folder / "unreadable.jsonl", data, most
        self.kinds: dict[str, str] = {}
        rows = distributed.gather_results(
            lambda: cut_back(self.path, start) if distributed.rank() == 0 else []
        )[0]
        self._know({row["path"]: Fault(row["kind"], row["reason"]) for row in rows})

    def __len__(self) -> int:
        return len(self.kinds)

    def __str__(self) -> str:
        kinds = Counter(self.kinds.values())
        return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))

    def num_new(self, step: Step) -> int:
        """Files that this process came upon in a step, and no one before."""
        return len(step.unreadable.keys() - self.kinds.keys())

    def note(self, step: Step, *, say: Callable[[str], None]) -> None:
        """Say and list what is new in the step of any process, which all must call.

        ValueError if it is more than the run bears, OSError for a folder that cannot be written to.
        """
        of_all = distributed.gather(dict(step.unreadable))
        found = sorted(item for own in of_all for item in own.items())
        new = {path: fault for path, fault in found if path not in self.kinds}
        self._know(new)
        distributed.gather_results(lambda: self._list(step.number, new))
        for path, fault in new.items():
            say(f"unreadable ({fault.kind}), another takes its place: {path}: {fault.reason}")
        if len(self) > self.most * self.data.num_files:
            distributed.stop_all(
                ValueError(
                    f"{len(self)} of {self.data.num_files} files cannot be read, more than "
                    f"{self.most:.0%}: {self}; mend the data, leave out what {self.path} lists, or "
                    f"raise max_unreadable"
                )
            )

    def _know(self, faults: dict[str, Fault]) -> None:
        for path, fault in faults.items():
            self.kinds.setdefault(path, fault.kind)
        self.data.give_up(faults)

    def _list(self, step: int, new: dict[str, Fault]) -> None:
        if distributed.rank() > 0:
            return
        rows = [{"step": step, "path": path, **fault._asdict()} for path, fault in new.items()]
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
