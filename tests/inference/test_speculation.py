import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inference_models import make_model
from scipy import stats
from serving_models import Letters

from looplm_jax.config import Injection, MeshConfig
from looplm_jax.errors import UserError
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, Finish, Sampling
from looplm_jax.inference._sampling import probabilities
from looplm_jax.inference.speculation import Reroute, Screening, speculate
from looplm_jax.inference.speculation._verify import accept, draft, read, verify_drafts
from looplm_jax.models._looplm import boxed_shapes, head_matrix
from looplm_jax.sharding import abstract_arrays, make_mesh

LOOPS = 4
PROMPTS = [[3, 14, 15, 92], [65], [35, 89, 79, 32, 38, 46, 26], [43, 38]]
BATCH = 125
SETTINGS = {"draft_loops": 3, "drafts": 3, "max_new_tokens": 6}


@functools.partial(jax.jit, static_argnums=(0, 3))
def forward(model, params, tokens, loops):
    """Returns logits [N, S, V] of the last loop, without a cache."""
    hidden = model.apply({"params": params}, tokens, loops=loops).hidden[-1]
    return hidden @ head_matrix(params, model.config)


def replayed(model, params, results, length):
    """Returns the logits of the last loop that predict each new token of each result, [N, n, V]."""
    texts = np.zeros((len(results), length), np.int32)
    for text, result in zip(texts, results, strict=True):
        text[: len(result.prompt_ids) + len(result.tokens)] = result.prompt_ids + result.tokens
    logits = np.array(forward(model, params, texts, results[0].loops))
    return [
        own[len(result.prompt_ids) - 1 :][: len(result.tokens)] for own, result in zip(logits, results, strict=True)
    ]


