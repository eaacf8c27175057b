"""Looping each sequence its own number of times in one program, with gradients through its last loops only."""

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from looplm_jax.config import Remat
from looplm_jax.models._looplm import LoopLM, LoopOutput, check_loops
from looplm_jax.models._modulation import LoopTime


def last_loop(
    model: LoopLM,
    variables: dict[str, Any],
    tokens: Int[Array, "B S"],
    depths: Int[Array, "B"],
    *,
    most: int,
    backprop_loops: int = 0,
    damping: float = 1.0,
    steps: Float[Array, "most"] | None = None,
    positions: Int[Array, "B S"] | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
    noise_seeds: UInt32[Array, "B S"] | None = None,
) -> LoopOutput:
    """Returns the output of the last loop of each sequence. Coda, gate and head of earlier loops are not computed.

    The depths are arrays, so there is one program for all of them. Sequences with fewer loops than others start later
    and keep their first state until then, so that all end together and the last loops are the same iterations for all.
    Iterations before the first start are not computed.

    In earlier loops than the last `backprop_loops`, everything is a constant: the state, the embedded input and the
    parameters (truncated backpropagation, as in Huginn, arXiv 2502.05171). With damping, this is the phantom gradient
    of a fixed point.

    Args:
      model: the model.
      variables: its parameters, and gathered copies if there are any.
      tokens: the token ids.
      depths: the number of loops of each sequence, from 1 to `most`.
      most: the largest number of loops. Memory for the backward pass grows with it, or with `backprop_loops`.
      backprop_loops: the number of last loops with gradients; 0 for all.
      damping: the weight of the new state in each of the last `backprop_loops` loops; that of the old one is
        `1 - damping`.
      steps: the steps of the loops, for models with modulation (`LoopTime`), of all sequences alike; by default equal
        ones.
      positions: the position of each token in its document.
      segment_ids: the document of each token.
      noise_seeds: the seed of the noise from which the state of each token starts, as for `LoopLM`.

    Raises:
      UserError: the model cannot run `most` loops.
    """
    check_loops(model.config, most)
    context, embedded, _ = cast(
        Any, model.apply(variables, tokens, positions=positions, segment_ids=segment_ids, method="begin")
    )
    start: Any = model.apply(variables, embedded, noise_seeds, method="initial_state")
    deepest, window = jnp.max(depths), min(backprop_loops or most, most)

    def step(
        variables: Any,
        embedded: Float[Array, "B S D"],
        state: Float[Array, "B S D"],
        left: int | Int[Array, ""],
        damping: float,
    ) -> LoopOutput:
        """Returns the output of an iteration, of which there are `left` to the end, this one included."""
        done = jnp.maximum(depths - left, 0)
        time = LoopTime.even(done, depths) if steps is None else LoopTime.of_steps(done, steps)
        output, _, _ = cast(
            Any, model.apply(variables, state, embedded, context, done, damping=damping, time=time, method="loop_step")
        )
        return output

    def advance(
        variables: Any,
        embedded: Float[Array, "B S D"],
        state: Float[Array, "B S D"],
        left: Int[Array, ""],
        damping: float = 1.0,
    ) -> Float[Array, "B S D"]:
        """Returns the state after an iteration, or the old one of sequences that have not started."""
        started = (depths >= left)[:, None, None]
        # Only the state is used, so the compiler removes coda and gate.
        return jnp.where(started, step(variables, embedded, state, left, damping).state, state)

    # Iterations without gradients. Their number is an array, which a loop allows that is not differentiated.
    frozen, constant, state = jax.lax.stop_gradient((variables, embedded, start))
    before = jnp.maximum(deepest - window, 0)
    state = jax.lax.fori_loop(0, before, lambda done, state: advance(frozen, constant, state, deepest - done), state)
    # Sequences that have not started keep their first state, with its gradient.
    state = jnp.where((depths > window)[:, None, None], state, start)

    # Iterations with gradients. Those before the first start are skipped.
    def iteration(state: Float[Array, "B S D"], left: Int[Array, ""]) -> tuple[Float[Array, "B S D"], None]:
        def run(state: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
            return advance(variables, embedded, state, left, damping)

        return jax.lax.cond(left <= deepest, run, lambda state: state, state), None

    # Inside a scan, XLA cannot merge the recomputation with the original, so it needs no barrier (`prevent_cse`).
    if model.compute.remat is Remat.LOOP:
        iteration = jax.checkpoint(iteration, prevent_cse=False)
    state, _ = jax.lax.scan(iteration, state, jnp.arange(window, 1, -1, dtype=depths.dtype))

    # All sequences have started, and all are read out.
    return step(variables, embedded, state, 1, damping)
