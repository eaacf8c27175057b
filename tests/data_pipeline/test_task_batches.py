"""Problems generated and packed by blocks: correct, pure, resumable, divided; full rows, no held-out problems."""

import collections
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import DataConfig, SourceConfig
from looplm_jax.data import SubstreamBatches, open_corpus, train_batches
from looplm_jax.data._packing import pack_problems
from looplm_jax.data._streams import Blocks
from looplm_jax.data.tasks import Addition, Capo, Mano, PHop, Problems, Reachability, Sequences, Supervise, ThreeHop
from looplm_jax.data.tasks._base import draw_again, is_held_out
from looplm_jax.data.tasks._p_hop import find
from looplm_jax.errors import UserError
from looplm_jax.testing import assert_resumes_exactly

EARLIER_PLACE = Path(__file__).parents[1] / "data" / "place_among_single_problems.json"
SEEDS = st.integers(0, 2**32 - 1)
TASKS = [
    Mano(length=4),
    Addition(longest=8, terms=8),
    PHop(hops=3, length=16),
    PHop(hops=3, fewest=1, length=16, sequences=Sequences.UNIFORM),
    Capo(people=50),
    Reachability(nodes=10, distance=3),
    ThreeHop(questions=500, people=6, relations=5, validation_items=100),
]


def split(problems):
    """Returns the tokens and targets of each problem."""
    ends = np.cumsum(problems.lengths)[:-1]
    return list(zip(np.split(problems.tokens, ends), np.split(problems.loss_mask, ends), strict=True))


def texts(task, problems):
    return [task.tokenizer.decode(tokens) for tokens, _ in split(problems)]


def value(symbols, modulus):
    """Evaluates a prefix expression recursively."""
    symbol = symbols.pop(0)
    if symbol not in "+-*":
        return int(symbol)
    left = value(symbols, modulus)
    right = value(symbols, modulus)
    return {"+": left + right, "-": left - right, "*": left * right}[symbol] % modulus


@given(length=st.integers(2, 12), modulus=st.integers(5, 40), seed=SEEDS, supervise=st.sampled_from(Supervise))
def test_expressions_are_right_and_none_is_held_out(length, modulus, seed, supervise):
    task = Mano(length=length, modulus=modulus, supervise=supervise)
    for tokens, mask in split(task.train_problems(seed, 7, 30)):
        bos, said, *expression, ans, answer = task.tokenizer.decode(tokens).split()
        drawn = int(said.removeprefix("<len_").removesuffix(">"))
        assert (bos, ans, len(expression)) == ("<bos>", "<ans>", 2 * drawn + 1)
        assert not (drawn == length and is_held_out(" ".join(expression)))
        assert value(expression, modulus) == int(answer)
        assert expression == []
        all_but_first = [False] + [supervise is Supervise.ALL] * (len(tokens) - 2) + [True]
        assert mask.tolist() == all_but_first


@given(power=st.integers(1, 5), digits=st.integers(1, 9), seed=SEEDS)
def test_sums_are_right_and_none_is_held_out(power, digits, seed):
    task = Addition(longest=2**power, terms=3, digits=digits)
    for tokens, mask in split(task.train_problems(seed, 0, 20)):
        symbols = task.tokenizer.decode(tokens).split()
        assert symbols[0] == symbols[-1] == "<end>"
        question, answer = "".join(symbols[1:-1]).split("=")
        numbers = question.split("+")
        assert len(numbers) in task.counts
        assert {len(number) for number in numbers} == {digits}
        assert str(sum(map(int, numbers))) == answer
        assert not is_held_out(question)
        assert mask.tolist() == [False] * (len(tokens) - len(answer) - 1) + [True] * (len(answer) + 1)


