"""Steps made ahead by worker processes; a file that hangs or crashes one of them is given up.

Each worker has its own pipe and makes every n-th step. A timer of the system ends it when a file
takes too long, whatever the decoder is stuck in; another one is then started, which passes over
that file. So the steps and their order are the same as without workers.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.multiprocessing

from fluxclip.data.batch import Step
from fluxclip.data.faults import Fault
from fluxclip.data.loader import Steps

AHEAD = 2  # steps of each worker that wait to be fetched or are being made
MOST_LOST = 10  # files in a row that end a worker: then it is not the files
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_NOTHING = -1  # in place of a record's number: the worker reads no file
_READ = 2  # place, after source and record, of how many files of its step a worker has read well
_STOPS = (signal.SIGINT, signal.SIGTERM)


def steps(
    dataset: Steps, *, start: int, stop: int, workers: int, timeout_s: float = 60.0
) -> Generator[Step, None, None]:
    """Steps `start` to `stop` in order, prepared ahead by worker processes if there are any.

    timeout_s: most time that a worker may take to read one file; then the file is given up, as is
    one that crashes it, and `dataset.hopeless` has it. Without workers nothing cuts a file off.
    Caches live in one process, so sources that cache are read in this one. Raises ChildProcessError
    if a worker ends for another reason. Closing the generator ends the workers.
    """
    numbers = range(start, stop)
    if any(source.cache_frames for source in dataset.sources):
        workers = 0
    with ExitStack() as closing:
        made: Iterator[Step] = map(dataset.__getitem__, numbers)
        if workers:
            ahead = Workers(dataset, numbers, count=workers, timeout_s=timeout_s)
            made = iter(closing.enter_context(ahead))
        if torch.cuda.is_available():
            made = _pinned_ahead(made) if workers else map(Step.pin_memory, made)
        yield from made


def _pinned_ahead(made: Iterator[Step]) -> Iterator[Step]:
    """The steps where a GPU can fetch them; the next one is copied there meanwhile."""
    # a thread has a device of its own, and would take memory of the first one
    device = torch.cuda.current_device()
    thread = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))

    def fetch() -> Step | None:
        step = next(made, None)
        return step and step.pin_memory()

    try:
        coming = thread.submit(fetch)
        while step := coming.result():
            coming = thread.submit(fetch)
            yield step
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # it ends with the workers


class Workers:
    """`count` processes that make the steps `numbers` of `data`: enter, and iterate once.

    timeout_s: seconds that a file may take. Iterating raises what making a step raised,
    ChildProcessError if a worker was ended for want of memory, or by too many files in a row.
    """

    def __init__(self, data: Steps, numbers: range, *, count: int, timeout_s: float) -> None:
        self._data, self._numbers, self._timeout_s = data, numbers, timeout_s
        self._count = min(count, len(numbers))
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Workers":
        # multiprocessing would ask processes that ignore SIGTERM to end, and wait for them
        atexit.register(self.close)
        try:
            for _ in range(self._count):
                self._workers.append(_Worker(self._data, self._timeout_s))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self._end()

    def _end(self) -> None:
        atexit.unregister(self.close)
        self.close()

    def __iter__(self) -> Iterator[Step]:
        count = self._count
        for turn, number in enumerate(self._numbers[: AHEAD * count]):
            self._workers[turn % count].ask(number)
        for turn in range(len(self._numbers)):
            worker = self._workers[turn % count]
            step = worker.fetch()
            for number in self._numbers[turn + AHEAD * count :][:1]:
                worker.ask(number)
            yield step

    def close(self) -> None:
        """End the processes; they hold nothing that is worth keeping."""
        for worker in self._workers:
            worker.close()


class _Worker:
    """A process that makes steps, and another in its place if a file ends it."""

    def __init__(self, data: Steps, timeout_s: float) -> None:
        self._data, self._timeout_s = data, timeout_s
        self._asked: deque[int] = deque()
        self._lost: list[str] = []  # files, with none between them that was read well
        self._came_to = 0  # how many files of its step the last process lost had read well
        self._closed = False
        self._changing = threading.Lock()  # one thread may close while another fetches
        self._start()

    def _start(self) -> None:
        self._told = self._data.hopeless  # the new process has it with the data
        # forking after threads have decoded can deadlock
        context = torch.multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._reading = context.RawArray("q", [0, _NOTHING, 0])
        self._process = context.Process(
            target=_work, args=(self._data, theirs, self._reading, self._timeout_s), daemon=True
        )
        with _stops_blocked():
            self._process.start()
        theirs.close()  # so that the pipe ends when the process does

    def ask(self, number: int) -> None:
        """Have a step made, after those asked for before."""
        self._asked.append(number)
        self._send(number)

    def _send(self, number: int) -> None:
        hopeless = self._data.hopeless
        # Only what is new: all of it may be more than a pipe holds, and the process, which may be
        # waiting for its step to be fetched, would not read it.
        new = {}
        if hopeless is not self._told:
            new = {path: fault for path, fault in hopeless.items() if path not in self._told}
        with suppress(OSError):  # it has ended, which `fetch` will see
            self._pipe.send((number, new))
        self._told = hopeless

    def fetch(self) -> Step:
        """The step asked for first of those not fetched yet."""
        while True:
            try:
                step, error, trace = self._pipe.recv()
                break
            except Exception as ended:  # of many kinds: tensors are fetched from it while it runs
                self._replace(ended)
        if error is not None:
            raise error from RuntimeError(f"in a worker process:\n{trace}")
        self._asked.popleft()
        self._lost.clear()
        made: Step = step
        return made

    def _replace(self, ended: Exception) -> None:
        """Start another process, which passes over the file that the last one has ended with."""
        self._process.join(10)
        with self._changing:
            if self._closed or self._process.exitcode is None:
                raise ended
            path, fault = self._fault(self._process.exitcode)
            self._data.give_up({str(path): fault})
            came_to = self._reading[_READ]
            if came_to > self._came_to:
                self._lost.clear()
            self._came_to = came_to
            self._lost.append(str(path))
            if len(self._lost) == MOST_LOST:
                raise ChildProcessError(
                    f"{MOST_LOST} files in a row ended a worker that read them, the last: "
                    f"{fault.reason}; if others can be read, move these away, and a run goes on "
                    f"by --resume: {', '.join(self._lost)}"
                )
            self._pipe.close()
            self._start()
        for number in self._asked:
            self._send(number)

    def _fault(self, code: int) -> tuple[Path | None, Fault]:
        """The file that was read when the process ended by `code`, if it is to be blamed for it."""
        source, record, _ = self._reading
        is_reading = record != _NOTHING
        path = self._data.sources[source].records[record].video if is_reading else None
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if is_reading and -code == signal.SIGALRM:
            return path, Fault("timeout", f"not read within {self._timeout_s:g} s")
        if is_reading and -code in _CRASHES:
            return path, Fault("crash", f"its decoder crashed ({how})")
        doing = f"it read {path}" if is_reading else "it read no file"
        hint = ""
        if -code == signal.SIGKILL:
            hint = "; if memory ran out, lower workers"
        elif -code == signal.SIGBUS:
            hint = "; /dev/shm, through which steps travel, may be full"
        elif code > 0 and not is_reading:
            hint = (
                "; what it said is above: a script that starts workers needs `if __name__ == "
                '"__main__":` around what it does, or workers = 0'
            )
        raise ChildProcessError(f"a worker process ended by {how} while {doing}{hint}")

    def close(self) -> None:
        with self._changing:
            self._closed = True
            self._process.kill()
            self._process.join()


def _work(data: Steps, pipe: Connection, reading: Any, timeout_s: float) -> None:
    """What a worker does: steps by their numbers, until nobody asks for more."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)

    @contextmanager
    def watched(source: int, record: int) -> Iterator[None]:
        reading[:_READ] = source, record
        signal.setitimer(signal.ITIMER_REAL, timeout_s)
        try:
            yield
            reading[_READ] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            reading[:_READ] = 0, _NOTHING

    data.watched = watched
    while True:
        try:
            number, new = pipe.recv()
        except EOFError:
            return
        data.give_up(new)
        reading[_READ] = 0
        try:
            pipe.send((data[number], None, ""))
        except Exception as error:
            pipe.send((None, _portable(error), traceback.format_exc()))


def _portable(error: Exception) -> Exception:
    """The error, or its words alone where it cannot travel to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does on the way
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """Also where a decoder hangs, so that a run that is killed leaves no process behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _stops_blocked() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, nor the SIGTERM of a job scheduler.

    Both reach every process of a run; one answers. What is blocked stays so in the new process from
    its first moment on.
    """
    resource_tracker.ensure_running()  # started on the way, it would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
