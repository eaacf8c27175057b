import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from looplm_jax.cli import plan as plan_command
from looplm_jax.cli.main import main
from looplm_jax.codec import to_dict
from looplm_jax.config import MeshConfig
from looplm_jax.convert._import_hf import write_converted
from looplm_jax.data.tokenizers import SymbolTokenizer
from looplm_jax.models._looplm import boxed_shapes
from looplm_jax.planning import _stage_plan as stage_plan
from looplm_jax.planning._budget import decode_timing
from looplm_jax.planning._decode_plan import DecodeMemory, DecodePlan, Floor
from looplm_jax.planning._targets import Target
from looplm_jax.planning._traffic import Buffer, Traffic
from looplm_jax.sharding._hardware import known_chip
from looplm_jax.training._run_folder import read_recipe


@pytest.fixture
def plan_file(recipe, tmp_path):
    """Writes the smallest recipe, for any number of devices."""
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
def test_a_search_prints_what_nothing_beats(plan_file, tmp_path, capsys):
    chosen = tmp_path / "chosen.json"
    assert main(["plan", plan_file, "--topology", "here", "--search", "--limit", "2", "--write", str(chosen)]) == 0
    printed = capsys.readouterr()
    assert f"wrote {chosen}\nnext: looplm plan {chosen} --topology here" in printed.out
    written, given = read_recipe(chosen), read_recipe(Path(plan_file))
    (settings,) = written.stages[0].settings
    assert settings.topology == "cpu:8"
    assert dataclasses.replace(written.stages[0], settings=()) == given.stages[0]
    assert (written.mesh, written.compute) == (given.mesh, given.compute)
    assert "(2 of 2) for 8 x cpu" in printed.err
    assert "--stages.only.accumulation 1" in printed.out
    assert "*" in printed.out
    assert "not compiled: 0 that cannot fit by arithmetic" in printed.out


@pytest.fixture
def compiler_that_fails(monkeypatch):
    """Makes the compiler fail on every train step."""

    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: Check failed:\n  offloaded twice")

    monkeypatch.setattr(stage_plan, "lower_step", lambda *_, **__: Lowered())


