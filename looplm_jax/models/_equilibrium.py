"""The fixed point of the loop of a model, for each sequence: deep equilibrium models (1909.01377)."""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from looplm_jax.config import AttentionKernel, Solver
from looplm_jax.models._fixed_point import SolverMetrics, implicit
from looplm_jax.models._looplm import LoopLM
from looplm_jax.models._modulation import LoopTime

Variables = dict[str, Any]


@flax.struct.dataclass
class Equilibrium:
    """The fixed point of each sequence, what the head reads of it, and how well it was solved."""

    state: Float[Array, "B S D"]
    hidden: Float[Array, "B S D"]
    solution: SolverMetrics


def equilibrium(
    model: LoopLM,
    variables: Variables,
    tokens: Int[Array, "B S"],
    *,
    solver: Solver,
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    noise_seeds: UInt32[Array, "B S"] | None = None,
) -> Equilibrium:
    """Solves for the state that a loop of the model leaves unchanged. It has the implicit gradient.

    The memory of the backward pass is that of one loop, whatever the number of loops of the solver.

    Args:
      model: the model. Without an injection, its fixed point does not depend on the tokens.
      variables: its parameters, and gathered copies if there are any.
      tokens: the token ids.
      solver: the solver of the state, and of the gradient in the backward pass.
      positions: the position of each token in its document.
      segment_ids: the document of each token.
      noise_seeds: the seed of the noise from which the state of each token starts, as for `LoopLM`.
    """
    context, embedded, _ = cast(
        Any, model.apply(variables, tokens, positions=positions, segment_ids=segment_ids, method="begin")
    )
    start: Any = model.apply(variables, embedded, noise_seeds, method="initial_state")
    # The number of a loop only tells the first one apart.
    done = jnp.ones(tokens.shape[0], jnp.int32)

    def loop(inputs: tuple[Variables, Array], state: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        variables, embedded = inputs
        output, _, _ = cast(Any, model.apply(variables, state, embedded, context, done, method="loop_step"))
        return output.state

    state, solution = implicit(loop, (variables, embedded), jax.lax.stop_gradient(start), solver)
    hidden, _ = cast(Any, model.apply(variables, state, context, method="read_out"))
    return Equilibrium(state=state, hidden=hidden, solution=solution)


def loop_of(
    model: LoopLM,
    variables: Variables,
    tokens: Int[Array, "B S"],
    done: Int[Array, "B"],
    *,
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    time: LoopTime | None = None,
) -> Callable[[Float[Array, "B S D"]], Float[Array, "B S D"]]:
    """Returns one loop as a function of the state, which has derivatives of any order.

    Args:
      model: the model.
      variables: its parameters, and gathered copies if there are any.
      tokens: the token ids.
      done: the loops of each sequence before this one.
      positions: the position of each token in its document.
      segment_ids: the document of each token.
      time: the time of the loop in a call, as for `LoopLM.loop_step`.
    """
    # Other implementations of attention have no second derivatives.
    compute = dataclasses.replace(model.compute, attention=AttentionKernel.XLA)
    plain = model.clone(compute=compute)
    context, embedded, _ = cast(
        Any, plain.apply(variables, tokens, positions=positions, segment_ids=segment_ids, method="begin")
    )

    def loop(state: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        output, _, _ = cast(Any, plain.apply(variables, state, embedded, context, done, time=time, method="loop_step"))
        return output.state

    return loop
