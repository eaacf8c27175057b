"""The synthetic tasks other than Mano: answers against an independent evaluator, distributions, and the split."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.data.tasks import Addition, PHop, Reachability, Sequences, ThreeHop, make_task
from looplm_jax.errors import UserError

SEEDS, INDICES = st.integers(0, 2**63), st.integers(0, 2**47)
SMALL = ThreeHop(questions=500, people=6, relations=5, validation_items=100)
CURRICULUM = dataclasses.replace(SMALL, fewest=1)


def words(task, example):
    return task.tokenizer.decode(example.tokens).split()


def both(task, seed, index):
    return task.train_example(seed, index), task.validation_example(index)


def chi_square(counts):
    """Returns Pearson's statistic against equal frequencies, as standard deviations above its mean."""
    counts = np.asarray(counts)
    statistic = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    return (statistic - (len(counts) - 1)) / np.sqrt(2 * (len(counts) - 1))


def sums(symbols):
    """Returns the numbers, and the digits after the equals sign."""
    left, right = "".join(symbols[1:-1]).split("=")
    return left.split("+"), right


@given(power=st.integers(1, 6), terms=st.integers(1, 40), digits=st.integers(2, 6), seed=SEEDS, index=INDICES)
def test_every_sum_is_right(power, terms, digits, seed, index):
    task = Addition(longest=2**power, terms=terms, digits=digits)
    for example in both(task, seed, index):
        numbers, answer = sums(words(task, example))
        assert {len(number) for number in numbers} == {digits}
        assert sum(map(int, numbers)) == int(answer)
        assert len(example.tokens) <= task.max_tokens
        assert example.loss_mask.sum() == len(answer) + 1
    assert len(numbers) == terms


def test_numbers_to_add_are_powers_of_two_equally_often():
    task = Addition()
    counts = collections.Counter(len(sums(words(task, task.train_example(0, index)))[0]) for index in range(2_000))
    assert sorted(counts) == [2, 4, 8, 16, 32]
    assert chi_square(list(counts.values())) < 4


def hop_by_table(sequence, hops):
    """Computes the answer from the definition, with a table of where each position leads."""
    leads = [
        max([0, *(j for j in range(2, i + 1) if sequence[j - 2] == sequence[i - 1])])
        for i in range(1, len(sequence) + 1)
    ]
    place = len(sequence)
    for _ in range(hops):
        place = leads[place - 1] if place else 0
    return sequence[place - 1] if place else "<none>"


@given(
    hops=st.integers(1, 8),
    spare=st.integers(0, 40),
    alphabet=st.integers(2, 6),
    kind=st.sampled_from(Sequences),
    seed=SEEDS,
    index=INDICES,
)
def test_every_hop_is_right(hops, spare, alphabet, kind, seed, index):
    task = PHop(hops=hops, length=2 * hops + 9 + spare, alphabet=alphabet, sequences=kind)
    for example in both(task, seed, index):
        *sequence, answer = words(task, example)
        assert len(sequence) == task.length
        assert hop_by_table(sequence, hops) == answer
        assert example.loss_mask.tolist() == [False] * task.length + [True]


def test_a_curriculum_says_how_many_hops_and_asks_all_numbers_equally_often():
    task = PHop(hops=4, fewest=2, length=24)
    counts = collections.Counter()
    for index in range(1_500):
        number, *sequence, answer = words(task, task.train_example(0, index))
        hops = int(number.removeprefix("<hops_").removesuffix(">"))
        assert hop_by_table(sequence, hops) == answer
        counts[hops] += 1
    assert sorted(counts) == [2, 3, 4]
    assert chi_square(list(counts.values())) < 4
    held_out = task.validation_example(7)
    assert words(task, held_out)[0] == "<hops_4>"
    assert len(held_out.tokens) == task.max_tokens == 26
    assert held_out.loss_mask.sum() == 1


def test_no_hop_of_a_chain_stays_where_it_is_and_a_quarter_of_uniform_sequences_does():
    chain, uniform = PHop(), PHop(sequences=Sequences.UNIFORM)
    sequences = [words(chain, chain.train_example(0, index))[:-1] for index in range(500)]
    assert all(sequence[-1] != sequence[-2] for sequence in sequences)
    assert all(hop_by_table(sequence, hops) != "<none>" for sequence in sequences[:20] for hops in (1, 8, 16))
    drawn = [words(uniform, uniform.train_example(0, index))[:-1] for index in range(2_000)]
    assert 0.22 < np.mean([sequence[-1] == sequence[-2] for sequence in drawn]) < 0.28


def test_answers_to_a_chain_are_uniform_and_pairs_lie_anywhere():
    task = PHop(hops=4, length=32)
    answers = collections.Counter(words(task, task.train_example(0, index))[-1] for index in range(2_000))
    assert len(answers) == 4
    assert chi_square(list(answers.values())) < 4


def reached(edges, start):
    """Returns all reachable nodes and their minimal number of steps."""
    steps, front = {start: 0}, [start]
    while front:
        front = [target for source, target in edges if source in front and target not in steps]
        steps |= dict.fromkeys(front, 1 + max(steps.values()))
    return steps


@given(distance=st.integers(1, 6), spare=st.integers(0, 12), seed=SEEDS, index=INDICES)
def test_every_graph_is_answered_rightly(distance, spare, seed, index):
    task = Reachability(nodes=2 * (distance + 1) + spare + 2, distance=distance)
    for example in both(task, seed, index):
        _, *edges, start, goal, _, answer = words(task, example)
        pairs = [(edges[place], edges[place + 2]) for place in range(0, len(edges) - 1, 4)]
        steps = reached(pairs, start)
        assert (goal in steps) == (answer == "yes")
        assert steps.get(goal, 0) <= distance
        assert len(example.tokens) == task.max_tokens
    assert steps.get(goal, distance) == distance


