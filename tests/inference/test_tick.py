"""What the compiled tick does, and what it leaves out."""

import re

import jax
import jax.numpy as jnp
import pytest
from inference_models import make_model
from jax.extend.core import jaxprs_in_params

from looplm_jax.halting import FixedLoops, KLDivergence, PolicyTable, QExit
from looplm_jax.inference.kv_cache import CacheStrategy
from looplm_jax.inference.slots import empty_slots
from looplm_jax.inference.tick import run_ticks, tick
from looplm_jax.models.blocks import unroll_layers
from looplm_jax.models.looplm import LoopLM

LOOPS, ROWS, CAPACITY = 3, 5, 64


@pytest.fixture(scope="module")
def model_and_params():
    return make_model(num_layers=1, loops=LOOPS)


def shape_of_slots(model, strategy=CacheStrategy.FULL, kinds=(FixedLoops, QExit)):
    return jax.eval_shape(
        lambda: empty_slots(
            model,
            strategy,
            rows=ROWS,
            capacity=CAPACITY,
            loops=LOOPS,
            cache_dtype=jnp.float32,
            policies=PolicyTable.empty(ROWS, kinds),
        )
    )


@pytest.mark.parametrize(
    ("strategy", "changes"),
    [(CacheStrategy.FULL, {"coda_layers": 1}), (CacheStrategy.AVERAGE, {"num_layers": 2, "prelude_layers": 1})],
)
def test_the_cache_is_updated_in_place(strategy, changes):
    model, params = make_model(**{"num_layers": 1, "loops": LOOPS} | changes)
    model, params = LoopLM(model.config, model.compute, unrolled=True), unroll_layers(params)
    slots = shape_of_slots(model, strategy)
    compiled = run_ticks.lower(model, params, slots, loops=LOOPS, ticks=2).compile()
    planes = jax.tree.leaves(slots.cache.planes)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in planes)
    shapes = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in planes}
    assert any(shape in compiled.as_text() for shape in shapes)
    copied = re.findall(r"= (\S+?)\{[^}]*\} copy\(", compiled.as_text())
    assert not shapes.intersection(copied)


def products(jaxpr, *, of_branches):
    """Shapes of the matrix products of a program, those in the branches of conditionals included or not."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        if equation.primitive.name != "cond" or of_branches:
            for inner in jaxprs_in_params(equation.params):
                yield from products(inner, of_branches=of_branches)


@pytest.mark.parametrize(("kind", "in_every_tick"), [(QExit, False), (KLDivergence, True)])
def test_the_head_is_computed_in_every_tick_only_for_policies_that_read_predictions(
    model_and_params, kind, in_every_tick
):
    model, params = model_and_params
    slots = shape_of_slots(model, kinds=(FixedLoops, kind))
    program = jax.make_jaxpr(lambda params, slots: tick(model, params, slots, loops=LOOPS, previews=False))(
        params, slots
    )
    logits = (ROWS, model.config.vocab_size)
    assert (logits in products(program.jaxpr, of_branches=False)) is in_every_tick
    assert logits in products(program.jaxpr, of_branches=True)
    assert (slots.memory.logits is not None) is in_every_tick
