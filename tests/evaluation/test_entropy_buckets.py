"""Accuracy on easy, medium and hard tokens, against a plain computation with NumPy."""

import jax
import numpy as np
import pytest
from scipy import special

from looplm_jax.data import Batch
from looplm_jax.errors import UserError
from looplm_jax.evaluation import bucket_scores, bucket_table
from looplm_jax.models._looplm import head_matrix
from looplm_jax.testing import tiny_config, tiny_model

LOOPS = 3


def random_model(seed, std):
    model, params = tiny_model(tiny_config(loops=LOOPS))
    generator = np.random.default_rng(seed)
    draws = jax.tree.map(lambda leaf: generator.normal(0, std, leaf.shape).astype(np.float32), params)
    return model, jax.device_put(draws)


def random_batch(seed, vocabulary):
    generator = np.random.default_rng(seed)
    shape = (2, 24)
    return Batch(
        tokens=generator.integers(vocabulary, size=shape).astype(np.int32),
        targets=generator.integers(4, size=shape).astype(np.int32),
        positions=np.broadcast_to(np.arange(24, dtype=np.int32), shape),
        segment_ids=np.ones(shape, np.int32),
        loss_mask=(generator.random(shape) < 0.8).astype(np.float32),
    )


def outputs(model, params, batch, loops):
    output = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens, loops=loops))(params, batch.tokens)
    logits = np.asarray(output.hidden, np.float64) @ np.asarray(head_matrix(params, model.config), np.float64)
    return special.log_softmax(logits, axis=-1), np.asarray(output.gate_logits, np.float64)


def test_scores_of_buckets_are_means_over_their_tokens():
    # The head of the base is scaled until its predictions are of all kinds.
    model, params = random_model(0, 0.5)
    base, base_params = random_model(1, 0.5)
    base_params = {**base_params, "head": 2.5 * base_params["head"]}
    batches = [random_batch(seed, model.config.vocab_size) for seed in (2, 3)]
    scores = bucket_scores(model, params, base, base_params, batches)

    rows = {"easy": [], "medium": [], "hard": []}
    for batch in batches:
        log_probs, _ = outputs(base, base_params, batch, 1)
        entropy = -(np.exp(log_probs) * log_probs).sum(-1)[0]
        log_probs, gates = outputs(model, params, batch, LOOPS)
        right = log_probs.argmax(-1) == batch.targets
        left = 1 - np.cumprod(special.expit(-gates), axis=0)
        left[-1] = 1
        exits = (left < 0.5).sum(axis=0)
        for row, column in np.argwhere(batch.loss_mask > 0):
            bucket = np.searchsorted([0.5, 1.0, 1.5], entropy[row, column])
            if bucket:
                own, e = right[:, row, column], exits[row, column]
                rows[["easy", "medium", "hard"][bucket - 1]].append((*own, own[e], e + 1))

    assert [own.name for own in scores] == list(rows)
    assert sum(own.tokens > 0 for own in scores) >= 2
    for own in scores:
        assert own.tokens == len(rows[own.name])
        if own.tokens:
            np.testing.assert_allclose(
                (*own.accuracy, own.adaptive_accuracy, own.mean_loops), np.mean(rows[own.name], axis=0), rtol=1e-6
            )

    table = bucket_table(scores)
    assert table.columns == ["bucket", "tokens", "loop 1", "loop 2", "loop 3", "adaptive", "mean loops"]
    assert [row[1] for row in table.rows] == [f"{own.tokens:,}" for own in scores]


def test_what_cannot_be_compared():
    model, params = random_model(0, 0.5)
    with pytest.raises(UserError, match="there is no held-out batch"):
        bucket_scores(model, params, model, params, [])
    other, other_params = tiny_model(tiny_config(vocab_size=model.config.vocab_size + 1))
    with pytest.raises(UserError, match="the base model has"):
        bucket_scores(model, params, other, other_params, [])
