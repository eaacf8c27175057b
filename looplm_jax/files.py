"""Atomic writes and checked reads of files, on local disks or in buckets, with one-line errors."""

import contextlib
import errno
import fcntl
import importlib.util
import logging
import os
import shlex
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias, TypeVar

from etils import epath
from etils.epath import backend

from looplm_jax.errors import UserError

NO_SPACE = "no space left on the disk"
AnyPath: TypeAlias = Path | epath.Path  # a local path, or one in a bucket

WAITS = (0.2, 1.0, 3.0)  # seconds before each retry of a refused read

_BUCKET = "gs://"
_SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # errors of file systems without locks
# Characters of an error of a bucket that a message shows.
_LONGEST = 200

T = TypeVar("T")


# Paths


def any_path(path: str | os.PathLike[str]) -> AnyPath:
    """Returns a local path, or a path in a bucket if it begins with `gs://`.

    Raises:
      UserError: the path is a URL of another kind, or gcsfs is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(path)
    if not text.startswith(_BUCKET):
        raise UserError(f"{text}: a run is stored on a disk or in a bucket; give a path, or gs://bucket/folder")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need gcsfs; install it with `pip install 'looplm_jax[gcs]'`")

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it also raises the errors that it logs
    return epath.Path(text)


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket rather than on a local disk."""
    return os.fspath(path).startswith(_BUCKET)


def quoted(path: str | os.PathLike[str]) -> str:
    """Returns a path quoted for a shell, also if it looks like a flag."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def absolute(path: AnyPath) -> AnyPath:
    """Returns the same path, independent of the current directory."""
    return path.absolute() if isinstance(path, Path) else path


# Reading


def check_regular(path: str | os.PathLike[str]) -> None:
    """Checks that a path is not a special file. Paths in buckets and missing files pass.

    Raises:
      UserError: the path is a named pipe, a socket or a device. Reading it may take forever or all memory.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # opening the file reports the reason

    kind = _SPECIAL_FILES.get(stat.S_IFMT(mode))
    if kind:
        raise UserError(f"{os.fspath(path)} is {kind}, not a file; give a regular file")


def read_text(path: AnyPath) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
      OSError: the file does not exist or cannot be read.
      UserError: the file is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it") from None


def make_folder(path: AnyPath) -> None:
    """Creates a folder with its parents; does nothing in a bucket. Raises OSError."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def forget_listing(path: AnyPath) -> None:
    """Clears the listings that clients of buckets cache, because other programs write to the bucket too."""
    if in_bucket(path):
        backend.fsspec_backend.fs(path).invalidate_cache()


def with_retries(read: Callable[[], T], passing: type[Exception] | tuple[type[Exception], ...] = OSError) -> T:
    """Returns the result of `read`, retried after each of `WAITS` if it raises an error that may be temporary.

    Args:
      read: the function to call.
      passing: the types of temporary errors.

    Raises:
      Exception: the error of the last attempt, or an error of another type.
    """
    # The last attempt is outside the loop, so that its error reaches the caller.
    for wait in WAITS:
        try:
            return read()
        except passing:
            time.sleep(wait)
    return read()


# Errors


def refusal(error: Exception, path: AnyPath) -> str | None:
    """Returns why the disk or the bucket refused `path`, or None if `error` is of another kind."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    if in_bucket(path):
        return _refusal_of_bucket(error)
    return error.strerror if isinstance(error, OSError) else None


@contextlib.contextmanager
def report_failed_writes(path: AnyPath) -> Iterator[None]:
    """A context manager that raises UserError with the name of the file if the disk or the bucket refuses a write."""
    with _naming(path, "written"):
        yield


@contextlib.contextmanager
def report_failed_reads(path: AnyPath) -> Iterator[None]:
    """A context manager that raises UserError with the name of the file if the disk or the bucket refuses a read."""
    with _naming(path, "read"):
        yield


