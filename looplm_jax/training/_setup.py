"""Prepares a run: data, models, meshes, tokenizer, checkpoints and the state from which it continues."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from looplm_jax import data
from looplm_jax.checkpoints import CheckpointStore, Metadata, read_metadata
from looplm_jax.codec import to_dict
from looplm_jax.config import DataConfig, Recipe
from looplm_jax.convert._import_hf import is_hf_folder
from looplm_jax.data._mixture import Corpus, open_corpus
from looplm_jax.data._pipeline import check_fit, chunks_left_out
from looplm_jax.data.tokenizers import FolderTokenizer, Tokenizer, deserialize
from looplm_jax.distributed import SINGLE_PROCESS, ProcessGroup, first_on_process_0
from looplm_jax.errors import UserError
from looplm_jax.files import quoted, write_atomically
from looplm_jax.models._looplm import LoopLM
from looplm_jax.resume import check_same_run
from looplm_jax.terminal import literal
from looplm_jax.training._compile import stage_mesh
from looplm_jax.training._goodput import Activity, ActivityTimer
from looplm_jax.training._guard import with_window
from looplm_jax.training._initialize_from import (
    InitCheckpoint,
    describe_init_checkpoint,
    initialized_state,
    read_init_checkpoint,
)
from looplm_jax.training._notes import changed_settings
from looplm_jax.training._run_folder import RunFolder, claim_run_folder
from looplm_jax.training._state import TrainState, abstract_state, initial_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Position:
    """The position of a run: its state, the stage of that state, and the position in the data of that stage.

    `data_state` is None if the stage has not begun.
    """

    state: TrainState
    stage: int
    data_state: Mapping[str, Any] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """The objects that stay the same from the first step to the last, and the position from which the run continues.

    Attributes:
      recipe: the configuration of the run.
      folder: the run folder.
      meshes: the mesh of each stage.
      models: the model of each stage.
      corpora: the corpus of each stage.
      tokenizer: the tokenizer.
      store: the checkpoints.
      position: the position from which the run continues.
    """

    recipe: Recipe
    folder: RunFolder
    meshes: tuple[Mesh, ...]
    models: tuple[LoopLM, ...]
    corpora: tuple[Corpus, ...]
    tokenizer: Tokenizer
    store: CheckpointStore
    position: Position


def prepare_run(
    recipe: Recipe,
    folder: RunFolder,
    console: Console,
    group: ProcessGroup = SINGLE_PROCESS,
    watch: ActivityTimer | None = None,
) -> Setup:
    """Prepares a run: checks shapes and data, claims the folder, finds or trains the tokenizer, and restores the state.

    Without a checkpoint in the folder, the state is initialized or taken from the checkpoint that the recipe starts
    from.

    Args:
      recipe: the configuration of the run.
      folder: the run folder.
      console: the console for messages.
      group: the processes of the run.
      watch: accounts for the time.

    Raises:
      UserError: the data is invalid, shapes do not fit the devices, the folder contains another run, or a checkpoint
        cannot be used.
    """
    watch = watch or ActivityTimer()

    # Whatever does not fit is refused before anything is written.
    meshes = tuple(stage_mesh(recipe, stage) for stage in recipe.stages)
    corpora = _open_corpora(recipe, console)
    models = tuple(LoopLM(recipe.model_of(stage), recipe.compute_of(stage)) for stage in recipe.stages)

    store = CheckpointStore(folder.checkpoints, keep=recipe.checkpoint.keep)
    resuming = bool(store.steps())
    # The initial checkpoint is read before `claim_run_folder` writes anything, because it may be refused.
    start = read_init_checkpoint(recipe, models[0], meshes[0]) if recipe.start.checkpoint and not resuming else None
    inherited = _init_tokenizer(recipe, folder, start)

    def own_folder() -> Tokenizer:
        if group.index == 0:
            claim_run_folder(folder, recipe)
        return run_tokenizer(recipe, _tokenizer_corpus(corpora), folder, console, inherited)

    # Process 0 writes the recipe and trains a missing tokenizer, which the other processes then read.
    tokenizer = first_on_process_0(group, "folder", own_folder)
    _report_pieces_left_out(recipe, corpora, tokenizer, console)

    # Restoring is timed separately.
    watch.charge(Activity.OTHER)
    if resuming:
        position = _restore(recipe, folder, models[0], meshes, store, tokenizer, console)
    else:
        position = Position(state=_first_state(recipe, models[0], meshes[0], start, console), stage=0, data_state=None)

    watch.charge(Activity.RESTORE)
    return Setup(
        recipe=recipe,
        folder=folder,
        meshes=meshes,
        models=models,
        corpora=corpora,
        tokenizer=tokenizer,
        store=store,
        position=position,
    )


def run_fingerprint(setup: Setup) -> dict[str, Any]:
    """Returns the values that must be the same on all processes: documents of every stage, tokenizer and position."""
    # Processes that read other files, or found other checkpoints, would otherwise compute a mixture of several runs.
    documents = {stage.name: corpus.digest for stage, corpus in zip(setup.recipe.stages, setup.corpora, strict=True)}
    position = [int(setup.position.state.step), setup.position.stage]
    return {"documents": documents, "tokenizer": setup.tokenizer.fingerprint, "position": position}


# Data


def _open_corpora(recipe: Recipe, console: Console) -> tuple[Corpus, ...]:
    """Returns the corpus of each stage. A mixture that several stages share is opened and read once."""
    opened: dict[DataConfig, Corpus] = {}
    for mixture in map(recipe.data_of, recipe.stages):
        if mixture not in opened:
            opened[mixture] = open_corpus(mixture, say=console.print)

    corpora = tuple(opened[recipe.data_of(stage)] for stage in recipe.stages)
    # Prepared data and tasks have a tokenizer, so their lengths can be checked already.
    for stage, corpus in zip(recipe.stages, corpora, strict=True):
        if corpus.own_tokenizer is not None:
            check_fit(corpus, corpus.own_tokenizer, stage.sequence_length)

    _check_same_vocabulary(recipe, corpora)
    return corpora


def _report_pieces_left_out(recipe: Recipe, corpora: Sequence[Corpus], tokenizer: Tokenizer, console: Console) -> None:
    """Prints estimates of how many chunks of chats are dropped, once per source."""
    # Chunks of a chat in which nothing is learned are not packed; how many there are depends on the sequence length.
    stages = zip(recipe.stages, corpora, strict=True)
    lines = (line for stage, corpus in stages for line in chunks_left_out(corpus, tokenizer, stage.sequence_length))
    for line in dict.fromkeys(lines):  # stages may share a source
        console.print(line, markup=False)


def _check_same_vocabulary(recipe: Recipe, corpora: Sequence[Corpus]) -> None:
    """Raises UserError if the stages have different vocabularies.

    A stage of text has the vocabulary of prepared data of another stage, if there is any.
    """
    prepared = _tokenizer_corpus(corpora)
    tokenizers = [
        prepared.own_tokenizer if corpus.texts and prepared.prepared else corpus.own_tokenizer for corpus in corpora
    ]
    owned = [None if tokenizer is None else tokenizer.fingerprint for tokenizer in tokenizers]

    for stage, fingerprint in zip(recipe.stages, owned, strict=True):
        if fingerprint != owned[0]:
            raise UserError(
                f"stages.{stage.name}.sources and those of {recipe.stages[0].name} have different vocabularies; "
                "a run has one tokenizer from its first stage to its last"
            )


def _tokenizer_corpus(corpora: Sequence[Corpus]) -> Corpus:
    """Returns the corpus that determines the tokenizer: the first with prepared data, or else the first."""
    return next((corpus for corpus in corpora if corpus.prepared), corpora[0])


def _init_tokenizer(recipe: Recipe, folder: RunFolder, start: InitCheckpoint | None) -> Tokenizer | None:
    """Returns the tokenizer of the checkpoint that the run starts from, or None.

    A run that resumes has it in its own checkpoints.
    """
    if not recipe.start.checkpoint:
        return None

    if start is not None:
        return start.tokenizer

    metadata = read_metadata(str(folder.checkpoints))
    return deserialize(metadata.tokenizer_kind, metadata.tokenizer)


# State


def _first_state(
    recipe: Recipe, model: LoopLM, mesh: Mesh, start: InitCheckpoint | None, console: Console
) -> TrainState:
    """Returns the first state of a run, with the parameters of `start` if there is one."""
    if start is None:
        return initial_state(recipe, model, recipe.stages[0], mesh)

    for step in start.skipped:
        console.print(f"warning: {step}; skipped", style="yellow")
    for note in start.notes:
        console.print(f"note: {literal(note)}")
    console.print(describe_init_checkpoint(start, recipe.model))

    return initialized_state(start, recipe, model, mesh)


def _restore(
    recipe: Recipe,
    folder: RunFolder,
    model: LoopLM,
    meshes: Sequence[Mesh],
    store: CheckpointStore,
    tokenizer: Tokenizer,
    console: Console,
) -> Position:
    """Returns the latest valid checkpoint. Raises UserError if its configuration or tokenizer is a different one."""
    stages = [stage.name for stage in recipe.stages]
    wanted = {**to_dict(recipe), "tokenizer": tokenizer.fingerprint}

    def describe(metadata: Metadata) -> TrainState:
        before = metadata.saved_recipe()
        saved = {**to_dict(before), "tokenizer": metadata.tokenizer_fingerprint}
        check_same_run(str(folder.path), saved, wanted)

        # A checkpoint is restored into the mesh and the trained parameters of its own stage, which need not be the
        # first.
        index = stages.index(metadata.extra["stage"])
        # The saved window of the guard may have another size, so the state is restored in its saved shape first.
        as_saved = dataclasses.replace(recipe, guard=before.guard)
        return abstract_state(as_saved, model, recipe.stages[index], meshes[index])

    restored = store.restore(describe)
    for step in restored.skipped:
        console.print(f"warning: {step}; going back to step {restored.step}", style="yellow")

    stage = stages.index(restored.metadata.extra["stage"])
    console.print(f"resuming from step {restored.step} of stage {stages[stage]}")

    # Some settings may be changed when a run is resumed. They are printed, so that a change by mistake is noticed.
    for note in changed_settings(restored.metadata.saved_recipe(), recipe, stage):
        console.print(note, markup=False)

    state = dataclasses.replace(restored.state, guard=with_window(restored.state.guard, recipe.guard))
    return Position(state=state, stage=stage, data_state=restored.metadata.data_state)


# Tokenizer


def run_tokenizer(
    recipe: Recipe, corpus: Corpus, folder: RunFolder, console: Console, inherited: Tokenizer | None = None
) -> Tokenizer:
    """Returns the tokenizer that a run uses from its first to its last step.

    A tokenizer that the run trains is written to the run folder.

    Args:
      recipe: the configuration of the run.
      corpus: the corpus that determines the tokenizer.
      folder: the run folder.
      console: the console for messages.
      inherited: the tokenizer of the checkpoint that the run started from.

    Raises:
      UserError: its vocabulary is not that of the model, it differs from the inherited one, or there is too little data
        to train one.
    """
    # The tokenizers of the corpus, of `data.tokenizer` and of the initial checkpoint must agree if there are several.
    tokenizer = corpus.own_tokenizer
    if tokenizer is not None and recipe.data.tokenizer:
        _check_own(recipe, corpus, tokenizer)

    if tokenizer is None and recipe.data.tokenizer:
        tokenizer = data.load_tokenizer(
            recipe.data.tokenizer, warn=lambda note: console.print(f"note: {literal(note)}")
        )

    if inherited is not None:
        _check_inherited(recipe, corpus, tokenizer, inherited)
        tokenizer = inherited

    if tokenizer is None:
        # The parameters of the checkpoint belong to its tokenizer: training another one would make them useless.
        if recipe.start.checkpoint:
            raise UserError(
                f"{recipe.start.checkpoint} has no tokenizer.json; copy it from where the model comes from, "
                "or set data.tokenizer to it"
            )

        # It exists if the run resumes, and on all processes but the first.
        if not folder.tokenizer.exists():
            console.print(f"training a tokenizer of {recipe.model.vocab_size} pieces")
            texts = data.training_texts(corpus, seed=recipe.data.seed)
            write_atomically(folder.tokenizer, data.train_sentencepiece(texts, recipe.model.vocab_size).serialize())
        tokenizer = data.load_tokenizer(str(folder.tokenizer))

    # An id beyond the embedding would raise no error on a device: it reads NaN.
    data.check_vocab(tokenizer, recipe.model.vocab_size)
    return tokenizer


def _check_own(recipe: Recipe, corpus: Corpus, own: Tokenizer) -> None:
    """Raises UserError if `data.tokenizer` is not the tokenizer of the corpus.

    A task accepts no other tokenizer. Prepared data accepts its own tokenizer from any path.
    """
    if corpus.tasks:
        raise UserError(f"{corpus.tasks[0].config.path!r} has a vocabulary of its own; leave data.tokenizer empty")
    # The fingerprint is a digest of the content, so the same tokenizer is accepted from any path.
    if data.load_tokenizer(recipe.data.tokenizer).fingerprint != own.fingerprint:
        raise UserError(
            f"{corpus.prepared[0].config.path!r} is prepared with another tokenizer than {recipe.data.tokenizer}; "
            "leave data.tokenizer empty to use its own, or prepare it again"
        )


def _check_inherited(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer | None, inherited: Tokenizer) -> None:
    """Raises UserError if the tokenizer differs from that of the checkpoint that the run starts from."""
    if tokenizer is None or tokenizer.fingerprint == inherited.fingerprint:
        return

    origin = recipe.start.checkpoint
    if corpus.tasks:
        task = corpus.tasks[0].config.path
        raise UserError(f"{task!r} has another vocabulary than {origin}; start from a checkpoint of the same task")

    if corpus.prepared:
        rows = corpus.prepared[0].config.path
        raise UserError(
            f"{rows!r} is prepared with another tokenizer than that of {origin}; {_how_to_prepare(origin, inherited)}"
        )
    raise UserError(
        f"{recipe.data.tokenizer} is another tokenizer than that of {origin}; leave data.tokenizer empty to use that"
    )


def _how_to_prepare(origin: str, inherited: Tokenizer) -> str:
    """Returns how to prepare data that a run that starts from `origin` can read."""
    if is_hf_folder(Path(origin)):
        return f"prepare it with --tokenizer {quoted(origin)}"
    if isinstance(inherited, FolderTokenizer):
        return f"prepare it with --tokenizer FOLDER, which `looplm convert to-hf {quoted(origin)} FOLDER` writes"
    return "prepare it with that one"
