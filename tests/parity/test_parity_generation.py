"""Greedy generation of 64 tokens agrees: JAX, and PyTorch alone and in a left-padded batch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from twins import CASES, twins

from looplm_jax.halting import FixedLoops, QExit
from looplm_jax.inference import generate

pytestmark = pytest.mark.transformers
NEW_TOKENS = 64
LENGTHS = (5, 9, 2)


def ours(pair, prompt, policy):
    return generate(pair.model, pair.params, prompt.tolist(), max_new_tokens=NEW_TOKENS, policy=policy).tokens


def theirs(pair, ids, mask, **options):
    made = pair.torch_model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return [tuple(row) for row in made[:, ids.shape[1] :].tolist()]


@pytest.mark.parametrize(
    "case",
    [case if case == "grouped_T4" else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
)
def test_greedy_tokens_are_identical_alone_and_left_padded(case):
    pair = twins(case)
    prompts = [pair.tokens(1, length, seed=length)[0] for length in LENGTHS]
    expected = [ours(pair, prompt, FixedLoops(loops=pair.config.loops)) for prompt in prompts]
    alone = [theirs(pair, prompt[None], np.ones((1, prompt.size), int))[0] for prompt in prompts]
    ids, mask = np.zeros((2, len(LENGTHS), max(LENGTHS)), int)
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.size :], mask[row, -prompt.size :] = prompt, 1
    assert alone == expected
    assert theirs(pair, ids, mask) == expected


@pytest.mark.parametrize("q", [0.3, 0.7])
def test_greedy_tokens_with_early_exit_are_identical(q):
    pair = twins("grouped_T4")
    prompt = pair.tokens(1, 7)[0]
    made = theirs(pair, prompt[None], np.ones((1, prompt.size), int), exit_threshold=q)
    assert made[0] == ours(pair, prompt, QExit(q=q))
