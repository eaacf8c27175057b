"""The signals that ask a command to stop."""

import signal


def stop_signals() -> tuple[signal.Signals, ...]:
    """Returns SIGTERM, and SIGINT and SIGHUP unless this process was started with them ignored.

    `nohup` starts a command with SIGHUP ignored, and shell scripts start background jobs with SIGINT ignored, so that
    signals from the terminal do not end them.
    """
    from_terminal = (number for number in (signal.SIGINT, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN)
    return (signal.SIGTERM, *from_terminal)
