"""From a recipe and a folder to everything that the first step needs: what the run is made of, and where it stands."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from looplm_jax.checkpoints import CheckpointStore, Metadata, check_same_run, read_metadata
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import Recipe
from looplm_jax.data.corpus import Corpus, open_corpus
from looplm_jax.data.tokenizers import Tokenizer, deserialize
from looplm_jax.models.looplm import LoopLM
from looplm_jax.sharding import check_batch, check_divides, make_mesh
from looplm_jax.training.run_folder import RunFolder, claim_folder
from looplm_jax.training.start import Start, describe_start, read_start, started_state
from looplm_jax.training.state import TrainState, abstract_state, initial_state
from looplm_jax.training.tokenizer import run_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: its state, the stage that state belongs to, and the place in that stage's data.

    `data_state` is None where the stage has not begun.
    """

    state: TrainState
    stage: int
    data_state: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays the same from the first step to the last, and the position to go on from."""

    recipe: Recipe
    folder: RunFolder
    mesh: Mesh
    model: LoopLM
    corpus: Corpus
    tokenizer: Tokenizer
    store: CheckpointStore
    position: Position


def prepare(recipe: Recipe, folder: RunFolder, console: Console) -> Setup:
    """Check shapes and data, claim the folder, find or train the tokeniser, and restore, take over or make the state.

    Raises:
      UserError: bad data, shapes that do not fit the devices, a folder of another run, or a checkpoint that the run
        cannot start from.
    """
    mesh = make_mesh(recipe.mesh)
    check_divides(mesh, recipe.model)
    for stage in recipe.stages:
        check_batch(mesh, stage.batch_size, stage.accumulation, f"stages.{stage.name}")
    corpus = open_corpus(recipe.data)
    model = LoopLM(recipe.model, recipe.compute)
    store = CheckpointStore(folder.checkpoints.absolute(), keep=recipe.checkpoint.keep)  # Orbax refuses others
    goes_on = bool(store.steps())
    start = read_start(recipe, model, mesh) if recipe.start.checkpoint and not goes_on else None
    claim_folder(folder, recipe)
    tokenizer = run_tokenizer(recipe, corpus, folder, console, _inherited(recipe, folder, start))
    if goes_on:
        position = _restore(recipe, folder, model, mesh, store, tokenizer, console)
    else:
        position = Position(state=_first_state(recipe, model, mesh, start, console), stage=0, data_state=None)
    return Setup(
        recipe=recipe,
        folder=folder,
        mesh=mesh,
        model=model,
        corpus=corpus,
        tokenizer=tokenizer,
        store=store,
        position=position,
    )


def _inherited(recipe: Recipe, folder: RunFolder, start: Start | None) -> Tokenizer | None:
    """The tokeniser of the checkpoint that the run started from: a run that goes on has it in its own checkpoints."""
    if not recipe.start.checkpoint:
        return None
    if start is not None:
        return start.tokenizer
    metadata = read_metadata(str(folder.checkpoints))
    return deserialize(metadata.tokenizer_kind, metadata.tokenizer)


def _first_state(recipe: Recipe, model: LoopLM, mesh: Mesh, start: Start | None, console: Console) -> TrainState:
    if start is None:
        return initial_state(recipe, model, recipe.stages[0], mesh)
    for damaged in start.damaged:
        console.print(f"warning: {damaged}; passed over", style="yellow")
    console.print(describe_start(start, recipe.model))
    return started_state(start, recipe, model, mesh)


def _restore(
    recipe: Recipe,
    folder: RunFolder,
    model: LoopLM,
    mesh: Mesh,
    store: CheckpointStore,
    tokenizer: Tokenizer,
    console: Console,
) -> Position:
    """The newest good checkpoint, refused if another configuration or tokeniser made it."""
    stages = [stage.name for stage in recipe.stages]
    wanted = {**to_dict(recipe), "tokenizer": tokenizer.fingerprint}

    def describe(metadata: Metadata) -> TrainState:
        config = to_dict(from_dict(Recipe, metadata.config))  # with the defaults of fields that are newer than it
        saved = {**config, "tokenizer": metadata.tokenizer_fingerprint}
        check_same_run(str(folder.path), saved, wanted)
        return abstract_state(recipe, model, recipe.stages[stages.index(metadata.extra["stage"])], mesh)

    restored = store.restore(describe)
    for damaged in restored.damaged:
        console.print(f"warning: {damaged}; going back to step {restored.step}", style="yellow")
    stage = stages.index(restored.metadata.extra["stage"])
    console.print(f"going on from step {restored.step} of stage {stages[stage]}")
    return Position(state=restored.state, stage=stage, data_state=restored.metadata.data_state)
