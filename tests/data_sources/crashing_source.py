"""A data source whose files do to the process that opens them, by their names, what bad ones do."""

import os
import signal
from pathlib import Path, PosixPath

from fluxclip.data.sources import Record, Records
from fluxclip.data.sources.annotations import read as read_annotations


class Opened(PosixPath):
    """segfault*, killed*: as they are called."""

    def is_dir(self) -> bool:
        if self.name.startswith("segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self.name.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().is_dir()


def read(path: str | Path, *, check_files: bool = True) -> Records:
    found = read_annotations(path, check_files=check_files)
    return Records([Record(Opened(r.video), r.captions, r.family) for r in found])
