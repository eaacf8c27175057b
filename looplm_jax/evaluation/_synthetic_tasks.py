"""Scores of synthetic tasks: exact-match accuracy on held-out problems, and bits of knowledge per parameter."""

import collections
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.data.tasks._base import Task
from looplm_jax.data.tasks._capo import Capo, Kind
from looplm_jax.data.tasks._capo_text import FACTS, NAMES
from looplm_jax.errors import UserError
from looplm_jax.losses import token_losses, token_scores
from looplm_jax.models._looplm import LoopLM, Params, head_matrix

# Other tokens carry no knowledge of people.
_KINDS = (Kind.NAME, Kind.VALUE)


# Accuracy


def task_accuracy(
    model: LoopLM, params: Params, task: Task, *, loops: int, items: int | None = None, batch_size: int = 256
) -> Float[np.ndarray, "T"]:
    """Returns the fraction of held-out problems that the model solves after loops 1..`loops`.

    A problem is solved if every target is the most probable token. Each target is predicted from the correct tokens
    before it; all are correct exactly if greedy decoding produces them.

    Args:
      model: the model.
      params: its parameters.
      task: a task whose vocabulary the model was built for.
      loops: the greatest depth.
      items: the number of problems; default: all held-out ones.
      batch_size: the number of problems per batch.

    Raises:
      UserError: the task has no held-out problems, or its vocabulary does not fit the model.
    """
    count = task.validation_items if items is None else min(items, task.validation_items)
    if count == 0:
        raise UserError("the task has no held-out problems; raise validation_items")
    if task.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the task has {task.tokenizer.vocab_size} symbols, more than the model's {model.config.vocab_size}; "
            "evaluate the task that the model was trained on"
        )

    solved = []
    for start in range(0, count, batch_size):
        problems = [task.validation_example(index) for index in range(start, min(start + batch_size, count))]

        # The last batch is padded with empty rows, so that one program serves all batches.
        tokens, mask = np.zeros((2, batch_size, task.max_tokens), np.int32)
        for row, problem in enumerate(problems):
            tokens[row, : len(problem.tokens)] = problem.tokens
            mask[row, : len(problem.tokens)] = problem.loss_mask

        scored = _solved(model, params, tokens, mask.astype(bool), loops=loops)
        solved.append(jax.device_get(scored)[:, : len(problems)])
    return np.concatenate(solved, axis=1).mean(axis=1)


def commonest_answer(task: Task, items: int) -> float:
    """Returns the fraction of the most common answer among the first held-out problems.

    This is the accuracy of always giving that answer.
    """
    problems = [task.validation_example(index) for index in range(min(items, task.validation_items))]
    # An accuracy near this one shows nothing but the frequency of answers.
    answers = collections.Counter(tuple(problem.tokens[problem.loss_mask].tolist()) for problem in problems)
    return answers.most_common(1)[0][1] / len(problems)


@functools.partial(jax.jit, static_argnames=("model", "loops"))
def _solved(
    model: LoopLM, params: Params, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], *, loops: int
) -> Bool[Array, "T B"]:
    """Returns which problems are solved after each loop. Attention is causal, so padding on the right has no effect."""
    output: Any = model.apply({"params": params}, tokens[:, :-1], loops=loops)
    head = head_matrix(params, model.config)
    scored = token_scores(output.hidden, head, tokens[:, 1:], chunk=model.compute.loss_chunk)
    # Tokens outside the mask are not targets, and count as correct.
    return jnp.all(scored.correct | ~mask[:, 1:], axis=-1)


# Bits of knowledge per parameter (Ouro paper, 6.1 and B.1)
#
# Let p1 and p2 be the cross-entropies in nats, summed over all name tokens and over all value tokens of a biography,
# and averaged over people and wordings. Then N people hold
#
#     R = [N log2(N0 / e^p1) + N log2(S0 / e^p2)] / P
#
# bits for each of P parameters. The maximum is reached at p1 = ln N and p2 = 0, when everything is known:
#
#     R_max = [N log2(N0 / N) + N log2 S0] / P
#
# The formula printed in the paper has typos; this one follows its source (arXiv 2404.05405).


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeLoss:
    """Nats per person on the tokens of the name (p1) and of the values (p2), after each loop."""

    name: Float[np.ndarray, "T"]
    value: Float[np.ndarray, "T"]


def knowledge_loss(
    model: LoopLM, params: Params, task: Capo, *, loops: int, items: int | None = None, batch_size: int = 256
) -> KnowledgeLoss:
    """Returns p1 and p2 after loops 1..`loops`.

    Args:
      model: the model.
      params: its parameters.
      task: the task that the model was trained on.
      loops: the greatest depth.
      items: the number of biographies; default: each person in each of the task's `validation_draws` wordings.
      batch_size: the number of biographies per batch.

    Raises:
      UserError: the task has no biographies to test with.
    """
    count = task.validation_items if items is None else min(items, task.validation_items)
    if count == 0:
        raise UserError("the task has no held-out biographies; raise validation_draws")

    # Summed on the host in float64, over [loops, kinds of tokens].
    total = np.zeros((loops, len(_KINDS)))
    for start in range(0, count, batch_size):
        tokens, kinds = _rows(task, range(start, min(start + batch_size, count)), batch_size)
        total += jax.device_get(_sums(model, params, tokens, kinds, loops=loops))

    name, value = total.T / count
    return KnowledgeLoss(name=name, value=value)


def bits_per_parameter(loss: KnowledgeLoss, people: int, parameters: int) -> Float[np.ndarray, "T"]:
    """Returns R of the paper after each loop. It is negative for a model that is worse than a uniform guess."""
    # ln(N0 / e^p1) + ln(S0 / e^p2)
    nats = math.log(NAMES) - loss.name + math.log(FACTS) - loss.value
    return people * nats / math.log(2) / parameters


def most_bits_per_parameter(people: int, parameters: int) -> float:
    """Returns R_max of the paper: the bits of all knowledge, per parameter."""
    return people * (math.log2(NAMES / people) + math.log2(FACTS)) / parameters


def _rows(task: Capo, indices: range, batch_size: int) -> tuple[Int[np.ndarray, "B N"], Int[np.ndarray, "B N"]]:
    """Returns one biography per row, and the kind of each token.

    The padding on the right has kind 0, which is not counted.
    """
    tokens, kinds = np.zeros((2, batch_size, task.max_tokens), np.int32)
    for row, index in enumerate(indices):
        biography = task.validation_biography(index)
        tokens[row, : len(biography.symbols)] = task.tokenizer.encode(" ".join(biography.symbols), special=True)
        kinds[row, : len(biography.symbols)] = biography.kinds
    return tokens, kinds


@functools.partial(jax.jit, static_argnames=("model", "loops"))
def _sums(
    model: LoopLM, params: Params, tokens: Int[Array, "B N"], kinds: Int[Array, "B N"], *, loops: int
) -> Float[Array, "T kinds"]:
    """Returns the cross-entropy of each kind of token, summed over a batch."""
    # Without the last token: each token is predicted from those before it.
    output: Any = model.apply({"params": params}, tokens[:, :-1], loops=loops)
    head = head_matrix(params, model.config)
    losses = token_losses(output.hidden, head, tokens[:, 1:], chunk=model.compute.loss_chunk)
    of_kind = [(kinds[:, 1:] == kind)[None] for kind in _KINDS]
    return jnp.stack([jnp.sum(losses, axis=(1, 2), where=where) for where in of_kind], axis=1)
