"""The signals that ask a command to stop."""

import signal


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns Ctrl-C, SIGTERM, and SIGHUP unless this process was started with SIGHUP ignored, as `nohup` does."""
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        return (signal.SIGTERM, signal.SIGINT)
    return (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
