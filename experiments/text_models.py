"""Text models that several experiments study. Each is trained once per settings, in a shared folder.

Stage I runs first, then Stage II from its end, with either target of the gate. Each has its own run folder and resumes
where it stopped; if two processes need the same one, the second waits for the first. The text is the source of the
local Python's standard library, unless other documents are given.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.frame import Cell, Scale
from looplm_jax.codec import override
from looplm_jax.config import GateTarget, Objective, Recipe, SourceConfig, StartConfig
from looplm_jax.data import ValidationBatches, collect_stdlib, train_sentencepiece, training_texts, validation_batches
from looplm_jax.files import locked, write_atomically
from looplm_jax.loading import Loaded, load
from looplm_jax.recipes import named_recipe
from looplm_jax.training._feeds import OpenCollector
from looplm_jax.training._metrics import EVALUATION, read_metrics
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import Evaluate, train

# Runs


@contextlib.contextmanager
def alone(folder: Path, name: str, console: Console) -> Iterator[None]:
    """Holds the lock of a name in a folder, which is created; waits while another process holds it.

    The system releases the lock if the process dies.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def wait() -> None:
        console.print(f"another process makes {name}; waiting for it")

    with locked(folder / f"{name}.lock", busy=wait):
        yield


def trained(
    recipe: Recipe,
    folder: Path,
    console: Console,
    *,
    evaluate: Evaluate | None = None,
    collect: OpenCollector | None = None,
) -> Path:
    """Trains a recipe, unless it is trained. Returns its run folder.

    Raises:
      Stopped: a signal arrived; calling again resumes.
    """
    outcome = train(recipe, folder, console=console, evaluate=evaluate, collect=collect)
    if outcome.stopped_by is not None:
        raise Stopped(outcome.stopped_by)
    return folder


def train_and_evaluate(
    recipe: Recipe, folder: Path, console: Console, evaluate: Evaluate
) -> Sequence[Mapping[str, Any]]:
    """Trains a recipe, unless it is trained. Returns its evaluations, each with its step.

    If the recipe starts from a checkpoint, that is evaluated too, on the same sequences, as step 0. Raises as
    `trained`.
    """
    trained(recipe, folder, console, evaluate=evaluate)
    rows = [row for row in read_metrics(folder) if row["kind"] == EVALUATION]
    if not recipe.start.checkpoint:
        return rows

    loaded, stage = load(Path(recipe.start.checkpoint)), recipe.stages[0]
    held_out = validation_batches(
        recipe.data,
        loaded.need_tokenizer(),
        batch_size=stage.batch_size,
        sequence_length=stage.sequence_length,
        max_sequences=recipe.evaluation.sequences,
    )
    return [{"step": 0, **evaluate(loaded.model, loaded.params, held_out)}, *rows]


# Models


