"""A data source whose decoder does to files, by their names, what broken decoders do."""

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any

from fluxclip.data.sources import Records
from fluxclip.data.sources.annotations import read as read_annotations
from fluxclip.video import Clip


class FaultyRecords(Records):
    """hang*: never comes back, nor lets another thread run. The rest is as it is called."""

    def clip(self, index: int, **wanted: Any) -> Clip:
        name = self[index].video.stem
        if name.startswith("hang"):
            ctypes.PyDLL(None).sleep(3600)
        if name.startswith("sleep"):
            time.sleep(3600)
        if name.startswith("segfault"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if name.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if name.startswith("exit"):
            os._exit(3)
        if name.startswith("strange"):
            raise RuntimeError("no\nidea")
        return super().clip(index, **wanted)


def read(path: str | Path, *, check_files: bool = True) -> Records:
    return FaultyRecords(read_annotations(path, check_files=check_files)[:])
