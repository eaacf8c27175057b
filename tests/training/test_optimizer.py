import dataclasses
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from training_cases import MODEL, STAGE, assert_identical, one_stage, random_batch

from looplm_jax.checkpoints._arrays import flatten
from looplm_jax.checkpoints._raw import read_raw
from looplm_jax.config import Injection, MeshConfig, OptimizerConfig, OptimizerKind, Schedule, TimeSignal
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM, boxed_params, init_params
from looplm_jax.planning._budget import shard_bytes, state_memory
from looplm_jax.sharding import make_mesh
from looplm_jax.training import _compile as program
from looplm_jax.training import train
from looplm_jax.training._compile import StagePrograms, to_device
from looplm_jax.training._optimizer import decayed, direction, learning_rate, make_optimizer
from looplm_jax.training._state import abstract_state, initial_state

PEAK, FINAL = 1e-3, 1e-4


def rates(schedule, steps=20, **changes):
    stage = dataclasses.replace(
        STAGE, steps=steps, learning_rate=PEAK, final_learning_rate=FINAL, schedule=schedule, **changes
    )
    return np.asarray(jax.vmap(lambda step: learning_rate(stage, step))(jnp.arange(steps)))


@pytest.mark.parametrize("schedule", Schedule)
def test_warm_up_is_linear_and_reaches_the_peak_with_its_last_step(schedule):
    np.testing.assert_allclose(rates(schedule, warmup_steps=4)[:4], PEAK * np.array([0.25, 0.5, 0.75, 1]), rtol=1e-6)


def test_constant():
    np.testing.assert_allclose(rates(Schedule.CONSTANT, warmup_steps=0), PEAK, rtol=1e-6)


def test_cosine_goes_from_the_peak_to_the_final_rate():
    for warmup in (0, 1, 4):
        got = rates(Schedule.COSINE, warmup_steps=warmup)
        first = max(warmup - 1, 0)  # it has the peak
        done = (np.arange(first, 20) - first) / (19 - first)
        np.testing.assert_allclose(got[first:], FINAL + (PEAK - FINAL) * 0.5 * (1 + np.cos(np.pi * done)), rtol=1e-5)


def test_warmup_stable_decay_is_flat_and_then_falls_to_the_final_rate():
    got = rates(Schedule.WARMUP_STABLE_DECAY, warmup_steps=4, decay_steps=5)
    np.testing.assert_allclose(got[3:15], PEAK, rtol=1e-6)
    np.testing.assert_allclose(np.diff(got[14:]), (FINAL - PEAK) / 5, rtol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "changes"),
    [
        (Schedule.COSINE, {}),
        (Schedule.COSINE, {"warmup_steps": 9}),
        *((Schedule.WARMUP_STABLE_DECAY, {"decay_steps": steps}) for steps in (1, 2, 7, 20)),
    ],
)
def test_the_last_step_of_a_decay_has_exactly_the_final_rate(schedule, changes):
    got = rates(schedule, **{"warmup_steps": 0, **changes})
    assert got[-1] == np.float32(FINAL)
    assert (got[:-1] > FINAL).all()


@pytest.mark.parametrize("schedule", Schedule)
def test_the_step_before_a_decay_has_exactly_the_peak(schedule):
    got = rates(schedule, warmup_steps=4, decay_steps=5)
    peaks = {Schedule.CONSTANT: slice(3, 20), Schedule.COSINE: slice(3, 4), Schedule.WARMUP_STABLE_DECAY: slice(3, 15)}
    assert (got[peaks[schedule]] == np.float32(PEAK)).all()


def test_a_cosine_of_one_step_has_the_peak():
    np.testing.assert_allclose(rates(Schedule.COSINE, steps=1, warmup_steps=0), [PEAK], rtol=1e-6)