@given(
    hops=st.integers(1, 6),
    spare=st.integers(0, 20),
    alphabet=st.integers(2, 14),
    curriculum=st.booleans(),
    kind=st.sampled_from(Sequences),
    seed=SEEDS,
)
def test_hops_are_right_and_none_is_held_out(hops, spare, alphabet, curriculum, kind, seed):
    task = PHop(hops=hops, fewest=int(curriculum), length=2 * hops + 9 + spare, alphabet=alphabet, sequences=kind)
    for tokens, mask in split(task.train_problems(seed, 5, 20)):
        symbols = task.tokenizer.decode(tokens).split()
        asked = int(symbols.pop(0).removeprefix("<hops_").removesuffix(">")) if curriculum else hops
        *sequence, answer = symbols
        place = find(sequence, len(sequence), asked)
        assert answer == (sequence[place - 1] if place else "<none>")
        assert place or kind is Sequences.UNIFORM
        assert not is_held_out(" ".join(symbol.removeprefix("s") for symbol in sequence))
        assert mask.tolist() == [False] * (len(tokens) - 1) + [True]


def chi_square(counts):
    """Returns Pearson's statistic against equal frequencies, as standard deviations above its mean."""
    counts = np.asarray(counts)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - (len(counts) - 1)) / np.sqrt(2 * (len(counts) - 1))


def test_problems_are_drawn_uniformly():
    mano = [text.split() for text in texts(Mano(), Mano().train_problems(0, 0, 4_000))]
    assert chi_square(list(collections.Counter(problem[1] for problem in mano).values())) < 4
    symbols = collections.Counter(symbol for problem in mano for symbol in problem[2:-2])
    assert chi_square([symbols[symbol] for symbol in "+-*"]) < 4
    assert chi_square([symbols[str(number)] for number in range(23)]) < 4
    root_is_last = [problem[3] not in "+-*" for problem in mano if problem[1] == "<len_4>"]
    assert abs(np.mean(root_is_last) - 1 / 4) < 0.08  # the left operand of four operators has 0, 1, 2 or 3

    addition = texts(Addition(), Addition().train_problems(0, 0, 2_000))
    assert chi_square(list(collections.Counter(text.count("+") for text in addition).values())) < 4

    task = PHop(hops=4, length=32)
    chains = [text.split() for text in texts(task, task.train_problems(0, 0, 3_000))]
    assert chi_square(list(collections.Counter(chain[-1] for chain in chains).values())) < 4
    ends = collections.Counter(find(chain[:-1], 32, 4) for chain in chains)
    one_by_one = [task.tokenizer.decode(task.train_example(0, index).tokens).split() for index in range(1_000)]
    assert abs(np.mean(list(ends.elements())) - np.mean([find(chain[:-1], 32, 4) for chain in one_by_one])) < 0.5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_problems_are_functions_of_seed_and_index(task):
    first, again = (dataclasses.replace(task).train_problems(3, 40, 20) for _ in range(2))
    np.testing.assert_equal(dataclasses.asdict(first), dataclasses.asdict(again))
    assert texts(task, task.train_problems(4, 40, 20)) != texts(task, first)
    assert texts(task, task.train_problems(3, 60, 20)) != texts(task, first)
    assert first.lengths.max() <= task.max_tokens
    assert (first.tokens.dtype, first.loss_mask.dtype) == (np.int32, bool)


@pytest.mark.parametrize(
    "task", [Mano(length=1, modulus=5), Addition(longest=2, terms=2, digits=1), PHop(hops=1, length=8, alphabet=3)]
)
def test_no_held_out_problem_is_trained_on_by_any_seed(task):
    trained = {text for seed in range(4) for text in texts(task, task.train_problems(seed, 0, 1_000))}
    held_out = {task.tokenizer.decode(task.validation_example(index).tokens) for index in range(200)}
    assert held_out
    assert not trained & held_out


def test_too_few_problems_are_refused():
    held_out = next(number for number in range(1_000) if is_held_out(str(number)))
    drawn = np.array([[held_out + 1], [held_out]])
    with pytest.raises(UserError, match="this task has too few problems to hold some out; change it"):
        draw_again(
            drawn, lambda places: drawn[places], lambda row: str(row[0]), np.array([1]), "this task", "change it"
        )


