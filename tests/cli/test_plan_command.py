import dataclasses
import importlib.util
import json

import pytest

from looplm_jax.cli.main import main
from looplm_jax.codec import to_dict
from looplm_jax.config import MeshConfig


@pytest.fixture
def plan_file(recipe, tmp_path):
    """The smallest recipe, on any number of devices."""
    path = tmp_path / "planned.json"
    stage = dataclasses.replace(recipe.stages[0], batch_size=8)
    path.write_text(json.dumps(to_dict(dataclasses.replace(recipe, stages=(stage,), mesh=MeshConfig(fsdp=2)))))
    return str(path)


def test_a_plan_for_the_devices_that_are_here(plan_file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    assert main(["plan", plan_file, "--topology", "here", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert "compiling stage only (1 of 1) for 8 x cpu" in printed.err
    assert "only on 8 x cpu (data=4 fsdp=2): fits" in printed.out
    assert "attention: xla; matrix products: " in printed.out
    assert "arrays of the state are updated in place" in printed.out
    assert "all-gather" in printed.out
    assert f"wrote {out}\nnext: looplm train --recipe {plan_file}" in printed.out
    (plan,) = json.loads(out.read_text())
    assert plan["memory"]["parameters"] > 0
    assert plan["inside"]["donated"] == plan["inside"]["state_arrays"]
    assert plan["timing"] is None
    assert {each["kind"] for each in plan["inside"]["collectives"]} >= {"all-gather", "all-reduce"}


@pytest.mark.slow
def test_a_search_prints_what_nothing_beats(plan_file, capsys):
    assert main(["plan", plan_file, "--topology", "here", "--search", "--limit", "2"]) == 0
    printed = capsys.readouterr()
    assert "(2 of 2) for 8 x cpu" in printed.err
    assert "--stages.only.accumulation 1" in printed.out
    assert "*" in printed.out
    assert "not compiled: 0 that cannot fit by arithmetic" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:2x2"], "unknown topology 'v9:2x2'; say here, or family:chips, such as v4:4x4x4, v5e:16x16"),
        (["--topology", "v5e"], "unknown topology 'v5e'"),
        (["--topology", "v5p:4x4"], "a slice of v5p has 3 dimensions, unlike v5p:4x4; such as v5p:4x8x8"),
        (["--topology", "v5e:32x32"], "at most 16x16 chips, unlike v5e:32x32; use --slices for more"),
        (["--topology", "here", "--slices", "0"], "--slices must be at least 1, not 0"),
        (["--topology", "here", "--stage", "onyl"], "has no stage 'onyl'; did you mean 'only'?"),
        (["--topology", "here", "--mesh.fsdp", "3"], "fsdp=3 does not fit 8 device(s)"),
        (["--topology", "here", "--mesh.data", "1", "--mesh.fsdp", "8", "--stage.batch_size", "12"], "does not divide"),
        (["--topology", "here", "--json", "nowhere/plan.json"], "there is no folder nowhere to write plan.json to"),
        (["--topology", "here", "--search", "--limit", "0"], "--limit must be at least 1, not 0"),
        (["--topology", "here", "--lim", "3"], "unknown flag '--lim'; did you mean '--limit'?"),
        ([], "the following arguments are required: --topology"),
    ],
)
def test_mistakes_end_in_one_line(plan_file, arguments, message, capsys):
    assert main(["plan", plan_file, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("looplm: ")
    assert message in line


def test_a_file_that_exists_is_not_overwritten(plan_file, capsys):
    assert main(["plan", plan_file, "--topology", "here", "--json", plan_file]) == 2
    assert "exists already; name another file, or remove it" in capsys.readouterr().err


def test_without_the_tpu_compiler(plan_file, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["plan", plan_file, "--topology", "v5e:2x2"]) == 2
    assert capsys.readouterr().err == (
        "looplm: the TPU compiler is not installed; run `pip install 'looplm_jax[tpu]'`\n"
    )


def test_a_slice_that_no_host_can_have(plan_file, capsys):
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
    assert main(["plan", plan_file, "--topology", "v5e:3x3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("looplm: there is no slice v5e:3x3: ")
