"""What an experiment is: a claim, a grid of cells at each scale, and a report with the printed results beside ours."""

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from looplm_jax.evaluation.tables import Table


class Scale(enum.Enum):
    """How large an experiment is run; the code is the same."""

    SMOKE = "smoke"  # seconds: whether it runs
    CPU = "cpu"  # two cores, at most 20 minutes a cell
    GPU = "gpu"  # half an hour of one H200
    PAPER = "paper"  # the printed settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid. `settings` are plain JSON values, and all that its result follows from."""

    name: str
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a finished cell leaves: its result, what made it and how long that took."""

    cell: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float
    versions: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Tables with ours beside the printed numbers, what they say, and figures by name, each drawn to a path."""

    tables: Sequence[Table]
    findings: Sequence[str]
    figures: Mapping[str, Callable[[Path], None]]


class Experiment(Protocol):
    """One experiment; its module's docstring is its record."""

    @property
    def name(self) -> str:
        """As it is typed."""

    @property
    def claim(self) -> str:
        """What it tests, in a line."""

    @property
    def scales(self) -> tuple[Scale, ...]:
        """Those that it has settings for."""

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """The grid at a scale."""

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """The result of a cell, as plain JSON values. Files go to `folder`; called again, it goes on from them."""

    def report(self, records: Sequence[Record]) -> Report:
        """What the records of a scale say, those of a part of the grid too."""
