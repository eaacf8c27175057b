"""Traced programs on disk, so that a later process need not trace them.

JAX's compilation cache skips compilation, but a process must trace and lower a program to find it there, and a small
engine spends most of its start on that. `SavedPrograms` saves the lowered program as `jax.export` serializes it, under
a key of everything that tracing reads: sources, versions, settings, static arguments, and shapes of the others.
"""

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import flax
import jax
import jax.export
import numpy as np
from jax.tree_util import PyTreeDef
from jaxtyping import PyTree

import looplm_jax
from looplm_jax.errors import UserError
from looplm_jax.files import write_atomically
from looplm_jax.models._looplm import LoopLM, Params

_SUFFIX = ".program"
_MOST_PROGRAMS = 64  # files of a folder; a program of 24 layers has about a megabyte
# Settings that change where programs are cached, or what is logged, but no program.
_IRRELEVANT = ("cache", "log", "traceback", "debug")
_ADDRESS = " at 0x"  # in the `repr` of a function, which means something else in another process

Shape: TypeAlias = tuple[tuple[int, ...], np.dtype]

S = TypeVar("S")
R = TypeVar("R")


class SavedPrograms:
    """Runs programs that an earlier process traced, and saves those that none did.

    A program is a jitted function of the model, its parameters, a state that is donated, and further arrays. It returns
    the new state, of the same structure, and a result. A damaged file, or a folder that cannot be written, costs time
    only.

    Args:
      folder: where programs are saved. Only its owner may be able to write to it, because its programs are executed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._ready: dict[Any, Callable[..., list[jax.Array]]] = {}

    def run(
        self,
        program: Callable[..., tuple[S, R]],
        model: LoopLM,
        params: Params,
        state: S,
        *others: PyTree,
        result: R,
        **static: Any,
    ) -> tuple[S, R]:
        """Returns `program(model, params, state, *others, **static)`. The state is donated.

        Args:
          program: a jitted function.
          model: its first argument, which is static.
          params: its second argument.
          state: its third argument.
          *others: its other positional arguments.
          result: any value with the structure of the result.
          **static: its keyword arguments, which are static.
        """
        leaves, structure = jax.tree.flatten((params, state, *others))
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        described = (program, model, tuple(static.items()), structure, shapes)

        call = self._ready.get(described)
        if call is None:
            call = self._ready[described] = self._compiled(params, state, *described)
        return jax.tree.unflatten(jax.tree.structure((state, result)), call(*leaves))

    def _compiled(self, params: Params, state: PyTree, *described: Any) -> Callable[..., list[jax.Array]]:
        """Returns a program as a function of the leaves of its arguments, which donates those of the state."""
        start = len(jax.tree.leaves(params))
        donated = range(start, start + len(jax.tree.leaves(state)))
        return jax.jit(self._traced(*described).call, donate_argnums=tuple(donated))

    def _traced(
        self,
        program: Callable[..., Any],
        model: LoopLM,
        static: Sequence[tuple[str, Any]],
        structure: PyTreeDef,
        shapes: Sequence[Shape],
    ) -> jax.export.Exported:
        """Returns a program of flat arguments: the saved one, or a newly traced one, which is saved."""
        description = f"{program.__module__}.{program.__name__} {model} {static} {structure} {shapes} {_versions()}"
        path = self._folder / f"{hashlib.sha256(description.encode()).hexdigest()}{_SUFFIX}"
        # A function, such as that of a `Custom` policy, is described by its address, which says nothing elsewhere.
        lasting = _ADDRESS not in description
        saved = _read(path) if lasting else None
        if saved is not None:
            return saved

        def flat(*leaves: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(program(model, *jax.tree.unflatten(structure, leaves), **dict(static)))

        traced = jax.export.export(jax.jit(flat))(*(jax.ShapeDtypeStruct(*shape) for shape in shapes))
        if lasting:
            self._save(path, traced)
        return traced

    def _save(self, path: Path, traced: jax.export.Exported) -> None:
        """Writes a program, and removes those that were not used for the longest time."""
        # The disk may be full, or another process may remove the same files. The program runs all the same.
        with contextlib.suppress(UserError, OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            payload = bytes(traced.serialize())
            write_atomically(path, hashlib.sha256(payload).digest() + payload)
            programs = sorted(self._folder.glob(f"*{_SUFFIX}"), key=lambda path: path.stat().st_mtime)
            for old in programs[:-_MOST_PROGRAMS]:
                old.unlink()


def _read(path: Path) -> jax.export.Exported | None:
    """Returns a saved program, or None if there is none, or it is damaged."""
    size = hashlib.sha256().digest_size
    try:
        content = path.read_bytes()
        os.utime(path)  # its last use, by which programs are removed
    except OSError:
        return None
    # The reader of programs trusts what it reads, so damage has to be found before.
    if hashlib.sha256(content[size:]).digest() != content[:size]:
        return None
    return jax.export.deserialize(bytearray(content[size:]))


@functools.cache
def _versions() -> str:
    """Returns everything outside the arguments that a traced program depends on."""
    package = Path(looplm_jax.__file__).parent
    # Size and time stand for the content, whose digest would take longer than tracing.
    sources = [(str(path.relative_to(package)), path.stat()) for path in sorted(package.rglob("*.py"))]
    files = [(name, found.st_size, found.st_mtime_ns) for name, found in sources]
    settings = {
        name: value for name, value in jax.config.values.items() if not any(map(name.__contains__, _IRRELEVANT))
    }
    return f"{jax.__version__} {flax.__version__} {jax.devices()[0].device_kind} {files} {sorted(settings.items())}"
