import sys
import types

import pytest

from looplm_jax.errors import UserError
from looplm_jax.training._loggers import WandbLog


def test_where_it_is_missing_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb needs Weights & Biases: `pip install wandb`"):
        WandbLog("project", name="run", config={})


def test_scalars_go_to_one_run(monkeypatch):
    lines, asked = [], {}
    fake_run = types.SimpleNamespace(log=lambda values, step: lines.append((step, values)), finish=lambda: None)
    fake = types.SimpleNamespace(init=lambda **given: asked.update(given) or fake_run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = WandbLog("project", name="run", config={"seed": 0})
    log.write(3, {"train/loss": 1.5})
    log.close()
    assert lines == [(3, {"train/loss": 1.5})]
    assert asked == {"project": "project", "name": "run", "id": "run", "resume": "allow", "config": {"seed": 0}}
