import pytest

from looplm_jax import codec
from looplm_jax.config import ModelConfig, Recipe, Stage
from looplm_jax.errors import UserError
from looplm_jax.resume import check_same_run

RECIPE = Recipe(
    name="tiny",
    model=ModelConfig(vocab_size=64, width=16, mlp_width=32, num_layers=1, num_heads=2),
    stages=(Stage(name="pretrain", steps=10, batch_size=2, sequence_length=8),),
)
SAVED = {**codec.to_dict(RECIPE), "tokenizer": "abc"}


def check(changes, fingerprint="abc"):
    check_same_run("runs/x", SAVED, {**codec.to_dict(codec.override(RECIPE, changes)), "tokenizer": fingerprint})


def test_the_same_run_passes():
    check({})


@pytest.mark.parametrize(
    "path",
    [
        "compute.loss_chunk",
        "mesh.fsdp",
        "checkpoint.every",
        "evaluation.every",
        "guard.window",
        "log_every",
        "stages.pretrain.context",
    ],
)
def test_what_changes_no_result_may_differ(path):
    check({path: 4, "description": "other"})


def test_the_same_data_may_be_elsewhere_and_a_batch_in_other_parts():
    check({"stages.pretrain.accumulation": 2, "data.root": "elsewhere", "data.tokenizer": "moved.model", "name": "x"})


def test_the_differing_fields_are_named():
    with pytest.raises(UserError) as error:
        check({"model.width": 32, "stages.pretrain.beta": 0.1})
    assert str(error.value) == (
        "run folder runs/x was trained with another configuration "
        "(model.width: 16, now 32; stages.pretrain.beta: 0.05, now 0.1); use another --out or the saved recipe"
    )


def test_another_tokenizer_is_named():
    with pytest.raises(UserError, match=r"\(tokenizer: abc, now def\)"):
        check({}, "def")


def test_many_differences_are_counted():
    changes = {f"model.{name}": 4 for name in ("width", "mlp_width", "num_layers", "num_heads", "vocab_size")}
    changes["seed"] = 3
    changes["model.head_dim"] = 2
    with pytest.raises(UserError, match="; and 2 more"):
        check(changes)


def test_a_field_that_one_side_lacks_is_named():
    with pytest.raises(UserError, match=r"\(new: absent, now 1\)"):
        check_same_run("runs/x", SAVED, {**SAVED, "new": 1})