def test_half_of_the_goals_are_reached_and_both_trees_look_alike():
    task = Reachability(nodes=16, distance=4)
    answers, children = [], collections.defaultdict(list)
    for index in range(1_500):
        _, *edges, start, _goal, _, answer = words(task, task.train_example(0, index))
        answers.append(answer == "yes")
        children[answer].append(sum(edges[place] == start for place in range(0, len(edges) - 1, 4)))
    assert abs(np.mean(answers) - 0.5) < 0.05
    assert abs(np.mean(children["yes"]) - np.mean(children["no"])) < 0.15


@given(seed=SEEDS, index=st.integers(0, 10**6))
def test_every_question_is_answered_by_three_facts(seed, index):
    for example in (SMALL.train_example(seed, index), SMALL.validation_example(index % 100)):
        symbols = words(SMALL, example)
        relations = [int(symbols[place][1:]) for place in (4, 7, 10)]
        person, answer = int(symbols[12][1:]), int(symbols[-1][1:])
        assert len(symbols) == SMALL.max_tokens
        assert person < SMALL.people
        assert answer // SMALL.people == 3
        assert SMALL.answer(person, tuple(relations)) == answer
        one_by_one = SMALL.answer(SMALL.answer(person, (relations[2],)), (relations[1],))
        assert SMALL.answer(one_by_one, (relations[0],)) == answer


def test_an_epoch_holds_each_question_once_and_none_that_is_held_out():
    def texts(examples):
        return [tuple(example.tokens.tolist()) for example in examples]

    epochs = [
        texts(SMALL.train_example(seed, epoch * 500 + index) for index in range(500))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    held_out = set(texts(map(SMALL.validation_example, range(100))))
    assert len(held_out) == 100
    assert all(set(epoch) == set(epochs[0]) and len(set(epoch)) == 500 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert not held_out & set(epochs[0])


@given(seed=SEEDS, index=st.integers(0, 10**6))
def test_shorter_questions_are_facts_that_longer_ones_need(seed, index):
    symbols = words(CURRICULUM, CURRICULUM.train_example(seed, index))
    place = symbols.index("?") - 1
    relations = tuple(int(symbol[1:]) for symbol in symbols[:place] if symbol[1:].isdigit())
    person, answer = int(symbols[place][1:]), int(symbols[-1][1:])
    assert 1 <= len(relations) <= 3
    for relation in reversed(relations):
        person = SMALL.answer(person, (relation,))
    assert person == answer < 4 * SMALL.people


def test_a_curriculum_asks_for_every_number_of_hops_alike_and_of_three_only_the_questions_of_the_training():
    asked = [CURRICULUM.train_example(0, index) for index in range(6_000)]
    hops = collections.Counter((len(example.tokens) - 7) // 3 for example in asked)
    assert chi_square([hops[1], hops[2], hops[3]]) < 4
    allowed = {SMALL.train_example(0, index).tokens.tobytes() for index in range(500)}
    of_three = {example.tokens.tobytes() for example in asked if len(example.tokens) == SMALL.max_tokens}
    assert of_three <= allowed
    assert len(of_three) > 480
    of_one = {example.tokens.tobytes() for example in asked if len(example.tokens) == SMALL.max_tokens - 6}
    assert len(of_one) == 3 * SMALL.people * SMALL.relations
    assert CURRICULUM.validation_example(7).tokens.tolist() == SMALL.validation_example(7).tokens.tolist()


def test_there_are_800_000_questions():
    task = ThreeHop()
    assert task.pool == 800_000
    assert task.tokenizer.vocab_size == 1 + 6 + 20 + 500


@pytest.mark.parametrize(
    "task",
    [Addition(longest=2, terms=2, digits=1), PHop(hops=1, length=8, alphabet=3), Reachability(nodes=4, distance=1)],
)
def test_no_held_out_problem_is_trained_on_by_any_seed(task):
    trained = {task.train_example(seed, index).tokens.tobytes() for seed in range(4) for index in range(400)}
    held_out = {task.validation_example(index).tokens.tobytes() for index in range(200)}
    assert held_out
    assert not trained & held_out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("addition:longest=12", "addition.longest must be a power of two, not 12"),
        ("addition:digits=0", "addition.digits must be at least 1, not 0"),
        ("phop:hops=8,length=16", "phop.length=16 has no room for 8 hops; make it 17 or more"),
        ("phop:hops=4,fewest=5", "phop.fewest must be from 1 to hops=4, or 0, not 5"),
        ("phop:sequences=chains", "chain"),
        ("reachability:nodes=17", "reachability.nodes=17 has no room for two paths of 8 edges; make it 18 or more"),
        ("threehop:fewest=4", "threehop.fewest must be from 1 to 3, not 4"),
        ("threehop:people=2,relations=2", "are more than the 16 that there are; lower them"),
        ("threehops", "no such task 'threehops'; did you mean 'threehop'"),
    ],
)
def test_bad_options_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as refused:
        make_task(spec)
    assert "\n" not in str(refused.value)


def test_problems_do_not_change_with_what_was_drawn_before():
    for task in (Addition(), PHop(), Reachability(), SMALL):
        forwards = [task.train_example(3, index).tokens.tolist() for index in range(4)]
        backwards = [task.train_example(3, index).tokens.tolist() for index in (3, 2, 1, 0)]
        assert forwards == backwards[::-1]
        assert len(set(map(tuple, itertools.chain(forwards, backwards)))) == 4