@given(data=st.data(), length=st.integers(8, 60), seed=SEEDS)
def test_rows_hold_every_problem_once(data, length, seed):
    sizes = data.draw(st.lists(st.integers(2, length + 1), min_size=1, max_size=60))
    random = np.random.default_rng(seed)
    total = sum(sizes)
    problems = Problems(random.integers(1, 99, total, np.int32), random.random(total) < 0.5, np.array(sizes))
    rows = pack_problems(problems, length)
    found = []
    for tokens, targets, ids, positions, mask in zip(*rows.values(), strict=True):
        assert not mask[ids == 0].any()
        for number in range(1, ids.max() + 1):
            at = np.flatnonzero(ids == number)
            assert np.array_equal(at, at[0] + np.arange(len(at)))
            assert positions[at].tolist() == list(range(len(at)))
            assert tokens[at][1:].tolist() == targets[at][:-1].tolist()
            found.append((tokens[at][0], *targets[at], *mask[at]))
    assert sorted(found) == sorted((*tokens, *map(float, mask[1:])) for tokens, mask in split(problems))
    assert [rows[name].dtype for name in rows] == [np.int32] * 4 + [np.float32]


@pytest.mark.parametrize(("task", "length"), [("mano", 256), ("addition:longest=8", 256), ("phop", 514)])
def test_rows_are_full(task, length):
    (part,) = open_corpus(DataConfig(sources=(SourceConfig(path=task),))).tasks
    blocks = Blocks((part,), (0,), length)
    assert np.mean([(blocks[block]["tokens_segment_ids"] > 0).mean() for block in range(3)]) > 0.965


def corpus_of(*specs, weights=None):
    weights = weights or [1.0] * len(specs)
    sources = [SourceConfig(path=spec, weight=weight) for spec, weight in zip(specs, weights, strict=True)]
    return open_corpus(DataConfig(sources=tuple(sources)))


def stream(corpus, **geometry):
    geometry = {"batch_size": 4, "sequence_length": 64, "seed": 1, **geometry}
    return train_batches(corpus, corpus.own_tokenizer, **geometry)


def take(batches, count):
    return [dataclasses.asdict(next(batches)) for _ in range(count)]


@pytest.mark.parametrize("done", [0, 1, 40, 333])
def test_a_stream_resumes_exactly(done):
    corpus = corpus_of("mano:length=4", "mano:length=4,supervise=all", weights=[3.0, 1.0])
    assert_resumes_exactly(lambda: stream(corpus), done=done, more=300)


def test_lanes_hold_problems_of_their_own_and_batches_are_the_same_for_any_number_of_processes():
    corpus = corpus_of("mano:length=6,modulus=31")

    def process(rows):
        def lane(number):
            return stream(corpus, batch_size=8, process_index=number, process_count=2)

        return SubstreamBatches(lane, substreams=2, sequences=rows, microbatch_sequences=8)

    whole, shares = process(range(8)), [process(range(4)), process(range(4, 8))]
    batches = take(whole, 30)
    for batch, *parts in zip(batches, *(take(share, 30) for share in shares), strict=True):
        joined = {name: np.concatenate([part[name] for part in parts]) for name in batch}
        np.testing.assert_equal(joined, batch)
    rows = [row.tobytes() for batch in batches for row in batch["tokens"]]
    assert len(set(rows)) == len(rows)


def test_a_mixture_holds_problems_by_weight():
    corpus = corpus_of("mano:length=4", "mano:length=4,supervise=all", weights=[3.0, 1.0])
    problems = Blocks(corpus.tasks, (0, 1), 64).problems(5)
    everything = [mask.sum() > 1 for _, mask in split(problems)]
    assert np.mean(everything) == pytest.approx(1 / 4, abs=0.002)
    assert 0.1 < np.mean(everything[:100]) < 0.4


def test_a_run_that_began_with_problems_drawn_one_by_one_resumes_with_the_same_batches(full_windows):
    """The position and the following batches are those of the version before blocks."""
    saved = json.loads(EARLIER_PLACE.read_text())
    resumed = stream(corpus_of("mano:length=4"))
    take(resumed, 3)
    resumed.restore(saved["state"])
    assert resumed.state() == saved["state"]
    assert [batch["tokens"].tolist() for batch in take(resumed, 2)] == saved["next_tokens"]
    assert "problems" not in resumed.state()["identity"]
    resumed.close()

    other = stream(corpus_of("mano:length=5"))
    with pytest.raises(UserError, match=r"data\.sources"):
        other.restore(saved["state"])
    assert other.state()["identity"]["problems"] == "blocks"
    other.close()
