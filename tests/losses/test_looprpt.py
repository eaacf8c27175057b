"""LoopRPT: its goldens, term by term, and laws."""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from looprpt_reference import hard_tokens as counted_hard_tokens
from loss_goldens import LOOPRPT, TEACHER_DECAY, golden

from looplm_jax.errors import UserError
from looplm_jax.halting import entropy, exit_distribution, log_exit_distribution, log_exit_probability, q_exit
from looplm_jax.losses import NoisyRollouts, TeacherScores, hard_tokens, looprpt, updated_teacher
from looplm_jax.losses import _looprpt as terms
from looplm_jax.losses._policy_gradient import standardize

SETTINGS = {
    "vocab_size": LOOPRPT["vocab_size"],
    "hard_share": LOOPRPT["hard_share"],
    "exit_threshold": LOOPRPT["exit_threshold"],
    "penalty": LOOPRPT["penalty"],
    "penalty_scale": LOOPRPT["penalty_scale"],
    "policy_weight": LOOPRPT["pg_weight"],
    "representation_weight": LOOPRPT["rep_weight"],
    "entropy_weight": LOOPRPT["entropy_weight"],
    "kl_weight": LOOPRPT["kl_weight"],
}
LEARNED = ("log_probs", "gates", "noisy_log_probs", "noisy_gates")


@functools.partial(jax.jit, static_argnames=tuple(SETTINGS))
def loss_and_gradients(arrays, count=None, **settings):
    """Returns loss and metrics, and the gradients of the inputs `LEARNED` and of the teacher."""

    def loss(learned, teacher):
        return looprpt(
            learned["log_probs"],
            learned["gates"],
            TeacherScores(**teacher),
            NoisyRollouts(learned["noisy_log_probs"], learned["noisy_gates"], arrays["sampled"]),
            mask=arrays["mask"],
            segment_ids=arrays["segments"],
            count=count,
            **settings,
        )

    learned = {name: arrays[name] for name in LEARNED}
    teacher = {
        "log_probs": arrays["teacher_log_probs"],
        "gate_logits": arrays["teacher_gates"],
        "entropy": arrays["teacher_entropy"],
    }
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(learned, teacher)


def inputs(arrays=None):
    """Returns the inputs of the golden, in float32 unless given in another precision."""
    named = golden("looprpt") if arrays is None else arrays
    found = {name.removeprefix("in/"): value for name, value in named.items() if name.startswith("in/")}
    return found if arrays is not None else {k: jnp.asarray(v, v.dtype.kind + "4") for k, v in found.items()}


def rows(arrays, chosen):
    """Returns the inputs of some rows: B is the last axis but one."""
    return {name: value[..., chosen, :] for name, value in arrays.items()}


# Goldens


@jax.jit
def intermediates(arrays):
    teacher = arrays["teacher_log_probs"]
    reference = q_exit(exit_distribution(arrays["teacher_gates"]), SETTINGS["exit_threshold"])
    penalty = terms.loop_penalty(
        arrays["teacher_entropy"], SETTINGS["vocab_size"], SETTINGS["penalty"], SETTINGS["penalty_scale"]
    )
    rewards = terms.loop_rewards(arrays["log_probs"], teacher, reference, penalty)
    noisy_rewards = terms.loop_rewards(arrays["noisy_log_probs"], teacher, reference, penalty)
    sampled_rewards = terms.at_loops(noisy_rewards, arrays["sampled"])
    log_pdf = log_exit_distribution(arrays["gates"])
    return {
        "t_ref": reference,
        "hard": hard_tokens(arrays["teacher_entropy"], arrays["segments"], arrays["mask"], SETTINGS["hard_share"]),
        "baseline": terms.at_loops(teacher, reference),
        "penalty": penalty,
        "rewards": rewards,
        "noisy_rewards": noisy_rewards,
        "sampled_rewards": sampled_rewards,
        "advantages": standardize(sampled_rewards, axis=0, eps=1e-8),
        "loop_advantages": standardize(rewards, axis=0, eps=1e-8),
        "weights": terms.representation_weights(log_pdf, rewards),
        "sampled_log_pdf": jax.vmap(log_exit_probability)(arrays["noisy_gates"], arrays["sampled"]),
        "entropy": entropy(log_pdf=log_pdf),
        "k3": terms.capped_k3(arrays["noisy_log_probs"], teacher),
    }


