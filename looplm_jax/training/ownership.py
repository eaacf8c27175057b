"""One process per run folder: a lock that the system keeps, and a file that tells other machines who holds it.

`owner.json` is in the run folder while a process trains there. On one machine a lock on that file decides, which the
system drops with the process, so the same command can resume right after `kill -9`. For other machines, and in
buckets, which have no locks, the file says when its owner was last alive: after `STALE_SECONDS` without a sign of life
the folder is free.
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
from looplm_jax.files import AnyPath, forget_listing, locked, make_folder, writing

OWNER_FILE = "owner.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0

_RETRY = 75  # exit status of sysexits.h for "try again": supervisors do
_LARGEST = 65536  # bytes of `owner.json` that are read
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class HeldElsewhereError(UserError):
    """Another machine trains in the folder, or did a moment ago."""

    status = _RETRY


@runtime_checkable
class Ownership(Protocol):
    """A run folder that this process holds."""

    def check(self) -> None:
        """Raises UserError where the folder was moved, removed or taken over, and must not be written to any more."""


class NotOwner:
    """The `Ownership` of every process but process 0, which holds the folder for all."""

    def check(self) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Owner:
    """What `owner.json` says."""

    host: str
    boot: str  # changes when the machine starts again; the same in all containers of a machine
    pid: int
    process_start: str  # tells a process from a later one with the same pid
    token: str
    heartbeat: float  # seconds since 1970

    @classmethod
    def this_process(cls) -> "Owner":
        """Returns a new owner, alive now."""
        return cls(
            host=socket.gethostname(),
            boot=_boot_id(),
            pid=os.getpid(),
            process_start=_process_start(os.getpid()),
            token=secrets.token_hex(8),
            heartbeat=time.time(),
        )

    def is_alive(self) -> bool:
        """Whether the process exists, where it is one of this machine; elsewhere, whether its heartbeat is fresh."""
        if self.boot == _boot_id() and self.host == socket.gethostname():
            return bool(self.process_start) and _process_start(self.pid) == self.process_start
        return time.time() - self.heartbeat < STALE_SECONDS

    def is_this_process(self) -> bool:
        """Whether this process wrote it in an earlier run and could not remove it."""
        return (self.boot, self.host, self.pid) == (_boot_id(), socket.gethostname(), os.getpid())

    def is_in_another_container(self) -> bool:
        """Whether it is in another container of this machine, where locks work and process numbers are other ones."""
        return self.boot == _boot_id() and self.host != socket.gethostname()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def own(folder: AnyPath) -> Iterator[Ownership]:
    """Makes the run folder where it is missing, and keeps other processes from training in it meanwhile.

    Raises:
      UserError: another process trains in it, or it cannot be written to.
      HeldElsewhereError: a process on another machine trains in it, or did so in the last `STALE_SECONDS`.
    """
    with _own_local(folder) if isinstance(folder, Path) else _own_object(folder) as owned:
        beating = threading.Event()
        thread = threading.Thread(target=_beat, args=(owned, beating), daemon=True)
        thread.start()
        try:
            yield owned
        finally:
            beating.set()
            thread.join()


@contextlib.contextmanager
def _own_local(folder: Path) -> Iterator["_LocalOwnership"]:
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    with writing(folder):
        make_folder(folder)
    try:
        with contextlib.ExitStack() as held:
            with writing(folder):
                owned = _LocalOwnership(folder, _locked_file(folder, held))
            held.callback(owned.release)
            yield owned
    finally:
        with contextlib.suppress(OSError):  # they hold the run
            for path in new_folders:
                path.rmdir()


def _locked_file(folder: Path, held: contextlib.ExitStack) -> int:
    """Locks `owner.json` until `held` is closed. Returns its descriptor; raises what `own` raises."""
    path = folder / OWNER_FILE

    def busy() -> None:
        holder: object = "another process"
        with contextlib.suppress(FileNotFoundError):  # the other process ended and removed it a moment ago
            holder = _parse(path.read_bytes()) or holder
        raise UserError(
            f"{folder} is in use by {holder}, which trains in it; wait for it or stop it, or choose another --out"
        ) from None

    while True:
        handle = held.enter_context(locked(path, busy=busy))
        if _is_same_file(path, handle):
            break
        held.close()  # its last owner removed the file before we had the lock
    holder = _parse(os.pread(handle, _LARGEST, 0))
    is_gone = holder is None or holder.is_this_process() or holder.is_in_another_container() or not holder.is_alive()
    if holder is not None and not is_gone:
        raise _held_elsewhere(holder, folder, path)
    return handle


@contextlib.contextmanager
def _own_object(folder: AnyPath) -> Iterator["_ObjectOwnership"]:
    path = folder / OWNER_FILE
    with writing(folder):
        holder = _read_object(path)
    if holder is not None and not holder.is_this_process() and holder.is_alive():
        raise _held_elsewhere(holder, folder, path)
    owned = _ObjectOwnership(folder, path)
    try:
        yield owned
    finally:
        owned.release()


class _LocalOwnership:
    def __init__(self, folder: Path, handle: int):
        self._folder, self._path, self._handle = folder, folder / OWNER_FILE, handle
        self._owner = Owner.this_process()
        self._is_taken = False
        self._write()

    def check(self) -> None:
        """See `Ownership.check`."""
        if self._is_taken or not _is_same_file(self._path, self._handle):
            raise _lost(self._folder)

    def beat(self) -> None:
        """Says that the process is alive, unless another machine has taken the folder over."""
        with contextlib.suppress(OSError):  # a disk that is full for a moment; the next heartbeat may succeed
            holder = _parse(os.pread(self._handle, _LARGEST, 0))
            self._is_taken = holder is not None and holder.token != self._owner.token
            if not self._is_taken:
                self._write()

    def release(self) -> None:
        """Leaves the folder to others."""
        if not self._is_taken and _is_same_file(self._path, self._handle):
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _write(self) -> None:
        self._owner = dataclasses.replace(self._owner, heartbeat=time.time())
        content = _content(self._owner)
        os.pwrite(self._handle, content, 0)
        os.ftruncate(self._handle, len(content))


class _ObjectOwnership:
    def __init__(self, folder: AnyPath, path: AnyPath):
        self._folder, self._path = folder, path
        self._owner = Owner.this_process()
        self._is_taken = False
        with writing(folder):
            path.write_bytes(_content(self._owner))

    def check(self) -> None:
        """See `Ownership.check`; as of the last heartbeat."""
        if self._is_taken:
            raise _lost(self._folder)

    def beat(self) -> None:
        """Says that the process is alive, unless another one has taken the folder over."""
        with contextlib.suppress(Exception):  # clients of buckets raise errors of many kinds; the next may succeed
            holder = _read_object(self._path)
            self._is_taken = holder is None or holder.token != self._owner.token
            if not self._is_taken:
                self._owner = dataclasses.replace(self._owner, heartbeat=time.time())
                self._path.write_bytes(_content(self._owner))

    def release(self) -> None:
        """Leaves the folder to others."""
        with contextlib.suppress(Exception):
            holder = _read_object(self._path)
            if holder is not None and holder.token == self._owner.token:
                self._path.unlink()


def _beat(owned: "_LocalOwnership | _ObjectOwnership", ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        owned.beat()


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


def _is_same_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(handle))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # a shared disk that does not answer for a moment says nothing about the folder
        return True


def _content(owner: Owner) -> bytes:
    return (json.dumps(dataclasses.asdict(owner)) + "\n").encode()


def _parse(content: bytes) -> Owner | None:
    """Returns what an `owner.json` says, None where it is empty or damaged: then nobody holds the folder by it."""
    try:
        values: Any = json.loads(content)
        kinds = {field.name: field.type for field in dataclasses.fields(Owner)}
        if not all(isinstance(values[name], kind) for name, kind in kinds.items()):  # type: ignore[arg-type]
            return None
        return Owner(**{name: values[name] for name in kinds})
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read_object(path: AnyPath) -> Owner | None:
    forget_listing(path)
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:  # not Linux: one name stands for one machine
        return socket.gethostname()


def _process_start(pid: int) -> str:
    """Returns when a process of this machine started, by its own clock; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, 0)
            return "unknown"
        return ""
