"""The fixed point of a model's loop: its state and gradient are those of many loops."""

import jax
import jax.numpy as jnp
import numpy as np

from looplm_jax.config import Injection, Solver, SolverKind
from looplm_jax.models import LoopLM, equilibrium, init_params, last_loop, loop_of
from looplm_jax.testing import tiny_config

LOOPS = 80
CONFIG = tiny_config(num_layers=1, injection=Injection.ADD, injection_norm=True, prelude_layers=1)


def test_state_and_gradient_are_those_of_many_loops():
    model, tokens = LoopLM(CONFIG), jnp.asarray([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    params = init_params(model, jax.random.key(0))
    cotangent = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, CONFIG.width)), jnp.float32)

    def solved(params):
        solver = Solver(kind=SolverKind.BROYDEN, tolerance=1e-6, max_loops=LOOPS, memory=20)
        output = equilibrium(model, {"params": params}, tokens, solver=solver)
        return jnp.sum(output.hidden * cotangent), output

    def unrolled(params):
        output = last_loop(model, {"params": params}, tokens, jnp.full(2, LOOPS), most=LOOPS)
        return jnp.sum(output.hidden * cotangent), output

    (_, found), gradients = jax.jit(jax.value_and_grad(solved, has_aux=True))(params)
    (_, wanted), wanted_gradients = jax.jit(jax.value_and_grad(unrolled, has_aux=True))(params)

    assert (found.solution.residual < 1e-5).all()
    assert (found.solution.evaluations < LOOPS).all()
    np.testing.assert_allclose(found.hidden, wanted.hidden, atol=1e-4)
    for (path, leaf), other in zip(
        jax.tree.leaves_with_path(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        scale = max(np.abs(np.asarray(other)).max(), 1e-3)
        np.testing.assert_allclose(leaf, other, atol=2e-3 * scale, err_msg=jax.tree_util.keystr(path))

    loop = loop_of(model, {"params": params}, tokens, jnp.ones(2, jnp.int32))
    np.testing.assert_allclose(jax.jit(loop)(found.state), found.state, atol=1e-4)
