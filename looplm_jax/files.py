"""Files that are written whole or not at all, on this disk or in a bucket, and one line where it refuses."""

import contextlib
import errno
import fcntl
import importlib.util
import logging
import os
import shlex
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias, TypeVar

from etils import epath
from etils.epath import backend

from looplm_jax.errors import UserError

NO_SPACE = "no space left on the disk"
AnyPath: TypeAlias = Path | epath.Path  # on this disk, or in a bucket

WAITS = (0.2, 1.0, 3.0)  # seconds before each new attempt at a read that the disk refused

_BUCKET = "gs://"
_SPECIAL_FILES = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)  # of file systems that have none
_LONGEST = 200

T = TypeVar("T")


def any_path(path: str | os.PathLike[str]) -> AnyPath:
    """A path on this disk, or in a bucket where it begins with `gs://`.

    Raises:
      UserError: a URL of another kind, or gcsfs is not installed.
    """
    text = os.fspath(path)
    if "://" not in text:
        return Path(path)
    if not text.startswith(_BUCKET):
        raise UserError(f"{text}: a run lies on a disk or in a bucket; give a path, or gs://bucket/folder")
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{text}: buckets need gcsfs; install it with `pip install 'looplm_jax[gcs]'`")
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # what it logs it raises, too
    return epath.Path(text)


def in_bucket(path: AnyPath) -> bool:
    """Whether it is an object, or the beginning of the names of objects, rather than a file or a folder."""
    return os.fspath(path).startswith(_BUCKET)


def pasted(path: str | os.PathLike[str]) -> str:
    """A path as it is typed in a shell, also where it looks like a flag."""
    text = os.fspath(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def absolute(path: AnyPath) -> AnyPath:
    """The same place, whatever the current folder."""
    return path.absolute() if isinstance(path, Path) else path


def check_regular(path: str | os.PathLike[str]) -> None:
    """Does nothing for a regular file, a folder, or what is not on this disk.

    Raises:
      UserError: the path is a named pipe, a socket or a device. To read one may take forever, or all memory.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says why
    kind = _SPECIAL_FILES.get(stat.S_IFMT(mode))
    if kind:
        raise UserError(f"{os.fspath(path)} is {kind}, not a file; give a regular file")


def read_text(path: AnyPath) -> str:
    """Returns the text of a UTF-8 file, without a byte order mark.

    Raises:
      OSError: there is no such file, or it cannot be read.
      UserError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; convert it") from None


def make_folder(path: AnyPath) -> None:
    """With its parents; in a bucket there is nothing to make. Raises OSError."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def forget_listing(path: AnyPath) -> None:
    """Clients of buckets keep lists of what they saw there, and others write as well."""
    if in_bucket(path):
        backend.fsspec_backend.fs(path).invalidate_cache()


def retried(read: Callable[[], T], passing: type[Exception] | tuple[type[Exception], ...] = OSError) -> T:
    """What `read` returns, tried again after each of `WAITS` where it raises an error that may pass.

    Raises:
      Exception: the error of the last attempt, or one of another kind.
    """
    for wait in WAITS:
        try:
            return read()
        except passing:
            time.sleep(wait)
    return read()


def refusal(error: Exception, path: AnyPath) -> str | None:
    """Why the disk or the bucket refused `path`, or None if `error` is of another kind."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    if in_bucket(path):
        return _refusal_of_bucket(error)
    return error.strerror if isinstance(error, OSError) else None


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[None]:
    """Raises UserError, with the name of the file, where the disk or the bucket refuses what is written inside."""
    with _naming(path, "written"):
        yield


@contextlib.contextmanager
def reading(path: AnyPath) -> Iterator[None]:
    """Raises UserError, with the name of the file, where the disk or the bucket refuses what is read inside."""
    with _naming(path, "read"):
        yield


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Write a file that is never seen half-written. Raises UserError where the disk or the bucket refuses."""
    with writing(path):
        if isinstance(path, Path):
            _replace(path, content)
        else:
            path.write_bytes(content)  # an object appears once all of it has arrived


@contextlib.contextmanager
def locked(path: Path, *, busy: Callable[[], None]) -> Iterator[int]:
    """Holds an exclusive lock on a folder or a file, which is made if it is missing, and gives its descriptor.

    The system drops the lock with the process, however it ends. Where the file system has no locks, none is held.

    Args:
      path: what is locked.
      busy: called where another process holds the lock: it raises, or returns and the lock is waited for.
    """
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    handle = os.open(path, flags, 0o666)
    try:
        _lock(handle, busy)
        yield handle
    finally:
        os.close(handle)


def _lock(handle: int, busy: Callable[[], None]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        busy()
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # otherwise a power cut after the rename can leave an empty file
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _naming(path: AnyPath, done: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = refusal(error, path)
        if reason is None:
            raise
        raise UserError(f"{path} cannot be {done} ({reason}); mend that and run the same command again") from None


def _refusal_of_bucket(error: Exception) -> str | None:
    """Clients of buckets raise errors of many kinds; those of TensorStore name the object."""
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket"
    known = isinstance(error, OSError) or type(error).__module__.startswith(("gcsfs.", "google.", "aiohttp."))
    if not known and _BUCKET not in text:
        return None
    return f"{text[:_LONGEST]}{'…' if len(text) > _LONGEST else ''}" or type(error).__name__
