import os
import signal
import threading
import time

import pytest

from looplm_jax.training._stopping import Stopped, StopRequest


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _hangups_are_not_ignored():
    """Restores the default of SIGHUP, which `nohup` sets to ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_remembered_until_someone_asks(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check()
        send(number)
        with pytest.raises(Stopped) as stopped:
            stop.check()
        assert stopped.value.signal is number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_of_the_terminal_that_was_ignored_before_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(number)
            stop.check()
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_second_interrupt_is_not_remembered():
    with StopRequest():
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_work_in_a_thread_gives_its_result_or_its_error():
    def fail():
        raise LookupError("of the thread")

    with StopRequest() as stop:
        assert stop.run(lambda: threading.current_thread() is threading.main_thread()) is False
        with pytest.raises(LookupError, match="of the thread"):
            stop.run(fail)


def test_work_in_a_thread_is_left_behind():
    release = threading.Event()

    def work():
        send(signal.SIGTERM)
        release.wait(60)

    started = time.monotonic()
    with StopRequest() as stop, pytest.raises(Stopped, match="SIGTERM"):
        stop.run(work)
    assert time.monotonic() - started < 5
    release.set()


def test_elsewhere_than_in_the_main_thread_no_request_comes():
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with StopRequest() as stop:
            seen.append(signal.getsignal(signal.SIGTERM))
            stop.check()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
