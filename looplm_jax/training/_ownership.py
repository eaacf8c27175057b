"""Ensures that one process at a time trains in a run folder, by a file lock and a heartbeat.

`owner.json` is in the run folder while a process trains there. On one machine, a lock on that file is decisive. The
operating system releases it when the process ends, so the same command can resume right after `kill -9`. Other
machines, and buckets, which have no locks, rely on the heartbeat in the file: after `STALE_SECONDS` without one the
folder is free.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from looplm_jax.errors import UserError
from looplm_jax.files import AnyPath, forget_listing, locked, make_folder, report_failed_writes

OWNER_FILE = "owner.json"
# A heartbeat may be late by a slow disk, so several in a row have to be missing.
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0

_RETRY = 75  # exit status EX_TEMPFAIL of sysexits.h, "try again", to which supervisors react

_CONTENT_BYTES = 384  # of `owner.json`, more than any owner needs
_LARGEST = 65536  # bytes of `owner.json` that are read
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HeldElsewhereError(UserError):
    """Another machine trains in the folder, or did so less than `STALE_SECONDS` ago."""

    status = _RETRY


@runtime_checkable
class Ownership(Protocol):
    """Exclusive ownership of a run folder by this process."""

    def check(self) -> None:
        """Raises UserError if the folder was moved, removed or taken over, and must no longer be written to."""


class NotOwner:
    """The `Ownership` of every process except process 0, which owns the folder for all."""

    def check(self) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """The contents of `owner.json`."""

    host: str
    boot: str  # the boot id: changes at every boot, and is the same in all containers of a machine
    pid: int
    process_start: str  # distinguishes a process from a later one with the same pid
    token: str
    heartbeat: float  # seconds since 1970

    @classmethod
    def this_process(cls) -> "Owner":
        """Returns an owner for this process, with a new token and the current time."""
        return cls(
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            token=secrets.token_hex(8),
            heartbeat=time.time(),
        )

    def is_alive(self) -> bool:
        """Whether the owner is alive.

        On this machine, that is whether its process exists; elsewhere, whether its heartbeat is fresh.
        """
        if self.boot == _boot_id() and self.host == socket.gethostname():
            return bool(self.process_start) and _process_start(self.pid) == self.process_start
        return time.time() - self.heartbeat < STALE_SECONDS

    def is_this_process(self) -> bool:
        """Whether this process wrote the file in an earlier run and could not remove it."""
        return (self.boot, self.host, self.pid) == (_boot_id(), socket.gethostname(), os.getpid())

    def is_in_another_container(self) -> bool:
        """Whether the owner is in another container of this machine, which shares locks but not process ids."""
        return self.boot == _boot_id() and self.host != socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


# Owning a folder


@contextlib.contextmanager
def own(folder: AnyPath) -> Iterator[Ownership]:
    """A context manager that creates the run folder if necessary and keeps other processes from training in it.

    Raises:
      UserError: another process trains in it, it cannot be written to, or the block failed because the folder was lost.
      HeldElsewhereError: a process on another machine trains in it, or did so within the last `STALE_SECONDS`.
    """
    with _own_local(folder) if isinstance(folder, Path) else _own_object(folder) as owned:
        beating = threading.Event()
        # A thread, because a step or a compilation may take longer than a heartbeat may.
        thread = threading.Thread(target=_beat, args=(owned, beating), daemon=True)
        thread.start()

        try:
            yield owned
        except Exception:
            owned.check()  # a lost folder explains errors of any type
            raise
        finally:
            # The heartbeat ends before the ownership is released.
            beating.set()
            thread.join()


@contextlib.contextmanager
def _own_local(folder: Path) -> Iterator["_LocalOwnership"]:
    """Owns a local folder, and removes the folders it has created if they are empty at the end."""
    # Innermost first, which is the order in which they are removed.
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    with report_failed_writes(folder):
        make_folder(folder)

    try:
        with contextlib.ExitStack() as held:
            with report_failed_writes(folder):
                owned = _LocalOwnership(folder, _locked_file(folder, held))
            held.callback(owned.release)
            yield owned
    finally:
        with contextlib.suppress(OSError):  # not empty: the run was started
            for path in new_folders:
                path.rmdir()


def _locked_file(folder: Path, held: contextlib.ExitStack) -> int:
    """Locks `owner.json` until `held` is closed and returns its descriptor. Raises the errors of `own`."""
    path = folder / OWNER_FILE

    def busy() -> None:
        holder: object = "another process"
        with contextlib.suppress(FileNotFoundError):  # the other process has just ended and removed it
            # The lock says that another process has the folder; the file only says which.
            holder = _parse(path.read_bytes()) or holder
        raise UserError(
            f"{folder} is in use by {holder}, which trains in it; wait for it or stop it, or choose another --out"
        ) from None

    while True:
        # Its last owner may remove the file between opening and locking. A lock on a removed file excludes no process.
        handle = held.enter_context(locked(path, busy=busy))
        if _is_same_file(path, handle):
            break
        held.close()  # the last owner removed the file before this process had the lock

    holder = _parse(os.pread(handle, _LARGEST, 0))
    # With the lock held, an owner in another container of this machine has ended, whatever its heartbeat is.
    is_gone = holder is None or holder.is_this_process() or holder.is_in_another_container() or not holder.is_alive()

    if holder is not None and not is_gone:
        raise _held_elsewhere(holder, folder, path)
    return handle


@contextlib.contextmanager
def _own_object(folder: AnyPath) -> Iterator["_ObjectOwnership"]:
    """Owns a folder in a bucket."""
    path = folder / OWNER_FILE
    with report_failed_writes(folder):
        holder = _read_object(path)
    if holder is not None and not holder.is_this_process() and holder.is_alive():
        raise _held_elsewhere(holder, folder, path)

    # Buckets have no locks: of two runs that start within a moment, the second takes over, and the first notices.
    owned = _ObjectOwnership(folder, path)
    try:
        yield owned
    finally:
        owned.release()


# Heartbeats


class _LocalOwnership:
    """Ownership of a local folder, by a lock on `owner.json`."""

    def __init__(self, folder: Path, handle: int):
        self._folder, self._path, self._handle = folder, folder / OWNER_FILE, handle
        self._owner = Owner.this_process()
        self._is_taken = False
        self._write()

    def check(self) -> None:
        """Raises UserError if the folder is lost; see `Ownership.check`."""
        if self._is_taken or not _is_same_file(self._path, self._handle):
            raise _lost(self._folder)

    def beat(self) -> None:
        """Writes a heartbeat, unless another machine has taken over the folder."""
        with contextlib.suppress(OSError):  # a temporarily full disk: the next heartbeat may succeed
            holder = _parse(os.pread(self._handle, _LARGEST, 0))
            self._is_taken = holder is not None and holder.token != self._owner.token
            if not self._is_taken:
                self._write()

    def release(self) -> None:
        """Removes `owner.json`, so that other processes may own the folder."""
        if not self._is_taken and _is_same_file(self._path, self._handle):
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _write(self) -> None:
        self._owner = dataclasses.replace(self._owner, heartbeat=time.time())
        content = _content(self._owner)
        # Overwritten before it is truncated, so that readers never find an empty file.
        os.pwrite(self._handle, content, 0)
        os.ftruncate(self._handle, len(content))


class _ObjectOwnership:
    """Ownership of a folder in a bucket, by a heartbeat in `owner.json`."""

    def __init__(self, folder: AnyPath, path: AnyPath):
        self._folder, self._path = folder, path
        self._owner = Owner.this_process()
        self._is_taken = False
        with report_failed_writes(folder):
            path.write_bytes(_content(self._owner))

    def check(self) -> None:
        """Raises UserError if the folder was lost as of the last heartbeat; see `Ownership.check`."""
        if self._is_taken:
            raise _lost(self._folder)

    def beat(self) -> None:
        """Writes a heartbeat, unless another process has taken over the folder."""
        with contextlib.suppress(
            Exception
        ):  # clients of buckets raise many types of errors; the next heartbeat may succeed
            holder = _read_object(self._path)
            # In a bucket a missing object is a loss too, because only a user or another run removes it.
            self._is_taken = holder is None or holder.token != self._owner.token
            if not self._is_taken:
                self._owner = dataclasses.replace(self._owner, heartbeat=time.time())
                self._path.write_bytes(_content(self._owner))

    def release(self) -> None:
        """Removes `owner.json`, so that other processes may own the folder."""
        with contextlib.suppress(Exception):
            holder = _read_object(self._path)
            if holder is not None and holder.token == self._owner.token:
                self._path.unlink()


def _beat(owned: "_LocalOwnership | _ObjectOwnership", ended: threading.Event) -> None:
    """Writes heartbeats until `ended` is set."""
    while not ended.wait(HEARTBEAT_SECONDS):
        owned.beat()


# Errors


def _held_elsewhere(holder: Owner, folder: AnyPath, path: AnyPath) -> HeldElsewhereError:
    seconds = max(0.0, time.time() - holder.heartbeat)
    return HeldElsewhereError(
        f"{folder} is in use by {holder}, alive {seconds:.0f} s ago; stop it, or choose another --out; if it is gone, "
        f"run the same command again {STALE_SECONDS:.0f} s after its end, or remove {path} to take over now"
    )


def _lost(folder: AnyPath) -> UserError:
    return UserError(
        f"{folder} was moved, removed or taken over by another process while this one trained in it; nothing more is "
        "written, and the steps since the last save are lost; put the folder back, and the same command resumes"
    )


# The owner file


def _is_same_file(path: Path, handle: int) -> bool:
    """Whether `path` is still the open file `handle`."""
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a shared file system that is briefly unavailable does not mean that the folder is lost
        return True


def _content(owner: Owner) -> bytes:
    # Of one length, because a reader during a write must not find the end of a longer heartbeat behind a shorter one.
    return f"{json.dumps(dataclasses.asdict(owner)):<{_CONTENT_BYTES - 1}}\n".encode()


def _parse(content: bytes) -> Owner | None:
    """Returns the owner in an `owner.json`, or None if it is empty or damaged, which means that the folder is free."""
    try:
        values: Any = json.loads(content)
        kinds = {field.name: field.type for field in dataclasses.fields(Owner)}
        # The file may be from another version, or half of it may be missing.
        if not all(isinstance(values[name], kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
            return None
        return Owner(**{name: values[name] for name in kinds})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_object(path: AnyPath) -> Owner | None:
    """Returns the owner of a folder in a bucket, or None."""
    forget_listing(path)
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


# Identity of a process


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux: machines are identified by host name
        return socket.gethostname()


def _process_start(pid: int) -> str:
    """Returns the start time of a process of this machine, in clock ticks since boot, or an empty string if it is gone.

    On systems without /proc it is "unknown".
    """
    try:
        # The second field is the name in parentheses, which may contain spaces and parentheses. The start time is field
        # 22.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            # Signal 0 only tests whether the process exists.
            os.kill(pid, 0)
            return "unknown"
        return ""
