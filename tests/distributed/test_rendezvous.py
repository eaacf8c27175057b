"""How processes connect, simulated by threads of this process, with unrelated clients on the port."""

import contextlib
import json
import queue
import socket
import threading
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from looplm_jax.distributed import LOST, JoinOptions, _connection, _process_group, join
from looplm_jax.distributed._connection import Connection, Rendezvous, reach_coordinator
from looplm_jax.distributed._process_group import Peer
from looplm_jax.errors import UserError

TOKEN = bytes(range(16))
HOST = "127.0.0.1"


class Arrivals:
    """Runs process 0 of `count` in a thread."""

    def __init__(self, count, **options):
        self.listener = socket.create_server((HOST, 0))
        self.address = self.listener.getsockname()
        self.connections, self.error, self._others = None, None, []
        self._thread = threading.Thread(target=self._accept, args=(count, options), daemon=True)
        self._thread.start()

    def _accept(self, count, options):
        try:
            self.connections = Rendezvous(TOKEN, count).accept(self.listener, **options)
        except UserError as error:
            self.error = str(error)

    def join(self, index, count, token=TOKEN, **options):
        connection = reach_coordinator(self.address, token, index, count, **options)
        self._others.append(connection)
        return connection

    def stranger(self, said=b""):
        sock = socket.create_connection(self.address)
        sock.sendall(said)
        return sock

    def wait(self):
        self._thread.join(20)
        assert not self._thread.is_alive(), "process 0 waits"
        self.listener.close()
        deadline = time.monotonic() + 20
        while len(self._others) < len(self.connections or {}):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for connection in (*(self.connections or {}).values(), *self._others):
            connection.close()
        return sorted(self.connections or {})


def in_background(work, *arguments, **options):
    """Starts a thread. Returns it, and the list that receives its result or UserError."""
    said = []

    def run():
        try:
            said.append(work(*arguments, **options))
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, said


@settings(max_examples=20)
@given(st.binary(max_size=3000) | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps))
@example(b"[" * 999 + b"\n")
@example(b'{"a":' * 198 + b"\n")
@example(b"9" * 900 + b"\n")
@example(b'["\\ud800", 1]\n')
@example('["é", 1]\n'.encode())
@example(json.dumps([TOKEN.hex(), True]).encode() + b"\n")
@example(json.dumps([TOKEN.hex(), 2**70]).encode() + b"\n")
@example(json.dumps([TOKEN.hex(), 1, [3]]).encode() + b"\n")
def test_nothing_that_a_stranger_says_keeps_a_process_out(said):
    said = said if isinstance(said, bytes) else said.encode(errors="surrogatepass") + b"\n"
    process_0 = Arrivals(2)
    with contextlib.suppress(OSError), process_0.stranger(said):
        pass
    started = time.monotonic()
    process_0.join(1, 2)
    assert process_0.wait() == [1]
    assert time.monotonic() - started < 5


def test_a_stranger_that_leaves_before_it_is_accepted_ends_nothing():
    class Listener:
        def __init__(self):
            self.ours, self.theirs = socket.socketpair()
            self.answers = iter([ConnectionAbortedError(), self.ours])

        def settimeout(self, seconds):
            pass

        def accept(self):
            answer = next(self.answers, TimeoutError())
            if isinstance(answer, Exception):
                raise answer
            return answer, None

    listener = Listener()
    listener.theirs.sendall(json.dumps([TOKEN.hex(), 1, 2]).encode() + b"\n")
    connections = Rendezvous(TOKEN, 2).accept(listener)
    assert sorted(connections) == [1]
    connections[1].close()
    listener.theirs.close()


def test_silent_strangers_delay_nobody():
    process_0 = Arrivals(2)
    strangers = [process_0.stranger(b"[") for _ in range(20)]
    started = time.monotonic()
    process_0.join(1, 2)
    assert time.monotonic() - started < 2
    assert process_0.wait() == [1]
    for stranger in strangers:
        stranger.close()


def test_a_stranger_is_closed_after_a_while_however_slowly_it_speaks(monkeypatch):
    monkeypatch.setattr(_connection, "_IDENTIFY_SECONDS", 0.5)
    process_0 = Arrivals(2)
    with process_0.stranger() as stranger:
        stranger.settimeout(5)
        deadline = time.monotonic() + 5
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                stranger.sendall(b" ")
                time.sleep(0.05)
        assert time.monotonic() < deadline
    process_0.join(1, 2)
    assert process_0.wait() == [1]


def test_a_late_process_is_named(monkeypatch, capfd):
    monkeypatch.setattr(_connection, "_REPORT_SECONDS", 0.2)
    process_0 = Arrivals(4)
    first, _ = in_background(process_0.join, 1, 4)
    time.sleep(0.6)
    others = [in_background(process_0.join, index, 4)[0] for index in (3, 2)]
    assert process_0.wait() == [1, 2, 3]
    for thread in (first, *others):
        thread.join(20)
    assert "looplm: process 0: waiting for processes 2, 3 of 4\n" in capfd.readouterr().err