# Writing


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Writes a file atomically. Raises UserError if the disk or the bucket refuses it."""
    with report_failed_writes(path):
        if isinstance(path, Path):
            _replace(path, content)
        else:
            path.write_bytes(content)  # an object becomes visible only when it is complete


@contextlib.contextmanager
def locked(path: Path, *, busy: Callable[[], None]) -> Iterator[int]:
    """A context manager that holds an exclusive lock on a folder or a file and yields its descriptor.

    A missing file is created. The operating system releases the lock when the process ends, however that happens. On a
    file system without locks, none is held.

    Args:
      path: the folder or file to lock.
      busy: called if another process holds the lock. It raises an error, or returns to wait for the lock.
    """
    # A folder can be locked but not opened for writing. Symbolic links are not followed to a file elsewhere.
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o666)

    try:
        _lock(handle, busy)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, busy: Callable[[], None]) -> None:
    """Locks an open file."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy()
        # `busy` returned, so this process waits.
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _replace(path: Path, content: bytes) -> None:
    """Writes a temporary file and renames it."""
    # In the same folder, because a rename is atomic only within a file system.
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # otherwise a power failure after the rename may leave an empty file
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


# Output folders


@contextlib.contextmanager
def staged_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a staging folder that becomes `out` if the body succeeds, and is removed if it raises.

    The staging folder is next to `out`, on the same file system, so that the final rename is atomic. The partial output
    of an earlier process that was killed is removed first.

    Raises:
      UserError: `out` exists and is not an empty folder, another process is writing it, or the file system refuses a
        write.
    """
    out = Path(out)
    with report_failed_writes(out):
        target = _absent_or_empty(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.partial")
        with _only_writer(staging, out), _named_as(out, staging):
            try:
                _remove_contents(staging)
                yield staging
                staging.replace(target)
            # BaseException: Ctrl-C must not leave a staging folder either.
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise


def _absent_or_empty(out: Path) -> Path:
    """Returns the path of `out` with links resolved. Raises UserError unless it is absent or an empty folder."""
    target = out.resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"{out} is a file; choose another folder")
    if target.is_dir() and any(target.iterdir()):
        raise UserError(f"{out} is not empty; choose another folder")
    # Neither can be replaced by a rename.
    if target == Path.cwd() or target.is_mount():
        raise UserError(f"{out} is the current folder or a mount point; name a new folder inside it")
    return target


@contextlib.contextmanager
def _only_writer(staging: Path, out: Path) -> Iterator[None]:
    """Creates the folder and holds its lock. Raises UserError if another process is writing there."""

    def busy() -> None:
        raise UserError(f"{out} is being written by another process; choose another folder") from None

    staging.mkdir(exist_ok=True)
    with locked(staging, busy=busy):
        yield


@contextlib.contextmanager
def _named_as(out: Path, staging: Path) -> Iterator[None]:
    """Replaces the staging folder with `out` in error messages: by then the staging folder no longer exists."""
    try:
        yield
    except UserError as error:
        # The user knows only `out`.
        raise UserError(str(error).replace(str(staging), str(out))) from error


def _remove_contents(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            # Links are removed, not what they lead to.
            entry.unlink()


# Refused operations


@contextlib.contextmanager
def _naming(path: AnyPath, done: str) -> Iterator[None]:
    """Converts refused operations to UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error, path)
        if reason is None:
            raise
        raise UserError(f"{path} cannot be {done} ({reason}); fix that and run the same command again") from None


def _refusal_of_bucket(error: Exception) -> str | None:
    """Returns why a bucket refused an operation, or None if `error` is of another kind.

    Clients of buckets raise many types of errors; those of TensorStore contain the name of the object.
    """
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket"
    known = isinstance(error, OSError) or type(error).__module__.startswith(("gcsfs.", "google.", "aiohttp."))
    if not known and _BUCKET not in text:
        return None
    return f"{text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}" or type(error).__name__
