"""Complete runs in this process: their run folders, how they resume, and what they refuse."""

import collections
import dataclasses
import functools
import io
import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest
from rich.console import Console
from training_cases import GATE, RECIPE, STAGE, assert_identical, one_stage

from looplm_jax.checkpoints import CheckpointStore, inspect_steps, read_metadata
from looplm_jax.codec import to_dict
from looplm_jax.config import DataConfig, EvaluationConfig, GuardConfig, MeshConfig, SourceConfig
from looplm_jax.data import validation_batches
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import evaluate_held_out
from looplm_jax.evaluation._reports import write_run_report
from looplm_jax.loading import load
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training import _batches as batches
from looplm_jax.training import _compile as program
from looplm_jax.training import _setup as setup
from looplm_jax.training import run
from looplm_jax.training._metrics import Reporter, read_metrics
from looplm_jax.training._run_folder import read_recipe
from looplm_jax.training._state import abstract_state

TOTAL = STAGE.steps + GATE.steps
RATES = ("tokens_per_second", "model_flops_per_second")


def evaluate(model, params, held_out):
    """Returns a cheap number that differs for any two sets of parameters."""
    assert held_out.num_sequences == RECIPE.evaluation.sequences
    return {"sum": float(sum(abs(np.asarray(leaf, np.float64)).sum() for leaf in jax.tree.leaves(params)))}


def train(folder, recipe=RECIPE):
    """Returns the outcome, and the lines that were printed."""
    said = io.StringIO()
    outcome = run.train(recipe, folder, evaluate=evaluate, console=Console(file=said, soft_wrap=True))
    return outcome, said.getvalue()


def final_state(folder, recipe=RECIPE, step=None):
    mesh, model = make_mesh(recipe.mesh), LoopLM(recipe.model, recipe.compute)
    stages = {stage.name: stage for stage in recipe.stages}

    def describe(metadata):
        return abstract_state(recipe, model, stages[metadata.extra["stage"]], mesh)

    return CheckpointStore(folder / "checkpoints", keep=9).restore(describe, step).state


def metrics(folder):
    """Returns every line of the metrics without the fields that depend on the clock."""
    return [
        {name: value for name, value in row.items() if name not in RATES and not name.startswith("seconds_in_")}
        for row in read_metrics(folder)
    ]


@pytest.fixture(scope="module")
def traces():
    return collections.Counter()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, traces):
    """Returns a run that was never stopped, and counts how often its programs are traced."""
    make = program.make_train_step

    def counting(recipe, model, stage, *, first_step, loops):
        step = make(recipe, model, stage, first_step=first_step, loops=loops)

        @functools.wraps(step)
        def traced(state, batch):
            traces[stage.name, loops] += 1
            return step(state, batch)

        return traced

    folder = tmp_path_factory.mktemp("finished") / "run"
    program.compiled_step.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_train_step", counting)
        outcome, said = train(folder)
    assert (outcome.step, outcome.skipped, outcome.stopped_by) == (TOTAL, 0, None)
    assert "compiling stage pretrain for" in said
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_each_program_is_traced_once(finished, traces):
    assert traces == {("pretrain", 1): 1, ("pretrain", 2): 1, ("gate", 2): 1}


def test_a_run_leaves_what_it_promises(finished):
    assert {path.name for path in finished.iterdir()} == {"config.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert read_recipe(finished / "config.json") == RECIPE
    assert next((finished / "tensorboard").iterdir()).name.startswith("events.out.tfevents")
    steps = {report.step: report for report in inspect_steps(str(finished))}
    assert sorted(steps) == [STAGE.steps, TOTAL - 2, TOTAL]
    assert [step for step, report in steps.items() if report.permanent] == [TOTAL, STAGE.steps]
    assert not any(report.damage for report in steps.values())
    metadata = read_metadata(str(finished))
    assert metadata.config == to_dict(RECIPE)
    assert (metadata.tokenizer_kind, metadata.extra) == ("symbols", {"stage": "gate"})


def test_the_metrics_tell_every_step(finished):
    rows = read_metrics(finished)
    training = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in training] == list(range(1, TOTAL + 1))
    assert [row["stage"] for row in training] == ["pretrain"] * STAGE.steps + ["gate"] * GATE.steps
    assert {row["loops"] for row in training if row["stage"] == "pretrain"} == {1, 2}
    for row in training:
        assert len(row["loss_per_loop"]) == len(row["exit_pdf"]) == row["loops"]
        assert sum(row["exit_pdf"]) == pytest.approx(1, abs=1e-5)
        assert all(row[name] > 0 for name in ("tokens", "gradient_norm", *RATES))
    # The last step of a schedule has its final rate, which is 0 here.
    assert [row["step"] for row in training if row["learning_rate"] <= 0] == [STAGE.steps]
    # Every third step, and at the end of each stage.
    assert [row["step"] for row in rows if row["kind"] == "evaluation"] == [3, 6, 9, 10]


