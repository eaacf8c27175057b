"""Early exits: the exit loop of a token, its cost, and its cache entries."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from golden_torch import random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.transformers

LOOPS, LAYERS = 4, 2
CLOSE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return tiny_model(spread=0.3)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def passes(model):
    """Returns a list that grows by one with every pass of the stack."""
    made = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: made.append(1))
    yield made
    handle.remove()


def logits_per_loop(model, ids):
    return torch.stack([model.lm_head(states) for states in model(ids, output_hidden_states=True).hidden_states])


def naive_probabilities(gate_logits):
    exits = gate_logits.double().sigmoid()
    survival, parts = torch.ones_like(exits[..., 0]), []
    for loop in range(exits.shape[-1] - 1):
        parts.append(survival * exits[..., loop])
        survival = survival * (1 - exits[..., loop])
    return torch.stack([*parts, survival], dim=-1)


@given(seed=st.integers(0, 1000), loops=st.integers(1, 6))
def test_exit_probabilities_are_a_distribution_by_the_formula(model, seed, loops):
    with torch.no_grad():
        output = model(random_ids(2, 5, seed=seed), loops=loops)
    expected = naive_probabilities(output.gate_logits)
    torch.testing.assert_close(output.exit_probabilities.double(), expected, **CLOSE)
    torch.testing.assert_close(output.exit_probabilities.sum(-1), torch.ones(2, 5), **CLOSE)


@given(seed=st.integers(0, 1000), q=st.floats(0, 1))
def test_threshold_exits_at_the_first_loop_whose_cdf_reaches_it(model, seed, q):
    ids = random_ids(2, 7, seed=seed)
    with torch.no_grad():
        output, logits = model(ids, exit_threshold=q, use_cache=False), logits_per_loop(model, ids)
        cdf = naive_probabilities(model(ids).gate_logits).cumsum(-1)
    cdf[..., -1] = 1
    near_a_tie = (cdf - q).abs().min(-1).values < 1e-5
    expected = (cdf >= q).long().argmax(-1) + 1
    assert ((output.exit_loops == expected) | near_a_tie).all()
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(7), indexing="ij")
    torch.testing.assert_close(output.logits, logits[output.exit_loops - 1, rows, columns], **CLOSE)
    assert output.loops_run == output.exit_loops.max()


def test_threshold_zero_is_loop_one_and_threshold_one_the_last(model):
    ids = random_ids(2, 5)
    assert (model(ids, exit_threshold=0.0).exit_loops == 1).all()
    with torch.no_grad():
        sure = tiny_model(spread=0.3)
        sure.model.early_exit_gate.bias.fill_(1e4)  # a sigmoid of 1.0 in any precision
    assert (sure(ids, exit_threshold=1.0).exit_loops == LOOPS).all()
    assert (sure(ids, exit_threshold=1 - 1e-6).exit_loops == 1).all()


def test_weighted_exit_gives_the_expected_logits(model):
    ids = random_ids(2, 6)
    output = model(ids, exit_weighted=True, use_cache=False)
    expected = torch.einsum("bst,tbsv->bsv", output.exit_probabilities, logits_per_loop(model, ids))
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    assert output.loops_run == LOOPS


@pytest.mark.parametrize("loops", [1, 2, 4, 7])
def test_loops_may_be_any_number(model, passes, loops):
    output = model(random_ids(2, 4), loops=loops, output_hidden_states=True)
    assert len(passes) == output.loops_run == loops
    assert len(output.hidden_states) == output.gate_logits.shape[-1] == loops
    fewer = model(random_ids(2, 4), loops=loops + 1, exit_loop=loops)
    torch.testing.assert_close(output.logits, fewer.logits, **CLOSE)


@pytest.mark.parametrize(
    ("settings", "ran"),
    [
        ({"exit_loop": 2, "use_cache": False}, 2),
        ({"exit_threshold": 0.0, "use_cache": False}, 1),
        ({"exit_loop": 2, "use_cache": True}, LOOPS),
        ({"exit_threshold": 0.0, "use_cache": True}, LOOPS),
        ({"exit_loop": 2, "use_cache": False, "output_hidden_states": True}, LOOPS),
        ({"exit_weighted": True, "use_cache": False}, LOOPS),
        ({"use_cache": False}, LOOPS),
    ],
)
def test_passes_of_the_stack_for_a_prompt(model, passes, settings, ran):
    assert model(random_ids(2, 5), **settings).loops_run == ran == len(passes)


@pytest.mark.parametrize("settings", [{"exit_loop": 2}, {"exit_threshold": 0.0}])
def test_decoding_runs_only_the_loops_that_are_needed(model, passes, settings):
    cache = model(random_ids(2, 5), use_cache=True).past_key_values
    passes.clear()
    output = model(random_ids(2, 1), past_key_values=cache, **settings)
    assert len(passes) == output.loops_run == output.exit_loops.max() < LOOPS


def test_generation_saves_passes(model, passes):
    ids = random_ids(3, 5)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    model.generate(ids, do_sample=False, exit_loop=2, **settings)
    assert len(passes) == LOOPS + 8 * 2
    passes.clear()
    model.generate(ids, do_sample=False, exit_threshold=0.3, **settings)
    assert LOOPS + 8 <= len(passes) < LOOPS * 9


def test_padding_is_not_waited_for(model):
    ids = random_ids(1, 6)
    exits = model(ids, exit_threshold=0.5, use_cache=False).exit_loops[0]
    assert exits.max() > exits[0]  # the first token leaves before another
    only_first = torch.tensor([[1, 0, 0, 0, 0, 0]])
    output = model(ids, attention_mask=only_first, exit_threshold=0.5, use_cache=False)
    assert output.loops_run == exits[0]


def decode(model, ids, steps, **settings):
    """Decodes greedily by hand. Returns the outputs of the steps after the prompt, and the cache."""
    output = model(ids, use_cache=True, **settings)
    cache, outputs = output.past_key_values, []
    for _ in range(steps):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=cache, **settings)
        outputs.append(output)
    return outputs, cache


def test_rows_that_leave_early_leave_their_last_keys_and_values_in_the_deeper_planes(model):
    outputs, cache = decode(model, random_ids(6, 5), steps=6, exit_threshold=0.5)
    exits = torch.cat([output.exit_loops for output in outputs], dim=1)
    assert exits.unique().numel() > 1
    assert any(output.exit_loops.min() < output.loops_run for output in outputs)
    planes = {
        name: torch.stack([getattr(layer, name) for layer in cache.layers]).unflatten(0, (LOOPS, LAYERS))[..., -6:, :]
        for name in ("keys", "values")
    }
    for plane in planes.values():  # [T, L, B, K, 6, Dh]
        for row in range(6):
            for step in range(6):
                exit_loop = int(exits[row, step])
                here = plane[:, :, row, :, step]
                assert (here[exit_loop:] == here[exit_loop - 1]).all()
                assert not exit_loop > 1 or (here[exit_loop - 1] != here[exit_loop - 2]).any()


def test_rows_do_not_depend_on_when_their_neighbours_leave(model):
    ids = random_ids(5, 6)
    together, _ = decode(model, ids, steps=6, exit_threshold=0.5)
    for row in range(5):
        alone, _ = decode(model, ids[row : row + 1], steps=6, exit_threshold=0.5)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours.logits[row], theirs.logits[0], **CLOSE)
            assert ours.exit_loops[row] == theirs.exit_loops[0] == theirs.loops_run


def test_hidden_states_are_given_where_the_call_or_the_configuration_asks(model):
    assert model(random_ids(1, 3)).hidden_states is None
    model.config.output_hidden_states = True
    try:
        assert len(model(random_ids(1, 3)).hidden_states) == LOOPS
        assert model(random_ids(1, 3), output_hidden_states=False).hidden_states is None
    finally:
        model.config.output_hidden_states = False


def test_asking_for_hidden_states_changes_no_token(model):
    ids = random_ids(4, 5)
    plain, cache = decode(model, ids, steps=4, exit_threshold=0.5)
    asked, other = decode(model, ids, steps=4, exit_threshold=0.5, output_hidden_states=True)
    for ours, theirs in zip(plain, asked, strict=True):
        torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
        assert len(theirs.hidden_states) == theirs.loops_run == LOOPS
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, **CLOSE)


def test_gates_of_loops_that_a_token_did_not_run_are_not_known(model):
    outputs, _ = decode(model, random_ids(6, 5), steps=4, exit_threshold=0.5)
    for output in outputs:
        assert output.gate_logits.shape == (6, 1, LOOPS)
        ran = torch.arange(1, LOOPS + 1) <= output.exit_loops[..., None]
        assert (output.gate_logits.isfinite() == ran).all()
        assert output.exit_probabilities[ran].isfinite().all()


def test_training_never_stops_early(model, passes):
    model.train()
    try:
        assert model(random_ids(2, 4), exit_loop=1, use_cache=False).loops_run == LOOPS
        cache = model(random_ids(2, 4), use_cache=True).past_key_values
        assert model(random_ids(2, 1), exit_threshold=0.0, past_key_values=cache).loops_run == LOOPS
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_loop": 1, "exit_threshold": 0.5}, "exit_loop, exit_threshold and exit_weighted exclude each other"),
        ({"exit_loop": 1, "exit_weighted": True}, "exit_loop, exit_threshold and exit_weighted exclude each other"),
        ({"exit_threshold": 0.1, "exit_weighted": True}, "exit_loop, exit_threshold and exit_weighted exclude"),
        ({"loops": 0}, "loops must be at least 1, not 0"),
        ({"exit_loop": 0}, r"exit_loop must be in 1\.\.4, not 0"),
        ({"exit_loop": 3, "loops": 2}, r"exit_loop must be in 1\.\.2, not 3"),
        ({"exit_threshold": 1.5}, r"exit_threshold must be in \[0, 1\], not 1.5"),
        ({"exit_threshold": float("nan")}, r"exit_threshold must be in \[0, 1\], not nan"),
        ({"exit_treshold": 0.5}, "this model does not know exit_treshold; leave it out"),
        ({"position": torch.zeros(1, 2)}, "this model does not know position; leave it out"),
        ({"output_attentions": True}, "this model does not know output_attentions; leave it out"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "give either input_ids or inputs_embeds"),
    ],
)
def test_mistakes_are_told_in_one_line(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        model(random_ids(1, 2), **arguments)
    assert "\n" not in str(caught.value)


def test_arguments_without_effect_are_accepted(model):
    arguments = {"cache_position": torch.arange(2), "token_type_ids": torch.zeros(1, 2), "output_attentions": False}
    torch.testing.assert_close(model(random_ids(1, 2), **arguments).logits, model(random_ids(1, 2)).logits)


def test_a_forward_pass_of_fixed_loops_is_one_graph(model):
    torch._dynamo.reset()
    compiled, ids = torch.compile(model, backend="eager", fullgraph=True), random_ids(2, 5)
    settings = {"loops": 2, "use_cache": False}
    torch.testing.assert_close(compiled(ids, **settings).logits, model(ids, **settings).logits)
    torch._dynamo.reset()
