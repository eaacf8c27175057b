"""Options of the looped block: published values, initial parameters, noise, and refusals."""

import dataclasses
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import BASE, random_tokens, tiny_config, tiny_model

from looplm_jax.config import Initializer, Injection, NormPlacement, Residual, TimeSignal
from looplm_jax.errors import UserError
from looplm_jax.models._injection import DiagonalInjection, noise_seeds, truncated_noise
from looplm_jax.models._looplm import LoopLM, init_params

_STABILIZERS = Path(__file__).parent.parent / "data" / "stabilizers.npz"


def stabilizers():
    """Returns outputs of Parcae's module, and the constants of DeepLoop, DeepNorm and residual scaling."""
    with np.load(_STABILIZERS) as arrays:
        return dict(arrays)


def made(**changes):
    config = dataclasses.replace(BASE, **changes)
    return jax.device_get(init_params(LoopLM(config), jax.random.key(1)))


# Published values


def test_diagonal_injection_equals_the_published_module():
    golden = {name: jnp.asarray(array, jnp.float32) for name, array in stabilizers().items()}
    inputs = golden["parcae/x"], golden["parcae/e"]
    fresh = nn.meta.unbox(DiagonalInjection().init(jax.random.key(0), *inputs))
    first = DiagonalInjection().apply(fresh, *inputs)
    np.testing.assert_allclose(first, golden["parcae/initial/out"], atol=2e-6)

    # The published matrix is [out, in].
    params = {
        "log_decay": golden["parcae/A_log"],
        "step_bias": golden["parcae/dt_bias"],
        "input_map": golden["parcae/B"].T,
    }
    ours = DiagonalInjection().apply({"params": params}, *inputs)
    np.testing.assert_allclose(ours, golden["parcae/out"], atol=2e-6)


@pytest.mark.parametrize("name", [name for name in stabilizers() if name.startswith("scaling/")])
def test_residual_weights_are_the_published_constants(name):
    layers, loops = (int(part[1:]) for part in name.removeprefix("scaling/").split("_"))
    alpha, _, _, _, per_loop = stabilizers()[name]
    config = dataclasses.replace(BASE, num_layers=layers, loops=loops, norm_placement=NormPlacement.OUTER)
    assert dataclasses.replace(config, residual=Residual.PER_LOOP).residual_weights == pytest.approx((1, per_loop))
    assert dataclasses.replace(config, residual=Residual.DEEP_LOOP).residual_weights == pytest.approx((alpha, 1))


# Initial parameters


def test_second_norms_start_at_their_initial_weight():
    layers = made(second_norm_init=0.1, prelude_layers=1)["core"]["layers"]
    for name in ("attention_post_norm", "mlp_post_norm"):
        np.testing.assert_array_equal(layers[name]["scale"], np.float32(0.1))
    np.testing.assert_array_equal(layers["attention_norm"]["scale"], 1)


def test_initial_matrices_are_scaled_by_depth_and_cut():
    std, width = 0.5, 64
    params = made(
        initializer=Initializer.SCALED_BY_DEPTH,
        init_std=std,
        width=width,
        head_dim=16,
        mlp_width=128,
        prelude_layers=1,
        coda_layers=2,
        injection=Injection.LINEAR,
    )
    attention, mlp = params["core"]["layers"]["attention"], params["core"]["layers"]["mlp"]
    scaled = [attention["out"]["kernel"], mlp["up"]["kernel"], mlp["down"]["kernel"]]
    plain = [attention["query"]["kernel"], attention["value"]["kernel"], mlp["gate"]["kernel"], params["injection"]]
    depth = 1 + BASE.loops * BASE.num_layers + 2
    for kernels, expected in ((scaled, std / (2 * depth) ** 0.5), (plain, std)):
        for kernel in kernels:
            assert kernel.std() == pytest.approx(0.9866 * expected, rel=0.05)  # that of a cut normal distribution
            assert np.abs(kernel).max() <= 3 * expected


def test_deep_loop_starts_from_smaller_matrices_in_the_shared_stack_alone():
    changes = {"norm_placement": NormPlacement.OUTER, "prelude_layers": 1}
    plain, deep = made(**changes), made(**changes, residual=Residual.DEEP_LOOP)
    beta = stabilizers()["scaling/L2_T8"][1] * (8 / BASE.loops) ** 0.5  # beta is in proportion to (T L)^-1/2
    for stack, factor in (("core", beta), ("prelude", 1.0)):
        for block, names in (("attention", ("value", "out")), ("mlp", ("gate", "up", "down"))):
            for name in names:
                kernels = (params[stack]["layers"][block][name]["kernel"] for params in (deep, plain))
                np.testing.assert_allclose(next(kernels), factor * next(kernels), rtol=1e-5)
    for name in ("query", "key"):
        ours, theirs = (params["core"]["layers"]["attention"][name]["kernel"] for params in (deep, plain))
        np.testing.assert_array_equal(ours, theirs)


# Noise


def test_noise_of_a_token_depends_on_its_seed_alone():
    seeds = noise_seeds(jnp.array([7, 8, 7]), jnp.broadcast_to(jnp.arange(4), (3, 4)))
    drawn = np.asarray(truncated_noise(seeds, 32, 0.5, jnp.float32))
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert len(np.unique(drawn[:2])) == drawn[:2].size  # two requests, or two positions, share nothing

    # Another batch, order and length.
    alone = truncated_noise(noise_seeds(jnp.array([8]), jnp.array([[3, 1]])), 32, 0.5, jnp.float32)
    np.testing.assert_array_equal(alone[0], drawn[1, [3, 1]])


def test_noise_is_cut_at_three_standard_deviations():
    drawn = np.asarray(truncated_noise(jnp.arange(4000, dtype=jnp.uint32)[None], 16, 0.5, jnp.float32))
    assert np.abs(drawn).max() <= 1.5
    assert drawn.std() == pytest.approx(0.9866 * 0.5, rel=0.01)
    assert abs(drawn.mean()) < 0.01


def test_a_model_starts_from_noise_only_with_seeds():
    model, params = tiny_model("huginn")
    tokens = random_tokens()[:3]
    seeds = noise_seeds(jnp.array([7, 8, 7]), jnp.broadcast_to(jnp.arange(6), (3, 6)))

    @jax.jit
    def states(seeds):
        start = model.initial_state(jnp.ones((3, 6, BASE.width)), seeds)
        return start, model.apply({"params": params}, tokens, loops=1, noise_seeds=seeds).hidden

    start, noisy = states(seeds)
    np.testing.assert_array_equal(start, truncated_noise(seeds, BASE.width, model.config.state_std, jnp.float32))
    zero, plain = states(None)
    np.testing.assert_array_equal(zero, 0)
    assert np.abs(noisy - plain).max() > 1e-3


# Refusals


def test_a_learned_time_signal_has_no_more_loops_than_rows():
    model, params = tiny_model("universal_transformer")
    with pytest.raises(UserError) as error:
        model.apply({"params": params}, random_tokens(), loops=8)
    assert str(error.value) == "loops=8 is beyond the 7 rows of the model's learned time signal; run at most 7 loops"
    assert (model.config.deeper_loops, tiny_config("parcae").deeper_loops) == (6, 6)
    assert dataclasses.replace(BASE, time_signal=TimeSignal.LEARNED).deeper_loops == BASE.loops
