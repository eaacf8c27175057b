"""Text models that several experiments study, each trained once for its settings, in a folder that they share.

Stage I, then Stage II from its end, with either target of the gate. Each is a run folder of its own, which goes on
where it was stopped; where two processes want the same one, the second waits for the first. The text is the source of
the local Python's standard library, unless other documents are named.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from looplm_jax.codec import override
from looplm_jax.config import GateTarget, Objective, Recipe, SourceConfig, StartConfig
from looplm_jax.data import ValidationBatches, collect_stdlib, train_sentencepiece, training_texts, validation_batches
from looplm_jax.files import locked, write_atomically
from looplm_jax.loading import Loaded, load
from looplm_jax.recipes import named_recipe
from looplm_jax.training.run import train
from looplm_jax.training.signals import Stopped

_NEW_ORDER = 1000  # added to the seed of Stage II's data, which comes in another order than in Stage I


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModel:
    """What a text model follows from.

    Args:
      recipe: by name; its first stage is Stage I, its last Stage II.
      changes: of fields of the recipe, by their dotted paths.
      seed: of the parameters and of the order of the documents.
      checkpoint: a run folder or a Hugging Face folder to study instead; Stage I is then not run.
      documents: files of text; empty: the source of the standard library.
    """

    recipe: str
    changes: Mapping[str, Any]
    seed: int
    checkpoint: str = ""
    documents: str = ""

    @property
    def name(self) -> str:
        """Of its folder: another one for any other settings."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.recipe}-seed{self.seed}-{hashlib.blake2b(content.encode(), digest_size=4).hexdigest()}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextModels:
    """The folder that they lie in."""

    folder: Path
    console: Console

    @classmethod
    def beside(cls, cell: Path, experiment: str, console: Console) -> "TextModels":
        """The folder for a cell: one for all experiments below a root; inside the results where these lie elsewhere."""
        results = cell.parent.parent
        usual = results.parent.name == experiment
        return cls(folder=(results.parent.parent if usual else results) / "text-models", console=console)

    def recipe(self, model: TextModel) -> Recipe:
        """The whole recipe of a model, with its documents and their tokeniser, which all seeds share."""
        recipe = override(named_recipe(model.recipe), model.changes)
        data = dataclasses.replace(recipe.data, sources=(SourceConfig(path=self._documents(model)),), root="")
        if not model.checkpoint:
            data = dataclasses.replace(data, tokenizer=self._tokenizer(dataclasses.replace(recipe, data=data), model))
        return dataclasses.replace(
            recipe,
            name="text-model",
            seed=model.seed,
            data=dataclasses.replace(data, seed=model.seed),
            stages=tuple(dataclasses.replace(stage, sources=()) for stage in recipe.stages),
        )

    def stage1_recipe(self, model: TextModel) -> Recipe:
        """Stage I alone."""
        recipe = self.recipe(model)
        return dataclasses.replace(recipe, stages=recipe.stages[:1])

    def stage1(self, model: TextModel) -> Path:
        """The run folder of Stage I, trained; or the checkpoint that is studied instead.

        Raises:
          Stopped: a signal came; called again, it goes on.
        """
        if model.checkpoint:
            return Path(model.checkpoint)
        return self._trained(self.stage1_recipe(model), model, "stage1")

    def stage2(self, model: TextModel, target: GateTarget) -> Path:
        """The run folder of Stage II, trained. Raises as `stage1`."""
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
        """Held-out documents as packed sequences: the same ones for all seeds."""
        return validation_batches(
            dataclasses.replace(self.recipe(model).data, tokenizer=""),
            loaded.need_tokenizer(),
            batch_size=batch_size,
            sequence_length=sequence_length,
            max_sequences=sequences,
        )

    def _trained(self, recipe: Recipe, model: TextModel, part: str) -> Path:
        folder = self.folder / model.name / part
        with self._alone(f"{model.name}-{part}"):
            outcome = train(recipe, folder, console=self.console)
        if outcome.stopped_by is not None:
            raise Stopped(outcome.stopped_by)
        return folder

    def _documents(self, model: TextModel) -> str:
        if model.documents:
            return model.documents
        path = self.folder / "stdlib.jsonl"
        with self._alone("stdlib"):
            if not path.exists():
                collect_stdlib(path)
        return str(path)

    def _tokenizer(self, recipe: Recipe, model: TextModel) -> str:
        """Of the vocabulary that the model has, trained on the documents of its recipe that are not held out."""
        about = f"{model.documents} {recipe.data.validation_fraction}"
        digest = hashlib.blake2b(about.encode(), digest_size=4).hexdigest()
        path = self.folder / f"tokenizer-{recipe.model.vocab_size}-{digest}.model"
        with self._alone(path.stem):
            if not path.exists():
                self.console.print(f"training a tokenizer of {recipe.model.vocab_size} pieces")
                tokenizer = train_sentencepiece(training_texts(recipe.data), recipe.model.vocab_size)
                write_atomically(path, tokenizer.serialize())
        return str(path)

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process at a time makes what has this name; the lock of a process that died is none."""
        self.folder.mkdir(parents=True, exist_ok=True)

        def wait() -> None:
            self.console.print(f"another process makes {name}; waiting for it")

        with locked(self.folder / f"{name}.lock", busy=wait):
            yield
