import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.data import open_corpus, train_batches, training_texts, validation_batches
from looplm_jax.data.tasks import Mano, Supervise, is_task, make_task
from looplm_jax.errors import UserError

SAMPLES = 3_000


def evaluate(symbols, modulus):
    """Evaluates a prefix expression with a stack, from the right; fails unless there is exactly one expression."""
    stack = []
    for symbol in reversed(symbols):
        if symbol in "+-*":
            left, right = stack.pop(), stack.pop()
            stack.append({"+": left + right, "-": left - right, "*": left * right}[symbol] % modulus)
        else:
            stack.append(int(symbol))
    (value,) = stack
    return value


def words(task, example):
    return task.tokenizer.decode(example.tokens).split()


def chi_square(counts):
    """Returns Pearson's statistic against equal frequencies, as standard deviations above its mean."""
    counts = np.asarray(counts)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    freedom = len(counts) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def samples():
    task = Mano()
    return [words(task, task.train_example(0, index)) for index in range(SAMPLES)]


@given(length=st.integers(2, 24), modulus=st.integers(5, 97), seed=st.integers(0, 2**63), index=st.integers(0, 2**47))
def test_every_problem_is_right(length, modulus, seed, index):
    task = Mano(length=length, modulus=modulus)
    for example in (task.train_example(seed, index), task.validation_example(index)):
        bos, marker, *expression, ans, answer = words(task, example)
        drawn = int(marker.removeprefix("<len_").removesuffix(">"))
        assert (bos, ans) == ("<bos>", "<ans>")
        assert len(expression) == 2 * drawn + 1 <= 2 * length + 1
        assert evaluate(expression, modulus) == int(answer)
        assert len(example.tokens) <= task.max_tokens


def test_lengths_are_uniform(samples):
    counts = collections.Counter(problem[1] for problem in samples)
    assert len(counts) == 10
    assert chi_square(list(counts.values())) < 4


def test_operators_operands_are_uniform(samples):
    counts = collections.Counter(symbol for problem in samples for symbol in problem[2:-2])
    assert chi_square([counts[symbol] for symbol in "+-*"]) < 4
    assert chi_square([counts[str(number)] for number in range(23)]) < 4