_NEW_ORDER = 1000  # added to the data seed of Stage II, which reads the data in another order than Stage I


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModel:
    """The settings that determine a text model.

    Args:
      recipe: the name of a recipe; its first stage is Stage I, its last Stage II.
      changes: new values of recipe fields, by their dotted paths.
      seed: the seed of the parameters and of the order of the documents.
      checkpoint: a run folder or a Hugging Face folder to study instead; Stage I is then not run.
      documents: text files; if empty, the source of the standard library.
    """

    recipe: str
    changes: Mapping[str, Any]
    seed: int
    checkpoint: str = ""
    documents: str = ""

    @property
    def name(self) -> str:
        """Returns the name of its folder, which is unique to the settings."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.recipe}-seed{self.seed}-{hashlib.blake2b(content.encode(), digest_size=4).hexdigest()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModels:
    """The shared folder of the models."""

    folder: Path
    console: Console

    @classmethod
    def beside(cls, cell: Path, experiment: str, console: Console) -> "TextModels":
        """Returns the folder for a cell: shared by all experiments below a root, else inside the results folder."""
        results = cell.parent.parent
        # The default layout is ROOT/NAME/SCALE/cells/CELL.
        usual = results.parent.name == experiment
        return cls(folder=(results.parent.parent if usual else results) / "text-models", console=console)

    def recipe(self, model: TextModel) -> Recipe:
        """Returns the complete recipe of a model, with its documents and their tokenizer, which all seeds share."""
        recipe = override(named_recipe(model.recipe), model.changes)
        data = dataclasses.replace(recipe.data, sources=(SourceConfig(path=self._documents(model)),), root="")
        if not model.checkpoint:
            # A checkpoint brings its own tokenizer.
            data = dataclasses.replace(data, tokenizer=self._tokenizer(dataclasses.replace(recipe, data=data), model))

        return dataclasses.replace(
            recipe,
            name="text-model",
            seed=model.seed,
            data=dataclasses.replace(data, seed=model.seed),
            stages=tuple(dataclasses.replace(stage, sources=()) for stage in recipe.stages),
        )

    def stage1_recipe(self, model: TextModel) -> Recipe:
        """Returns the recipe with Stage I only."""
        recipe = self.recipe(model)
        return dataclasses.replace(recipe, stages=recipe.stages[:1])

    def stage1(self, model: TextModel) -> Path:
        """Trains Stage I, unless it is trained. Returns its run folder, or the checkpoint that is studied instead.

        Raises:
          Stopped: a signal arrived; calling again resumes.
        """
        if model.checkpoint:
            return Path(model.checkpoint)
        return self._trained(self.stage1_recipe(model), model, "stage1")

    def stage2(self, model: TextModel, target: GateTarget) -> Path:
        """Trains Stage II, unless it is trained, and returns its run folder. Raises as `stage1`."""
        start, recipe = self.stage1(model), self.recipe(model)
        if model.checkpoint:
            recipe = dataclasses.replace(recipe, model=load(start).recipe.model)

        stage = dataclasses.replace(recipe.stages[-1], objective=Objective.GATE, gate_target=target)
        recipe = dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, seed=model.seed + _NEW_ORDER),
            stages=(stage,),
            start=StartConfig(checkpoint=str(start)),
        )
        return self._trained(recipe, model, f"stage2-{target.value}")

    def held_out(
        self, model: TextModel, loaded: Loaded, *, sequences: int, sequence_length: int, batch_size: int
    ) -> ValidationBatches:
        """Returns held-out documents as packed sequences, the same for all seeds."""
        return validation_batches(
            # The loaded model's own tokenizer is passed separately.
            dataclasses.replace(self.recipe(model).data, tokenizer=""),
            loaded.need_tokenizer(),
            batch_size=batch_size,
            sequence_length=sequence_length,
            max_sequences=sequences,
        )

    def stdlib(self) -> Path:
        """Returns the source of the local Python's standard library as documents, collected unless it is there."""
        path = self.folder / "stdlib.jsonl"
        with self._alone("stdlib"):
            if not path.exists():
                collect_stdlib(path)
        return path

    def _trained(self, recipe: Recipe, model: TextModel, part: str) -> Path:
        """Trains a recipe, unless it is trained. Returns its run folder."""
        with self._alone(f"{model.name}-{part}"):
            return trained(recipe, self.folder / model.name / part, self.console)

    def _documents(self, model: TextModel) -> str:
        """Returns the pattern of the documents: those of the model, or the standard library."""
        return model.documents or str(self.stdlib())

    def _tokenizer(self, recipe: Recipe, model: TextModel) -> str:
        """Returns a tokenizer of the model's vocabulary size, trained on the documents that are not held out."""
        # Other documents, or another split, give another tokenizer, which therefore needs another file.
        about = f"{model.documents} {recipe.data.validation_fraction}"
        digest = hashlib.blake2b(about.encode(), digest_size=4).hexdigest()
        path = self.folder / f"tokenizer-{recipe.model.vocab_size}-{digest}.model"
        with self._alone(path.stem):
            if not path.exists():
                self.console.print(f"training a tokenizer of {recipe.model.vocab_size} pieces")
                tokenizer = train_sentencepiece(training_texts(recipe.data), recipe.model.vocab_size)
                write_atomically(path, tokenizer.serialize())
        return str(path)

    def _alone(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Holds the lock of a name in the shared folder."""
        return alone(self.folder, name, self.console)


# Scales


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