@given(
    st.sampled_from(Schedule),
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 50),
    st.floats(0, 1),
    st.integers(0, 200),
)
def test_the_rate_never_leaves_its_bounds(schedule, warmup, decay, stable, final, step):
    stage = dataclasses.replace(
        STAGE, steps=warmup + decay + stable, warmup_steps=warmup, decay_steps=decay, schedule=schedule,
        learning_rate=PEAK, final_learning_rate=final * PEAK,
    )  # fmt: skip
    rate = float(learning_rate(stage, jnp.int32(step)))
    assert final * PEAK * min(1, 1 / max(warmup, 1)) * (1 - 1e-5) <= rate <= PEAK * (1 + 1e-5)


def transcribed_adamw(config, gradients, params, steps):
    """Clipping, Adam and decoupled weight decay, transcribed from their papers, for equal gradients in all `steps`."""
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    clipped = {name: gradient * min(1.0, config.clip_norm / norm) for name, gradient in gradients.items()}
    mean = dict.fromkeys(gradients, 0.0)
    square = dict.fromkeys(gradients, 0.0)
    for _ in range(steps):
        for name, gradient in clipped.items():
            mean[name] = config.b1 * mean[name] + (1 - config.b1) * gradient
            square[name] = config.b2 * square[name] + (1 - config.b2) * gradient**2
    scaled = {
        name: mean[name] / (1 - config.b1**steps) / (np.sqrt(square[name] / (1 - config.b2**steps)) + config.eps)
        for name in gradients
    }
    return {
        name: value + (config.weight_decay * params[name] if name == "kernel" else 0.0)
        for name, value in scaled.items()
    }


@pytest.mark.parametrize("clip_norm", [0.3, 1e3])
def test_adamw_is_the_transcription(clip_norm):
    config = OptimizerConfig(clip_norm=clip_norm)
    generator = np.random.default_rng(0)
    shapes = {"kernel": (3, 4), "scale": (4,), "bias": ()}
    params = {name: np.float32(generator.normal(size=shape)) for name, shape in shapes.items()}
    gradients = {name: np.float32(generator.normal(size=shape)) for name, shape in shapes.items()}
    axes = {name: PartitionSpec(*("norm",) * len(shape)) for name, shape in shapes.items()}
    state = make_optimizer(config, axes).init(params)
    for steps in (1, 2, 3):
        updates, state = direction(config, axes, jax.tree.map(jnp.asarray, gradients), state, params)
        wanted = transcribed_adamw(config, gradients, params, steps)
        for name in shapes:
            np.testing.assert_allclose(updates[name], wanted[name], rtol=1e-5)


@pytest.mark.parametrize("make", [boxed_params, init_params])
def test_norms_and_biases_are_not_decayed_and_all_else_is(make):
    config = dataclasses.replace(MODEL, injection=Injection.LINEAR, prelude_layers=1, coda_layers=1)
    params = jax.eval_shape(lambda: make(LoopLM(config), jax.random.key(0)))
    mask = nn.meta.unbox(decayed(params))
    kept = {
        jax.tree_util.keystr(path, simple=True, separator="."): flag for path, flag in jax.tree.leaves_with_path(mask)
    }
    undecayed = {name for name, flag in kept.items() if not flag}
    assert undecayed == {name for name in kept if name.endswith(("scale", "bias"))}
    assert {"embedding", "head", "injection", "gate.kernel"} <= set(kept) - undecayed
    assert {"gate.bias", "norm.scale"} <= undecayed


def test_diagonal_injection_and_parameters_of_time_are_not_decayed():
    config = dataclasses.replace(MODEL, injection=Injection.DIAGONAL, time_signal=TimeSignal.LEARNED, qk_bias=True)
    mask = decayed(jax.eval_shape(lambda: init_params(LoopLM(config), jax.random.key(0))))
    spared = {*mask["diagonal_injection"].values(), mask["time_table"]}
    biases = {mask["core"]["layers"]["attention"][name]["bias"] for name in ("query", "key")}
    assert (spared, biases, mask["embedding"]) == ({False}, {False}, True)

    config = dataclasses.replace(MODEL, time_signal=TimeSignal.MODULATION)
    mask = decayed(jax.eval_shape(lambda: init_params(LoopLM(config), jax.random.key(0))))
    assert set(jax.tree.leaves((mask["time_embedding"], mask["core"]["layers"]["modulation"]))) == {False}


