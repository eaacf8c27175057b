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
        raise UserError("the task holds no problem out; raise validation_items")
    if task.tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the task has {task.tokenizer.vocab_size} symbols, more than the model's {model.config.vocab_size}; "
            "evaluate the task that the model was trained on"
        )

    right = []
    for start in range(0, count, batch_size):
        problems = [task.validation_example(index) for index in range(start, min(start + batch_size, count))]

        # The last batch is padded with empty rows, so that one program serves all batches.
        tokens, mask = np.zeros((2, batch_size, task.max_tokens), np.int32)
        for row, problem in enumerate(problems):
            tokens[row, : len(problem.tokens)] = problem.tokens
            mask[row, : len(problem.tokens)] = problem.loss_mask

        scored = _all_right(model, params, tokens, mask.astype(bool), loops=loops)
        right.append(jax.device_get(scored)[:, : len(problems)])
    return np.concatenate(right, axis=1).mean(axis=1)


def commonest_answer(task: Task, items: int) -> float:
    """Returns the fraction of the most common answer among the first held-out problems.

    This is the accuracy of always giving that answer.
    """
    problems = [task.validation_example(index) for index in range(min(items, task.validation_items))]
    answers = collections.Counter(tuple(problem.tokens[problem.loss_mask].tolist()) for problem in problems)
    return answers.most_common(1)[0][1] / len(problems)


@functools.partial(jax.jit, static_argnames=("model", "loops"))
def _all_right(
    model: LoopLM, params: Params, tokens: Int[Array, "B N"], mask: Bool[Array, "B N"], *, loops: int
) -> Bool[Array, "T B"]:
    """Returns which problems are solved after each loop. Attention is causal, so padding on the right has no effect."""
    output: Any = model.apply({"params": params}, tokens[:, :-1], loops=loops)
    head = head_matrix(params, model.config)
    scored = token_scores(output.hidden, head, tokens[:, 1:], chunk=model.compute.loss_chunk)
    # Tokens outside the mask are not targets, and count as correct.
    return jnp.all(scored.correct | ~mask[:, 1:], axis=-1)
