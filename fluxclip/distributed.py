"""Several processes at one job: which one this is, and what the others found.

The only home of torch.distributed. A process that `torchrun` started knows by its environment how
many there are; started alone it is the only one, and nothing here costs anything.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

T = TypeVar("T")

_TIMEOUT = timedelta(hours=12)  # the fastest process waits for the slowest


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes share the job."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def device() -> str | None:
    """The GPU that this process has to itself among those of its machine; None to choose freely."""
    import torch

    if world_size() == 1 or not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', rank())) % torch.cuda.device_count()}"


def num_cores() -> int:
    """Cores of this machine for each of the processes on it, at least 1."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def together() -> Iterator[None]:
    """Connect the processes of one job for as long as it lasts; a lone process needs none."""
    if world_size() == 1:
        yield
        return
    import torch.distributed as dist

    dist.init_process_group("gloo", timeout=_TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def gather_results(work: Callable[[], T]) -> list[T]:
    """What `work` gives in every process, in the order of their ranks; all must call it.

    Where it raised ValueError or OSError in some, all processes stop: the first by that error, the
    others by SystemExit(2), so that one line is printed.
    """
    result, error = None, None
    try:
        result = work()
    except (ValueError, OSError) as caught:
        error = caught
    for found in gather(error):
        if found is not None:
            if rank() == 0:
                raise found
            raise SystemExit(2)
    return gather(cast(T, result))


def gather(value: T) -> list[T]:
    """What every process has, in the order of their ranks; all must call it.

    The values travel as pickles between processes of one job, none comes from a file.
    """
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values