# Adafactor and Muon. Their references are Optax's optimizers for separate matrices.

LAYERS, WIDTH = 2, 16
NO_CLIP = 1e6
AXES = {
    "core": {
        "query": {"kernel": PartitionSpec("layers", "embed", "heads", "head_dim")},
        "out": {"kernel": PartitionSpec("layers", "heads", "head_dim", "embed")},
        "norm": {"scale": PartitionSpec("layers", "norm")},
    },
    "embedding": PartitionSpec("vocab", "embed"),
    "gate": {"bias": PartitionSpec("norm")},
}
SHAPES = {
    "core": {"query": {"kernel": (2, 16, 2, 4)}, "out": {"kernel": (2, 2, 4, 16)}, "norm": {"scale": (2, 16)}},
    "embedding": (12, 16),
    "gate": {"bias": (1,)},
}


def random_tree(seed, size):
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape) * size, jnp.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def separate(tree):
    """Returns the parameters as two-dimensional matrices, one for each layer, and vectors."""
    core, found = tree["core"], {"embedding": tree["embedding"], "bias": tree["gate"]["bias"]}
    for layer in range(LAYERS):
        found[f"query{layer}"] = core["query"]["kernel"][layer].reshape(WIDTH, -1)
        found[f"out{layer}"] = core["out"]["kernel"][layer].reshape(-1, WIDTH)
        found[f"scale{layer}"] = core["norm"]["scale"][layer]
    return found


def assert_updates(config, references):
    """Compares three updates with those of an optimizer for the separate parameters with each prefix."""
    params = random_tree(0, 0.3)
    apart = separate(params)
    state, others = make_optimizer(config, AXES).init(params), [other.init(apart) for _, other in references]
    step = jax.jit(lambda gradients, state: direction(config, AXES, gradients, state, params))

    for seed, size in enumerate((1.0, 0.1, 2.0), start=1):
        gradients = random_tree(seed, size)
        updates, state = step(gradients, state)
        for number, (prefixes, other) in enumerate(references):
            with jax.numpy_dtype_promotion("standard"):
                wanted, others[number] = jax.jit(other.update)(separate(gradients), others[number], apart)
            for name, got in separate(updates).items():
                if name.startswith(prefixes):
                    decay = 0.0 if name.startswith(("scale", "bias")) else config.weight_decay * apart[name]
                    np.testing.assert_allclose(got, decay - wanted[name], rtol=2e-4, atol=1e-5, err_msg=name)


def test_adafactor_is_that_of_optax_for_separate_matrices():
    config = OptimizerConfig(kind=OptimizerKind.ADAFACTOR, decay_exponent=0.7, weight_decay=0.2, clip_norm=NO_CLIP)
    assert_updates(config, [("", optax.adafactor(1.0, min_dim_size_to_factor=1, decay_rate=0.7))])


def test_muon_is_that_of_optax_for_the_matrices_of_the_shared_stack_and_adamw_updates_the_rest():
    config = OptimizerConfig(kind=OptimizerKind.MUON, momentum=0.8, weight_decay=0.2, clip_norm=NO_CLIP)
    muon = optax.contrib.muon(1.0, beta=0.8, consistent_rms=0.2)
    adam = optax.adam(1.0, b1=config.b1, b2=config.b2, eps=config.eps)
    assert_updates(config, [(("query", "out"), muon), (("embedding", "scale", "bias"), adam)])


