"""The frame of an experiment: a claim, a grid of cells per scale, a record per finished cell, and a report.

A folder holds one experiment at one scale. Cells run one after another; if the command stops, the same command resumes.
With `--share 2/4` a process takes every fourth cell, starting with the second. A failed cell does not stop the others.
"""

import dataclasses
import enum
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from looplm_jax import json_io
from looplm_jax.codec import differences
from looplm_jax.errors import UserError
from looplm_jax.evaluation import Table
from looplm_jax.files import write_atomically
from looplm_jax.training._stopping import Stopped

# The interface


class Scale(enum.Enum):
    """The size at which an experiment runs; the code is the same."""

    SMOKE = "smoke"  # seconds, to check that it runs
    CPU = "cpu"  # two cores, at most 20 minutes per cell
    GPU = "gpu"  # half an hour of one H200
    PAPER = "paper"  # the published settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid. `settings` are plain JSON values that determine the result completely."""

    name: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """The record of a finished cell: its result, the settings and versions that produced it, and its time."""

    cell: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Tables of our results next to the published ones, findings, and figures by name, each drawn to a path."""

    tables: Sequence[Table]
    findings: Sequence[str]
    figures: Mapping[str, Callable[[Path], None]]


class Experiment(Protocol):
    """One experiment. The docstring of its module is its documentation."""

    @property
    def name(self) -> str:
        """Returns the name that the user types."""

    @property
    def claim(self) -> str:
        """Returns what the experiment tests, in one line."""

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Returns the scales that it has settings for."""

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns the cells of a scale."""

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Returns the result of a cell as plain JSON values. Files go to `folder`; a second call resumes from them."""

    def report(self, records: Sequence[Record]) -> Report:
        """Returns the report for the records of a scale, which may be only part of its grid."""


# The grid


FORMAT = 1  # of the records; incremented when old ones would be misread
_INTERRUPTED = "interrupted.json"
_PACKAGES = ("looplm_jax", "jax", "flax", "optax", "numpy")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The cells that a process takes: numbers `part`, `part + of`, … counted from 1."""

    part: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Parses `2/4`. Raises UserError for anything else."""
        part, slash, of = text.partition("/")
        if not slash or not part.isdecimal() or not of.isdecimal() or not 1 <= int(part) <= int(of):
            raise UserError(f"--share {text}: write it as PART/OF, such as 1/4 to 4/4")
        return cls(part=int(part), of=int(of))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The records of all finished cells of a grid, and the reasons why cells failed in this run, by name."""

    records: list[Record]
    failed: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The folder of an experiment at a scale."""

    folder: Path
    experiment: str
    scale: str

    def open(self) -> None:
        """Creates the folder, or checks that it is this experiment's.

        Raises:
          UserError: it holds another experiment, scale or version.
        """
        path, mine = self.folder / "grid.json", self._identity()
        if path.exists():
            differing = [
                f"{field.path} is {field.theirs!r}, not {field.ours!r}" for field in differences(mine, _read(path))
            ]

            if differing:
                raise UserError(f"{self.folder} holds other results ({'; '.join(differing)}); choose another --out")
            return

        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, _json(mine))

    def records(self, cells: Sequence[Cell]) -> list[Record]:
        """Returns the records of the finished cells.

        Raises:
          UserError: a record was made with settings other than the cell's.
        """
        return [record for cell in cells if (record := self.record(cell)) is not None]

    def record(self, cell: Cell) -> Record | None:
        """Returns the record of a cell, or None if it is not finished. Raises UserError as `records` does."""
        path = self.cell_folder(cell) / "record.json"
        if not path.exists():
            return None

        values = _read(path)
        record = Record(**{**values, "result": json_io.with_nan(values["result"])})
        # Through JSON, because records hold lists where settings may hold tuples.
        settings = json.loads(_json(cell.settings))
        changed = [field.path for field in differences(settings, record.settings)]

        if changed:
            raise UserError(
                f"{path} was made with other settings ({', '.join(changed)}); choose another --out, or remove it"
            )
        return record

    def cell_folder(self, cell: Cell) -> Path:
        """Returns the folder of a cell's files."""
        return self.folder / "cells" / cell.name

    def run(
        self,
        cells: Sequence[Cell],
        work: Callable[[Cell, Path], Mapping[str, Any]],
        share: Share,
        say: Callable[[str], None],
    ) -> Outcome:
        """Runs the unfinished cells of a share of the grid. A cell whose work raises UserError is skipped.

        Raises:
          UserError: as `records`.
          Stopped: a signal arrived; the same call resumes.
        """
        self.records(cells)  # refuses mismatched records before anything runs
        failed = {}
        mine = cells[share.part - 1 :: share.of]

        for number, cell in enumerate(mine, 1):
            where = f"cell {number} of {len(mine)}, {cell.name}"
            if self.record(cell) is not None:
                say(f"{where}: finished before")
                continue

            say(f"{where}: begins")
            folder = self.cell_folder(cell)
            folder.mkdir(parents=True, exist_ok=True)
            start, before = time.perf_counter(), _seconds_before(folder)

            try:
                result = work(cell, folder)
            except Stopped:
                # Time of interrupted attempts counts toward the record of the cell.
                write_atomically(folder / _INTERRUPTED, _json({"seconds": before + time.perf_counter() - start}))
                raise
            except UserError as error:
                failed[cell.name] = str(error)
                say(f"{where}: FAILED: {error}")
                continue

            record = Record(
                cell=cell.name,
                settings=cell.settings,
                result=result,
                seconds=before + time.perf_counter() - start,
                versions=versions(),
            )
            write_atomically(folder / "record.json", _json(dataclasses.asdict(record)))
            say(f"{where}: finished in {record.seconds:.0f} s")

        return Outcome(records=self.records(cells), failed=failed)

    def _identity(self) -> dict[str, Any]:
        """Returns what a folder must agree on to be continued."""
        return {"format": FORMAT, "experiment": self.experiment, "scale": self.scale}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that the numbers depend on."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def _seconds_before(folder: Path) -> float:
    """Returns the time that an unfinished cell took before a signal stopped it."""
    path = folder / _INTERRUPTED
    return float(_read(path)["seconds"]) if path.exists() else 0.0


def _read(path: Path) -> dict[str, Any]:
    """Reads a JSON file. Raises UserError if it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is not JSON; remove it, and the same command makes it again") from None


def _json(value: Any) -> bytes:
    """Returns a value as bytes of strict JSON."""
    return (json_io.dumps(value, indent=1, sort_keys=True) + "\n").encode()
