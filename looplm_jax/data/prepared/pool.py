"""Processes that work through jobs, one at a time each, and tell how they get on.

They are spawned, so they import nothing that the work does not need. Signals that stop a command reach its parent
alone, which ends them; where the parent is killed, the next word to it ends them.
"""

import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from looplm_jax.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a worker has done since it said so last."""

    documents: int
    tokens: int
    bytes: int


Report = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Finished(Generic[Result]):
    """The result of job number `number`."""

    number: int
    result: Result


@dataclasses.dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    number: int  # of the job in hand


def run_jobs(
    work: Callable[[Job, Report], Result], jobs: Sequence[Job], workers: int
) -> Generator[Progress | Finished[Result], None, None]:
    """Give the jobs, in order, to at most `workers` processes; their words come as they are said.

    Closing the iterator ends the processes at once. `work` is sent to each of them once, and must be picklable.

    Raises:
      UserError: what a job raised, or a process that was killed.
    """
    waiting = iter(enumerate(jobs))
    busy: list[_Worker] = []
    with contextlib.ExitStack() as ending:
        for _ in range(min(workers, len(jobs))):
            busy.append(_start(work, ending))
            _give(busy[-1], waiting)
        while busy:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                word = _hear(worker)
                if isinstance(word, Progress):
                    yield word
                    continue
                number = worker.number
                if not _give(worker, waiting):
                    busy.remove(worker)
                yield Finished(number, word)


def _start(work: Callable[..., Any], ending: contextlib.ExitStack) -> _Worker:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(work, theirs), daemon=True)
    resource_tracker.ensure_running()  # the first start would do it, and let the signals through after that
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        process.start()
        ending.callback(_end, process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Worker(process, ours, number=-1)


def _end(process: SpawnProcess) -> None:
    process.kill()
    process.join()


def _give(worker: _Worker, waiting: Iterator[tuple[int, Any]]) -> bool:
    """Hand over the next job, or the news that there is none."""
    number, job = next(waiting, (-1, None))
    with contextlib.suppress(BrokenPipeError):  # `_hear` says it
        worker.pipe.send(job)
    worker.number = number
    return number >= 0


def _hear(worker: _Worker) -> Any:
    try:
        word = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(
            "a worker was killed, perhaps for lack of memory; the same command goes on, with fewer --workers if need be"
        ) from None
    if isinstance(word, Exception):
        raise word
    return word


def _serve(work: Callable[[Any, Report], Any], pipe: Connection) -> None:
    with contextlib.suppress(BrokenPipeError, EOFError):  # the parent is gone
        while (job := pipe.recv()) is not None:
            try:
                pipe.send(work(job, pipe.send))
            except BrokenPipeError:
                raise
            except Exception as error:
                pipe.send(error)