def test_stage_two_starts_from_the_parameters_of_stage_one(finished):
    before, after = final_state(finished, step=STAGE.steps), final_state(finished)
    assert int(after.optimizer[1].count) == GATE.steps
    for group in set(before.params) - {"gate"}:
        assert_identical(after.params[group], before.params[group])
    assert not np.array_equal(after.params["gate"]["kernel"], before.params["gate"]["kernel"])


def test_a_finished_run_started_again_does_nothing(copy):
    def content():
        return {
            path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and "tensorboard" not in str(path)
        }

    before = content()
    outcome, said = train(copy)
    assert (outcome.step, outcome.stopped_by) == (TOTAL, None)
    assert said == f"resuming from step {TOTAL} of stage gate\n"
    assert content() == before


def damage(folder, step):
    """Flips a bit in the arrays of a step."""
    for path in (folder / "checkpoints" / str(step) / "state").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, finished):
    damage(copy, TOTAL)
    _, said = train(copy)
    warning, going_on, *_ = said.splitlines()
    assert warning.startswith(f"warning: step {TOTAL} is damaged: ")
    assert warning.endswith(f"; going back to step {TOTAL - 2}")
    assert going_on == f"resuming from step {TOTAL - 2} of stage gate"
    assert_identical(final_state(copy), final_state(finished))
    assert metrics(copy) == metrics(finished)


def test_a_run_goes_on_from_the_end_of_an_earlier_stage(copy, finished):
    for step in (TOTAL - 2, TOTAL):
        shutil.rmtree(copy / "checkpoints" / str(step))
    _, said = train(copy)
    assert f"resuming from step {STAGE.steps} of stage pretrain" in said
    assert "compiling stage pretrain" not in said
    assert_identical(final_state(copy), final_state(finished))
    assert metrics(copy) == metrics(finished)


def hang(model, params, held_out):
    """Stands in for an evaluation that is stopped."""
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(5)


@pytest.mark.slow
def test_an_evaluation_that_a_signal_cut_short_is_made_up(tmp_path, finished):
    folder = tmp_path / "run"
    outcome = run.train(RECIPE, folder, evaluate=hang, console=Console(file=io.StringIO()))
    assert (outcome.step, outcome.stopped_by) == (3, signal.SIGTERM)
    assert [(report.step, report.permanent) for report in inspect_steps(str(folder))] == [(3, False), (2, False)]
    train(folder)
    assert_identical(final_state(folder), final_state(finished))
    assert metrics(folder) == metrics(finished)


def test_the_last_evaluation_of_a_stage_is_made_up_too(copy, finished):
    for step in (TOTAL - 2, TOTAL):
        shutil.rmtree(copy / "checkpoints" / str(step))
    rows = [row for row in read_metrics(copy) if (row["kind"], row["step"]) != ("evaluation", STAGE.steps)]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(copy)
    assert metrics(copy) == metrics(finished)


def test_a_run_that_is_stopped_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "prepare_run", lambda *_: hang(None, None, None))
    outcome, _ = train(tmp_path / "run")
    assert (outcome.step, outcome.stopped_by) == (0, signal.SIGTERM)
    assert not (tmp_path / "run").exists()


def test_no_good_checkpoint_is_one_line(copy):
    for step in (STAGE.steps, TOTAL - 2, TOTAL):
        damage(copy, step)
    with pytest.raises(UserError, match=rf"no valid checkpoint in .*: step {TOTAL} is damaged: .*restore a copy"):
        train(copy)


