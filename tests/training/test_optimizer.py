import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from training_cases import MODEL, STAGE

from looplm_jax.config import Injection, OptimizerConfig, Schedule, TimeSignal
from looplm_jax.models._looplm import LoopLM, boxed_params, init_params
from looplm_jax.training._optimizer import adamw, decayed, direction, learning_rate

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
    state = adamw(config).init(params)
    for steps in (1, 2, 3):
        updates, state = direction(config, jax.tree.map(jnp.asarray, gradients), state, params)
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


def test_diagonal_injection_and_the_time_table_are_not_decayed():
    config = dataclasses.replace(MODEL, injection=Injection.DIAGONAL, time_signal=TimeSignal.LEARNED, qk_bias=True)
    mask = decayed(jax.eval_shape(lambda: init_params(LoopLM(config), jax.random.key(0))))
    spared = {*mask["diagonal_injection"].values(), mask["time_table"]}
    biases = {mask["core"]["layers"]["attention"][name]["bias"] for name in ("query", "key")}
    assert (spared, biases, mask["embedding"]) == ({False}, {False}, True)
