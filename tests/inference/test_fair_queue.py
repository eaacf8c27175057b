import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.inference._scheduler import FairQueue


def drain(queue):
    return [queue.pop() for _ in range(len(queue))]


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_clients_take_turns_and_each_is_served_in_order(clients):
    queue = FairQueue(limit=20)
    for number, client in enumerate(clients):
        queue.push(client, (client, number))
    served = []
    while len(queue):
        first = queue.first()
        served.append(queue.pop())
        assert first == served[-1]
    assert sorted(served) == sorted((client, number) for number, client in enumerate(clients))
    rounds = collections.defaultdict(list)
    turns = collections.Counter()
    for client, number in served:
        turns[client] += 1
        rounds[client].append((turns[client], number))
    assert all(numbers == sorted(numbers) for numbers in rounds.values())
    order = [turn for client, number in served for turn, own in rounds[client] if own == number]
    assert order == sorted(order)  # no client has a second turn while another waits for its first


def test_a_client_that_comes_later_waits_for_one_item_of_the_others_only():
    queue = FairQueue(limit=10)
    for number in range(5):
        queue.push("busy", number)
    queue.push("late", "x")
    assert drain(queue) == [0, "x", 1, 2, 3, 4]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=20))
def test_what_is_removed_changes_nothing_for_the_others(items):
    """Clients with remaining requests take turns as before, each in order."""
    queue = FairQueue(limit=20)
    for number, (client, stays) in enumerate(items):
        queue.push(client, (number, client, stays))
    for number, (client, stays) in enumerate(items):
        if not stays:
            assert queue.discard(client, (number, client, stays))
            assert not queue.discard(client, (number, client, stays))
    order = dict.fromkeys(client for client, _ in items)
    left = [
        [(number, own, True) for number, (own, stays) in enumerate(items) if stays and own == client]
        for client in order
    ]
    turns = itertools.zip_longest(*left)
    assert len(queue) == sum(map(len, left))
    assert drain(queue) == [item for turn in turns for item in turn if item is not None]


def test_the_queue_is_bounded():
    queue = FairQueue(limit=2)
    queue.push("a", 1)
    assert not queue.full
    queue.push("b", 2)
    assert queue.full
    with pytest.raises(OverflowError, match="2 items are waiting"):
        queue.push("c", 3)
    assert drain(queue) == [1, 2]
    for operation in (queue.first, queue.pop):
        with pytest.raises(IndexError, match="nothing waits"):
            operation()
