"""Upcycling: which layer is a copy of which, in parameters and optimizer state alike, and training from the result."""

import dataclasses
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_of_at_most
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import looplm_jax
from looplm_jax.checkpoints import Metadata, inspect_steps, read_metadata
from looplm_jax.checkpoints._arrays import flatten
from looplm_jax.checkpoints._raw import RawStep, read_raw, write_raw
from looplm_jax.cli.main import main
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import (
    CheckpointConfig,
    ComputeConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    Recipe,
    Remat,
    SourceConfig,
    Stage,
)
from looplm_jax.convert._upcycle import Order, source_layers, upcycle
from looplm_jax.data import open_corpus
from looplm_jax.errors import UserError
from looplm_jax.models._blocks import Stack, make_context
from looplm_jax.models._looplm import LoopLM, count_params, init_params
from looplm_jax.training._optimizer import axes_of, make_optimizer
from looplm_jax.training.run import train

LAYERS, STEP = 2, 7
RECIPE = Recipe(
    name="upcycled",
    model=ModelConfig(
        vocab_size=12,
        width=16,
        mlp_width=24,
        num_layers=LAYERS,
        num_heads=2,
        loops=2,
        prelude_layers=LAYERS,
        coda_layers=1,
        max_positions=64,
    ),
    stages=(Stage(name="pretrain", steps=2, batch_size=2, sequence_length=16, loops=2),),
    compute=ComputeConfig(remat=Remat.NONE, loss_chunk=16),
    mesh=MeshConfig(data=1),
    data=DataConfig(sources=(SourceConfig(path="mano:length=2,modulus=5"),), validation_fraction=0.0),
    checkpoint=CheckpointConfig(every=2, keep=1),
)


def state() -> dict[str, jax.Array]:
    """Returns random arrays of a train state by name: parameters, their optimizer state, and more."""
    random = np.random.default_rng(0)
    params = jax.eval_shape(lambda: init_params(LoopLM(RECIPE.model), jax.random.key(0)))
    optimizer = jax.eval_shape(make_optimizer(RECIPE.optimizer, axes_of(RECIPE.model, params)).init, params)
    guard = {"losses": jax.ShapeDtypeStruct((4,), jnp.float32), "skipped": jax.ShapeDtypeStruct((), jnp.int32)}
    shapes = flatten({"params": params, "optimizer": optimizer, "guard": guard})
    return {name: jnp.asarray(0.3 * random.standard_normal(x.shape), x.dtype) for name, x in shapes.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a checkpoint of one step, as a run writes it."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = open_corpus(RECIPE.data).own_tokenizer
    metadata = Metadata(
        config=to_dict(RECIPE),
        tokenizer_kind=tokenizer.kind,
        tokenizer=tokenizer.serialize(),
        tokenizer_fingerprint=tokenizer.fingerprint,
        data_state={"position": 3},
        extra={"stage": "pretrain"},
    )
    write_raw(folder, RawStep(step=STEP, arrays=state(), metadata=metadata))
    return folder


@pytest.fixture(
    scope="module",
    params=[
        (2, Order.INTERLEAVE),
        *(pytest.param((copies, Order.STACK), marks=pytest.mark.slow) for copies in (2, 3)),
    ],
    ids=str,
)
def deeper(request, base, tmp_path_factory):
    """Returns the upcycled checkpoint, and the original of each of its layers."""
    copies, order = request.param
    out = tmp_path_factory.mktemp("deeper") / "new" / "deep"
    said = str(upcycle(base, out, layers=copies * LAYERS, order=order))
    model = dataclasses.replace(RECIPE.model, num_layers=copies * LAYERS)
    assert said == (
        f"{LAYERS} layers became {copies * LAYERS} ({order.value}): {count_params(model):,} parameters; "
        f"wrote step {STEP} to {out}"
    )
    return out, source_layers(order, LAYERS, copies * LAYERS)


def in_core(name):
    return ".core.layers." in name


@pytest.mark.parametrize(
    ("order", "chosen"), [(Order.INTERLEAVE, (0, 0, 0, 1, 1, 1)), (Order.STACK, (0, 1, 0, 1, 0, 1))]
)
def test_the_two_orders(order, chosen):
    assert source_layers(order, 2, 6) == chosen


@given(st.sampled_from(Order), st.integers(1, 9), st.integers(2, 4))
def test_every_layer_is_copied_equally_often_and_first_copies_keep_their_order(order, before, copies):
    chosen = source_layers(order, before, before * copies)
    assert sorted(chosen) == sorted(list(range(before)) * copies)
    assert list(dict.fromkeys(chosen)) == list(range(before))
    steps = np.diff(chosen)
    assert set(steps) <= ({0, 1} if order is Order.INTERLEAVE else {1, 1 - before})


def test_arrays_of_the_stack_are_gathered_and_others_are_untouched(base, deeper):
    out, chosen = deeper
    before, after = read_raw(base).arrays, read_raw(out).arrays
    assert list(after) == list(before)
    assert {name.split(".core")[0] for name in before if in_core(name)} == {
        "params",
        "optimizer.1.mu",
        "optimizer.1.nu",
    }
    for name, array in before.items():
        wanted = np.asarray(array)[list(chosen)] if in_core(name) else np.asarray(array)
        assert np.asarray(after[name]).tobytes() == wanted.tobytes(), name
        assert after[name].dtype == array.dtype


def test_the_description_says_the_new_depth_and_forgets_the_place_in_the_data(base, deeper):
    out, chosen = deeper
    before, after = read_metadata(str(base)), read_metadata(str(out))
    recipe = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, num_layers=len(chosen)))
    assert from_dict(Recipe, after.config) == recipe
    assert after == dataclasses.replace(before, config=to_dict(recipe), data_state={})
    (report,) = inspect_steps(str(out))
    assert (report.step, report.damage, report.permanent) == (STEP, None, True)
    assert report.parameters == count_params(recipe.model)


