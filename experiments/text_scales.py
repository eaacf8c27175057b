"""The text models that early exit, KV sharing and depth study at each scale: the same ones for all three."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.experiment import Cell, Scale
from experiments.text_model import TextModel, TextModels

SMALLEST: Mapping[str, Any] = MappingProxyType(
    {
        "model.vocab_size": 384,
        "model.width": 32,
        "model.mlp_width": 48,
        "stage.steps": 4,
        "stage.batch_size": 2,
        "stage.sequence_length": 64,
        "stage.warmup_steps": 0,
        "stage.decay_steps": 0,
        "mesh.data": 1,
        "data.validation_fraction": 0.3,
        "evaluation.sequences": 8,
        "log_every": 1,
    }
)  # changes of `demo` that make it run in seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCells:
    """A cell for each seed of a model, and the held-out sequences that it is measured on."""

    recipe: str
    seeds: int
    sequences: int
    sequence_length: int
    batch_size: int
    changes: Mapping[str, Any]
    checkpoint: str = ""

    def model(self, seed: int) -> TextModel:
        """One of the models."""
        return TextModel(recipe=self.recipe, changes=dict(self.changes), seed=seed, checkpoint=self.checkpoint)

    def cells(self) -> tuple[Cell, ...]:
        """With the fields of `TextModel`, and those of `TextModels.held_out`, as settings."""
        return tuple(
            Cell(
                name=f"text-seed{seed}",
                settings={
                    "model": dataclasses.asdict(self.model(seed)),
                    "sequences": self.sequences,
                    "sequence_length": self.sequence_length,
                    "batch_size": self.batch_size,
                },
            )
            for seed in range(self.seeds)
        )


TEXT_CELLS: Mapping[Scale, TextCells] = MappingProxyType(
    {
        Scale.SMOKE: TextCells(recipe="demo", seeds=1, sequences=8, sequence_length=64, batch_size=4, changes=SMALLEST),
        Scale.CPU: TextCells(
            recipe="demo", seeds=2, sequences=256, sequence_length=128, batch_size=8, changes={"mesh.data": 1}
        ),
        Scale.GPU: TextCells(
            recipe="text-small",
            seeds=2,
            sequences=1024,
            sequence_length=256,
            batch_size=32,
            changes={"stage.batch_size": 32, "mesh.data": 1, "data.validation_fraction": 0.05},
        ),
        Scale.PAPER: TextCells(
            recipe="ouro-1.4b",
            seeds=1,
            sequences=2048,
            sequence_length=1024,
            batch_size=4,
            changes={
                "data.validation_fraction": 0.3,
                "stages.gate.steps": 500,
                "stages.gate.batch_size": 32,
                "stages.gate.accumulation": 1,
                "stages.gate.sequence_length": 1024,
                "stages.gate.context": 0,
            },
            checkpoint="checkpoints/ouro-1.4b",
        ),
    }
)


class OnTextModels:
    """What the experiments on these models share."""

    name: str
    scales = tuple(TEXT_CELLS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """One for each seed."""
        return TEXT_CELLS[scale].cells()

    def studied(self, cell: Cell, folder: Path, console: Console) -> tuple[TextModels, TextModel, Mapping[str, Any]]:
        """The models beside a cell, the one that it is about, and the held-out text to measure it on."""
        held_out = {name: value for name, value in cell.settings.items() if name != "model"}
        return TextModels.beside(folder, self.name, console), TextModel(**cell.settings["model"]), held_out
