"""Bits of knowledge that a model holds per parameter (Ouro paper, 6.1 and B.1).

Let p1 and p2 be the cross-entropies in nats, summed over all name tokens and over all value tokens of a biography, and
averaged over people and wordings. Then N people hold

    R = [N log2(N0 / e^p1) + N log2(S0 / e^p2)] / P

bits for each of P parameters. The maximum is reached at p1 = ln N and p2 = 0, when everything is known:

    R_max = [N log2(N0 / N) + N log2 S0] / P

The formula printed in the paper has typos; this one follows its source (arXiv 2404.05405).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from looplm_jax.data.tasks.capo import Capo, Kind
from looplm_jax.data.tasks.capo_pools import FACTS, NAMES
from looplm_jax.errors import UserError
from looplm_jax.losses import token_losses
from looplm_jax.models.looplm import LoopLM, Params, head_matrix

_KINDS = (Kind.NAME, Kind.VALUE)


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
        raise UserError("there is no biography to test with; raise validation_draws")

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
    return jnp.stack([jnp.sum(losses, axis=(1, 2), where=kinds[:, 1:] == kind) for kind in _KINDS], axis=1)