def test_it_computes_what_the_repeated_layers_compute(base, deeper):
    """Compared with one-layer models of the same parameters, run in the order of the copies within each loop."""
    out, chosen = deeper
    model, params = looplm_jax.load(out)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 12, (2, 16)), jnp.int32)
    output = model.apply({"params": params}, tokens)

    original = looplm_jax.load(base).params
    single = LoopLM(dataclasses.replace(model.config, num_layers=1), model.compute)
    wanted = by_hand(single, original, chosen, tokens)
    np.testing.assert_allclose(output.hidden, wanted, rtol=0, atol=2e-5)


def by_hand(single: LoopLM, original, chosen, tokens):
    """Returns the states of every loop, with each layer applied by a separate stack."""
    config = single.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    context = make_context(config, positions, jnp.ones_like(tokens))

    @jax.jit
    def layer(stack, index, state):
        own = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1), stack)
        return Stack(config, 1).apply({"params": own}, state, context)[0]

    def layers(name, state, indices):
        for index in indices:
            state = layer(original[name], index, state)
        return state

    def normalise(name, state):
        scale = original[name]["scale"][None, None]
        return state * jax.lax.rsqrt(jnp.mean(state**2, axis=-1, keepdims=True) + config.norm_eps) * scale

    state = layers("prelude", original["embedding"][tokens], range(LAYERS))
    hidden = []
    for _ in range(config.loops):
        state = normalise("norm", layers("core", state, chosen))
        hidden.append(normalise("coda_norm", layers("coda", state, range(1))))
    return jnp.stack(hidden)


@pytest.mark.slow
def test_training_goes_on_from_it_with_the_state_of_the_optimizer(base, tmp_path, capsys):
    plain = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, prelude_layers=0, coda_layers=0))
    train(plain, tmp_path / "run", console=Console(file=io.StringIO()))
    upcycle(tmp_path / "run", tmp_path / "deep", layers=2 * LAYERS, order=Order.INTERLEAVE)
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(to_dict(plain)))
    words = ["train", "--recipe", recipe, "--out", tmp_path / "on", "--start.checkpoint", tmp_path / "deep"]
    assert main([*map(str, words), "--start.optimizer", "true"]) == 2
    assert "type --model.num_layers 4, or start elsewhere" in capsys.readouterr().err
    assert main([*map(str, words), "--start.optimizer", "true", "--model.num_layers", "4"]) == 0
    assert int(read_raw(tmp_path / "on").arrays["optimizer.1.count"]) == 4  # two steps of each run


# Refusals


@pytest.mark.parametrize("layers", [-2, 0, 1, LAYERS, 2 * LAYERS + 1])
def test_a_depth_that_copies_do_not_give_is_refused(layers, base, tmp_path):
    with pytest.raises(UserError) as caught:
        upcycle(base, tmp_path / "out", layers=layers, order=Order.STACK)
    assert str(caught.value) == (
        f"the 2 layers of {base} cannot become {layers} by whole copies; choose 4, 6 or another multiple"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_left_alone(base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        upcycle(base, tmp_path, layers=4, order=Order.STACK)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="missing is not a checkpoint"):
        upcycle(tmp_path / "missing", tmp_path / "out", layers=4, order=Order.STACK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [100, 2000])
def test_a_disk_that_refuses_leaves_nothing_behind(size, base, tmp_path):
    with files_of_at_most(size), pytest.raises(UserError) as caught:
        upcycle(base, tmp_path / "out", layers=4, order=Order.STACK)
    assert str(caught.value) == (
        f"File too large while writing {tmp_path}/out/checkpoints/{STEP}: fix that and run the same command again"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_newer_damaged_step_is_named(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    shutil.copytree(base / "checkpoints" / str(STEP), source / "checkpoints" / "9")
    for path in (source / "checkpoints" / "9" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    upcycled = upcycle(source, tmp_path / "out", layers=4, order=Order.STACK)
    assert upcycled.step == STEP
    assert str(upcycled).startswith("warning: step 9 is damaged: ")