def test_how_a_run_is_computed_and_saved_may_change(copy):
    recipe = dataclasses.replace(
        RECIPE, log_every=7, guard=GuardConfig(window=RECIPE.guard.window, patience=3), evaluation=EvaluationConfig()
    )
    assert train(copy, recipe)[0].step == TOTAL
    assert read_recipe(copy / "config.json") == recipe


def gate_with(**changes):
    return dataclasses.replace(RECIPE, stages=(STAGE, dataclasses.replace(GATE, **changes)))


def resume_as_users_do(folder, recipe=RECIPE):
    """Trains the last steps again, in programs of XLA's default emitters.

    With the older ones, which the tests compile with, programs that differ elsewhere may round a loop differently.
    """
    compile_ = jax.stages.Lowered.compile
    shutil.rmtree(folder / "checkpoints" / str(TOTAL))
    with pytest.MonkeyPatch.context() as patch:
        options = {"xla_cpu_use_fusion_emitters": True}
        patch.setattr(jax.stages.Lowered, "compile", lambda lowered: compile_(lowered, compiler_options=options))
        patch.setattr(program, "compiled_step", functools.cache(program.compiled_step.__wrapped__))
        train(folder, recipe)


@pytest.fixture(scope="module")
def resumed(finished, tmp_path_factory):
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("resumed") / "run")
    resume_as_users_do(folder)
    return folder


# Not 2: the spread of two losses that happen to be close makes the next one a spike.
@pytest.mark.parametrize(
    "window", [pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow), 200]
)
def test_a_run_is_resumed_bit_for_bit_with_another_window_of_its_guard(copy, resumed, window):
    recipe = dataclasses.replace(RECIPE, guard=GuardConfig(window=window))
    resume_as_users_do(copy, recipe)
    ours, untouched = final_state(copy, recipe), final_state(resumed)
    assert_identical(ours.params, untouched.params)
    assert_identical(ours.optimizer, untouched.optimizer)
    newest = np.asarray(untouched.guard.losses)[: int(untouched.guard.accepted)][-window:]
    assert sorted(np.asarray(ours.guard.losses)[: len(newest)]) == sorted(newest)


def test_a_run_is_resumed_with_its_batches_in_other_parts(copy, finished):
    shutil.rmtree(copy / "checkpoints" / str(TOTAL))
    recipe = gate_with(accumulation=2)
    train(copy, recipe)
    ours, untouched = final_state(copy, recipe), final_state(finished)
    for a, b in zip(jax.tree.leaves(ours.params), jax.tree.leaves(untouched.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert [row["loss"] for row in metrics(copy) if row["kind"] == "train"] == pytest.approx(
        [row["loss"] for row in metrics(finished) if row["kind"] == "train"], rel=1e-5
    )


def test_the_random_keys_do_not_depend_on_the_environment(finished):
    with jax.default_prng_impl("rbg"):
        assert final_state(finished).key.shape == (2,)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"{",
        b"[" * 100_000,
        *(pytest.param(rest, marks=pytest.mark.slow) for rest in (b"", b"\0" * 50, b"[]", b"\xff")),
    ],
)
def test_a_missing_or_damaged_config_is_made_again_from_a_checkpoint(content, copy):
    wanted = (copy / "config.json").read_bytes()
    (copy / "config.json").unlink()
    if content is not None:
        (copy / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"seed: 0, now 1\); use another --out"):
        train(copy, dataclasses.replace(RECIPE, seed=1))
    assert train(copy)[0].step == TOTAL
    assert (copy / "config.json").read_bytes() == wanted
    assert load(copy).recipe == RECIPE