def test_the_state_of_adafactor_is_rows_and_columns():
    moments = make_optimizer(OptimizerConfig(kind=OptimizerKind.ADAFACTOR), AXES).init(random_tree(0, 1.0))[1].moments
    query, out = moments["core"]["query"]["kernel"], moments["core"]["out"]["kernel"]
    assert (query.rows.shape, query.columns.shape) == ((2, 16), (2, 2, 4))
    assert (out.rows.shape, out.columns.shape) == ((2, 2, 4), (2, 16))
    assert moments["core"]["norm"]["scale"].shape == (2, 16)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "adamw",
            {"momentum": 0.9},
            "optimizer.momentum=0.9 has no effect with optimizer.kind=adamw; leave it at 0.95",
        ),
        ("adafactor", {"b1": 0.8}, "optimizer.b1=0.8 has no effect with optimizer.kind=adafactor; leave it at 0.9"),
        ("muon", {"decay_exponent": 0.5}, "optimizer.decay_exponent=0.5 has no effect with optimizer.kind=muon"),
        ("adafactor", {"decay_exponent": 0.0}, "optimizer.decay_exponent must be in (0, 1], not 0.0"),
        ("muon", {"momentum": 1.0}, "optimizer.momentum must be in [0, 1), not 1.0"),
    ],
)
def test_a_field_without_effect_is_refused(kind, changes, message):
    with pytest.raises(UserError) as caught:
        OptimizerConfig(kind=OptimizerKind(kind), **changes)
    assert str(caught.value).startswith(message)


# Runs.

OTHERS = [OptimizerKind.ADAFACTOR, OptimizerKind.MUON]
STEADY = dataclasses.replace(STAGE, min_loops=0, warmup_steps=0, schedule=Schedule.CONSTANT, steps=4)


def three_steps(kind, mesh_config):
    """Returns the losses and the last state of three steps on a mesh."""
    recipe = one_stage(STEADY, optimizer=OptimizerConfig(kind=kind), mesh=mesh_config)
    mesh, model = make_mesh(mesh_config), LoopLM(recipe.model, recipe.compute)
    state, losses = initial_state(recipe, model, STEADY, mesh), []
    programs = StagePrograms(recipe, model, STEADY, mesh, first_step=0)
    programs.compile(2)
    for seed in range(3):
        state, metrics = programs.run(2, state, to_device(random_batch(seed), STEADY, mesh))
        losses.append(float(metrics.loss))
    planned = state_memory(abstract_state(recipe, model, STEADY, mesh), None).optimizer
    assert planned == shard_bytes(state.optimizer)
    return losses, state


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_three_steps_are_the_same_on_any_mesh_and_the_state_is_sharded(kind):
    losses, state = three_steps(kind, MeshConfig(data=1))
    losses_on_mesh, on_mesh = three_steps(kind, MeshConfig(data=1, fsdp=2, tensor=2))
    np.testing.assert_allclose(losses_on_mesh, losses, rtol=1e-5)
    for (path, leaf), wanted in zip(
        jax.tree.leaves_with_path(on_mesh.params), jax.tree.leaves(state.params), strict=True
    ):
        np.testing.assert_allclose(leaf, wanted, atol=2e-4, err_msg=jax.tree_util.keystr(path))
    assert shard_bytes(on_mesh.optimizer) < 0.7 * shard_bytes(state.optimizer)


@pytest.mark.parametrize("kind", [OptimizerKind.MUON, pytest.param(OptimizerKind.ADAFACTOR, marks=pytest.mark.slow)])
def test_a_resumed_run_is_bit_identical_and_each_program_is_traced_once(kind, tmp_path, monkeypatch):
    traces, make = [], program.make_train_step

    def counting(*args, **kwargs):
        step = make(*args, **kwargs)
        return lambda state, batch: (traces.append(kwargs["loops"]), step(state, batch))[1]

    monkeypatch.setattr(program, "make_train_step", counting)
    program.compiled_step.cache_clear()
    recipe = one_stage(STEADY, optimizer=OptimizerConfig(kind=kind))
    train(recipe, tmp_path / "run")
    wanted = read_raw(tmp_path / "run").arrays
    assert int(wanted["step"]) == 4
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    train(recipe, tmp_path / "run")
    assert_identical(read_raw(tmp_path / "run").arrays, wanted)
    assert traces == [2]


def test_upcycling_copies_the_layers_of_every_state():
    """Every array under the shared stack has the layers first."""
    for kind in OptimizerKind:
        state = make_optimizer(OptimizerConfig(kind=kind), AXES).init(random_tree(0, 1.0))
        inside = [array for name, array in flatten(state).items() if ".core." in f".{name}"]
        assert inside
        assert {array.shape[0] for array in inside} == {LAYERS}
