"""Exact-match accuracy on the held-out problems of a synthetic task, at every depth."""

import collections
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from looplm_jax.data.tasks.base import Task
from looplm_jax.errors import UserError
from looplm_jax.losses import token_scores
from looplm_jax.models.looplm import LoopLM, Params, head_matrix


def task_accuracy(
    model: LoopLM, params: Params, task: Task, *, loops: int, items: int | None = None, batch_size: int = 256
) -> Float[np.ndarray, "T"]:
    """Share of held-out problems all of whose targets are the most probable tokens, after loops 1..`loops`.

    Each target is predicted from the right tokens before it; that all are right is the same as that greedy decoding
    gives them.

    Args:
      model: the model.
      params: its parameters.
      task: one whose vocabulary the model was made for.
      loops: the greatest depth.
      items: how many problems; default: all that are held out.
      batch_size: problems in a batch.

    Raises:
      UserError: nothing is held out, or the vocabulary does not fit the model.
    """
    count = task.validation_items if items is None else min(items, task.validation_items)
    if count == 0:
        raise UserError("the task holds no problem out; raise validation_items")
    if task.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the task has {task.tokenizer.vocab_size} symbols, more than the model's {model.config.vocab_size}; "
            "evaluate the task that the model was trained on"
        )
    right = []
    for start in range(0, count, batch_size):
        problems = [task.validation_example(index) for index in range(start, min(start + batch_size, count))]
        tokens, mask = np.zeros((2, batch_size, task.max_tokens), np.int32)
        for row, problem in enumerate(problems):
            tokens[row, : len(problem.tokens)] = problem.tokens
            mask[row, : len(problem.tokens)] = problem.loss_mask
        scored = _all_right(model, params, tokens, mask.astype(bool), loops=loops)
        right.append(jax.device_get(scored)[:, : len(problems)])
    return np.concatenate(right, axis=1).mean(axis=1)


def commonest_answer(task: Task, items: int) -> float:
    """Share of the commonest answer among the first held-out problems: the accuracy of always giving that one."""
    problems = [task.validation_example(index) for index in range(min(items, task.validation_items))]
    answers = collections.Counter(tuple(problem.tokens[problem.loss_mask].tolist()) for problem in problems)
    return answers.most_common(1)[0][1] / len(problems)


@functools.partial(jax.jit, static_argnames=("model", "loops"))
def _all_right(
    model: LoopLM, params: Params, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], *, loops: int
) -> Bool[Array, "T B"]:
    """What stands behind a problem in its row is never looked at by what stands before."""
    output: Any = model.apply({"params": params}, tokens[:, :-1], loops=loops)
    head = head_matrix(params, model.config)
    scored = token_scores(output.hidden, head, tokens[:, 1:], chunk=model.compute.loss_chunk)
    return jnp.all(scored.correct | ~mask[:, 1:], axis=-1)