def test_a_damaged_config_without_a_checkpoint_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is missing or damaged, and no checkpoint says what was trained"):
        train(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        b'{"kind": "train", "step": 1}\n\xff\xfe',
        *(pytest.param(rest, marks=pytest.mark.slow) for rest in (b"{}", b"\0" * 30, b"[" * 100_000)),
    ],
)
def test_a_damaged_line_of_metrics_does_not_keep_a_run_from_resuming(line, finished, copy):
    shutil.rmtree(copy / "checkpoints" / str(TOTAL))
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join([*lines[:3], line, b"\n", *lines[3:]]))
    outcome, said = train(copy)
    assert outcome.step == TOTAL
    assert f"warning: {copy / 'metrics.jsonl'}:{4 + line.count(10)}: not a line of metrics; left out" in said
    assert [row for row in metrics(copy) if "stage" in row or row["kind"] != "train"] == metrics(finished)
    assert "report.md" in write_run_report(copy, RECIPE)


def test_steps_make_only_explicit_transfers(tmp_path, monkeypatch):
    """From the report of the first step to that of the last but one: reads batches, runs steps, and logs them."""
    stage, add, guarded = dataclasses.replace(STAGE, min_loops=0), Reporter.add, []

    def add_and_guard(reporter, step, *metrics):
        add(reporter, step, *metrics)
        guarded.append(step < stage.steps)
        jax.config.update("jax_transfer_guard", "disallow" if guarded[-1] else "allow")

    monkeypatch.setattr(Reporter, "add", add_and_guard)
    recipe = one_stage(
        stage,
        mesh=MeshConfig(data=2),
        evaluation=dataclasses.replace(RECIPE.evaluation, every=0),
        checkpoint=dataclasses.replace(RECIPE.checkpoint, every=stage.steps),
    )
    try:
        outcome, _ = train(tmp_path, recipe)
    finally:
        jax.config.update("jax_transfer_guard", None)
    assert outcome.step == len(guarded) == stage.steps
    assert guarded.count(True) == stage.steps - 1


def test_settings_without_effect_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "prepare_run", lambda *_: hang(None, None, None))
    _, said = train(tmp_path / "run", gate_with(final_learning_rate=1e-3))
    assert "note: stages.gate: final_learning_rate=0.001 has no effect with schedule=constant\n" in said


def test_another_configuration_is_refused_with_what_differs(copy):
    other = dataclasses.replace(RECIPE, seed=1, stages=(dataclasses.replace(STAGE, beta=0.5), GATE))
    config = (copy / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"seed: 0, now 1; stages.pretrain.beta: 0.05, now 0.5\); use another --out"):
        train(copy, other)
    assert (copy / "config.json").read_bytes() == config


def test_another_tokenizer_is_refused(copy, monkeypatch):
    other = SymbolTokenizer([f"<{index}>" for index in range(RECIPE.model.vocab_size)])
    monkeypatch.setattr(setup, "run_tokenizer", lambda *_: other)
    with pytest.raises(UserError, match=r"was trained with another configuration \(tokenizer: .*, now .*\)"):
        train(copy)


def test_a_checkpoint_in_the_middle_of_other_data_is_refused(copy, monkeypatch):
    shutil.rmtree(copy / "checkpoints" / str(TOTAL))
    original = batches.data.train_batches
    monkeypatch.setattr(batches.data, "train_batches", lambda *args, seed, **kwargs: original(*args, seed=9, **kwargs))
    with pytest.raises(
        UserError, match=r"the saved position in the data belongs to another setup \(seed: 1 then, 9 now"
    ):
        train(copy)


def poisoned_from(step, monkeypatch):
    """Returns batches whose loss mask is NaN from a step on."""
    to_device, count = run.to_device, iter(range(1000))

    def poison(batch, *where):
        if next(count) >= step:
            batch = dataclasses.replace(batch, loss_mask=np.full_like(batch.loss_mask, np.nan))
        return to_device(batch, *where)

    monkeypatch.setattr(run, "to_device", poison)


def test_a_run_gives_up_after_too_many_skipped_steps_in_a_row(tmp_path, monkeypatch):
    poisoned_from(3, monkeypatch)
    recipe = dataclasses.replace(RECIPE, guard=GuardConfig(patience=2))
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", recipe)
    assert str(caught.value) == (
        "gave up at step 5: 2 steps in a row had a loss or gradient that was not finite, or a spike; what was saved "
        "before stays; lower stage.learning_rate or look at the data, and train with another --out"
    )
    assert [row["skipped"] for row in metrics(tmp_path / "run") if row["kind"] == "train"] == [0, 0, 0, 1, 2]
    assert [report.step for report in inspect_steps(str(tmp_path / "run")) if not report.damage] == [4, 2]
    parameters = jax.tree.leaves(final_state(tmp_path / "run", recipe).params)
    assert all(np.isfinite(leaf).all() for leaf in parameters)