def assert_greedy(model, params, results, length):
    for result, logits in zip(results, replayed(model, params, results, length), strict=True):
        # Rounding decides between equal logits, which one of a thousand prompts has.
        chosen = np.take_along_axis(logits, np.array(result.tokens)[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(chosen, np.max(logits, axis=-1), rtol=0, atol=1e-6)
        log_probs = np.max(logits, axis=-1) - np.logaddexp.reduce(logits, axis=-1)
        np.testing.assert_allclose(result.log_probs, log_probs, atol=1e-4)


@pytest.fixture(scope="module")
def small_model():
    """Returns a model with positions for the longest prompt and its answer."""
    return make_model(max_positions=18)


def random_prompts(batches, seed):
    """Returns prompts of 1 to 12 tokens."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 97, generator.integers(1, 13)).tolist() for _ in range(batches * BATCH)]


def continued_in_batches(model, params, prompts):
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    return [result for batch in batches for result in speculate(model, params, batch, **SETTINGS)]


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(2, seed=1)


@pytest.fixture(scope="module")
def greedy(small_model, prompts):
    """Returns greedy continuations of all prompts."""
    return continued_in_batches(*small_model, prompts)


def test_greedy_tokens_are_those_of_fixed_loops(small_model, greedy):
    for start in range(0, len(greedy), BATCH):
        assert_greedy(*small_model, greedy[start : start + BATCH], 18)
    assert {len(result.tokens) for result in greedy} == {6}
    assert {result.finish for result in greedy} == {Finish.LENGTH}


@pytest.mark.slow
def test_greedy_tokens_are_those_of_fixed_loops_on_a_thousand_prompts(small_model):
    greedy = continued_in_batches(*small_model, random_prompts(8, seed=2))
    for start in range(0, len(greedy), BATCH):
        assert_greedy(*small_model, greedy[start : start + BATCH], 18)


def test_greedy_tokens_are_those_of_the_engine(small_model, prompts, greedy):
    engine = Engine(*small_model, config=EngineConfig(slots=16, capacity=18, chunk=18))
    expected = engine.generate(prompts[:16], max_new_tokens=6, policy=FixedLoops(loops=LOOPS))
    assert [result.tokens for result in greedy[:16]] == [result.tokens for result in expected]


def test_accepted_drafts_save_passes(greedy):
    rates = np.array([result.acceptance_rate for result in greedy])
    loops = np.array([result.loops_per_token for result in greedy])
    assert 0.1 < rates.mean() < 0.9
    assert np.corrcoef(rates, loops)[0, 1] < -0.9
    round_passes = 3 * SETTINGS["draft_loops"] + LOOPS - SETTINGS["draft_loops"]
    assert all(result.passes % round_passes == 0 for result in greedy)


def test_a_row_does_not_depend_on_the_others(small_model, prompts, greedy):
    """With other rows in another order; sampled or greedy."""
    order = np.random.default_rng(2).permutation(BATCH)
    samplings = [Sampling(temperature=1.0, seed=seed) if seed % 2 else Sampling() for seed in range(BATCH)]
    first = speculate(*small_model, prompts[:BATCH], sampling=samplings, **SETTINGS)
    again = speculate(
        *small_model, [prompts[row] for row in order], sampling=[samplings[row] for row in order], **SETTINGS
    )
    assert [first[row].tokens for row in order] == [result.tokens for result in again]
    assert [result.tokens for result in first[::2]] == [result.tokens for result in greedy[:BATCH:2]]


@pytest.mark.slow
def test_a_row_alone_is_what_it_is_among_others(small_model, prompts):
    sampling = Sampling(temperature=1.0, seed=7)
    row = next(row for row in range(BATCH) if len(prompts[row]) == 1)
    among = speculate(*small_model, prompts[:BATCH], sampling=[sampling] * BATCH, **SETTINGS)[row]
    (alone,) = speculate(*small_model, [prompts[row]], sampling=[sampling], **SETTINGS)
    assert alone.tokens == among.tokens
    assert (alone.drafted, alone.accepted, alone.passes) == (among.drafted, among.accepted, among.passes)


def test_other_prompts_and_settings_compile_nothing(small_model, prompts, greedy):
    programs = (read, draft, verify_drafts)
    before = [program._cache_size() for program in programs]
    speculate(
        *small_model,
        prompts[-BATCH:],
        sampling=Sampling(temperature=0.7, top_p=0.9, min_p=0.01, seed=3),
        stop_ids=[5],
        **SETTINGS,
    )
    assert [program._cache_size() for program in programs] == before


def p_value(observed, expected):
    """Returns the p-value of a chi-square test, and checks that no impossible outcome occurred."""
    possible = expected > 0
    assert observed[~possible].sum() == 0
    return stats.chisquare(observed[possible], expected[possible] * observed.sum(), sum_check=False).pvalue


def count(pairs, size):
    observed = np.zeros((size, size))
    np.add.at(observed, tuple(np.array(pairs).T), 1)
    return observed


@pytest.mark.slow
def test_drawn_tokens_are_distributed_as_those_of_fixed_loops():
    """The joint first two tokens after one prompt, for 8192 seeds; the second comes from the first or second round."""
    model, params = make_model(vocab_size=6, num_layers=1, loops=3, max_positions=6)
    samplings = [Sampling(temperature=3.0, top_k=4, seed=seed) for seed in range(8192)]
    results = speculate(
        model, params, [[1, 4, 2]] * 8192, draft_loops=1, drafts=2, max_new_tokens=2, sampling=samplings
    )

    distribution = jax.jit(lambda logits: probabilities(logits, samplings[0]))

    def joint(loops):
        logits = forward(model, params, np.array([[1, 4, 2, token] for token in range(6)]), loops)
        first, second = np.moveaxis(np.asarray(distribution(logits[:, -2:])), 1, 0)
        return first[0][:, None] * second

    drafted, accepted = (sum(getattr(result, name) for result in results) for name in ("drafted", "accepted"))
    assert 0.2 < accepted / drafted < 0.8
    assert not np.array_equal(joint(1) > 0, joint(3) > 0)
    assert p_value(count([result.tokens for result in results], 6), joint(3)) > 1e-3


@jax.jit
def accept_pairs(target, proposal, keys):
    """Verifies two drafts per row from `proposal`, which has a row for each previous token, and the start last."""

    def pair(key):
        first = jax.random.categorical(key, jnp.log(proposal[-1]))
        second = jax.random.categorical(jax.random.fold_in(key, 1), jnp.log(proposal[first]))
        return jnp.stack([first, second]).astype(jnp.int32)

    drafts = jax.vmap(pair)(keys)
    before = jnp.stack([jnp.full(keys.size, target.shape[1]), drafts[:, 0]], axis=1)
    test_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, 2)))(keys)
    return drafts, accept(drafts, target[before], proposal[before], test_keys)


@pytest.mark.parametrize("seed", range(3))
def test_what_the_test_keeps_is_distributed_as_the_target(seed):
    generator = np.random.default_rng(seed)
    target, proposal = generator.dirichlet(np.ones(5), (2, 6)).astype(np.float32)
    drafts, kept = accept_pairs(target, proposal, jax.random.split(jax.random.key(seed), 20_000))
    tokens, counts = np.asarray(kept.tokens), np.asarray(kept.counts)
    first = np.bincount(tokens[:, 0], minlength=5)
    assert p_value(first, target[5]) > 1e-3
    whole = counts == 2
    assert p_value(count(tokens[whole], 5).sum(0), (target[tokens[whole, 0]]).mean(0)) > 1e-3
    assert np.array_equal(kept.accepted > 0, whole)
    share = np.minimum(target[5], proposal[5]).sum()
    assert whole.mean() == pytest.approx(share, abs=0.02)
    same = np.arange(2) < np.asarray(kept.accepted)[:, None]
    assert np.array_equal(tokens[same], np.asarray(drafts)[same])


def test_greedy_verification_keeps_what_the_target_takes():
    """One-hot distributions make verification deterministic."""
    generator = np.random.default_rng(0)
    wanted, drafts = generator.integers(0, 3, (2, 200, 4)).astype(np.int32)
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(jax.random.split(jax.random.key(0), 200))
    kept = jax.jit(accept)(drafts, np.eye(3, dtype=np.float32)[wanted], np.eye(3, dtype=np.float32)[drafts], keys)
    agreeing = np.cumprod(wanted == drafts, axis=1).sum(axis=1)
    assert np.array_equal(kept.accepted, agreeing)
    assert np.array_equal(kept.counts, np.minimum(agreeing + 1, 4))
    for tokens, own, size in zip(np.asarray(kept.tokens), wanted, np.asarray(kept.counts), strict=True):
        assert np.array_equal(tokens[:size], own[:size])


@pytest.fixture(scope="module")
def whole_model():
    """Returns a model with every optional part."""
    return make_model(
        vocab_size=96,
        prelude_layers=1,
        coda_layers=1,
        tied_head=True,
        injection=Injection.ADD,
        loops=3,
        max_positions=16,
    )


def continued(model, params, **changes):
    """Continues four prompts of different lengths, the last with a repetition penalty; compiled once for all tests."""
    settings = {"draft_loops": 1, "drafts": 2, "max_new_tokens": 7}
    samplings = [*[Sampling()] * 3, Sampling(repetition_penalty=5.0)]
    return speculate(model, params, PROMPTS, sampling=samplings, **settings | changes)


@pytest.fixture(scope="module")
def plain(whole_model):
    return continued(*whole_model)


@pytest.mark.slow
def test_every_part_of_the_model_takes_part(whole_model, plain):
    for result, logits in zip(plain[:3], replayed(*whole_model, plain, 16), strict=False):
        assert result.tokens == tuple(np.argmax(logits, axis=-1))


@pytest.mark.slow
def test_repetition_penalty_counts_the_drafts_before(whole_model, plain):
    result, logits = plain[3], replayed(*whole_model, plain, 16)[3]
    assert result.tokens != tuple(np.argmax(logits, axis=-1))
    for place, token in enumerate(result.tokens):
        seen = list(result.prompt_ids + result.tokens[:place])
        logits[place, seen] *= np.where(logits[place, seen] > 0, 0.2, 5.0)
        assert token == np.argmax(logits[place])


@pytest.mark.slow
def test_stop_tokens_end_a_row(whole_model, plain):
    stop = plain[2].tokens[3]
    for before, result in zip(plain, continued(*whole_model, stop_ids=[stop]), strict=True):
        end = before.tokens.index(stop) + 1 if stop in before.tokens else 7
        assert result.tokens == before.tokens[:end]
        assert result.finish is (Finish.STOP if stop in before.tokens else Finish.LENGTH)
        assert result.accepted <= len(result.tokens)


def test_stop_strings_end_a_row_as_in_the_engine(whole_model, plain):
    """Also if they begin in one round and end in the next; text that may begin one is held back."""
    texts = [Letters().decode(result.tokens) for result in plain]
    received = [[] for _ in plain]
    stop = texts[0][2:5]
    results = continued(
        *whole_model, stop_strings=[stop], tokenizer=Letters(), on_token=lambda row, new: received[row].append(new)
    )
    for result, text, before, own in zip(results, texts, plain, received, strict=True):
        assert result.text == text.split(stop)[0]
        assert result.finish is (Finish.STOP if stop in text else Finish.LENGTH)
        assert result.tokens == before.tokens[: len(result.tokens)]
        assert tuple(new.token for new in own) == result.tokens
        assert tuple(new.log_prob for new in own) == result.log_probs
        assert result.text.startswith("".join(new.text for new in own))
        assert {new.exit_loop for new in own} == {3}
    assert results[0].finish is Finish.STOP


def test_tokens_are_told_as_soon_as_they_are_accepted(whole_model, plain):
    """Before the following drafts are screened."""
    received = [[] for _ in plain]

    def screen(row, _):
        assert row.tokens == tuple(received[row.index])
        return Screening.CONTINUE

    results = continued(*whole_model, screen=screen, on_token=lambda row, new: received[row].append(new.token))
    assert results == plain
    assert [tuple(own) for own in received] == [result.tokens for result in results]


@pytest.mark.parametrize("place", [2, 6])
def test_a_callback_that_raises_fails_its_row_alone(whole_model, plain, place):
    received = []

    def broken(row, new):
        if row == 1:
            received.append(new.token)
            if len(received) == place + 1:
                raise KeyError("lost")

    results = continued(*whole_model, on_token=broken)
    assert (results[1].finish, results[1].error) == (Finish.FAILED, "on_token raised KeyError: 'lost'")
    assert results[1].tokens == plain[1].tokens[: place + 1]
    assert [results[row] for row in (0, 2, 3)] == [plain[row] for row in (0, 2, 3)]


@pytest.mark.slow
def test_a_mesh_changes_no_token():
    model, params = make_model(vocab_size=96, num_layers=1, loops=3, max_positions=16)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    wanted = abstract_arrays(boxed_shapes(model.config), mesh)
    spread = jax.tree.map(lambda leaf, like: jax.device_put(np.asarray(leaf), like.sharding), params, wanted)
    results = speculate(model, spread, PROMPTS, draft_loops=1, drafts=2, max_new_tokens=7, mesh=mesh)
    for result, logits in zip(results, replayed(model, params, results, 16), strict=True):
        assert result.tokens == tuple(np.argmax(logits, axis=-1))


def test_drafts_are_screened_before_they_are_verified(whole_model, plain):
    """One row continues, one stops after its first round, one is redirected, one has a callback that raises."""
    shown = {row: [] for row in range(4)}

    def screen(row, drafts):
        assert row.prompt_ids == tuple(PROMPTS[row.index])
        shown[row.index].append((row.tokens, drafts))
        if row.index == 1 and row.tokens:
            return Screening.STOP
        if row.index == 2 and not row.tokens:
            return Reroute([7, 8, 9])
        if row.index == 3 and len(row.tokens) > 2:
            raise ValueError("not my day")
        return Screening.CONTINUE

    results = continued(*whole_model, screen=screen)
    assert results[0] == plain[0]
    assert results[1].finish is Finish.STOP
    assert [result.screened for result in results] == [False, True, False, False]
    assert results[1].tokens == plain[1].tokens[: len(results[1].tokens)] != ()
    assert results[2].tokens[:3] == (7, 8, 9)
    assert results[3].finish is Finish.FAILED
    assert results[3].error == "screen raised ValueError: not my day"
    assert len(results[3].tokens) > 2
    assert all(len(drafts) == min(2, 7 - len(tokens)) for calls in shown.values() for tokens, drafts in calls)
    logits = replayed(*whole_model, results, 16)[2]
    assert results[2].tokens[3:] == tuple(np.argmax(logits[3:], axis=-1))
    expected = logits[np.arange(7), results[2].tokens] - np.logaddexp.reduce(logits, axis=-1)
    np.testing.assert_allclose(results[2].log_probs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("verdict", "message"),
    [
        (lambda: Reroute(()), "UserError: a reroute needs at least one token; use Screening.STOP to end the row"),
        (lambda: Reroute((96,)), "UserError: token 96 of the reroute is not in the vocabulary of 96 tokens"),
        (lambda: "onwards", "ValueError: 'onwards' is not a valid Screening"),
    ],
)
def test_a_verdict_that_makes_no_sense_fails_its_row_alone(whole_model, plain, verdict, message):
    results = continued(*whole_model, screen=lambda row, _: verdict() if row.index == 1 else Screening.CONTINUE)
    assert (results[1].tokens, results[1].error) == ((), f"screen raised {message}")
    assert (results[1].acceptance_rate, results[1].loops_per_token) == (0, 0)
    assert [results[row] for row in (0, 2, 3)] == [plain[row] for row in (0, 2, 3)]


def test_logits_that_are_not_finite_fail_their_row_alone(small_model, prompts, greedy):
    model, params = small_model
    broken = prompts[0][0]
    damaged = {**params, "embedding": params["embedding"].at[broken].set(jnp.inf)}
    results = speculate(model, damaged, prompts[:BATCH], **SETTINGS)
    failed = [result.finish is Finish.FAILED for result in results]
    assert 0 < sum(failed) < BATCH / 2
    for prompt, result, before in zip(prompts[:BATCH], results, greedy[:BATCH], strict=True):
        if broken in prompt:
            assert result.error == "logits were not finite; the parameters are damaged, or overflow"
            assert result.tokens == ()
        assert result.tokens == before.tokens[: len(result.tokens)]
        assert result.finish is Finish.FAILED or result.tokens == before.tokens


@pytest.mark.parametrize("draft_loops", [0, 4, -1])
def test_drafts_come_from_a_loop_before_the_last(small_model, draft_loops):
    with pytest.raises(UserError, match=rf"^draft_loops must be in 1..3 to be verified by loop 4, not {draft_loops}$"):
        speculate(*small_model, PROMPTS, **SETTINGS | {"draft_loops": draft_loops})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafts": 0}, "drafts must be at least 1, not 0"),
        ({"loops": 1, "draft_loops": 1}, "self-speculation needs at least 2 loops, not 1; generate without it"),
        (
            {"cache": CacheStrategy.LAST},
            "self-speculation needs a full cache, not 'last': each loop reads keys and values of its own",
        ),
        ({"sampling": [Sampling()]}, "1 samplings for 4 prompts; give one for all, or one for each"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
        ({"max_new_tokens": 16}, "4 tokens of prompt and 16 new ones are beyond model.max_positions=18"),
    ],
)
def test_settings_that_cannot_be_served(small_model, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        speculate(*small_model, PROMPTS, **SETTINGS | changes)
    assert "\n" not in str(raised.value)


def test_stop_strings_that_cannot_be(small_model):
    with pytest.raises(UserError, match=r"^stop strings need a tokenizer to find them by; give one, or use stop_ids$"):
        speculate(*small_model, PROMPTS, stop_strings=["a"], **SETTINGS)
    with pytest.raises(UserError, match=r"^stop_strings must be a list of strings; write \['a'\]$"):
        speculate(*small_model, PROMPTS, stop_strings="a", tokenizer=Letters(), **SETTINGS)


def test_prompts_that_cannot_be_served(small_model):
    with pytest.raises(UserError, match="the prompt is empty"):
        speculate(*small_model, [[1], []], **SETTINGS)
    with pytest.raises(UserError, match="token 97 of the prompt is not in the vocabulary of 97 tokens"):
        speculate(*small_model, [[97]], **SETTINGS)
    assert speculate(*small_model, [], **SETTINGS) == []
