"""Files that are written whole or not at all, and one line where the disk refuses."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from looplm_jax.errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises UserError, with the name of the file, where the disk refuses what is written inside."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "no space left on the disk" if full else error.strerror
        raise UserError(f"{path} cannot be written ({reason}); mend that and run the same command again") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is never seen half-written. Raises UserError where the disk refuses."""
    temporary = path.with_name(path.name + ".new")
    with writing(path):
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
