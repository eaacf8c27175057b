import jax
import jax.numpy as jnp
import numpy as np
from inference_models import make_model

from looplm_jax.config import ComputeConfig, Dtype, Injection, Remat
from looplm_jax.inference._decoder import in_dtype_of_products
from looplm_jax.models._looplm import LoopLM


def test_parameters_in_the_dtype_of_products_change_no_answer():
    """The gate keeps its dtype, because it computes in float32."""
    model, params = make_model(num_layers=1, injection=Injection.LINEAR, loops=1)
    half = LoopLM(model.config, ComputeConfig(dtype=Dtype.BFLOAT16, remat=Remat.NONE))
    held = in_dtype_of_products(params, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(held | {"gate": ()})} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(held["gate"])} == {jnp.dtype(jnp.float32)}
    run = jax.jit(lambda params: half.apply({"params": params}, jnp.array([[3, 1, 4, 1]])))
    as_stored, as_held = run(params), run(held)
    np.testing.assert_array_equal(as_stored.hidden, as_held.hidden)
    np.testing.assert_array_equal(as_stored.gate_logits, as_held.gate_logits)
