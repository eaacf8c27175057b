"""RLTT and the clipped policy gradient: their goldens, an enumerable policy, and laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import policy_reference as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loss_goldens import ADVANTAGES, AGGREGATIONS, MAX_NEW_TOKENS, POLICY, RLTT, WEIGHTINGS, golden, under

from looplm_jax.config import Advantage, Aggregation, LoopWeights
from looplm_jax.halting import log_exit_probability
from looplm_jax.losses import aggregate, group_advantages, k3, loop_weights, policy_gradient, rltt
from looplm_jax.losses._policy_gradient import policy_ratio, trajectory_log_probs

reward = st.floats(-10, 10, width=32)
log_prob = st.floats(-30, 0, width=32)
groups = hnp.arrays(np.float32, (3, 4), elements=reward)
tokens = hnp.arrays(np.float32, (4, 5), elements=log_prob)
masks = hnp.arrays(np.float32, (4, 5), elements=st.sampled_from([0.0, 1.0]))
every_aggregation = pytest.mark.parametrize("aggregation", Aggregation)


# Goldens


@pytest.mark.parametrize("advantage", Advantage)
@pytest.mark.parametrize(
    ("name", "rewards", "out"), [("rltt", "in/rewards", "out"), ("grpo_depth", "arrays/out/rewards", "arrays/out")]
)
def test_advantages_equal_the_golden(name, rewards, out, advantage, precision):
    ours = group_advantages(precision.arrays(golden(name))[rewards], advantage)
    precision.assert_close(ours, golden(name)[f"{out}/advantages/{advantage.value}"])


@functools.partial(jax.jit, static_argnums=(1, 2))
def rltt_and_gradients(arrays, kind, aggregation):
    def loss(log_probs, gates, loop_logits):
        if kind == "learned":
            weights = jnp.broadcast_to(jax.nn.softmax(loop_logits)[:, None, None], log_probs.shape)
        else:
            weights = loop_weights(gates, LoopWeights(kind), alpha=RLTT["alpha"])
        value, metrics = rltt(
            log_probs,
            weights,
            group_advantages(arrays["rewards"]).reshape(-1),
            arrays["mask"],
            max_new_tokens=RLTT["max_new_tokens"],
            reference_log_probs=arrays["reference"],
            aggregation=aggregation,
            kl_weight=RLTT["kl_weight"],
        )
        return value, (metrics, trajectory_log_probs(log_probs, weights))

    names = ("log_probs", "gates", "loop_logits")
    (value, (metrics, mixed)), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(
        *(arrays[name] for name in names)
    )
    found = {"loss": value, "loss_pg": metrics.policy_loss, "loss_kl": metrics.kl}
    return found, mixed, dict(zip(names, gradients))


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_rltt_equals_the_golden(kind, precision):
    expected = golden("rltt")
    arrays = under(precision.arrays({k: v for k, v in expected.items() if k.startswith("in/")}), "in/")
    for aggregation in Aggregation:
        found, mixed, gradients = rltt_and_gradients(arrays, kind, aggregation)
        precision.assert_close(mixed, expected[f"out/{kind}/mixed"])
        for name, value in found.items():
            precision.assert_close(value, expected[f"out/{kind}/{aggregation.value}/{name}"])
        for name, gradient in gradients.items():
            # What is not in the golden is not reached.
            golden_gradient = expected.get(f"grad/{kind}/{aggregation.value}/{name}", np.zeros(gradient.shape))
            precision.assert_close(gradient, golden_gradient)


@functools.partial(jax.jit, static_argnums=(1, 2))
def policy_gradient_and_gradients(arrays, credit, aggregation):
    def loss(log_probs, gates):
        old = arrays["in/old_log_probs"]
        if credit == "joint":
            log_probs = log_probs + log_exit_probability(gates, arrays["in/exit_loops"])
            old = old + arrays["in/old_exit_log_probs"]
        value, metrics = policy_gradient(
            log_probs,
            group_advantages(arrays["out/rewards"]).reshape(-1),
            arrays["in/mask"],
            max_new_tokens=MAX_NEW_TOKENS["arrays"],
            old_log_probs=old,
            aggregation=aggregation,
            clip_low=POLICY["clip_low"],
            clip_high=POLICY["clip_high"],
        )
        return value, (metrics, policy_ratio(log_probs, old))

    (value, (metrics, ratio)), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(
        arrays["in/log_probs"], arrays["in/gates"]
    )
    return value, metrics, ratio, dict(zip(("log_probs", "gates"), gradients))


@pytest.mark.parametrize("credit", ["joint", "tokens"])
def test_the_clipped_policy_gradient_equals_the_golden(credit, precision):
    expected = under(golden("grpo_depth"), "arrays/")
    for aggregation in Aggregation:
        value, metrics, ratio, gradients = policy_gradient_and_gradients(
            precision.arrays(expected), credit, aggregation
        )
        where = f"{credit}/{aggregation.value}"
        precision.assert_close(ratio, expected[f"{credit}/ratio"])
        precision.assert_close(value, expected[f"{where}/loss"])
        precision.assert_close(metrics.clipped, expected[f"{where}/clipped"])
        precision.assert_close(gradients["log_probs"], expected[f"{where}/grad_log_probs"])
        if credit == "joint":
            precision.assert_close(gradients["gates"], expected[f"{where}/grad_gates"])
        else:
            np.testing.assert_array_equal(gradients["gates"], 0)


def test_exit_log_probabilities_equal_the_golden(precision):
    expected = golden("grpo_depth")
    arrays = precision.arrays(expected)
    ours = log_exit_probability(arrays["arrays/in/gates"], arrays["arrays/in/exit_loops"])
    precision.assert_close(ours, expected["arrays/out/exit_log_probs"])
    ours = tree_log_policy(arrays["tree/in/gates"], arrays["tree/in/logits"], arrays)
    precision.assert_close(ours[0], expected["tree/out/exit_log_probs"])
    precision.assert_close(ours[1], expected["tree/out/log_probs"])


# A policy whose answers can be enumerated


def tree_log_policy(gates, logits, arrays):
    """Returns the log-probabilities of exits and tokens of all answers, [answers, N] each."""
    nodes, exits, drawn = (arrays[f"tree/in/{name}"] for name in ("nodes", "exit_loops", "tokens"))
    return log_exit_probability(gates.T[:, nodes], exits), jax.nn.log_softmax(logits)[nodes, exits - 1, drawn]


@jax.jit
def expected_reward_gradient(arrays):
    def expected_reward(gates, logits):
        joint = sum(tree_log_policy(gates, logits, arrays))
        return jnp.sum(jnp.exp(jnp.sum(joint * arrays["tree/in/mask"], axis=1)) * arrays["tree/out/rewards"])

    return jax.value_and_grad(expected_reward, argnums=(0, 1))(arrays["tree/in/gates"], arrays["tree/in/logits"])


@jax.jit
def expected_loss_gradients(arrays):
    """Returns the gradients of the expected loss over all groups of two answers, for every kind of it, [9, ...]."""
    mask, rewards = arrays["tree/in/mask"], arrays["tree/out/rewards"]
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(len(rewards)), jnp.arange(len(rewards))), axis=-1).reshape(-1, 2)

    def expected_losses(gates, logits):
        joint = sum(tree_log_policy(gates, logits, arrays))
        chances = jax.lax.stop_gradient(jnp.exp(jnp.sum(joint * mask, axis=1)))

        def of_group(pair):
            return jnp.stack(
                [
                    policy_gradient(
                        joint[pair],
                        group_advantages(rewards[pair][None], advantage)[0],
                        mask[pair],
                        max_new_tokens=MAX_NEW_TOKENS["tree"],
                        aggregation=aggregation,
                    )[0]
                    for advantage in Advantage
                    for aggregation in Aggregation
                ]
            )

        return jnp.sum(jnp.prod(chances[pairs], axis=1)[:, None] * jax.vmap(of_group)(pairs), axis=0)

    return jax.jacrev(expected_losses, argnums=(0, 1))(arrays["tree/in/gates"], arrays["tree/in/logits"])


def test_the_expected_reward_and_its_gradient_equal_the_golden(precision):
    expected = golden("grpo_depth")
    value, (gates, logits) = expected_reward_gradient(precision.arrays(expected))
    precision.assert_close(value, expected["tree/out/J"])
    precision.assert_close(gates, expected["tree/out/dJ_gates"])
    precision.assert_close(logits, expected["tree/out/dJ_logits"])


def test_the_expected_loss_over_all_groups_equals_the_golden(precision):
    expected = golden("grpo_depth")
    gates, logits = expected_loss_gradients(precision.arrays(expected))
    kinds = [f"{advantage}/{aggregation}" for advantage in ADVANTAGES for aggregation in AGGREGATIONS]
    for index, kind in enumerate(kinds):
        precision.assert_close(gates[index], expected[f"tree/expected/{kind}/gates"])
        precision.assert_close(logits[index], expected[f"tree/expected/{kind}/logits"])

    # The law: leave-one-out, summed and divided by a constant, is the gradient of the expected reward, and the mean
    # is 1 - 1/G of it.
    exact = -expected["tree/out/dJ_logits"] / MAX_NEW_TOKENS["tree"]
    precision.assert_close(logits[kinds.index("leave_one_out/constant")], exact)
    precision.assert_close(logits[kinds.index("mean/constant")], exact / 2)


# Advantages


@given(groups, st.sampled_from(Advantage))
def test_the_advantages_of_a_group_sum_to_zero(rewards, advantage):
    ours = group_advantages(jnp.asarray(rewards), advantage)
    scale = 1 + np.abs(ours).max()
    np.testing.assert_allclose(jnp.sum(ours, axis=1) / scale, 0, atol=1e-5)


@given(groups)
def test_prompts_do_not_mix(rewards):
    whole = group_advantages(jnp.asarray(rewards))
    alone = jnp.concatenate([group_advantages(jnp.asarray(rewards[i : i + 1])) for i in range(len(rewards))])
    np.testing.assert_array_equal(whole, alone)


@given(groups)
def test_leave_one_out_is_the_distance_from_the_mean_of_the_others(rewards):
    wide = rewards.astype(np.float64)
    others = (wide.sum(axis=1, keepdims=True) - wide) / (wide.shape[1] - 1)
    ours = group_advantages(jnp.asarray(rewards), Advantage.LEAVE_ONE_OUT)
    np.testing.assert_allclose(ours, wide - others, rtol=1e-5, atol=1e-5)


@given(reward, st.integers(1, 9), st.sampled_from(Advantage))
def test_equal_rewards_have_an_advantage_of_exactly_zero(value, group, advantage):
    ours = group_advantages(jnp.full((2, group), value, jnp.float32), advantage)
    np.testing.assert_array_equal(ours, 0)


# Terms of a token


@given(tokens, tokens)
def test_k3_is_not_negative_and_zero_where_policies_agree(policy, other):
    assert (k3(jnp.asarray(policy), jnp.asarray(other)) >= -1e-6).all()
    np.testing.assert_array_equal(k3(jnp.asarray(policy), jnp.asarray(policy)), 0)
    np.testing.assert_allclose(
        k3(jnp.asarray(policy), jnp.asarray(other)),
        reference.k3(policy.astype(np.float64), other.astype(np.float64)),
        rtol=1e-4,
        atol=1e-6,
    )


def test_the_gradient_of_k3_pulls_toward_the_reference():
    policy, other = jnp.array([-1.0, -2.0, -3.0, -1e4]), jnp.array([-2.0, -2.0, -1.0, 0.0])
    ours, of_reference = jax.grad(lambda p, r: jnp.sum(k3(p, r)), argnums=(0, 1))(policy, other)
    np.testing.assert_allclose(ours, [1 - np.exp(-1), 0, 1 - np.exp(2), 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(of_reference, 0)


def on_policy_gradient(log_probs, advantages, mask, **options):
    def loss(current):
        return policy_gradient(current, advantages, mask, max_new_tokens=5, **options)

    return jax.value_and_grad(loss, has_aux=True)(log_probs)


@given(tokens, masks, st.sampled_from([0.0, 0.2]))
def test_on_policy_nothing_is_clipped_and_the_gradient_is_that_of_reinforce(log_probs, mask, clip):
    advantages = np.array([1.0, -0.5, 0.0, 2.0], np.float32)
    for aggregation in Aggregation:
        (_, metrics), gradient = on_policy_gradient(
            jnp.asarray(log_probs),
            jnp.asarray(advantages),
            jnp.asarray(mask),
            old_log_probs=jnp.asarray(log_probs),
            aggregation=aggregation,
            clip_low=clip,
            clip_high=clip,
        )
        weights = reference.token_weights(mask.astype(np.float64), aggregation.value, 5)
        np.testing.assert_allclose(gradient, -weights * advantages[:, None], rtol=1e-5, atol=1e-7)
        assert metrics.clipped == 0


@given(tokens, tokens, st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_the_clipped_loss_equals_its_definition(log_probs, old, low, high):
    advantages = np.array([1.0, -0.5, 0.0, 2.0])
    (loss, _), gradient = on_policy_gradient(
        jnp.asarray(log_probs),
        jnp.asarray(advantages, jnp.float32),
        jnp.ones((4, 5)),
        old_log_probs=jnp.asarray(old),
        aggregation=Aggregation.TOKEN,
        clip_low=low,
        clip_high=high,
    )
    _, values, _, _ = reference.clipped(
        log_probs.astype(np.float64), old.astype(np.float64), advantages[:, None], low, high
    )
    np.testing.assert_allclose(loss, values.mean(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(gradient).all()


@given(hnp.arrays(np.float32, (4, 3, 2), elements=st.floats(-1e4, 1e4, width=32)), st.sampled_from(LoopWeights))
def test_the_weights_of_loops_sum_to_one(gates, kind):
    ours = loop_weights(jnp.asarray(gates), kind, alpha=2.0)
    np.testing.assert_allclose(jnp.sum(ours, axis=0), 1, rtol=1e-5)
    expected = reference.loop_weights(kind.value.removesuffix("_constant"), gates.astype(np.float64), 2.0, np.zeros(4))
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-6)


# Aggregation


@every_aggregation
@given(tokens, masks)
def test_aggregation_equals_its_weights(aggregation, values, mask):
    ours = aggregate(jnp.asarray(values), jnp.asarray(mask), aggregation, max_new_tokens=9)
    weights = reference.token_weights(mask.astype(np.float64), aggregation.value, 9)
    np.testing.assert_allclose(ours, np.sum(weights * values), rtol=1e-5, atol=1e-6)


@every_aggregation
def test_a_batch_without_tokens_has_no_loss_and_no_gradient(aggregation):
    (loss, metrics), gradient = on_policy_gradient(
        -jnp.ones((4, 5)), jnp.ones(4), jnp.zeros((4, 5)), aggregation=aggregation
    )
    assert loss == 0
    assert metrics.clipped == 0
    np.testing.assert_array_equal(gradient, 0)


@every_aggregation
@given(tokens, tokens, masks)
def test_microbatches_sum_to_the_batch(aggregation, log_probs, old, mask):
    advantages = jnp.array([1.0, -0.5, 0.25, 2.0])
    arrays = jnp.asarray(log_probs), advantages, jnp.asarray(mask), jnp.asarray(old)

    def loss(chosen, **counts):
        current, weights, kept, before = (array[chosen] for array in arrays)
        return policy_gradient(
            current,
            weights,
            kept,
            max_new_tokens=5,
            old_log_probs=before,
            reference_log_probs=before,
            kl_weight=0.1,
            aggregation=aggregation,
            **counts,
        )

    counts = {"rows": jnp.asarray(4.0), "tokens": jnp.asarray(mask.sum())}
    whole, parts = loss(slice(0, 4)), [loss(slice(i, i + 2), **counts) for i in (0, 2)]
    summed = jax.tree.map(lambda a, b: a + b, *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), summed, whole)


def test_tokens_after_the_end_have_no_influence():
    random = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(5) < np.array([[5], [2], [0], [3]]), jnp.float32)
    log_probs = -jnp.asarray(random.random((4, 5)), jnp.float32)
    other = jnp.where(mask > 0, log_probs, -7.0)
    ours, theirs = (
        on_policy_gradient(each, jnp.arange(4.0), mask, old_log_probs=log_probs) for each in (log_probs, other)
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