@pytest.mark.parametrize(
    ("remat", "change"),
    [
        ("offload", "keep the inputs of layers on the device: --compute.remat layer"),
        ("layer", "change the settings of compute or mesh, or try others with --search"),
    ],
)
@pytest.mark.usefixtures("compiler_that_fails")
def test_a_stage_that_does_not_compile(plan_file, tmp_path, remat, change, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--topology", "here", "--compute.remat", remat, "--json", str(out)]
    assert main(["plan", plan_file, *arguments]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"looplm: stage only for 8 x cpu does not compile; {change} "
        "(JaxRuntimeError: INTERNAL: Check failed: offloaded twice)"
    )
    assert not out.exists()


@pytest.mark.usefixtures("compiler_that_fails")
def test_a_search_in_which_nothing_compiles(plan_file, tmp_path, capsys):
    out, chosen = tmp_path / "plan.json", tmp_path / "chosen.json"
    arguments = ["--topology", "here", "--search", "--limit", "2", "--json", str(out), "--write", str(chosen)]
    assert main(["plan", plan_file, *arguments]) == 1
    printed = capsys.readouterr().out
    assert printed.count("  skipped --stages.only.accumulation 1") == 2
    assert "next: the same command with a larger --limit, or more devices\n" in printed
    for failure in json.loads(out.read_text()):
        assert failure["error"].startswith("stage only for 8 x cpu does not compile; ")
        assert failure["flags"].startswith("--stages.only.accumulation 1")
    assert not chosen.exists()


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
        (["--topology", "here", "--write", "r.json"], "--write has no effect without --search; add --search"),
        (
            ["--topology", "here", "--search", "--write", "nowhere/r.json"],
            "there is no folder nowhere to write r.json to",
        ),
        (["--topology", "here", "--search", "--write", "r.yaml"], "--write r.yaml must end in .json, as recipes do"),
        (
            ["--topology", "here", "--compute.reduce", "step"],
            "compute.reduce=step needs whole parameters on every device",
        ),
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "v9:1x1"], "unknown topology 'v9:1x1'; say here, or family:chips, such as v4:4x4x4"),
        (["--topology", "here"], "--decode plans for TPUs, unlike 8 x cpu; choose a slice such as v5e:1x1"),
        (["--topology", "v5e:1x1", "--slots", "0"], "--slots must be at least 1, not 0"),
        (["--topology", "v5e:1x1", "--capacity", "-1"], "--capacity must be at least 1, not -1"),
        (["--topology", "v5e:1x1", "--capacity", "65"], "--capacity=65 is beyond model.max_positions=64"),
        (
            ["--topology", "v5e:1x1", "--capacity", "64", "--filled", "65"],
            "--filled must be between 0 and --capacity=64, not 65",
        ),
        (
            ["--topology", "v5e:1x1", "--capacity", "64", "--page-size", "16", "--pages", "3"],
            "one request of --capacity=64 takes 4 pages of 16 positions, and there are 3: 1 are missing; use --pages 4",
        ),
        (
            ["--topology", "v5e:1x1", "--capacity", "64", "--loops-mean", "1.5"],
            "--loops-mean must be between 1 and the 1 loops of the model",
        ),
        (
            ["--topology", "v5e:1x1", "--capacity", "64", "--loops-mean", "nan"],
            "--loops-mean must be between 1 and the 1 loops",
        ),
        (["--topology", "v5e:1x1", "--cache", "lats"], "argument --cache: unknown cache 'lats'; did you mean 'last'?"),
        (["--topology", "v5e:1x1", "--search"], "--search has no effect with --decode; leave one of them out"),
        (["--topology", "v5e:1x1", "--stage", "only"], "--stage has no effect with --decode"),
        (["--topology", "v5e:1x1", "--slices", "2"], "--slices has no effect with --decode"),
        (["--topology", "v5e:1x1", "--limit", "8"], "--limit has no effect with --decode"),
        (["--topology", "v5e:1x1", "--mesh.data", "2"], "--mesh.data has no effect with --decode; only --model.* and"),
        (["--topology", "v5e:1x1", "--slotz", "2"], "unknown flag '--slotz'; did you mean '--slots'?"),
        (["--topology", "v5e:1x1", "--json", "nowhere/plan.json"], "there is no folder nowhere to write plan.json to"),
    ],
)
def test_mistakes_about_a_tick_end_in_one_line(plan_file, arguments, message, capsys):
    assert main(["plan", plan_file, "--decode", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("looplm: ")
    assert message in line


def test_more_chips_than_heads(plan_file, capsys):
    pytest.importorskip("libtpu", reason="the TPU compiler (libtpu) is not installed")
    assert main(["plan", plan_file, "--decode", "--topology", "v5e:2x2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "the 4 of v5e:2x2 do not divide model.num_heads=2; choose a topology with fewer" in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ouro-1.5b", "there is no recipe and no checkpoint 'ouro-1.5b'; did you mean 'ouro-1.4b'?"),
        ("runs/lost", "there is no recipe and no checkpoint 'runs/lost'; name a recipe, a .json file or a checkpoint"),
        ("lost.json", "lost.json"),
        (".", ". is not a checkpoint"),
    ],
)
def test_neither_a_recipe_nor_a_checkpoint(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", given, "--decode", "--topology", "v5e:1x1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("flag", ["--slots", "--capacity", "--page-size", "--pages", "--filled", "--loops-mean"])
def test_flags_of_a_tick_need_decode(plan_file, flag, capsys):
    assert main(["plan", plan_file, "--topology", "here", flag, "3"]) == 2
    assert f"{flag} has no effect without --decode; add --decode" in capsys.readouterr().err


@pytest.fixture
def planned(monkeypatch):
    """Records the requests to a fake planner, which answers at once with a plan that fits if there is one slot."""
    asked = []

    def plan_decode(model, compute, request, target):
        del compute
        asked.append((model, request))
        fits = request.slots == 1
        moved = Traffic(read=Counter({Buffer.CACHE: 3 * 10**9}), written=Counter({Buffer.CACHE_COPY: 10**9}))
        timing = decode_timing(
            target, moved=4 * 10**9, floor=10**9, sent=0, slots=request.slots, loops=1, loops_mean=request.loops_mean
        )
        return DecodePlan(
            target=target.name,
            devices=1,
            dtype="bfloat16",
            loops=1,
            request=request,
            fits=fits,
            memory=DecodeMemory(parameters=2**30, cache=2**34, temporaries=0, other=0, capacity=2**34),
            moved=moved if fits else None,
            floor=Floor(parameters=10**9 - 10**6, cache_read=10**6, cache_written=0),
            sent=0,
            timing=timing if fits else None,
            reading=2 * 10**6 if request.cache.shares else 0,
            compile_seconds=1.0,
        )

    target = Target(name="v5e:1x1", devices=(FakeChip(),), chip=known_chip("TPU v5 lite"), shape=(1, 1))
    monkeypatch.setattr(plan_command, "find_target", lambda topology: target)
    monkeypatch.setattr(plan_command, "plan_decode", plan_decode)
    return asked


class FakeChip:
    platform = "tpu"


def test_a_plan_of_a_tick(plan_file, planned, tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["plan", plan_file, "--decode", "--topology", "v5e:1x1", "--slots", "1", "--filled", "10"]
    assert main([*command, "--cache", "last", "--loops-mean", "1", "--json", str(out)]) == 0
    ((model, request),) = planned
    assert model.max_positions == request.capacity == 64  # the model's positions limit a slot, as in the engine
    printed = capsys.readouterr()
    assert "compiling a tick of 1 slots for v5e:1x1" in printed.err
    assert f"{plan_file}, a tick on v5e:1x1: fits" in printed.out
    assert "1 slot(s) of 64 positions, 10 of each filled; 1 page(s) of 64; cache last, 1 loops, bfloat16" in printed.out
    assert "cache                          3.000        0.000" in printed.out
    assert "copies of the cache            0.000        1.000" in printed.out
    assert "a prompt of 64 tokens takes 0.002 GB more while it is read" in printed.out
    assert "floor: 1.000 GB (parameters once 0.999, filled cache once 0.001" in printed.out
    assert "ratio: 4.000 (4.000 GB moved)" in printed.out
    assert "at best 4.884 ms a tick (floor 1.221 ms), 204.8 ticks/s" in printed.out
    assert "at best 204.8 tokens/s at 1 loops a token, 204.8 at a mean exit of 1" in printed.out
    (plan,) = json.loads(out.read_text())
    assert plan["fits"]
    assert plan["ratio"] == 4
    assert plan["moved"]["cache"] == {"read": 3 * 10**9, "written": 0}
    assert plan["request"] == {
        "slots": 1,
        "capacity": 64,
        "page_size": 64,
        "pages": 1,
        "cache": "last",
        "filled": 10,
        "loops_mean": 1.0,
    }


def test_a_tick_that_does_not_fit(plan_file, planned, capsys):
    assert main(["plan", plan_file, "--decode", "--topology", "v5e:1x1", "--model.loops", "2"]) == 1
    ((model, request),) = planned
    assert (model.loops, request.slots) == (2, 8)
    printed = capsys.readouterr().out
    assert "DOES NOT FIT, 17.00 of 16.00 GiB a device (parameters 1.000, cache 16.000" in printed
    assert "change: fewer requests at one time: --slots 4" in printed
    assert "change: fewer pages, for which requests may have to wait: --pages 4" in printed
    assert "change: shorter requests: --capacity 32" in printed
    assert "next: the same command with one of the changes above" in printed


def test_a_tick_of_the_model_of_a_checkpoint(recipe, planned, tmp_path):
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), nn.meta.unbox(boxed_shapes(recipe.model)))
    write_converted(tmp_path / "saved", recipe, params, SymbolTokenizer(["a", "b"]))
    assert main(["plan", str(tmp_path / "saved"), "--decode", "--topology", "v5e:1x1", "--slots", "1"]) == 0
    ((model, _),) = planned
    assert model == recipe.model
