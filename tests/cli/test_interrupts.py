import os
import signal

import pytest

from looplm_jax.cli._common import interrupt_calls


@pytest.fixture(autouse=True)
def python_handler():
    """Installs Python's own handler, which raises KeyboardInterrupt, and restores that of pytest."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_interrupt_calls_and_the_second_raises():
    calls = []
    with interrupt_calls(lambda: calls.append(True)):
        os.kill(os.getpid(), signal.SIGINT)
        assert calls == [True]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert calls == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_arrives_while_the_handler_is_installed(monkeypatch):
    calls, install = [], signal.signal

    def install_and_interrupt(number, handler):
        before = install(number, handler)
        if handler is not signal.default_int_handler:
            os.kill(os.getpid(), signal.SIGINT)
        return before

    monkeypatch.setattr(signal, "signal", install_and_interrupt)
    with interrupt_calls(lambda: calls.append(True)):
        assert calls == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