def test_every_intermediate_equals_the_golden(precision):
    ours = intermediates(inputs(precision.arrays(golden("looprpt"))))
    for name, value in ours.items():
        precision.assert_close(value, golden("looprpt")[f"out/{name}"])
    for name in ("hard", "t_ref"):
        np.testing.assert_array_equal(ours[name], golden("looprpt")[f"out/{name}"])
    losses = {name for name in golden("looprpt") if name.startswith("out/loss")}
    assert {f"out/{name}" for name in ours} | losses == {n for n in golden("looprpt") if n.startswith("out/")}


def test_losses_and_gradients_equal_the_golden(precision):
    (loss, metrics), (gradients, _) = loss_and_gradients(inputs(precision.arrays(golden("looprpt"))), **SETTINGS)
    expected = golden("looprpt")
    precision.assert_close(loss, expected["out/loss"])
    precision.assert_close(metrics.policy_loss, expected["out/loss_pg"])
    precision.assert_close(metrics.representation_loss, expected["out/loss_rep"])
    precision.assert_close(-metrics.exit_entropy, expected["out/loss_entropy"])
    precision.assert_close(metrics.kl, expected["out/loss_kl"])
    assert metrics.hard_tokens == expected["out/hard"].sum()
    for name, gradient in gradients.items():
        precision.assert_close(gradient, expected[f"grad/{name}"])


def test_all_tokens_are_hard_with_a_share_of_one(precision):
    (loss, metrics), _ = loss_and_gradients(
        inputs(precision.arrays(golden("looprpt"))), **(SETTINGS | {"hard_share": 1.0})
    )
    precision.assert_close(loss, golden("looprpt")["share_1/loss"])
    assert metrics.hard_tokens == golden("looprpt")["share_1/hard"].sum() == golden("looprpt")["in/mask"].sum()


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_ties_at_the_cut_are_not_hard(share, precision):
    ties = precision.arrays({k: v for k, v in golden("looprpt").items() if k.startswith("ties/")})
    ours = hard_tokens(ties["ties/entropy"], ties["ties/segments"], ties["ties/mask"], share)
    np.testing.assert_array_equal(ours, golden("looprpt")[f"ties/hard_{share}"])


def test_the_teacher_follows_the_student(precision):
    update = precision.arrays({k: v for k, v in golden("looprpt").items() if k.startswith("update/")})
    ours = updated_teacher({"w": update["update/teacher"]}, {"w": update["update/student"]}, TEACHER_DECAY)
    precision.assert_close(ours["w"], golden("looprpt")["update/out"])


# Hard tokens


@given(st.integers(0, 999), st.sampled_from([0.1, 0.2, 0.5, 0.9, 1.0]))
def test_hard_tokens_are_those_that_counting_finds(seed, share):
    random = np.random.default_rng(seed)
    entropies = random.integers(0, 9, (3, 16)).astype(np.float32)  # with many ties
    segments = np.sort(random.integers(0, 4, (3, 16)), axis=1).astype(np.int32)
    mask = (random.random((3, 16)) < 0.7).astype(np.float32)
    ours = jax.jit(hard_tokens, static_argnums=3)(*map(jnp.asarray, (entropies, segments, mask)), share)
    np.testing.assert_array_equal(ours, counted_hard_tokens(entropies, segments, mask, share))


@pytest.mark.parametrize("share", ["0.1", "0.2", "0.3", "0.5", "0.7"])
def test_the_cut_is_exact_for_documents_of_any_length(share):
    sizes = np.arange(2, 100_001)
    rest = 1 - Fraction(share)
    exact = rest.numerator * (sizes - 1) // rest.denominator
    np.testing.assert_array_equal(terms._rank_cuts(100_000, float(share))[2:], exact)


@pytest.mark.parametrize("share", [0.2, 1.0])
def test_a_document_of_one_token_is_hard(share):
    one = jnp.ones((1, 1))
    np.testing.assert_array_equal(hard_tokens(one, jnp.ones((1, 1), jnp.int32), one, share), one)


# Laws


def test_a_batch_without_hard_tokens_has_no_loss_and_no_gradient():
    arrays = inputs() | {"mask": jnp.zeros((3, 14))}
    (loss, metrics), gradients = loss_and_gradients(arrays, **SETTINGS)
    assert loss == 0
    assert all(value == 0 for value in jax.tree.leaves(metrics))
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("logit", [-80.0, 80.0, -1e4, 1e4])
def test_saturated_gates_keep_loss_and_gradients_finite(logit):
    arrays = inputs()
    saturated = {name: jnp.full_like(arrays[name], logit) for name in ("gates", "noisy_gates", "teacher_gates")}
    (loss, _), gradients = loss_and_gradients(arrays | saturated, **SETTINGS)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


