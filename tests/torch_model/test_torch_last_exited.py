"""Rows of a padded batch exit at different loops: tokens, exits and probabilities equal JAX's for single rows."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from golden_torch import tiny_model

from looplm_jax.config import ModelConfig
from looplm_jax.convert._state_dict import from_torch_state_dict
from looplm_jax.halting import FixedLoops, QExit
from looplm_jax.inference import generate
from looplm_jax.models._looplm import LoopLM

pytestmark = pytest.mark.transformers

LENGTHS, NEW_TOKENS = (5, 9, 7), 10
CONFIG = ModelConfig(vocab_size=61, width=32, mlp_width=48, num_layers=2, num_heads=4, num_kv_heads=2)


@pytest.fixture(scope="module")
def torch_model():
    return tiny_model(spread=0.3)


@pytest.fixture(scope="module")
def params(torch_model):
    return from_torch_state_dict(torch_model.state_dict(), CONFIG)


def decode(torch_model, prompts, **exit):
    """Decodes greedily in one left-padded batch. Returns tokens, exit loops and log-probabilities [B, new]."""
    width = max(LENGTHS)
    ids = torch.tensor(np.stack([np.pad(prompt, (width - len(prompt), 0)) for prompt in prompts]))
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in LENGTHS])
    columns, cache = [], None
    for _ in range(NEW_TOKENS):
        output = torch_model(ids, attention_mask=mask, past_key_values=cache, use_cache=True, **exit)
        log_probs, ids = output.logits[:, -1:].log_softmax(-1).max(-1)
        columns.append((ids, output.exit_loops[:, -1:], log_probs))
        mask, cache = torch.cat([mask, torch.ones_like(ids)], dim=1), output.past_key_values
    return [torch.cat(parts, dim=1).tolist() for parts in zip(*columns, strict=True)]


@pytest.mark.parametrize(
    ("policy", "exit"),
    [
        (QExit(q=0.3), {"exit_threshold": 0.3}),
        (QExit(q=0.6), {"exit_threshold": 0.6}),
        (FixedLoops(loops=2), {"exit_loop": 2, "loops": 4}),
    ],
)
def test_decoding_equals_jax(torch_model, params, policy, exit):
    random = np.random.default_rng(0)
    prompts = [random.integers(3, CONFIG.vocab_size, length) for length in LENGTHS]
    with torch.no_grad():
        tokens, exit_loops, log_probs = decode(torch_model, prompts, **exit)
    for row, prompt in enumerate(prompts):
        ours = generate(LoopLM(CONFIG), params, prompt.tolist(), max_new_tokens=NEW_TOKENS, policy=policy)
        assert list(ours.tokens) == tokens[row]
        assert list(ours.exit_loops) == exit_loops[row]
        np.testing.assert_allclose(ours.log_probs, log_probs[row], rtol=0, atol=1e-4)
