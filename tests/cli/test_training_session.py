import os
import signal

import pytest

from looplm_jax.cli import train as train_command
from looplm_jax.cli.main import main
from looplm_jax.training._run_folder import RunFolder
from looplm_jax.training.run import Outcome


class Left(BaseException):
    """Raised instead of ending the process."""


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        (signal.SIGTERM, 143, "stopped by SIGTERM at step 7; the same command resumes there"),
        (signal.SIGINT, 130, "stopped by SIGINT at step 7; the same command resumes there"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_a_stopped_run_leaves_at_once(end, status, message, recipe_file, tmp_path, monkeypatch, capsys):
    def train(recipe, out, **_):
        if isinstance(end, BaseException):
            raise end
        return Outcome(folder=RunFolder(path=out), step=7, skipped=0, stopped_by=end)

    def leave(given):
        assert given == status
        raise Left

    monkeypatch.setattr(train_command, "train", train)
    monkeypatch.setattr(os, "_exit", leave)
    folder = tmp_path / "a [path] with :smile: and many words, " / ("x" * 100)
    with pytest.raises(Left):
        main(["train", "--recipe", str(recipe_file), "--out", str(folder)])
    announcement, last = capsys.readouterr().err.splitlines()
    assert announcement.endswith(f"writing to {folder}")
    assert last == f"looplm: {message}"
