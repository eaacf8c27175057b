"""The model card: only facts of the checkpoint and its run folder, and code that runs."""

import dataclasses
import json
import re

import pytest
from tiny_checkpoints import SYMBOLS, TINY, tiny_recipe, write_checkpoint

from looplm_jax.checkpoints import Restored, restore_params
from looplm_jax.config import DataConfig, Objective, SourceConfig, Stage, StartConfig
from looplm_jax.convert import convert_to_hf
from looplm_jax.convert._layout import array_shapes
from looplm_jax.convert._model_card import TrainingRecord, model_card, training_record
from looplm_jax.models._looplm import count_params


def card(step=40, evaluation=None, **changes):
    record = TrainingRecord(recipe=tiny_recipe(**changes), step=step, evaluation=evaluation)
    return model_card(record, dtype="bfloat16")


def rows(text):
    """Returns the cells of every row of every table."""
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if "|" in line]


def test_the_head_is_metadata_that_the_hub_reads():
    yaml = pytest.importorskip("yaml")
    _, head, _ = card().split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ouro", "looped", "looplm_jax", "custom_code"],
    }


def test_what_the_model_is():
    text = card()
    assert "# tiny\n\nfor tests\n" in text
    assert ["parameters", f"{count_params(TINY):,} (bfloat16)"] in rows(text)
    assert ["query heads, key/value heads, head width", "4, 2, 6"] in rows(text)
    assert ["loops", "3"] in rows(text)
    assert "tied" not in text
    assert "tied to the embedding" in card(model=dataclasses.replace(TINY, tied_head=True))


def test_every_stage_that_was_trained_as_far_as_it_came():
    objective, rate = "expected loss (Eq. 4), beta 0.05, uniform prior", "0.0003, constant, 0 warm-up steps"
    first = ["pretrain", "30", "4", "32", "3,840", "3", objective, rate]
    assert first in rows(card(step=40))
    assert first in rows(card(step=35))
    assert ["gate", "10", "8", "16", "1,280", "3", objective, rate] in rows(card(step=40))
    assert ["gate", "5 of 10", "8", "16", "640", "3", objective, rate] in rows(card(step=35))
    assert not any(row[0] == "gate" for row in rows(card(step=30)))


def test_a_stage_that_supervises_the_last_loop_alone():
    plain = Stage(name="plain", objective=Objective.LAST_LOSS, steps=3, batch_size=2, sequence_length=8)
    assert "| loss after the last loop |" in card(stages=(plain,))


def test_the_gates_own_stage():
    stage = Stage(name="gate", objective=Objective.GATE, steps=3, batch_size=2, sequence_length=8, min_loops=2)
    text = card(stages=(stage,))
    assert ["gate", "3", "2", "8", "48", "2 to 4", "gate (Eq. 5, 6), as_printed, k 50, gamma 0.005"] in [
        row[:-1] for row in rows(text)
    ]


def test_a_model_that_was_not_trained_here():
    text = card(step=0)
    assert "No training step is recorded in this checkpoint." in text
    assert "AdamW" not in text
    assert "Held-out" not in text


def test_where_it_began_and_what_it_read():
    sources = (SourceConfig(path="books/*.jsonl", weight=0.75), SourceConfig(path="a|b.txt"))
    text = card(start=StartConfig(checkpoint="runs/base"), data=DataConfig(sources=sources, validation_fraction=0.005))
    assert "Began with the parameters of `runs/base`." in text
    assert ["`books/*.jsonl`", "0.75"] in rows(text)
    assert [r"`a\|b.txt`", "1"] in rows(text)
    assert "0.5 % of the documents were held out." in text


def test_names_cannot_break_the_text():
    assert "# two lines\n\n--- no head" in card(name="two\nlines", description="---\nno head")


# The record, from a run folder


def record(run, step=None):
    restored: Restored = restore_params(str(run), array_shapes(TINY), step=step)
    return training_record(str(run), restored)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns a run of forty steps with a log whose last line is incomplete."""
    folder = write_checkpoint(tmp_path_factory.mktemp("card") / "run", step=30)
    write_checkpoint(folder, step=40)
    lines = [
        {"kind": "evaluation", "step": 30, "loss_per_loop": [3.0, 2.0, 1.0]},
        {"kind": "train", "step": 40, "loss": 1.5},
        {"kind": "evaluation", "step": 40, "loss_per_loop": [2.5, 1.5, 0.5]},
    ]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(log + '{"kind": "evaluation", "step": 4')
    return folder


@pytest.mark.parametrize("below", ["", "checkpoints", "checkpoints/40"])
def test_the_last_losses_on_held_out_text(run, below):
    text = model_card(record(run / below), dtype="float32")
    assert "## Held-out text, at step 40" in text
    assert ["1", "2.5000", "12.18"] in rows(text)
    assert ["3", "0.5000", "1.65"] in rows(text)


def test_an_earlier_step_has_its_own_losses(run):
    assert record(run, step=30).evaluation["loss_per_loop"] == [3.0, 2.0, 1.0]


def test_a_checkpoint_without_a_log_says_nothing_of_losses(tmp_path):
    found = record(write_checkpoint(tmp_path / "run"))
    assert found.evaluation is None
    assert "Held-out" not in model_card(found, dtype="float32")


@pytest.mark.transformers
def test_the_code_on_the_card_runs(run, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    convert_to_hf(run, tmp_path / "model")
    text = (tmp_path / "model" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace('"Once"', repr(SYMBOLS.piece(5))), {"FOLDER": str(tmp_path / "model")})
