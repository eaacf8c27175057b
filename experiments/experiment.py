"""The interface of an experiment: a claim, a grid of cells per scale, and a report with the published results."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from looplm_jax.evaluation import Table


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
