"""The engine, replay and self-speculation serve every option of the looped block, or refuse it by name."""

import dataclasses
import enum
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huginn_golden import CONFIG as HUGINN
from inference_models import make_model

from looplm_jax.config import (
    GatePlacement,
    InitialState,
    Injection,
    ModelConfig,
    NormPlacement,
    PositionSignal,
    Residual,
    StateNorm,
    TimeSignal,
)
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops, QExit
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, generate, replay
from looplm_jax.inference.speculation import speculate
from looplm_jax.models._looplm import head_matrix

PROMPT = [3, 14, 15, 92, 65, 35]
LOOPS = 3
PARCAE = {
    "injection": Injection.DIAGONAL,
    "initial_state": InitialState.ZERO,
    "injection_norm": True,
    "norm_placement": NormPlacement.PRE,
    "residual": Residual.PER_LOOP,
    "state_norm": StateNorm.READOUT,
    "time_signal": TimeSignal.SINUSOID,
}
UNIVERSAL = {
    "norm_placement": NormPlacement.POST,
    "state_norm": StateNorm.READOUT,
    "time_signal": TimeSignal.LEARNED,
    "position_signal": PositionSignal.SINUSOID,
    "gate": GatePlacement.BEFORE,
}
# Trained for another number of loops, of which the time of a loop would be another fraction.
MODULATED = {
    "injection": Injection.QUERY,
    "injection_norm": True,
    "time_signal": TimeSignal.MODULATION,
    "norm_placement": NormPlacement.OUTER,
    "residual": Residual.DEEP_LOOP,
    "loops": LOOPS - 1,
}
# Models that are decoded here, in `test_replay` (an added input, prelude and coda), and in `test_huginn_golden`.
DECODED = [PARCAE, UNIVERSAL, MODULATED, {"injection": Injection.ADD}, vars(HUGINN)]
# They determine initial values, or training, or are covered by a field beside them.
WITHOUT_EFFECT = {"initializer", "init_std", "second_norm_init", "gate_bias", "state_std", "max_loops"}


@functools.partial(jax.jit, static_argnums=0)
def full_forward(model, params, tokens):
    output = model.apply({"params": params}, tokens[None], loops=LOOPS)
    return jax.nn.log_softmax(output.hidden[:, 0] @ head_matrix(params, model.config))


@pytest.mark.parametrize(
    "options",
    [pytest.param(PARCAE, marks=pytest.mark.slow), UNIVERSAL, pytest.param(MODULATED, marks=pytest.mark.slow)],
    ids=["parcae", "universal_transformer", "modulated_query"],
)
def test_cached_decoding_equals_the_full_forward(options):
    model, params = make_model(num_layers=1, **{"loops": LOOPS, **options})
    made = generate(model, params, PROMPT, max_new_tokens=5, policy=FixedLoops(loops=LOOPS))
    predicted = full_forward(model, params, jnp.array([*PROMPT, *made.tokens]))[-1, len(PROMPT) - 1 : -1]
    assert made.tokens == tuple(np.argmax(predicted, axis=-1))
    np.testing.assert_allclose(made.log_probs, np.max(predicted, axis=-1), atol=1e-4)

    drafted = speculate(model, params, [PROMPT], draft_loops=1, drafts=2, max_new_tokens=5, loops=LOOPS)[0]
    assert drafted.tokens == made.tokens


@pytest.mark.parametrize(
    ("options", "q", "strategy"),
    [
        (UNIVERSAL, 0.05, CacheStrategy.LAST),
        (MODULATED, 0.3, CacheStrategy.LAST),
        pytest.param(UNIVERSAL, 0.05, CacheStrategy.FULL, marks=pytest.mark.slow),
        pytest.param(MODULATED, 0.3, CacheStrategy.FULL, marks=pytest.mark.slow),
    ],
)
def test_replay_recomputes_exits(options, q, strategy):
    """With a gate before the loop, and with layers that are modulated by the loops of the engine."""
    model, params = make_model(num_layers=1, **{"loops": LOOPS, **options})
    engine = Engine(model, params, config=EngineConfig(slots=1, capacity=16, cache=strategy, loops=LOOPS))
    made = engine.generate([PROMPT], max_new_tokens=6, policy=QExit(q=q))[0]
    assert len(set(made.exit_loops)) > 1
    np.testing.assert_allclose(replay(model, params, made, strategy=strategy, loops=LOOPS), made.log_probs, atol=1e-4)


def test_what_the_engine_refuses():
    model, params = make_model(num_layers=1, loops=LOOPS, **UNIVERSAL)
    deep = "loops=4 is beyond the 3 rows of the model's learned time signal; run at most 3 loops"
    with pytest.raises(UserError) as error:
        Engine(model, params, config=EngineConfig(loops=4))
    assert str(error.value) == deep
    with pytest.raises(UserError) as error:
        speculate(model, params, [PROMPT], draft_loops=1, drafts=1, max_new_tokens=1, loops=4)
    assert str(error.value) == deep

    model, params = make_model(num_layers=1, loops=LOOPS, gate=GatePlacement.NONE)
    with pytest.raises(UserError) as error:
        Engine(model, params).generate([PROMPT], max_new_tokens=1, policy=QExit(q=0.5))
    assert str(error.value) == (
        "QExit reads the exit gate, and the model has none (model.gate=none); "
        "use fixed loops, or a policy that reads states or predictions"
    )


def test_every_option_is_part_of_a_decoded_model():
    options = [field for field in dataclasses.fields(ModelConfig) if field.default is not dataclasses.MISSING]
    assert {field.name for field in options} > WITHOUT_EFFECT
    for field in options:
        values = {model.get(field.name, field.default) for model in DECODED}
        if isinstance(field.default, enum.Enum) and field.name not in WITHOUT_EFFECT:
            assert values == set(type(field.default)), field.name
        elif isinstance(field.default, bool):
            assert values == {False, True}, field.name
