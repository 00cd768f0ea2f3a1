"""Several processes at one job: which one this is, and what the others found.

The only home of torch.distributed. A process that `torchrun` started knows by its environment how
many there are; started alone it is the only one, and nothing here costs anything.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast

from fluxclip import stages

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd import Function
    from torch.futures import Future
    from torch.nn import Module

T = TypeVar("T")

# the fastest process waits for the slowest: in evaluation at the end, in training at every step
_BACKENDS = "cpu:gloo,cuda:nccl"
_joined_alone: list[bool] = []  # filled while there is a group of `join_alone`
_TIMEOUT = {"cpu": timedelta(hours=12), "device": timedelta(minutes=30)}


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
    # by torchrun's name, or that of DeepSpeed's launcher
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, (os.cpu_count() or 1) // int(processes))


@contextmanager
def together(*, tensors: Literal["cpu", "device"] = "cpu") -> Iterator[None]:
    """Connect the processes of one job for as long as it lasts; a lone process needs none.

    tensors: where those lie that are sent: on the CPU, or on the GPU that each process has, if any.
    """
    if world_size() == 1:
        try:
            yield
        finally:
            _leave_alone()
        return
    import torch
    import torch.distributed as dist

    if tensors == "device" and (own := device()):
        torch.cuda.set_device(own)
        dist.init_process_group(_BACKENDS, timeout=_TIMEOUT[tensors])
        _refuse_shared_gpus()
    else:
        dist.init_process_group("gloo", timeout=_TIMEOUT[tensors])
    try:
        yield
    except (dist.DistBackendError, RuntimeError) as error:
        # NCCL's own kind, or gloo's, which is none but names itself
        if not isinstance(error, dist.DistBackendError) and "gloo" not in str(error):
            raise
        raise ConnectionError(
            "another process of this job has ended, and this one with it; that one's last line "
            f"says why (here: {' '.join(str(error).split())[:160]})"
        ) from error
    finally:
        dist.destroy_process_group()


def join_alone() -> None:
    """Connect a lone process to itself, for a library that wants a launcher and a group."""
    import torch
    import torch.distributed as dist
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    if world_size() == 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        if not dist.is_initialized():
            backend = _BACKENDS if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
            _joined_alone.append(True)


def _leave_alone() -> None:
    """Undo `join_alone`, if it was called; a group that somebody else made stays."""
    if _joined_alone:
        import torch.distributed as dist

        _joined_alone.clear()
        dist.destroy_process_group()


def _refuse_shared_gpus() -> None:
    """ValueError in all processes if two of them have the same GPU, which NCCL cannot do."""
    import torch

    own = torch.cuda.get_device_properties(torch.cuda.current_device())
    of_all = gather((os.uname().nodename, str(own.uuid)))
    if len(set(of_all)) < len(of_all):
        stop_all(
            ValueError(
                f"{len(of_all)} processes have {len(set(of_all))} GPUs: start one for each GPU"
            )
        )


def gather_results(work: Callable[[], T]) -> list[T]:
    """What `work` gives in every process, in the order of their ranks; all must call it.

    Where it raised ValueError or OSError in some, all processes stop: one by that error, the
    others by SystemExit(2), so that one line is printed. Any other error goes on where it was
    raised, and stops the others too.
    """
    result, error = None, None
    try:
        result = work()
    except Exception as caught:
        error = caught
    known = error if isinstance(error, (ValueError, OSError)) else None
    failed = [(known, error is not None)] if world_size() == 1 else gather((known, bool(error)))
    if error is not None and known is None:
        raise error
    if any(is_failed for _, is_failed in failed):
        stop_all(next((each for each, _ in failed if each is not None), SystemExit(2)))
    return gather(cast(T, result))


def stop_all(error: BaseException) -> NoReturn:
    """Stop every process by an error that all have: the first raises it, the others exit with 2."""
    raise error if rank() == 0 else SystemExit(2)


def gather(value: T) -> list[T]:
    """What every process has, in the order of their ranks; all must call it.

    The values travel as pickles between processes of one job, none comes from a file.
    """
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [value] * world_size()
    with stages.stage("communicate"):
        dist.all_gather_object(values, value)
    return values


def gather_rows(x_BD: "Tensor") -> "Tensor":
    """The rows of all ranks in the order of their ranks, with gradient; all must call it.

    x_BD: of any number type, its first axis equally long on every rank. Gives (W*B, D) for W
    ranks; a lone process gets x_BD itself. In the backward pass a rank gets for its rows the sum
    of the gradients that all ranks have for them.
    """
    return x_BD if world_size() == 1 else cast("Tensor", _functions()[0].apply(x_BD))


def exchange_rows(x_ND: "Tensor") -> "Tensor":
    """Equal blocks of rows, the i-th sent to rank i and the i-th received from it, with gradient.

    x_ND: its first axis equally long on every rank and a multiple of their number. Gives (N, D);
    a lone process gets x_ND itself. All must call it; gradients go back the way the rows came.
    """
    return x_ND if world_size() == 1 else cast("Tensor", _functions()[1].apply(x_ND))


@cache
def _functions() -> "tuple[type[Function], type[Function]]":
    """Gather and exchange with their gradients; in a function, as classes would need torch."""
    import torch
    import torch.distributed as dist

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_BD: torch.Tensor) -> torch.Tensor:
            x_ND = x_BD.new_empty((world_size() * len(x_BD), *x_BD.shape[1:]))
            with stages.stage("communicate"):
                dist.all_gather_into_tensor(x_ND, x_BD.contiguous())
            return x_ND

        @staticmethod
        def backward(ctx: Any, grad_ND: torch.Tensor) -> torch.Tensor:
            grad_BD = grad_ND.new_empty((len(grad_ND) // world_size(), *grad_ND.shape[1:]))
            with stages.stage("communicate"):
                dist.reduce_scatter_tensor(grad_BD, grad_ND.contiguous())
            return grad_BD

    class Exchange(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x_ND: torch.Tensor) -> torch.Tensor:
            received_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
            with stages.stage("communicate"):
                dist.all_to_all_single(received_ND, x_ND.contiguous())
            return received_ND

        @staticmethod
        def backward(ctx: Any, grad_ND: torch.Tensor) -> torch.Tensor:
            sent_back_ND = torch.empty_like(grad_ND, memory_format=torch.contiguous_format)
            with stages.stage("communicate"):
                dist.all_to_all_single(sent_back_ND, grad_ND.contiguous())
            return sent_back_ND

    return Gather, Exchange


def mean(numbers: Mapping[str, float]) -> dict[str, float]:
    """The mean over processes of numbers that all have by the same names; all must call it."""
    if world_size() == 1:
        return dict(numbers)
    import torch
    import torch.distributed as dist

    x = torch.tensor(list(numbers.values()), dtype=torch.float64)
    with stages.stage("communicate"):
        dist.all_reduce(x)
    return dict(zip(numbers, (x / world_size()).tolist(), strict=True))


def averaging(module: "Module", *, some_unused: bool) -> "Module":
    """The module, called through which it averages over processes the gradients it gets.

    some_unused: some parameters may have no part in a call. Made while stages are measured, it
    counts what the exchange takes, which goes on beside the backward pass, as "gradients".
    """
    if world_size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    with warnings.catch_warnings():
        # torch 2.15 wants broadcast_buffers by another name, which 2.9 has not
        warnings.simplefilter("ignore", FutureWarning)
        made = DistributedDataParallel(
            module, broadcast_buffers=False, find_unused_parameters=some_unused,
            gradient_as_bucket_view=True,
        )  # fmt: skip
    if stages.is_measured():
        made.register_comm_hook(None, _timed_average())
    return made


class _Moment:
    """Now, on the clock of what computes a tensor: the GPU's, or this process's."""

    def __init__(self, tensor: "Tensor") -> None:
        import torch

        self.seconds, self.event = time.perf_counter(), None
        if tensor.is_cuda:
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record()

    def since(self, earlier: "_Moment") -> float:
        if self.event is None or earlier.event is None:
            return self.seconds - earlier.seconds
        return float(earlier.event.elapsed_time(self.event)) / 1000


def _timed_average() -> "Callable[[Any, Any], Future[Tensor]]":
    """What DDP does with a bucket of gradients, from its start to its end counted as "gradients".

    A bucket waits until the one before is done: that time counts once.
    """
    import torch
    import torch.distributed as dist

    ended: list[_Moment] = []  # when the last bucket was done

    # DDP reads the annotations: types, no strings
    def average(
        _: object,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[torch.Tensor]:
        buffer = bucket.buffer().div_(world_size())
        start = _Moment(buffer)

        def done(future: "Future[list[Tensor]]") -> "Tensor":
            moments, end = [start, *ended], _Moment(buffer)
            ended[:] = [end]
            stages.beside("gradients", lambda: min(end.since(moment) for moment in moments))
            return future.value()[0]

        work = dist.all_reduce(buffer, async_op=True)
        assert work is not None
        return work.get_future().then(done)

    return average
