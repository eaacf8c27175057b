"""The experiments early-exit, kv-sharing, depth and prior on one small text model, through their command."""

import dataclasses
import fcntl
import io
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from text_fixtures import with_documents

from experiments import command, text_models
from experiments.__main__ import main
from experiments.depth import DEPTH
from experiments.early_exit import AHEAD, EARLY_EXIT, PRINTED, STAGE1
from experiments.exit_scores import FIXED, GATE, families, score_families
from experiments.frame import Scale
from experiments.kv_sharing import KV_SHARING, quality, whole_rows
from experiments.prior import UNIFORM
from experiments.text_models import TEXT_CELLS, TextModels
from looplm_jax.errors import UserError
from looplm_jax.evaluation._evaluate import depth_sweep
from looplm_jax.inference import CacheStrategy
from looplm_jax.loading import load
from looplm_jax.training._run_folder import RunFolder
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import Outcome

MODEL = TEXT_CELLS[Scale.SMOKE].model(0)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Returns a folder in which early-exit was run, so that the text model is trained."""
    root = with_documents(tmp_path_factory.mktemp("experiments"))
    assert main(["early-exit", "--root", str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def models(root):
    return TextModels(folder=root / "text-models", console=Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def loaded(models):
    return load(models.stage1(MODEL))


@pytest.fixture(scope="module")
def held_out(models, loaded):
    return models.held_out(MODEL, loaded, sequences=8, sequence_length=64, batch_size=4)


def result_of(root, name):
    (record,) = json.loads((root / name / "smoke" / "results.json").read_text())["records"]
    return record["result"]


@pytest.mark.slow
def test_early_exit_compares_all_policies_with_both_stages(root):
    result = result_of(root, "early-exit")
    assert set(result["families"]) == {STAGE1, PRINTED, AHEAD, *families(4)} - {GATE}
    assert result["loops"] == 4
    assert result["tokens_per_second"] > 0
    assert result["pairs"][0]["pair"] == [PRINTED, STAGE1]
    report = (root / "early-exit" / "smoke" / "report.md").read_text()
    assert "Q-exit, look-ahead gate" in report
    assert (root / "early-exit" / "smoke" / "exits.png").stat().st_size > 0


@pytest.mark.slow
def test_the_other_experiments_find_the_model_trained(root, capsys):
    run = next((root / "text-models").glob("demo-seed0-*/stage1"))
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["depth", "--root", str(root)]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    assert "compiling stage" not in capsys.readouterr().err
    result = result_of(root, "depth")
    assert result["loops"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert "67.45" in (root / "depth" / "smoke" / "report.md").read_text()


@pytest.mark.slow
def test_a_share_of_the_grid_of_priors_runs(root):
    assert main(["prior", "--root", str(root), "--share", "1/2"]) == 0
    result = result_of(root, "prior")
    assert result["prior"] == UNIFORM
    assert len(result["held_out"]["loss"]) == 2 * result["loops"] == 8
    assert sum(result["held_out"]["exit_pdf"]) == pytest.approx(1)
    assert 0 < result["exit_entropy"] <= np.log(4) + 1e-6
    assert result["tokens_per_second"] > 0
    assert "1 of 2 cells" in (root / "prior" / "smoke" / "report.md").read_text()


@pytest.mark.slow
def test_kv_sharing_runs_at_smoke_scale(root):
    assert main(["kv-sharing", "--root", str(root)]) == 0
    result = result_of(root, "kv-sharing")
    assert result["bytes"]["full"] == 4 * result["bytes"]["last"] == 4 * result["bytes"]["first"]
    assert result["greedy"]["full"] == {"whole": 1.0, "before_first_difference": 1.0}
    assert result["told"]["full, shared prefill"]["loss_difference"] == pytest.approx(0, abs=1e-5)
    report = (root / "kv-sharing" / "smoke" / "report.md").read_text()
    assert "18.73" in report
    assert (root / "kv-sharing" / "smoke" / "sharing.png").stat().st_size > 0


@pytest.mark.slow
def test_fixed_depths_and_the_ends_of_every_family_are_those_of_the_depth_sweep(loaded, held_out):
    scored = score_families(loaded.model, loaded.params, held_out, families(4))
    sweep = depth_sweep(loaded.model, loaded.params, held_out, max_loops=4).curve
    once = np.ones((1, scored[FIXED].tokens.size), int)
    fixed = scored[FIXED].resampled(once)
    np.testing.assert_allclose(fixed.loops[0], [1, 2, 3, 4])
    np.testing.assert_allclose(fixed.loss[0], sweep.loss, rtol=1e-5)
    np.testing.assert_allclose(fixed.accuracy[0], sweep.accuracy, rtol=1e-5)
    assert fixed.area(fixed.loss)[0] == pytest.approx(sweep.area, rel=1e-5)
    for name in (GATE, "confidence", "margin"):
        np.testing.assert_allclose(scored[name].resampled(once).loops[0, [0, -1]], [1, 4])
    for name in ("state difference", "KL of predictions", "entropy change"):  # never at loop 1
        np.testing.assert_allclose(scored[name].resampled(once).loops[0, [0, -1]], [2, 4], atol=0.01)


@pytest.mark.slow
def test_a_family_of_other_points_of_the_same_line_has_the_same_area(loaded, held_out):
    policies = families(4)[FIXED]
    scored = score_families(loaded.model, loaded.params, held_out, {"all": policies, "middle": policies[1:3]})
    once = np.ones((1, scored["all"].tokens.size), int)
    whole = scored["all"].resampled(once)
    for name in ("all", "middle"):
        joined = scored[name].resampled(once).joined(whole)
        assert joined.area(joined.loss)[0] == pytest.approx(whole.area(whole.loss)[0])
        assert joined.at([1, 2.5, 4]).loss == pytest.approx(whole.at([1, 2.5, 4]).loss)


@pytest.mark.slow
def test_with_a_plane_for_each_loop_being_told_is_the_forward_pass_whatever_was_prefilled(loaded, held_out):
    texts = whole_rows(held_out)
    told = quality(loaded.model, loaded.params, texts, 4, (CacheStrategy.FULL, CacheStrategy.LAST))
    output = jax.jit(loaded.model.apply)({"params": loaded.params}, jnp.asarray(texts[:, :-1]))
    logits = np.asarray(output.hidden[-1] @ loaded.params["head"], np.float64)[:, 31:]
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = -np.take_along_axis(log_probs, texts[:, 32:, None], axis=-1).mean()
    assert told["full, full prefill"]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert told["full, shared prefill"]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert abs(told["last, full prefill"]["loss"] - wanted) > 1e-6


@pytest.mark.slow
def test_rows_of_many_documents_are_no_texts(held_out):
    with pytest.raises(UserError, match="no held-out document fills a sequence"):
        whole_rows([batch for batch in held_out if False])


@pytest.mark.slow
def test_a_second_process_waits_for_the_first(models):
    said = io.StringIO()
    waiting = TextModels(folder=models.folder, console=Console(file=said))
    with (models.folder / f"{MODEL.name}-stage1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: time.sleep(0.2) or fcntl.flock(lock, fcntl.LOCK_UN))
        thread.start()
        waiting.stage1(MODEL)
        thread.join()
    assert "another process makes" in said.getvalue()


@pytest.mark.slow
def test_a_signal_stops_the_cell(models, monkeypatch):
    outcome = Outcome(folder=RunFolder(path=models.folder), step=1, skipped=0, stopped_by=15)
    monkeypatch.setattr(text_models, "train", lambda *_, **__: outcome)
    with pytest.raises(Stopped):
        models.stage1(MODEL)


def test_results_elsewhere_have_models_of_their_own(tmp_path):
    usual = TextModels.beside(tmp_path / "depth" / "cpu" / "cells" / "a", "depth", Console())
    assert usual.folder == tmp_path / "text-models"
    elsewhere = TextModels.beside(tmp_path / "mine" / "cells" / "a", "depth", Console())
    assert elsewhere.folder == tmp_path / "mine" / "text-models"


@pytest.mark.slow
def test_a_checkpoint_is_studied_in_place_of_a_model_of_ones_own(models):
    trained = models.stage1(MODEL)
    published = dataclasses.replace(MODEL, checkpoint=str(trained))
    assert models.stage1(published) == trained
    assert published.name != MODEL.name


@pytest.mark.parametrize("experiment", [EARLY_EXIT, KV_SHARING, DEPTH], ids=lambda each: each.name)
def test_every_scale_has_cells_of_their_own_names(experiment):
    for scale in experiment.scales:
        names = [cell.name for cell in experiment.cells(scale)]
        assert len(set(names)) == len(names) > 0
        assert all(json.dumps(dict(cell.settings)) for cell in experiment.cells(scale))
    assert command.EXPERIMENTS[experiment.name] is experiment
