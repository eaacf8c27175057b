"""Agreement between processes, simulated by threads of this process."""

import concurrent.futures
import socket

import pytest

from looplm_jax.distributed import LOST, JoinOptions, check_same
from looplm_jax.distributed._connection import Connection
from looplm_jax.distributed._process_group import Peer
from looplm_jax.errors import UserError


@pytest.fixture
def group():
    """Returns three peers, how each ended, and a function that loses one."""
    ended = {}
    pairs = {number: socket.socketpair() for number in (1, 2)}

    def ending(index):
        def end(message, status):
            ended[index] = (message, status)
            for connection in peers[index]._connections.values() if index else ():
                connection.close()

        return end

    peers = [Peer(0, 3, {peer: Connection(ours) for peer, (ours, _) in pairs.items()}, ending(0))]
    peers += [Peer(peer, 3, {0: Connection(theirs)}, ending(peer)) for peer, (_, theirs) in pairs.items()]
    yield peers, ended
    for connection in (connection for peer in peers for connection in peer._connections.values()):
        connection.close()


def together(peers, work):
    with concurrent.futures.ThreadPoolExecutor(len(peers)) as pool:
        return list(pool.map(work, peers))


def test_all_get_the_values_of_all_in_order(group):
    peers, _ = group

    def work(peer):
        return [peer.gather(name, [peer.index, turn]) for turn in range(50) for name in ("a", "b")]

    wanted = [[[index, turn] for index in range(3)] for turn in range(50) for _ in "ab"]
    assert together(peers, work) == [wanted] * 3


def test_a_process_that_was_started_otherwise_is_named_everywhere(group):
    peers, _ = group

    def work(peer):
        with pytest.raises(UserError) as caught:
            check_same(peer, "configuration", {"model": {"width": 8 + (peer.index == 2)}, "stages": [{"name": "x"}]})
        return str(caught.value)

    (line,) = set(together(peers, work))
    assert line == (
        "process 2 was started with another configuration than process 0 (model.width: 8, there 9); "
        "start all processes with the same command, data and version"
    )


def test_a_lost_peer_ends_the_others(group):
    peers, ended = group
    peers[2]._is_shutting_down = True
    peers[2]._connections[0].close()
    for peer in peers[:2]:
        for receiver in peer._receivers:
            receiver.join(20)
    assert ended[1][1] == ended[0][1] == LOST
    assert ended[0][0].startswith("process 0: process 2: lost")
    assert ended[1][0].startswith("process 1: process 2: lost")


def test_a_shutdown_is_no_loss(group):
    peers, ended = group
    together(peers, lambda peer: peer.shutdown())
    for peer in peers:
        for receiver in peer._receivers:
            receiver.join(20)
    assert ended == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coordinator": "a:1"}, "give --coordinator, --processes and --process together, or --distributed alone"),
        ({"automatic": True, "coordinator": "a:1", "processes": 2, "process": 0}, "or --distributed alone"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator must be HOST:PORT of process 0, not 'a'"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, r"--process must be in 0..1 \(--processes 2\)"),
    ],
)
def test_incomplete_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        JoinOptions(**options)


def test_a_process_without_options_is_a_single_process():
    assert not JoinOptions().requested