def test_skipped_steps_are_counted_and_do_not_stop_a_run(tmp_path, monkeypatch):
    to_device, count = run.to_device, iter(range(1000))

    def poison_some(batch, *where):
        mask = np.nan if next(count) in (1, 4) else 1.0
        return to_device(dataclasses.replace(batch, loss_mask=np.full_like(batch.loss_mask, mask)), *where)

    monkeypatch.setattr(run, "to_device", poison_some)
    outcome, _ = train(tmp_path / "run")
    assert (outcome.step, outcome.skipped) == (TOTAL, 2)


@pytest.mark.slow  # test_two_processes_train_as_one has its short form
def test_a_run_on_a_mesh_is_evaluated_saved_and_read_back_on_one_device(tmp_path):
    stage = dataclasses.replace(STAGE, min_loops=0, steps=2, warmup_steps=0)
    recipe = one_stage(stage, mesh=MeshConfig(data=2, fsdp=2))
    outcome = run.train(recipe, tmp_path / "run", evaluate=evaluate_held_out, console=Console(file=io.StringIO()))
    assert outcome.step == 2
    loaded = load(tmp_path / "run")
    (evaluation,) = (row for row in read_metrics(tmp_path / "run") if row["kind"] == "evaluation")
    held_out = validation_batches(
        recipe.data, loaded.tokenizer, batch_size=4, sequence_length=16, max_sequences=recipe.evaluation.sequences
    )
    here = evaluate_held_out(loaded.model, loaded.params, held_out)
    np.testing.assert_allclose(evaluation["loss_per_loop"], here["loss_per_loop"], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": MeshConfig(data=16)}, "a mesh of data=16 does not fit 8 device"),
        ({"mesh": MeshConfig(data=3)}, r"stages.pretrain.batch_size=4 .* use a multiple of 3"),
        ({"mesh": MeshConfig(data=1, tensor=4)}, "mesh.tensor=4 does not divide model.num_heads=2"),
        ({"data": DataConfig()}, "data.sources is empty"),
        ({"data": DataConfig(sources=(SourceConfig(path="missing/*.txt"),))}, "no file matches 'missing/.*'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", dataclasses.replace(RECIPE, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (dataclasses.replace(STAGE, sequence_length=6), r"a problem of '.*' takes 8 positions, more than"),
        (dataclasses.replace(STAGE, trainable=("gat",)), r"no parameter group 'gat' to train; did you mean 'gate'\?"),
    ],
)
def test_a_command_that_failed_before_its_first_step_can_be_mended(stage, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", one_stage(stage))
    mended = one_stage(dataclasses.replace(STAGE, steps=2, min_loops=0, warmup_steps=0))
    assert train(tmp_path / "run", mended)[0].step == 2


def test_the_tokenizer_of_a_failed_command_gives_way(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(dataclasses.replace(RECIPE, seed=9))))
    (tmp_path / "run" / "tokenizer.model").write_text("of another vocabulary")
    train(tmp_path / "run", one_stage(dataclasses.replace(STAGE, steps=2, min_loops=0, warmup_steps=0)))
    assert not (tmp_path / "run" / "tokenizer.model").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run; choose another --out"):
        train(tmp_path)
    with pytest.raises(UserError, match=r"notes.txt is a file; choose another --out"):
        train(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"notes.txt/run cannot be written \(Not a directory\)"):
        train(tmp_path / "notes.txt" / "run")
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_process_killed_in_its_first_moments_is_no_hindrance(tmp_path):
    (tmp_path / "config.json.new").write_text('{"name": "ti')
    with pytest.raises(UserError, match="no file matches"):
        train(tmp_path, dataclasses.replace(RECIPE, data=DataConfig(sources=(SourceConfig(path="missing.txt"),))))