def test_left_sizes_are_uniform():
    task = Mano(length=4)
    sizes = collections.Counter()
    for index in range(2_000):
        left = words(task, task.validation_example(index))[3:]
        open_operands, end = 1, 0
        while open_operands:
            open_operands += 1 if left[end] in "+-*" else -1
            end += 1
        sizes[end // 2] += 1
    assert sorted(sizes) == [0, 1, 2, 3]
    assert chi_square(list(sizes.values())) < 4


def test_chance_level(samples):
    guesses = np.random.default_rng(0).integers(23, size=len(samples))
    hits = np.mean([int(problem[-1]) == guess for problem, guess in zip(samples, guesses)])
    assert Mano().chance == pytest.approx(0.0435, abs=1e-4)
    assert hits == pytest.approx(Mano().chance, abs=0.015)


def test_examples_are_functions_of_seed_and_index():
    task = Mano()
    assert np.array_equal(task.train_example(1, 5).tokens, Mano().train_example(1, 5).tokens)
    distinct = {tuple(task.train_example(seed, index).tokens) for seed in range(3) for index in range(100)}
    assert len(distinct) > 250


def test_training_never_holds_a_validation_problem():
    task = Mano(length=1, modulus=5)
    train = {tuple(task.train_example(seed, index).tokens) for seed in range(4) for index in range(400)}
    held_out = {tuple(task.validation_example(index).tokens) for index in range(400)}
    assert held_out
    assert not train & held_out
    assert len(train) + len(held_out) == 3 * 5 * 5


def test_validation_is_at_full_length():
    task = Mano(length=7)
    assert {words(task, task.validation_example(index))[1] for index in range(50)} == {"<len_7>"}


def test_supervision():
    answer, everything = Mano().train_example(0, 0), Mano(supervise=Supervise.ALL).train_example(0, 0)
    assert np.array_equal(answer.tokens, everything.tokens)
    assert answer.loss_mask.tolist() == [False] * (len(answer.tokens) - 1) + [True]
    assert everything.loss_mask.tolist() == [False] + [True] * (len(answer.tokens) - 1)


def test_specs():
    assert make_task("mano") == Mano()
    assert make_task("mano:length=4, modulus=7,supervise=all") == Mano(length=4, modulus=7, supervise=Supervise.ALL)
    assert is_task("mano")
    assert is_task("nonsense:length=4")
    assert not any(map(is_task, ("gs://bucket/x.jsonl", "mine/*.jsonl", "mano.txt", "/a/b:c.txt", "C:\\x.txt")))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("manno:length=4", "no such task 'manno'; did you mean 'mano'"),
        ("mano:lenght=4", "unknown field 'mano.lenght'; did you mean 'length'"),
        ("mano:length=four", "mano.length: expected a whole number, got 'four'"),
        ("mano:length", "'length' has no value; write mano:option=value"),
        ("mano:length=0", "mano.length must be at least 1, not 0"),
        ("mano:modulus=1", "mano.modulus must be at least 2, not 1"),
        ("mano:supervise=some", "mano.supervise: no such choice 'some'; known: all, answer"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        open_corpus(DataConfig(sources=(SourceConfig(path=spec),)))


def test_too_few_problems():
    fewest = Mano(length=1, modulus=2)
    with pytest.raises(UserError, match="mano:length=1,modulus=2 has too few problems to hold some out; raise length"):
        fewest.validation_example(0)


def task_data(*specs):
    return DataConfig(sources=tuple(SourceConfig(path=spec) for spec in specs))


def test_task_through_the_same_pipeline():
    corpus = open_corpus(task_data("mano:length=4", "mano:length=4,supervise=all"))
    task = corpus.tasks[0].task
    batches = train_batches(corpus, corpus.own_tokenizer, batch_size=2, sequence_length=64, seed=0)
    state = batches.state()
    first = next(batches)
    batches.restore(state)
    assert np.array_equal(next(batches).tokens, first.tokens)
    batches.close()
    for row in range(2):
        for number in range(1, first.segment_ids[row].max() + 1):
            at = first.segment_ids[row] == number
            problem = [*first.tokens[row][at], first.targets[row][at][-1]]
            _, _, *expression, _, answer = task.tokenizer.decode(problem).split()
            assert evaluate(expression, 23) == int(answer)
            assert first.loss_mask[row][at].sum() in (1, len(problem) - 1)


def test_validation_of_a_task():
    corpus = open_corpus(task_data("mano:length=4,validation_items=30"))
    batches = validation_batches(corpus, corpus.own_tokenizer, batch_size=4, sequence_length=64)
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == 30


def test_task_errors(text_data, tokenizer):
    corpus = open_corpus(task_data("mano"))
    with pytest.raises(UserError, match=r"the task 'mano' has its own tokenizer; leave data.tokenizer empty"):
        train_batches(corpus, tokenizer, batch_size=2, sequence_length=64, seed=0)
    with pytest.raises(UserError, match="a problem of 'mano' takes 24 positions, more than sequence_length=16"):
        train_batches(corpus, corpus.own_tokenizer, batch_size=2, sequence_length=16, seed=0)
    with pytest.raises(UserError, match="there is none to train"):
        training_texts(corpus)
    with pytest.raises(UserError, match="different vocabularies"):
        open_corpus(task_data("mano", "mano:length=4"))
    mixed = dataclasses.replace(text_data, sources=(*text_data.sources, SourceConfig(path="mano")))
    with pytest.raises(UserError, match="has a vocabulary of its own and cannot be mixed"):
        open_corpus(mixed)
