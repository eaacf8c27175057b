"""Problems as the engine reads them: the tokens of a prompt, and the text of the right answer."""

import dataclasses
import functools
from collections.abc import Iterator

import grain
import numpy as np

from looplm_jax.config import RecordKind, SourceConfig
from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.data import Corpus, Example, Problem
from looplm_jax.data._documents import Document, plain_text
from looplm_jax.data._examples import prompt_tokens
from looplm_jax.data._mixture import MixtureSource
from looplm_jax.data._pipeline import mixture
from looplm_jax.data.sources import open_files
from looplm_jax.data.tasks import is_task, make_task
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.inference import Result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A problem for the engine.

    Attributes:
      prompt_ids: the tokens that an answer follows.
      prompt: the prompt as text, for rewards and for display.
      answer: the text of the right answer, without an end mark.
    """

    prompt_ids: tuple[int, ...]
    prompt: str
    answer: str


def to_question(record: Document | Example, tokenizer: Tokenizer, *, special: bool = False) -> Question:
    """Returns a problem, or the problem of a synthetic task, as a question.

    The prompt of a task's problem is everything before its first target, and the answer are its targets.

    Args:
      record: the problem.
      tokenizer: encodes the prompt, and decodes problems of tasks.
      special: parse names of special tokens in the prompt as these tokens.
    """
    if isinstance(record, Example):
        first = int(np.argmax(record.loss_mask))
        prompt, targets = record.tokens[:first].tolist(), record.tokens[record.loss_mask].tolist()
        return Question(
            prompt_ids=tuple(prompt),
            prompt=tokenizer.decode(prompt),
            answer=tokenizer.decode(without_stop(targets, stop_ids(tokenizer))),
        )

    assert isinstance(record, Problem)
    return Question(
        prompt_ids=prompt_tokens(record.prompt, tokenizer, special=special),
        prompt=plain_text(record.prompt),
        answer=record.answer,
    )


def answer_text(result: Result, tokenizer: Tokenizer) -> str:
    """Returns the text of an answer, without the token that ended it."""
    return tokenizer.decode(without_stop(result.tokens, stop_ids(tokenizer)))


def without_stop(tokens: list[int] | tuple[int, ...], stops: list[int]) -> list[int]:
    """Returns the tokens without a last one that ends a text."""
    return list(tokens[:-1] if tokens and tokens[-1] in stops else tokens)


# Streams of problems


def training_questions(corpus: Corpus, tokenizer: Tokenizer, *, seed: int) -> grain.MapDataset:
    """Returns an endless dataset of training problems, mixed by weight. Question i is a function of the seed and i.

    Raises:
      UserError: a source has no problems.
    """
    for part in corpus.sources:
        if not is_task(part.config.path) and part.config.kind is not RecordKind.PROBLEM:
            raise UserError(f"{part.config.path} is read as {part.config.kind.value}, not as problems; set its kind")

    def convert(records: grain.MapDataset, part: MixtureSource) -> grain.MapDataset:
        return records.map(functools.partial(to_question, tokenizer=tokenizer, special=part.config.special_tokens))

    return mixture(corpus, seed, convert=convert)


def held_out_questions(source: SourceConfig, tokenizer: Tokenizer) -> Iterator[Question]:
    """Yields the problems of files in their order, or the held-out problems of a task.

    Raises:
      UserError: the files cannot be read, have no problems, or the task has another vocabulary.
    """
    if not is_task(source.path):
        problems = open_files(dataclasses.replace(source, kind=RecordKind.PROBLEM))
        for number in range(len(problems)):
            yield to_question(problems[number], tokenizer, special=source.special_tokens)
        return

    task = make_task(source.path)
    if task.tokenizer.fingerprint != tokenizer.fingerprint:
        raise UserError(f"{source.path!r} has another vocabulary than the model; give a task that it was trained on")
    for number in range(task.validation_items):
        yield to_question(task.validation_example(number), tokenizer)
