"""Fixed points of a loop, and gradients through them: deep equilibrium models (1909.01377).

    z* = f(theta, z*),  J = df/dz at z*
    u = J^T u + dL/dz*,  dL/dtheta = u^T df/dtheta         the implicit gradient, of any number of loops
    z <- damping f(theta, z) + (1 - damping) z             the phantom gradient, of k such steps from z*, held constant

`f` is any function of a state whose rows, along the leading axis, do not depend on each other. The implicit gradient
solves a second fixed point with products of J^T, so its memory is that of one pass, whatever the number of iterations.

The rows are solved together, and each stops by itself. Residuals and the algebra of the solvers are in float32 or
wider; `f` is evaluated in the dtype of its state.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from looplm_jax.config import Solver, SolverKind

State = Float[Array, "B *S"]
_RIDGE = 1e-4  # of Anderson acceleration, relative to the mean squared residual


@flax.struct.dataclass
class SolverMetrics:
    """The relative residual of each row, and the evaluations of `f` until it stopped."""

    residual: Float[Array, "B"]
    evaluations: Int[Array, "B"]


def fixed_point(
    f: Callable[[Array], Array], z0: Float[Array, "B *S"], solver: Solver
) -> tuple[Float[Array, "B *S"], SolverMetrics]:
    """Solves `z = f(z)`. Its result has no reverse-mode gradient; that of `implicit` has.

    Args:
      f: the function of the state.
      z0: the initial state.
      solver: the iteration, and when it stops.

    Returns:
      `f` of the state with the smallest residual `|f(z) - z| / |f(z)|` of each row, and the metrics. A row whose first
      evaluation is not finite is returned as it is, with a residual of NaN.
    """
    wide = np.promote_types(z0.dtype, np.float32)
    method = _METHODS[solver.kind]
    rows = z0.shape[0]

    def running(carry: _Carry) -> Array:
        return (carry.loop < solver.max_loops) & jnp.any(carry.active)

    def evaluate(carry: _Carry) -> _Carry:
        output = f(carry.state.astype(z0.dtype)).astype(wide)
        residual = _norm(output - carry.state) / jnp.maximum(_norm(output), jnp.finfo(wide).tiny)

        # The first evaluation counts even if it is not finite, so that a failure is seen and not hidden.
        better = carry.active & ((residual < carry.residual) | (carry.loop == 0))
        active = carry.active & ~(residual <= solver.tolerance)
        following, memory = method.advance(carry.memory, carry.loop, carry.state, output)

        return _Carry(
            loop=carry.loop + 1,
            state=_where(active, following, carry.state),
            memory=memory,
            active=active,
            best=_where(better, output, carry.best),
            residual=jnp.where(better, residual, carry.residual),
            evaluations=carry.evaluations + carry.active.astype(jnp.int32),
        )

    start = z0.astype(wide)
    solved = jax.lax.while_loop(
        running,
        evaluate,
        _Carry(
            loop=jnp.int32(0),
            state=start,
            memory=method.start(start, solver.memory),
            active=jnp.ones(rows, bool),
            best=start,
            residual=jnp.full(rows, jnp.inf, wide),
            evaluations=jnp.zeros(rows, jnp.int32),
        ),
    )

    return solved.best.astype(z0.dtype), SolverMetrics(residual=solved.residual, evaluations=solved.evaluations)


def implicit(
    f: Callable[[Any, Array], Array],
    params: Any,
    z0: Float[Array, "B *S"],
    solver: Solver,
    *,
    adjoint: Solver | None = None,
) -> tuple[Float[Array, "B *S"], SolverMetrics]:
    """Solves `z = f(params, z)`. The result has the implicit gradient, and derivatives of any order.

    Args:
      f: the function of parameters and state. Arrays that it closes over receive gradients too.
      params: a pytree of the arrays that `f` depends on.
      z0: the initial state, which receives no gradient.
      solver: the solver of the state.
      adjoint: the solver of the backward pass; by default the same.

    Returns:
      The state, and the metrics of its solution, which have no gradient.
    """
    converted, constants = _without_closure(f, params, z0)
    return _implicit(converted, solver, adjoint or solver, (params, constants), z0)


def phantom(
    f: Callable[[Any, Array], Array],
    params: Any,
    z: Float[Array, "B *S"],
    *,
    loops: int = 1,
    damping: float = 1.0,
) -> Float[Array, "B *S"]:
    """Returns the state after a few damped loops from `z`, which is held constant: a cheaper, approximate gradient.

    A damping of 1 is backpropagation through the last loops only; with one loop it is the one-step gradient.

    Args:
      f: the function of parameters and state.
      params: a pytree of the arrays that `f` depends on.
      z: the state to start from, such as that of `fixed_point`.
      loops: the number of loops that the gradient passes through.
      damping: the weight of the new state in each loop; that of the old one is `1 - damping`.
    """

    def step(state: Array, _: None) -> tuple[Array, None]:
        return damping * f(params, state) + (1.0 - damping) * state, None

    return jax.lax.scan(step, jax.lax.stop_gradient(z), None, length=loops)[0]


# The implicit gradient


def _without_closure(f: Callable[[Any, Array], Array], params: Any, z: Array) -> tuple[Callable, list[Any]]:
    """Returns `f` as a function of parameters, state and all arrays that it closes over; and these arrays."""
    # `jax.closure_convert` keeps integers in the closure, where the backward pass finds tracers that are gone.
    traced = jax.make_jaxpr(f)(params, z)

    def converted(params: Any, z: Array, *constants: Any) -> Array:
        (output,) = jax.core.eval_jaxpr(traced.jaxpr, constants, *jax.tree.leaves((params, z)))
        return output

    return converted, list(traced.consts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _implicit(f: Callable, solver: Solver, adjoint: Solver, inputs: Any, z0: Array) -> Any:
    params, constants = inputs
    return fixed_point(lambda z: f(params, z, *constants), z0, solver)


def _implicit_forward(f: Callable, solver: Solver, adjoint: Solver, inputs: Any, z0: Array) -> Any:
    # This call is differentiable itself, and so is that of the backward pass. Hence higher derivatives exist.
    z, metrics = _implicit(f, solver, adjoint, inputs, z0)
    return (z, metrics), (inputs, z)


def _implicit_backward(f: Callable, solver: Solver, adjoint: Solver, saved: Any, cotangents: Any) -> Any:
    inputs, z = saved
    of_output, _ = cotangents

    _, pull = jax.vjp(lambda inputs, z: f(inputs[0], z, *inputs[1]), inputs, z)  # one pass, which all products share
    u, _ = implicit(lambda _, u: pull(u)[1] + of_output, (), of_output, adjoint)

    return pull(u)[0], jnp.zeros_like(z)


_implicit.defvjp(_implicit_forward, _implicit_backward)


# Solvers


class _Carry(NamedTuple):
    """The state of the iteration. Rows that are not active have stopped and keep their state."""

    loop: Array
    state: Array
    memory: Any
    active: Array
    best: Array
    residual: Array
    evaluations: Array


class _Method(NamedTuple):
    """A solver: its initial memory, and the state to evaluate next, from a state and the output of `f`."""

    start: Callable[[Array, int], Any]
    advance: Callable[[Any, Array, Array, Array], tuple[Array, Any]]


def _loops_start(state: Array, size: int) -> tuple[()]:
    return ()


def _loops(memory: tuple[()], loop: Array, state: Array, output: Array) -> tuple[Array, tuple[()]]:
    return output, memory


class _Anderson(NamedTuple):
    """The latest outputs of `f` and their differences from the states, in a ring."""

    outputs: Float[Array, "M B *S"]
    differences: Float[Array, "M B *S"]


def _anderson_start(state: Array, size: int) -> _Anderson:
    empty = jnp.zeros((size, *state.shape), state.dtype)
    return _Anderson(outputs=empty, differences=empty)


def _anderson(memory: _Anderson, loop: Array, state: Array, output: Array) -> tuple[Array, _Anderson]:
    """Returns the sum of outputs whose weights, of sum one, minimize the norm of the sum of differences."""
    size = memory.outputs.shape[0]
    outputs = memory.outputs.at[loop % size].set(output)
    differences = memory.differences.at[loop % size].set(output - state)
    filled = (jnp.arange(size, dtype=jnp.int32) <= loop).astype(output.dtype)

    gram = _products(differences, differences)  # [B, M, M], zero for empty entries
    mean_square = jnp.trace(gram, axis1=1, axis2=2) / jnp.sum(filled)
    gram = gram / jnp.maximum(mean_square, jnp.finfo(output.dtype).tiny)[:, None, None]

    # A ridge of fixed size would stop the convergence once residuals are smaller. Empty entries get a weight of zero.
    matrix = gram + jnp.diag(_RIDGE * filled + (1.0 - filled))[None]
    weights = jnp.linalg.solve(matrix, jnp.broadcast_to(filled[:, None], (*gram.shape[:2], 1)))[..., 0]
    weights = weights / jnp.sum(weights, axis=1, keepdims=True)

    return _combine(weights, outputs), _Anderson(outputs=outputs, differences=differences)


class _Broyden(NamedTuple):
    """The last state and its difference, and the inverse Jacobian of the differences: `-I + sum_m left_m right_m^T`."""

    state: Float[Array, "B *S"]
    difference: Float[Array, "B *S"]
    left: Float[Array, "M B *S"]
    right: Float[Array, "M B *S"]


def _broyden_start(state: Array, size: int) -> _Broyden:
    empty = jnp.zeros((size, *state.shape), state.dtype)
    return _Broyden(state=state, difference=jnp.zeros_like(state), left=empty, right=empty)


def _broyden(memory: _Broyden, loop: Array, state: Array, output: Array) -> tuple[Array, _Broyden]:
    """Returns the quasi-Newton step from the state, after the good Broyden update of the inverse, without line search.

    A full memory is emptied, which makes the next step one of plain loops.
    """
    difference = output - state
    slot = (loop - 1) % memory.left.shape[0]
    left, right = (jnp.where(slot == 0, 0.0, factors) for factors in (memory.left, memory.right))

    moved, changed = state - memory.state, difference - memory.difference
    new_right = _combine(_project(left, moved), right) - moved
    new_left = moved - (_combine(_project(right, changed), left) - changed)
    denominator = _project(new_right[None], changed)[:, 0]

    # The first state has no predecessor, and rows that stopped have not moved.
    smallest = jnp.finfo(state.dtype).eps * _norm(new_right) * _norm(changed)
    usable = (loop > 0) & (jnp.abs(denominator) > smallest)
    scale = jnp.where(usable, 1.0 / jnp.where(usable, denominator, 1.0), 0.0)
    left = left.at[slot].set(new_left * _per_row(scale, state))
    right = right.at[slot].set(_where(usable, new_right, jnp.zeros_like(state)))

    following = state + difference - _combine(_project(right, difference), left)
    return following, _Broyden(state=state, difference=difference, left=left, right=right)


_METHODS = {
    SolverKind.LOOPS: _Method(_loops_start, _loops),
    SolverKind.ANDERSON: _Method(_anderson_start, _anderson),
    SolverKind.BROYDEN: _Method(_broyden_start, _broyden),
}


# Algebra of rows. States keep their shape, so that their sharding remains.


def _per_row(values: Shaped[Array, "B"], state: Float[Array, "B *S"]) -> Array:
    return values.reshape(-1, *[1] * (state.ndim - 1))


def _where(rows: Bool[Array, "B"], chosen: Float[Array, "B *S"], other: Float[Array, "B *S"]) -> Float[Array, "B *S"]:
    return jnp.where(_per_row(rows, chosen), chosen, other)


def _norm(state: Float[Array, "B *S"]) -> Float[Array, "B"]:
    return jnp.sqrt(jnp.sum(jnp.square(state), axis=tuple(range(1, state.ndim))))


def _products(one: Float[Array, "M B *S"], other: Float[Array, "N B *S"]) -> Float[Array, "B M N"]:
    """Returns the inner products of all pairs of states of a row."""
    axes = tuple(range(2, one.ndim))
    return jax.lax.dot_general(one, other, ((axes, axes), ((1,), (1,))), precision=jax.lax.Precision.HIGHEST)


def _project(states: Float[Array, "M B *S"], state: Float[Array, "B *S"]) -> Float[Array, "B M"]:
    """Returns the inner products of the states of a row with one more."""
    return _products(states, state[None])[..., 0]


def _combine(weights: Float[Array, "B M"], states: Float[Array, "M B *S"]) -> Float[Array, "B *S"]:
    """Returns the weighted sum of the states of each row."""
    return jax.lax.dot_general(weights, states, (((1,), (0,)), ((0,), (1,))), precision=jax.lax.Precision.HIGHEST)
