"""Paths of checkpoints. Every file name is either taken literally or refused before anything is written."""

import glob
import os
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from etils.epath import gpath

from looplm_jax.errors import UserError
from looplm_jax.files import any_path, in_bucket

# gsutil and TensorStore treat some of these as patterns, and others as versions or fragments.
_FORBIDDEN_IN_BUCKETS = re.compile(r"[\x00-\x1f\x7f#?*+;\[\]\\]")


class _LocalPath(gpath.PosixGPath):
    """A local path in which `*` and `[` are ordinary characters, and `/gs/…` is a folder like any other."""

    @property
    def _uri_scheme(self) -> str | None:
        # The base class takes a path below /gs for a bucket.
        return None

    def glob(self, pattern: str) -> Iterator["_LocalPath"]:
        """Yields the entries below this folder that match. The folder's name is not treated as a pattern."""
        return (self._new(found) for found in glob.iglob(os.path.join(glob.escape(os.fspath(self)), pattern)))


def checkpoint_path(path: str | os.PathLike[str]) -> epath.Path:
    """Returns an absolute path at which checkpoints can be written and read.

    Raises:
      UserError: the path is a URL of another kind than gs://, or has a name that TensorStore, Orbax or Cloud Storage
        cannot represent.
    """
    given = any_path(path)
    if in_bucket(given):
        return _bucket_path(epath.Path(given))
    return _local_path(os.path.abspath(given))


def kvstore(folder: epath.Path) -> dict[str, Any]:
    """Returns TensorStore's specification of a folder. A specification needs no escaping, unlike a URL."""
    text = os.fspath(folder)
    if not in_bucket(folder):
        return {"driver": "file", "path": f"{text}/"}

    bucket, _, path = text.removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}


def _bucket_path(path: epath.Path) -> epath.Path:
    """Returns `path`. Raises UserError if its name contains a character that bucket tools misread."""
    found = _FORBIDDEN_IN_BUCKETS.search(os.fspath(path))
    if found:
        raise UserError(f"{os.fspath(path)!r} has {found[0]!r} in its name, which tools for buckets misread; rename it")
    return path


def _local_path(path: str) -> epath.Path:
    """Returns `path` as a literal local path. Raises UserError if no checkpoint can be stored there."""
    reason = _reason_against(path)
    if reason:
        raise UserError(f"{path!r} {reason}, so no checkpoint can be kept there; rename the folder or choose another")
    return _LocalPath(path)


def _reason_against(path: str) -> str | None:
    """Returns why no checkpoint can be stored at `path`, or None."""
    if "\\" in path:
        return "has a backslash in its name, which TensorStore reads as a slash"
    if "gs:/" in path:
        return "has 'gs:/' in it, which Orbax reads as the name of a bucket"
    # Linux allows any bytes in a name; TensorStore requires UTF-8.
    try:
        path.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    return None
