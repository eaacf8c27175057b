"""Agreement between processes, simulated by threads of this process."""

import concurrent.futures
import socket

import pytest

from looplm_jax.distributed import LOST, Join, check_same
from looplm_jax.distributed.link import Link
from looplm_jax.distributed.star import Member
from looplm_jax.errors import UserError


@pytest.fixture
def star():
    """Returns three members, how each ended, and a function that loses one."""
    ended = {}
    pairs = {peer: socket.socketpair() for peer in (1, 2)}

    def ending(index):
        def end(message, status):
            ended[index] = (message, status)
            for link in members[index]._links.values() if index else ():
                link.close()

        return end

    members = [Member(0, 3, {peer: Link(ours) for peer, (ours, _) in pairs.items()}, ending(0))]
    members += [Member(peer, 3, {0: Link(theirs)}, ending(peer)) for peer, (_, theirs) in pairs.items()]
    yield members, ended
    for link in (link for member in members for link in member._links.values()):
        link.close()


def together(members, work):
    with concurrent.futures.ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(work, members))


def test_all_get_the_values_of_all_in_order(star):
    members, _ = star

    def work(member):
        return [member.gather(name, [member.index, turn]) for turn in range(50) for name in ("a", "b")]

    wanted = [[[index, turn] for index in range(3)] for turn in range(50) for _ in "ab"]
    assert together(members, work) == [wanted] * 3


def test_one_that_was_started_otherwise_is_named_everywhere(star):
    members, _ = star

    def work(member):
        with pytest.raises(UserError) as caught:
            check_same(
                member, "configuration", {"model": {"width": 8 + (member.index == 2)}, "stages": [{"name": "x"}]}
            )
        return str(caught.value)

    (line,) = set(together(members, work))
    assert line == (
        "process 2 was started with another configuration than process 0 (model.width: 8, there 9); "
        "start all processes with the same command, data and version"
    )


def test_a_lost_member_ends_the_others(star):
    members, ended = star
    members[2]._leaving = True
    members[2]._links[0].close()
    for member in members[:2]:
        for receiver in member._receivers:
            receiver.join(20)
    assert ended[1][1] == ended[0][1] == LOST
    assert ended[0][0].startswith("process 0: process 2: lost")
    assert ended[1][0].startswith("process 1: process 2: lost")


def test_leaving_is_no_loss(star):
    members, ended = star
    together(members, lambda member: member.leave())
    for member in members:
        for receiver in member._receivers:
            receiver.join(20)
    assert ended == {}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"coordinator": "a:1"}, "say --coordinator, --processes and --process together, or --distributed alone"),
        ({"automatic": True, "coordinator": "a:1", "processes": 2, "process": 0}, "or --distributed alone"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator must be HOST:PORT of process 0, not 'a'"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"--process must be in 0..1 \(--processes 2\)"),
    ],
)
def test_half_told_is_refused(told, message):
    with pytest.raises(UserError, match=message):
        Join(**told)


def test_a_process_that_was_told_nothing_is_alone():
    assert not Join().asked
