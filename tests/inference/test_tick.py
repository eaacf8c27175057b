"""What the compiled tick does, and what it leaves out."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from inference_models import make_model
from jax.extend.core import jaxprs_in_params

from looplm_jax.halting import Confidence, FixedLoops, KLDivergence, QExit
from looplm_jax.halting._policy_table import PolicyTable
from looplm_jax.inference._cache_layout import PoolSize
from looplm_jax.inference._cache_strategy import CacheStrategy
from looplm_jax.inference._kv_cache import empty_cache
from looplm_jax.inference._loopwise_prefill import begin_chunk, run_loop
from looplm_jax.inference._prefill import LastToken, Place, admit, prefill_chunk
from looplm_jax.inference._slots import empty_slots
from looplm_jax.inference._tick import run_ticks, tick
from looplm_jax.models._blocks import unroll_layers
from looplm_jax.models._looplm import LoopLM

LOOPS, ROWS, CAPACITY = 3, 5, 64
POOL = PoolSize(pages=20, page_size=16, pages_per_slot=4)


@pytest.fixture(scope="module")
def model_and_params():
    return make_model(num_layers=1, loops=LOOPS)


def shape_of_slots(model, strategy=CacheStrategy.FULL, kinds=(FixedLoops, QExit)):
    return jax.eval_shape(
        lambda: empty_slots(
            model,
            strategy,
            POOL,
            rows=ROWS,
            loops=LOOPS,
            cache_dtype=jnp.float32,
            policies=PolicyTable.empty(ROWS, kinds),
        )
    )


FULL = CacheStrategy.FULL, {"coda_layers": 1}
AVERAGE = CacheStrategy.AVERAGE, {"num_layers": 2, "prelude_layers": 1}
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


def unrolled_model(changes):
    model, params = make_model(**{"num_layers": 1, "loops": LOOPS} | changes)
    return LoopLM(model.config, model.compute, unrolled=True), unroll_layers(params)


def assert_in_place(lowered, planes):
    """The program returns these arrays where they were given to it, and copies none of them as a whole."""
    compiled, planes = lowered.compile(), jax.tree.leaves(planes)
    assert compiled.memory_analysis().alias_size_in_bytes >= sum(leaf.size * leaf.dtype.itemsize for leaf in planes)
    shapes = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in planes}
    assert any(shape in compiled.as_text() for shape in shapes)
    copied = re.findall(r"= (\S+?)\{[^}]*\} copy\(", compiled.as_text())
    assert not shapes.intersection(copied)


@pytest.mark.parametrize(("strategy", "changes"), [FULL, slow(*AVERAGE)])
def test_the_cache_is_updated_in_place(strategy, changes):
    model, params = unrolled_model(changes)
    slots = shape_of_slots(model, strategy)
    assert_in_place(run_ticks.lower(model, params, slots, loops=LOOPS, ticks=2), slots.cache.planes)


@pytest.mark.parametrize(("strategy", "changes"), [slow(*FULL), AVERAGE])
def test_a_prompt_is_put_into_a_slot_in_place(strategy, changes):
    model, params = unrolled_model(changes)
    slots = shape_of_slots(model, strategy)
    settings = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), slots.settings)
    place = Place(slot=index(), pages=jax.ShapeDtypeStruct((POOL.pages_per_slot,), jnp.int32), length=index())
    lowered = admit.lower(model, params, slots, last_token(model), place, settings, None)
    assert_in_place(lowered, slots.cache.planes)


@pytest.mark.parametrize("in_pages", [slow(False), True])
def test_a_chunk_is_added_to_a_row_in_place(in_pages):
    model, params = unrolled_model({"prelude_layers": 1, "coda_layers": 1})
    row = shape_of_row_of_pages(model) if in_pages else shape_of_row(model)
    lowered = prefill_chunk.lower(model, params, row, jax.ShapeDtypeStruct((16,), jnp.int32), index())
    assert_in_place(lowered, row.planes)


def test_a_loop_of_a_chunk_is_added_to_the_only_plane_in_place():
    model, params = unrolled_model(AVERAGE[1])
    row = shape_of_row_of_pages(model, CacheStrategy.AVERAGE)
    tokens = jax.ShapeDtypeStruct((16,), jnp.int32)
    _, chunk = jax.eval_shape(functools.partial(begin_chunk, model), params, row, tokens, index())
    lowered = run_loop.lower(model, params, row, chunk, last_token(model), index())
    assert_in_place(lowered, row.planes)


def shape_of_row_of_pages(model, strategy=CacheStrategy.FULL):
    pages = jax.ShapeDtypeStruct((1, POOL.pages_per_slot), jnp.int32)
    length = jax.ShapeDtypeStruct((1,), jnp.int32)
    return dataclasses.replace(shape_of_slots(model, strategy).cache, lengths=length, table=pages)


def shape_of_row(model):
    return jax.eval_shape(
        lambda: empty_cache(model.config, CacheStrategy.FULL, rows=1, capacity=CAPACITY, loops=LOOPS, dtype=jnp.float32)
    )


def last_token(model):
    return LastToken(
        hidden=jax.ShapeDtypeStruct((LOOPS, model.config.width), jnp.float32),
        state=jax.ShapeDtypeStruct((LOOPS, model.config.width), jnp.float32),
        gate_logits=jax.ShapeDtypeStruct((LOOPS,), jnp.float32),
    )


def index():
    return jax.ShapeDtypeStruct((), jnp.int32)


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


def test_what_a_loop_predicted_is_kept_only_for_policies_that_compare(model_and_params):
    """An array [N, V]; who looks at one loop alone, or at the likeliest token, needs no such thing."""
    model, _ = model_and_params
    looking, comparing = (shape_of_slots(model, kinds=(FixedLoops, kind)) for kind in (Confidence, KLDivergence))
    assert looking.memory.logits is None
    assert comparing.memory.logits.shape == (ROWS, model.config.vocab_size)
    assert not any(model.config.vocab_size in leaf.shape for leaf in jax.tree.leaves(looking))
