"""Selects the tokenizer of a run: a given one, that of its task, that of its checkpoint, or one trained on its data."""

from pathlib import Path

from rich.console import Console

from looplm_jax import data
from looplm_jax.config import Recipe
from looplm_jax.convert.from_hf import is_hf_folder
from looplm_jax.data.corpus import Corpus
from looplm_jax.data.tokenizers import FolderTokenizer, Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.files import pasted, write_atomically
from looplm_jax.printing import literal
from looplm_jax.training.run_folder import RunFolder


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
        if recipe.start.checkpoint:
            raise UserError(
                f"{recipe.start.checkpoint} has no tokenizer.json; copy it from where the model comes from, "
                "or set data.tokenizer to it"
            )
        if not folder.tokenizer.exists():
            console.print(f"training a tokenizer of {recipe.model.vocab_size} pieces")
            texts = data.training_texts(corpus, seed=recipe.data.seed)
            write_atomically(folder.tokenizer, data.train_sentencepiece(texts, recipe.model.vocab_size).serialize())
        tokenizer = data.load_tokenizer(str(folder.tokenizer))

    data.check_vocab(tokenizer, recipe.model.vocab_size)
    return tokenizer


def _check_own(recipe: Recipe, corpus: Corpus, own: Tokenizer) -> None:
    """Raises UserError if `data.tokenizer` is not the tokenizer of the corpus.

    A task accepts no other tokenizer. Prepared data accepts its own tokenizer from any path.
    """
    if corpus.tasks:
        raise UserError(f"{corpus.tasks[0].config.path!r} has a vocabulary of its own; leave data.tokenizer empty")
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
        return f"prepare it with --tokenizer {pasted(origin)}"
    if isinstance(inherited, FolderTokenizer):
        return f"prepare it with --tokenizer FOLDER, which `looplm convert to-hf {pasted(origin)} FOLDER` writes"
    return "prepare it with that one"
