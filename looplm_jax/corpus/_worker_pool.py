"""A pool of worker processes that each take one job at a time and report their progress.

Workers are spawned rather than forked, so they import only what their work needs. Signals that stop a command are
delivered to the parent alone, which then kills the workers. If the parent itself is killed, each worker exits on its
next send or receive, when it finds the pipe closed.
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

# Signals that are blocked in workers, so that the parent alone handles them.
_HELD_BACK = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Progress:
    """The work done by a worker since its previous report."""

    documents: int
    tokens: int
    bytes: int


Report = Callable[[Progress], None]


@dataclasses.dataclass(frozen=True)
class Finished(Generic[Result]):
    """The result of the job with this number."""

    number: int
    result: Result


@dataclasses.dataclass
class _Worker:
    """A worker process, the parent's end of its pipe, and the job it is working on."""

    process: SpawnProcess
    pipe: Connection
    number: int  # of the current job


# The parent


def run_jobs(
    work: Callable[[Job, Report], Result], jobs: Sequence[Job], workers: int
) -> Generator[Progress | Finished[Result], None, None]:
    """Runs jobs, handed out in order, on at most `workers` processes, and yields progress and results as they arrive.

    Closing the generator kills the processes at once.

    Args:
      work: called in a worker with a job and a function to report progress. It is sent to each worker once and must be
        picklable.
      jobs: the arguments of the calls, which must be picklable.
      workers: the maximum number of processes.

    Raises:
      UserError: a worker was killed. An exception raised by a job is re-raised.
    """
    waiting = iter(enumerate(jobs))
    busy: list[_Worker] = []

    # The stack kills all workers when the generator ends, for whatever reason.
    with contextlib.ExitStack() as ending:
        for _ in range(min(workers, len(jobs))):
            # Started one after another: each begins its first job while the next one starts.
            busy.append(_start(work, ending))
            _send_job(busy[-1], waiting)

        while busy:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                message = _receive(worker)
                if isinstance(message, Progress):
                    yield message
                    continue

                # The next job is handed out before the result is yielded, so that the worker is not idle while the
                # caller runs.
                number = worker.number
                if not _send_job(worker, waiting):
                    busy.remove(worker)
                yield Finished(number, message)


def _start(work: Callable[..., Any], ending: contextlib.ExitStack) -> _Worker:
    """Starts a worker, and registers it with `ending` to be killed."""
    ours, theirs = multiprocessing.Pipe()
    # Not `fork`: the parent may have threads, whose locks a fork would copy in any state.
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(work, theirs), daemon=True)
    resource_tracker.ensure_running()  # otherwise the first start does it, and unblocks the signals

    # The worker inherits the blocked signals. The parent's mask is restored right after the start.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        process.start()
        ending.callback(_end, process)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    # The parent must not hold the worker's end, or it would never see the pipe close.
    theirs.close()
    return _Worker(process, ours, number=-1)


def _end(process: SpawnProcess) -> None:
    """Kills a worker and waits for its exit."""
    # Workers have nothing to save: the files of a unit are published when they are complete.
    process.kill()
    process.join()


def _send_job(worker: _Worker, waiting: Iterator[tuple[int, Any]]) -> bool:
    """Sends the next job to a worker, or None if there is none. Returns whether there was one."""
    number, job = next(waiting, (-1, None))
    with contextlib.suppress(BrokenPipeError):  # `_receive` reports a dead worker
        worker.pipe.send(job)
    worker.number = number
    return number >= 0


def _receive(worker: _Worker) -> Any:
    """Returns the next message of a worker. Raises UserError if the worker died, and re-raises what its job raised."""
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        raise UserError(
            "a worker was killed, perhaps for lack of memory; run the same command to resume, with fewer --workers if "
            "needed"
        ) from None
    if isinstance(message, Exception):
        raise message
    return message


# The worker


def _serve(work: Callable[[Any, Report], Any], pipe: Connection) -> None:
    """The main loop of a worker: receives jobs and sends results until it receives None."""
    with contextlib.suppress(BrokenPipeError, EOFError):  # the parent has exited
        while (job := pipe.recv()) is not None:
            try:
                pipe.send(work(job, pipe.send))
            except BrokenPipeError:
                raise
            except Exception as error:
                # Re-raised in the parent, with its type.
                pipe.send(error)
