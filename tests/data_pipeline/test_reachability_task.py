"""Reachability with several questions per graph, over chosen distances, and about the root."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.data.tasks import Reachability, make_task
from looplm_jax.data.tasks._reachability import Asks
from looplm_jax.errors import UserError

SEEDS, INDICES = st.integers(0, 2**63), st.integers(0, 2**47)


def parsed(task, example):
    """Returns the successors of each node, and the questions with their answers."""
    graph, *questions = " ".join(task.tokenizer.decode(example.tokens).split()[1:]).split(" ? ")
    follows = collections.defaultdict(list)
    for edge in graph.removesuffix(" ;").split(" ; "):
        source, target = edge.split(" > ")
        follows[source].append(target)
    return follows, [question.replace("<ans> ", "").split() for question in questions]


def depth(follows, start, goal):
    """Returns the number of edges of the path between two nodes, or None."""
    if start == goal:
        return 0
    below = [depth(follows, node, goal) for node in follows[start]]
    return next((1 + found for found in below if found is not None), None)


@given(
    distance=st.integers(1, 5),
    trees=st.integers(2, 4),
    spare=st.integers(0, 6),
    questions=st.integers(1, 5),
    asks=st.sampled_from(Asks),
    nearer=st.booleans(),
    seed=SEEDS,
    index=INDICES,
    data=st.data(),
)
def test_every_question_is_answered_rightly_and_over_the_asked_edges(
    distance, trees, spare, questions, asks, nearer, seed, index, data
):
    asked = data.draw(st.integers(0, distance))
    nodes = trees * (distance + 1) + spare
    settings = {"nodes": nodes, "trees": trees, "distance": distance, "questions": questions, "nearer": nearer}
    task = Reachability(**settings, asked=asked, asks=asks, validation_items=1)
    trained, tested = task.train_example(seed, index), task.validation_example(index)
    assert len(trained.tokens) == task.max_tokens
    for example, count, lengths in ((trained, questions, range(1, distance + 1)), (tested, 1, [asked or distance])):
        follows, found = parsed(task, example)
        assert len(found) == count == example.loss_mask.sum()
        answers = [task.tokenizer.piece(token) for token in example.tokens[example.loss_mask]]
        assert answers == [question[-1] for question in found]
        for question in found:
            if asks is Asks.ROOT:
                goal, root = question
                assert depth(follows, root, goal) in lengths
                assert not any(root in targets for targets in list(follows.values()))
            else:
                start, goal, answer = question
                between = depth(follows, start, goal)
                assert between in lengths if answer == "yes" else between is None


@pytest.mark.parametrize("asks", Asks)
@pytest.mark.parametrize(("nearer", "weights"), [(False, [1, 1, 1, 1]), (True, [12, 6, 4, 3])])
def test_lengths_in_training_are_uniform_or_as_often_as_they_are_near(asks, nearer, weights):
    task = Reachability(nodes=12, distance=4, questions=3, asks=asks, nearer=nearer)
    lengths = collections.Counter()
    for index in range(500):
        follows, questions = parsed(task, task.train_example(0, index))
        pairs = [question[::-1] if asks is Asks.ROOT else question[:2] for question in questions]
        lengths.update(depth(follows, *pair) for pair in pairs)
    counts = np.array([lengths[length] for length in range(1, 5)])
    assert np.all(np.abs(counts / counts.sum() - np.array(weights) / sum(weights)) < 0.05)


@given(trees=st.integers(2, 4), seed=SEEDS)
def test_a_guess_of_a_root_is_right_once_in_as_many_times_as_there_are_trees(trees, seed):
    task = Reachability(nodes=trees * 3, trees=trees, distance=2, asks=Asks.ROOT)
    follows, _ = parsed(task, task.train_example(seed, 0))
    targets = {target for targets in follows.values() for target in targets}
    assert len(set(follows) - targets) == trees
    assert task.chance == 1 / trees


def test_a_question_of_several_is_never_a_held_out_problem():
    tasks = [Reachability(nodes=4, distance=1, questions=questions, asks=Asks.ROOT) for questions in (1, 3)]
    held_out = {task.tokenizer.decode(task.validation_example(index).tokens) for task in tasks for index in range(100)}
    for task in tasks:
        for index in range(300):
            graph, *questions = task.tokenizer.decode(task.train_example(1, index).tokens).split(" ? ")
            assert not held_out & {f"{graph} ? {question}" for question in questions}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("reachability:trees=1", "reachability.trees must be at least 2, not 1"),
        (
            "reachability:trees=3,nodes=26",
            "reachability.nodes=26 has no room for 3 paths of 8 edges; make it 27 or more",
        ),
        ("reachability:questions=0", "reachability.questions must be at least 1, not 0"),
        ("reachability:asked=-1", "reachability.asked must be at least 0, not -1"),
        ("reachability:asked=9", "reachability.asked=9 is more than distance=8; lower it"),
        ("reachability:asks=roots", "root"),
    ],
)
def test_bad_options_of_reachability_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as refused:
        make_task(spec)
    assert "\n" not in str(refused.value)
