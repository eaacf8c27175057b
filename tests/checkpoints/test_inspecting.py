import json

import pytest
from checkpoint_cases import make_metadata, make_state

from looplm_jax.checkpoints import CheckpointStore, inspect_steps
from looplm_jax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (1, 2, 3):
        store.save(step, make_state(step), make_metadata(step), permanent=step == 1)
    store.close()
    return tmp_path


def test_every_sound_step_is_described(folder):
    reports = inspect_steps(str(folder))
    assert [(report.step, report.damage, report.permanent) for report in reports] == [
        (3, None, False),
        (2, None, False),
        (1, None, True),
    ]
    assert reports[0].parameters == 64 * 32 + 2 * 8 * 8 + 8
    assert reports[0].bytes > 2 * 4 * 64 * 32
    values = json.loads(json.dumps(reports[0].to_json()))
    assert values["config"] == make_metadata().config
    assert values["arrays"]["params.core.kernel"] == "bfloat16[2,8,8]"


def test_each_damaged_step_is_named(folder):
    max((folder / "3").rglob("d/*"), key=lambda path: path.stat().st_size).write_bytes(b"")
    (folder / "2" / "sidecar" / "data.json").write_text("{")
    damages = [report.damage for report in inspect_steps(str(folder))]
    assert damages[0].startswith("array ")
    assert damages[1].startswith("sidecar/data.json cannot be read")
    assert damages[2] is None
    assert json.dumps(inspect_steps(str(folder), step=2)[0].to_json())


def test_a_step_that_is_not_there_is_refused(folder):
    with pytest.raises(UserError, match="holds no step 9"):
        inspect_steps(str(folder), step=9)
