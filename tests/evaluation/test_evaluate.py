import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluation_cases import make_batch

from looplm_jax.data import Batch
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import Q_GRID, Curve, depth_sweep, evaluate, exit_curve, masked_means, score_tokens
from looplm_jax.halting import exit_distribution, q_exit
from looplm_jax.losses import token_scores
from looplm_jax.models._looplm import head_matrix


@pytest.fixture(scope="module")
def batches(loaded):
    return [make_batch(seed, vocab_size=loaded.model.config.vocab_size) for seed in range(3)]


@pytest.fixture(scope="module")
def evaluation(loaded, batches):
    return evaluate(loaded.model, loaded.params, batches)


@pytest.fixture(scope="module")
def reference(loaded, batches):
    """Computes loss and correctness [T, N] and exit distribution [3, N] of the N unmasked tokens, depth by depth."""
    model, params = loaded
    forward = jax.jit(functools.partial(model.apply, {"params": params}), static_argnames="loops")
    loss, correct, pdf = [], [], []
    for batch in batches:
        kept = batch.loss_mask > 0
        arrays = {"positions": jnp.asarray(batch.positions), "segment_ids": jnp.asarray(batch.segment_ids)}
        hidden = []
        for loops in (3, 6):
            output = forward(jnp.asarray(batch.tokens), loops=loops, **arrays)
            hidden.append(output.hidden[-1])
            if loops == 3:
                pdf.append(np.asarray(exit_distribution(output.gate_logits))[:, kept])
        scores = token_scores(jnp.stack(hidden), head_matrix(params, model.config), jnp.asarray(batch.targets))
        loss.append(np.asarray(scores.loss, np.float64)[:, kept])
        correct.append(np.asarray(scores.correct)[:, kept])
    return {"loss": np.hstack(loss), "correct": np.hstack(correct), "pdf": np.hstack(pdf)}


def test_one_pass_equals_a_pass_for_each_depth(evaluation, reference):
    curve = evaluation.depths.curve
    assert curve.loops == (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    np.testing.assert_allclose(np.array(curve.loss)[[2, 5]], reference["loss"].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(np.array(curve.accuracy)[[2, 5]], reference["correct"].mean(axis=1), atol=1e-9)
    assert evaluation.depths.tokens == reference["loss"].shape[1]
    assert evaluation.depths.trained_loops == 3


def test_the_exit_distribution_is_averaged(evaluation, reference):
    exits = evaluation.exits
    np.testing.assert_allclose(exits.exit_pdf, reference["pdf"].mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(sum(exits.exit_pdf), 1.0, rtol=1e-6)
    np.testing.assert_allclose(exits.mean_exit_loop, np.dot([1, 2, 3], exits.exit_pdf))
    for index, q in enumerate(Q_GRID):
        loops = q_exit(jnp.asarray(reference["pdf"]), q)
        np.testing.assert_allclose(exits.q_exit.loops[index], np.mean(loops), atol=1e-6)


def test_the_ends_of_q_are_the_ends_of_fixed_depth(evaluation):
    exits, depths = evaluation.exits, evaluation.depths.curve
    for quantity in ("loops", "loss", "accuracy"):
        by_q, fixed = getattr(exits.q_exit, quantity), getattr(exits.fixed, quantity)
        np.testing.assert_allclose([by_q[0], by_q[-1]], [fixed[0], fixed[-1]], rtol=1e-12)
        assert fixed == getattr(depths, quantity)[:3]
    assert list(exits.q_exit.loops) == sorted(exits.q_exit.loops)
    assert min(depths.loss[:3]) <= exits.expected_loss <= max(depths.loss[:3])


def test_the_parts_alone_give_the_same(loaded, batches, evaluation):
    depths = depth_sweep(loaded.model, loaded.params, batches)
    exits = exit_curve(loaded.model, loaded.params, batches)
    np.testing.assert_allclose(depths.curve.loss, evaluation.depths.curve.loss, rtol=1e-6)
    np.testing.assert_allclose(exits.q_exit.loss, evaluation.exits.q_exit.loss, rtol=1e-6)


def test_compiled_once_and_each_batch_is_reported(loaded, batches):
    evaluate(loaded.model, loaded.params, batches[:1])
    before, seen = score_tokens._cache_size(), []
    evaluate(loaded.model, loaded.params, iter(batches), on_batch=lambda: seen.append(1))
    assert score_tokens._cache_size() == before
    assert len(seen) == 3


def test_fewer_loops_than_trained(loaded, batches):
    evaluation = evaluate(loaded.model, loaded.params, batches[:1], max_loops=1)
    assert evaluation.depths.curve.loops == evaluation.exits.fixed.loops == (1.0,)
    assert evaluation.exits.exit_pdf == (1.0,)
    assert evaluation.exits.q_exit.area == evaluation.exits.q_exit.loss[0]


def test_json(evaluation):
    values = json.loads(json.dumps(evaluation.to_json()))
    assert values["depths"]["trained_loops"] == 3
    assert len(values["depths"]["loss"]) == 6
    assert values["exits"]["q_exit"]["q"] == list(Q_GRID)
    assert values["exits"]["fixed"]["area"] == evaluation.exits.fixed.area


def test_area_is_the_mean_of_a_straight_line():
    assert Curve.of([1, 2, 4], [5, 4, 2], [0, 0, 0]).area == pytest.approx(3.5)


def test_means_do_not_lose_digits_over_many_batches():
    ones = np.ones((1, 4), np.int32)
    batch = Batch(
        tokens=ones, targets=ones, segment_ids=ones, positions=ones, loss_mask=np.array([[1, 1, 0, 1]], np.float32)
    )
    values = iter([np.float32([[2.0**24, 1, np.nan, 1]])] * 1 + [np.float32([[0, 1, np.nan, 0]])] * 999)
    means = masked_means(lambda _: next(values), [batch] * 1000)
    assert means.values == (2.0**24 + 2 + 999) / 3000
    assert means.tokens == 3000


def test_nothing_to_evaluate(loaded):
    batch = make_batch(0, vocab_size=loaded.model.config.vocab_size)
    empty = Batch(**{**vars(batch), "loss_mask": np.zeros_like(batch.loss_mask)})
    with pytest.raises(UserError, match="there is no token to evaluate"):
        masked_means(lambda batch: batch.loss_mask, [empty])
    with pytest.raises(UserError, match="there is no token to evaluate"):
        masked_means(lambda batch: batch.loss_mask, [])
    with pytest.raises(UserError, match="loops must be at least 1, not 0"):
        evaluate(loaded.model, loaded.params, [batch], max_loops=0)