def test_log_probabilities_far_apart_keep_gradients_finite():
    arrays = inputs()
    far = {"noisy_log_probs": arrays["noisy_log_probs"] - 1e4}
    (loss, _), gradients = loss_and_gradients(arrays | far, **SETTINGS)
    assert np.isfinite(loss)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))


def test_equal_rewards_teach_the_gates_of_rollouts_nothing():
    arrays = inputs()
    same = {
        "noisy_log_probs": jnp.broadcast_to(arrays["noisy_log_probs"][:1], arrays["noisy_log_probs"].shape),
        "sampled": jnp.full_like(arrays["sampled"], 2),
    }
    (_, metrics), (gradients, _) = loss_and_gradients(arrays | same, **SETTINGS)
    assert metrics.policy_loss == 0
    np.testing.assert_array_equal(gradients["noisy_gates"], 0)


def test_each_term_reaches_one_input_and_none_the_teacher():
    reached = {
        "policy_weight": "noisy_gates",
        "representation_weight": "log_probs",
        "entropy_weight": "gates",
        "kl_weight": "noisy_log_probs",
    }
    for only, name in reached.items():
        settings = SETTINGS | {weight: float(weight == only) for weight in reached}
        _, (gradients, of_teacher) = loss_and_gradients(inputs(), **settings)
        assert {key for key, gradient in gradients.items() if np.any(gradient)} == {name}
        assert not any(np.any(gradient) for gradient in of_teacher.values())


def test_rows_of_one_batch_equal_batches_of_one_row():
    arrays = inputs()
    whole = loss_and_gradients(arrays, **SETTINGS)
    count = whole[0][1].hard_tokens
    parts = [loss_and_gradients(rows(arrays, slice(i, i + 1)), count=count, **SETTINGS) for i in range(3)]
    for name in LEARNED:
        together = np.concatenate([part[1][0][name] for part in parts], axis=-2)
        np.testing.assert_allclose(together, whole[1][0][name], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(sum(part[0][0] for part in parts), whole[0][0], rtol=1e-5)
    for field in dataclasses.fields(whole[0][1]):
        summed = sum(getattr(part[0][1], field.name) for part in parts)
        np.testing.assert_allclose(summed, getattr(whole[0][1], field.name), rtol=1e-5)


def test_masked_tokens_have_no_influence():
    arrays = inputs()
    chosen = arrays["mask"] > 0
    random = np.random.default_rng(1)
    other = {
        name: jnp.where(chosen, value, jnp.asarray(random.normal(size=value.shape), value.dtype))
        for name, value in arrays.items()
        if value.dtype == jnp.float32 and name != "mask"
    }
    ours, theirs = (loss_and_gradients(case, **SETTINGS) for case in (arrays, arrays | other))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), ours, theirs)


def test_other_documents_of_a_row_change_only_the_number_of_tokens():
    arrays = inputs()
    first = np.asarray(arrays["segments"] == 1, np.float32)
    alone, with_others = (
        loss_and_gradients(arrays | {"mask": mask}, count=jnp.ones(()), **SETTINGS)[1][0]
        for mask in (arrays["mask"] * first, arrays["mask"])
    )
    for name in LEARNED:
        np.testing.assert_allclose(alone[name], np.asarray(with_others[name]) * first, rtol=1e-6, atol=1e-8)


def test_a_frozen_teacher_stays_bit_for_bit_and_keeps_its_dtype():
    teacher = {"w": jnp.asarray(np.random.default_rng(0).normal(size=9), jnp.float32)}
    student = {"w": jnp.ones(9, jnp.bfloat16)}
    np.testing.assert_array_equal(updated_teacher(teacher, student, 1.0)["w"], teacher["w"])
    np.testing.assert_array_equal(updated_teacher(teacher, student, 0.0)["w"], student["w"].astype(jnp.float32))


@pytest.mark.parametrize("name", ["teacher_log_probs", "teacher_gates", "noisy_log_probs"])
def test_scores_of_another_number_of_loops_are_refused(name):
    arrays = inputs()
    loop = -3  # of [T, B, S] and of [G, T, B, S]
    arrays[name] = jnp.take(arrays[name], jnp.array([0]), axis=loop)
    with pytest.raises(UserError, match=r"score the same batch with the same number of loops"):
        loss_and_gradients(arrays, **SETTINGS)
