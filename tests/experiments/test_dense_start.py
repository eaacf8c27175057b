"""The dense-start experiment at a small size: all its runs, its report, and no run twice."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from text_fixtures import RESULTS, with_documents

import looplm_jax
from experiments.__main__ import main
from experiments.dense_models import branch_sizes, with_second_norms
from experiments.dense_start import DENSE_START
from experiments.frame import Record, Scale
from experiments.reporting import read_results
from looplm_jax.config import ModelConfig, NormPlacement
from looplm_jax.models._blocks import make_context
from looplm_jax.models._looplm import LoopLM, init_params

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of the results after one run, with a few existing documents."""
    root = with_documents(tmp_path_factory.mktemp("experiments"))
    assert main(["dense-start", "--root", str(root)]) == 0
    return root / "dense-start" / "smoke"


def results_in(folder):
    return [record["result"] for record in json.loads((folder / "results.json").read_text())["records"]]


@pytest.mark.slow
def test_every_start_has_its_course_and_nothing_runs_twice(finished, capsys):
    results = results_in(finished)
    courses = {course["name"]: course for course in results}
    assert list(courses) == ["pre", "sandwich, matched norms", "looped from scratch"]
    assert courses["pre"]["steps"] == [0, 2, 4]
    assert courses["looped from scratch"]["steps"] == [2, 4]
    assert all(len(losses) == 4 for losses in courses["pre"]["losses"])
    assert "back at the dense model's" in (finished / "report.md").read_text()
    assert (finished / "dense-start.png").stat().st_size > 10_000

    metrics = {path: path.read_text() for path in finished.rglob("metrics.jsonl")}
    # One cell is unfinished; its runs are.
    (finished / "cells" / "pre" / "record.json").unlink()
    assert main(["dense-start", "--root", str(finished.parent.parent)]) == 0
    assert "wrote results.json, report.md" in capsys.readouterr().out
    assert len(metrics) == 4
    assert metrics == {path: path.read_text() for path in finished.rglob("metrics.jsonl")}
    assert results_in(finished) == results


@pytest.mark.slow
def test_before_training_loop_one_of_pre_is_the_dense_model(finished):
    first = {course["name"]: course["losses"][0][0] for course in results_in(finished)}
    (dense_loss,) = {course["dense_loss"] for course in results_in(finished)}
    assert first["pre"] == pytest.approx(dense_loss, abs=1e-5)
    assert abs(first["sandwich, matched norms"] - dense_loss) > 1e-5


@pytest.mark.slow
def test_second_norms_are_written_and_nothing_else_changes(finished, tmp_path):
    sandwich = finished / "shared" / "starts" / "sandwich"
    with_second_norms(sandwich, tmp_path / "out", {"attention": jnp.full(1, 2.0), "mlp": 3.0 * jnp.ones(1)})
    before, after = (looplm_jax.load(path).params for path in (sandwich, tmp_path / "out"))
    layers = after["core"]["layers"]
    assert np.unique(layers["attention_post_norm"]["scale"]) == 2.0
    assert np.unique(layers["mlp_post_norm"]["scale"]) == 3.0
    np.testing.assert_array_equal(before["embedding"], after["embedding"])
    np.testing.assert_array_equal(before["core"]["layers"]["mlp"]["up"]["kernel"], layers["mlp"]["up"]["kernel"])


def test_branch_sizes_are_what_the_branches_add():
    """With the weights of all other branches at zero, the stack adds the output of that branch."""
    config = ModelConfig(
        vocab_size=11, width=8, mlp_width=12, num_layers=1, num_heads=2, norm_placement=NormPlacement.PRE, init_std=0.5
    )
    model = LoopLM(config)
    params = init_params(model, jax.random.key(0))
    params["core"]["layers"]["mlp"]["down"]["kernel"] *= 0.0
    tokens = jnp.arange(10)[None]
    context = make_context(config, jnp.arange(10)[None], jnp.ones((1, 10), jnp.int32))
    sizes = branch_sizes(params, config, tokens, context)
    embedded = params["embedding"][tokens]
    state, _ = model.apply(
        {"params": params}, embedded, context, method=lambda model, x, context: model.core(x, context)
    )
    expected = jnp.sqrt(jnp.mean(jnp.square(state - embedded), axis=-1)).mean()
    np.testing.assert_allclose(sizes["attention"][0], expected, rtol=1e-5)
    assert sizes["mlp"][0] == 0


def test_the_report_says_when_a_loss_is_back():
    losses = [[2.0, 3.0], [2.1, 2.5], [1.9, 2.4]]
    result = {"name": "pre", "dense_loss": 2.0, "loops": 2, "steps": [0, 25, 50], "losses": losses}
    report = DENSE_START.report([Record(cell="pre", settings={}, result=result, seconds=1.0, versions={})])
    text = "".join(table.markdown() for table in report.tables)
    assert "| pre | 50 | not in 50 |" in text
    assert "| pre | 3.000 | 2.500 | 2.400 |" in text
    assert report.findings == ["The dense model: 2.0000 nats/token, held out."]


def test_what_is_wrong_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "text-models").mkdir()
    (tmp_path / "text-models" / "stdlib.jsonl").write_text("not json\n")
    assert main(["dense-start", "--root", str(tmp_path)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("looplm: not finished: pre, sandwich-matched-norms, looped-from-scratch (")


def test_the_records_in_the_repository_are_those_of_the_grid():
    results = read_results(RESULTS / "dense-start" / "cpu" / "results.json")
    cells = {cell.name: json.loads(json.dumps(cell.settings)) for cell in DENSE_START.cells(Scale.CPU)}
    assert {record.cell: record.settings for record in results.records} == cells
    report = DENSE_START.report(results.records)
    first, last, back = report.tables
    assert first.rows[1] == ["pre", "3.619", "3.668", "3.656", "3.622", "3.593", "3.549", "3.505"]
    assert last.rows[4] == ["sandwich, small norms", "3.912", "3.763", "3.734", "3.666", "3.636", "3.575", "3.516"]
    assert back.rows[4] == ["sandwich, small norms", "250", "275"]


@pytest.mark.slow
def test_the_llama_folder_is_the_dense_model_in_transformers(finished):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    dense = looplm_jax.load(finished / "shared" / "dense")
    theirs = transformers.LlamaForCausalLM.from_pretrained(finished / "shared" / "llama")
    tokens = np.arange(40)[None]
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(tokens)).last_hidden_state
    ours = dense.model.apply({"params": dense.params}, jnp.asarray(tokens, jnp.int32)).hidden[0]
    np.testing.assert_allclose(ours, hidden.numpy(), atol=1e-5, rtol=1e-5)
