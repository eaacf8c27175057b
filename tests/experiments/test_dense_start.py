"""The dense-start experiment at a small size: all its runs, its report, and no run twice."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import looplm_jax
from experiments import dense_start
from experiments.dense_models import branch_sizes, with_second_norms
from experiments.dense_start_report import Course, Results, report
from looplm_jax.config import ModelConfig, NormPlacement
from looplm_jax.models._blocks import make_context
from looplm_jax.models._looplm import LoopLM, init_params

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Returns the folder of the experiment after one run, with an existing small corpus."""
    out = tmp_path_factory.mktemp("dense_start")
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    lines = [{"text": part} for path in sources for part in path.read_text().split("\n\n") if part.strip()]
    (out / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert dense_start.main(["--out", str(out), "--scale", "smoke"]) == 0
    return out


@pytest.mark.slow
def test_every_start_has_its_course_and_nothing_runs_twice(finished, capsys):
    results = json.loads((finished / "results.json").read_text())
    courses = {course["name"]: course for course in results["courses"]}
    assert list(courses) == ["pre", "sandwich, matched norms", "looped from scratch"]
    assert courses["pre"]["steps"] == [0, 2, 4]
    assert courses["looped from scratch"]["steps"] == [2, 4]
    assert all(len(losses) == 4 for losses in courses["pre"]["losses"])
    assert "back at the dense model's" in (finished / "report.md").read_text()

    metrics = {path: path.read_text() for path in finished.glob("runs/*/metrics.jsonl")}
    assert dense_start.main(["--out", str(finished), "--scale", "smoke"]) == 0
    assert "wrote results.json, report.md" in capsys.readouterr().out
    assert len(metrics) == 4
    assert metrics == {path: path.read_text() for path in finished.glob("runs/*/metrics.jsonl")}
    assert json.loads((finished / "results.json").read_text()) == results


@pytest.mark.slow
def test_before_training_loop_one_of_pre_is_the_dense_model(finished):
    results = json.loads((finished / "results.json").read_text())
    first = {course["name"]: course["losses"][0][0] for course in results["courses"]}
    assert first["pre"] == pytest.approx(results["dense_loss"], abs=1e-5)
    assert abs(first["sandwich, matched norms"] - results["dense_loss"]) > 1e-5


@pytest.mark.slow
def test_second_norms_are_written_and_nothing_else_changes(finished, tmp_path):
    with_second_norms(
        finished / "starts" / "sandwich", tmp_path / "out", {"attention": jnp.full(1, 2.0), "mlp": 3.0 * jnp.ones(1)}
    )
    before, after = (looplm_jax.load(path).params for path in (finished / "starts" / "sandwich", tmp_path / "out"))
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
    course = Course(name="pre", steps=[0, 25, 50], losses=[[2.0, 3.0], [2.1, 2.5], [1.9, 2.4]])
    text = report(Results(dense_loss=2.0, loops=2, courses=[course]))
    assert "| pre | 50 | not in 50 |" in text
    assert "| pre | 3.000 | 2.500 | 2.400 |" in text


def test_what_is_wrong_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "corpus.jsonl").write_text("not json\n")
    assert dense_start.main(["--out", str(tmp_path), "--scale", "smoke"]) == 2
    assert "dense_start: " in capsys.readouterr().err


@pytest.mark.slow
def test_the_llama_folder_is_the_dense_model_in_transformers(finished):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    dense = looplm_jax.load(finished / "runs" / "dense")
    theirs = transformers.LlamaForCausalLM.from_pretrained(finished / "llama")
    tokens = np.arange(40)[None]
    with torch.no_grad():
        hidden = theirs.model(torch.tensor(tokens)).last_hidden_state
    ours = dense.model.apply({"params": dense.params}, jnp.asarray(tokens, jnp.int32)).hidden[0]
    np.testing.assert_allclose(ours, hidden.numpy(), atol=1e-5, rtol=1e-5)
