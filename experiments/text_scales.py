"""The text models of each scale, shared by the early-exit, KV-sharing and depth experiments."""

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
)  # changes of `demo` that let it run in seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextCells:
    """A cell per seed of a model, and the held-out sequences to measure it on."""

    recipe: str
    seeds: int
    sequences: int
    sequence_length: int
    batch_size: int
    changes: Mapping[str, Any]
    checkpoint: str = ""

    def model(self, seed: int) -> TextModel:
        """Returns the model of a seed."""
        return TextModel(recipe=self.recipe, changes=dict(self.changes), seed=seed, checkpoint=self.checkpoint)

    def cells(self) -> tuple[Cell, ...]:
        """Returns cells whose settings are the fields of `TextModel` and the arguments of `TextModels.held_out`."""
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
    """The base class of experiments on the text models."""

    name: str
    scales = tuple(TEXT_CELLS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per seed."""
        return TEXT_CELLS[scale].cells()

    def studied(self, cell: Cell, folder: Path, console: Console) -> tuple[TextModels, TextModel, Mapping[str, Any]]:
        """Returns the shared models, the model that the cell studies, and the arguments of its held-out text."""
        held_out = {name: value for name, value in cell.settings.items() if name != "model"}
        return TextModels.beside(folder, self.name, console), TextModel(**cell.settings["model"]), held_out