def test_processes_that_do_not_come_are_named_to_all_that_came():
    process_0 = Arrivals(4, timeout=0.5)
    thread, said = in_background(process_0.join, 2, 4)
    process_0.wait()
    thread.join(20)
    assert said == [process_0.error]
    assert process_0.error == (
        "processes 1, 3 of 4 did not arrive within 0 seconds; start each on its host, with the same --coordinator and "
        "--processes"
    )


def test_one_that_leaves_before_all_are_there_is_missing_again():
    process_0 = Arrivals(3)
    with process_0.stranger(json.dumps([TOKEN.hex(), 1, 3]).encode() + b"\n"):
        time.sleep(0.3)
    time.sleep(0.3)
    second, _ = in_background(process_0.join, 2, 3)
    time.sleep(0.3)
    assert process_0.connections is None
    process_0.join(1, 3)
    second.join(20)
    assert process_0.wait() == [1, 2]


def test_two_processes_with_one_number_are_named(capfd):
    process_0 = Arrivals(3)
    first, said = in_background(process_0.join, 1, 3)
    time.sleep(0.3)
    second, _ = in_background(process_0.join, 1, 3)
    first.join(20)
    assert said[0].startswith(f"two processes were started as --process 1 (on {HOST}); start all processes with")
    process_0.join(2, 3)
    second.join(20)
    assert process_0.wait() == [1, 2]
    assert "process 0: two processes were started as --process 1" in capfd.readouterr().err


def test_another_number_of_processes_is_named():
    process_0 = Arrivals(2)
    with pytest.raises(UserError, match="process 3 was started with --processes 4, process 0 with 2"):
        process_0.join(3, 4)
    process_0.join(1, 2)
    assert process_0.wait() == [1]


def test_another_secret_is_a_stranger(capfd):
    process_0 = Arrivals(2)
    with pytest.raises(UserError, match="did not answer within 0 seconds \\(it closed the connection\\)"):
        process_0.join(1, 2, token=bytes(16), timeout=0)
    process_0.join(1, 2)
    assert process_0.wait() == [1]
    assert f"closed a connection from {HOST}, which is not a process of this run" in capfd.readouterr().err


def test_process_0_may_come_last(monkeypatch, capfd):
    monkeypatch.setattr(_connection, "_REPORT_SECONDS", 0.2)
    with socket.create_server((HOST, 0)) as taken:
        address = taken.getsockname()
    thread, said = in_background(reach_coordinator, address, TOKEN, 1, 2)
    time.sleep(1)
    with socket.create_server(address) as listener:
        connections = Rendezvous(TOKEN, 2).accept(listener)
    thread.join(20)
    for connection in (*connections.values(), *said):
        connection.close()
    line = f"looplm: process 1: waiting for process 0 at {HOST}:{address[1]} (Connection refused)\n"
    assert line in capfd.readouterr().err


def test_a_taken_port_is_one_line():
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as caught:
            join(JoinOptions(coordinator=f"{HOST}:{port}", processes=2, process=0))
    assert str(caught.value) == (
        f"process 0 cannot listen on port {port} of {HOST}: another program has it; choose another port in "
        "--coordinator, the same on all processes"
    )


def test_process_0_on_another_host_is_one_line():
    with pytest.raises(UserError, match="start process 0 on the host of --coordinator, or set JAX_COORDINATOR_BIND"):
        join(JoinOptions(coordinator="192.0.2.1:9000", processes=2, process=0))


def test_a_name_that_nobody_knows_is_one_line():
    with pytest.raises(UserError, match=r"process 0 cannot listen on port 9000 of nowhere\.invalid"):
        join(JoinOptions(coordinator="nowhere.invalid:9000", processes=2, process=0))


def test_outside_a_pod_nothing_says_which_processes_there_are(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="this is neither a TPU pod nor a Slurm job"):
        join(JoinOptions(automatic=True))


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_on_all_of_them_and_learns_it_later(stopped, monkeypatch):
    """The stopped process sends no heartbeats and reads nothing until the others have ended."""
    monkeypatch.setattr(_process_group, "_LAST_SECONDS", 0.2)  # seconds for which process 0 waits for the others
    ours, theirs = socket.socketpair()
    ended = {0: queue.SimpleQueue(), 1: queue.SimpleQueue()}

    def peer(index, sock, silence):
        connection = Connection(sock, silence=silence)
        Peer(index, 2, {1 - index: connection}, lambda *said: ended[index].put(said))
        return connection

    connections = [peer(1 - stopped, ours, 0.3)]
    said, status = ended[1 - stopped].get(timeout=20)
    lost = "lost, silent for 60 seconds, stopped or its machine gone; start all processes again"
    assert said.startswith(f"process {1 - stopped}: process {stopped}: {lost}")
    assert status == LOST
    connections.append(peer(stopped, theirs, 20))
    said, status = ended[stopped].get(timeout=20)
    assert said.startswith(f"process {stopped}: {lost}")
    assert status == LOST
    for connection in connections:
        connection.close()
