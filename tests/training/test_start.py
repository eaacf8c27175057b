"""Runs that start from the parameters of a checkpoint: what they take over, and what they refuse."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from training_cases import GATE, MODEL, RECIPE, STAGE, assert_identical, one_stage

from looplm_jax.checkpoints import read_metadata
from looplm_jax.checkpoints._raw import read_raw, write_raw
from looplm_jax.cli.main import main
from looplm_jax.codec import from_dict, to_dict
from looplm_jax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    OptimizerKind,
    Recipe,
    Schedule,
    SourceConfig,
    StartConfig,
)
from looplm_jax.convert._export_hf import convert_to_hf
from looplm_jax.data import load_tokenizer, train_sentencepiece
from looplm_jax.errors import UserError
from looplm_jax.models._looplm import LoopLM
from looplm_jax.sharding import make_mesh
from looplm_jax.training import run
from looplm_jax.training._initialize_from import (
    check_shape,
    describe_init_checkpoint,
    initialized_state,
    read_init_checkpoint,
)
from looplm_jax.training._metrics import read_metrics
from looplm_jax.training._run_folder import RunFolder
from looplm_jax.training._setup import prepare_run
from looplm_jax.training._state import abstract_state, initial_state

SHORT = dataclasses.replace(STAGE, steps=2, min_loops=0, warmup_steps=0, schedule=Schedule.CONSTANT)
BASE = one_stage(SHORT)
MESHES = [MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)]


def train(folder, recipe):
    """Returns the lines that were printed."""
    said = io.StringIO()
    run.train(recipe, folder, console=Console(file=said, soft_wrap=True))
    return said.getvalue()


def started(checkpoint, *, optimizer=False, optimizer_config=BASE.optimizer, **changes):
    """Returns the recipe of another run, which starts from a checkpoint."""
    start = StartConfig(checkpoint=str(checkpoint), optimizer=optimizer)
    given = {"name": "started", "seed": 5, "start": start, "optimizer": optimizer_config}
    return dataclasses.replace(BASE, **given, **changes)


def first_state(recipe):
    mesh, model = make_mesh(recipe.mesh), LoopLM(recipe.model, recipe.compute)
    return initialized_state(read_init_checkpoint(recipe, model, mesh), recipe, model, mesh)


def prepared(folder, recipe):
    """Returns the setup of a run before its first step, and the lines that were printed."""
    said = io.StringIO()
    setup = prepare_run(recipe, RunFolder(path=folder), Console(file=said, soft_wrap=True))
    return setup.position, said.getvalue()


def arrays(tree):
    return jax.tree.leaves(tree)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a finished run of two steps."""
    folder = tmp_path_factory.mktemp("base") / "run"
    train(folder, BASE)
    return folder


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("optimizer", [False, True])
def test_the_first_state_is_that_of_the_recipe_with_what_the_checkpoint_gives(base, mesh, optimizer):
    recipe = started(base, optimizer=optimizer, mesh=mesh)
    model, devices = LoopLM(recipe.model, recipe.compute), make_mesh(mesh)
    state, fresh = first_state(recipe), initial_state(recipe, model, SHORT, devices)
    saved = read_raw(base).arrays
    assert_identical(arrays(state.params), [saved[name] for name in sorted(saved) if name.startswith("params.")])
    if optimizer:
        assert int(state.optimizer[1].count) == SHORT.steps
        assert_identical(state.optimizer[1].mu["head"], saved["optimizer.1.mu.head"])
    else:
        assert_identical(state.optimizer, fresh.optimizer)
    for rest in ("step", "guard", "key"):
        assert_identical(getattr(state, rest), getattr(fresh, rest))
    wanted = abstract_state(recipe, model, SHORT, devices)
    assert jax.tree.structure(state) == jax.tree.structure(wanted)
    for leaf, target in zip(arrays(state), arrays(wanted), strict=True):
        assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


def test_parameters_of_sixteen_bits_become_float32(base, tmp_path):
    whole = read_raw(base)
    narrow = {name: array.astype(jnp.bfloat16) for name, array in whole.arrays.items() if name.startswith("params.")}
    write_raw(tmp_path, dataclasses.replace(whole, arrays=narrow))
    state = first_state(started(tmp_path))
    wanted = [narrow[name].astype(jnp.float32) for name in sorted(narrow)]
    assert_identical(arrays(state.params), wanted)


def test_a_run_that_was_stopped_before_its_first_save_starts_from_the_checkpoint_again(base, tmp_path):
    for _ in range(2):
        position, said = prepared(tmp_path / "run", started(base))
        assert (int(position.state.step), position.stage, position.data_state) == (0, 0, None)
        assert said == f"starting from the parameters of {base}, step 2\n"


def test_a_damaged_step_is_named_and_the_one_before_is_taken(base, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(base / "checkpoints" / "2", start / "checkpoints" / "1")
    shutil.copytree(base / "checkpoints" / "2", start / "checkpoints" / "2")
    for path in (start / "checkpoints" / "2" / "state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:-9])
    _, said = prepared(tmp_path / "run", started(start, optimizer=True))
    warning, origin = said.splitlines()
    assert warning.startswith("warning: step 2 is damaged: ")
    assert warning.endswith("; skipped")
    assert origin == f"starting from the parameters and the optimizer state of {start}, step 1"


# The shape of the model.


@pytest.mark.parametrize(
    "changes",
    [
        {"loops": 3},
        {"rope_theta": 1e4, "norm_eps": 1e-5, "max_positions": 128, "init_std": 0.1},
        {"num_kv_heads": 2},
        {"head_dim": 8},
    ],
)
def test_what_gives_no_shape_may_differ(changes):
    check_shape("base", dataclasses.replace(MODEL, **changes), MODEL)


def test_settings_that_differ_are_said(base):
    recipe = started(base, model=dataclasses.replace(MODEL, loops=3, rope_theta=1e4, num_kv_heads=2))
    model, mesh = LoopLM(recipe.model, recipe.compute), make_mesh(recipe.mesh)
    assert describe_init_checkpoint(read_init_checkpoint(recipe, model, mesh), recipe.model) == (
        f"starting from the parameters of {base}, step 2; settings of the model that differ (here, there): "
        "loops: 3, 2; rope_theta: 10000.0, 1000000.0"
    )


def test_a_model_of_another_shape_is_refused_with_what_to_type(base, tmp_path):
    other = dataclasses.replace(MODEL, num_layers=3, tied_head=True, loops=7)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", started(base, model=other))
    assert str(caught.value) == (
        f"{base} holds a model of another shape (num_layers: 3, 1; tied_head: True, False there); type "
        "--model.num_layers 1 --model.tied_head false, or start elsewhere"
    )
    assert not (tmp_path / "run").exists()


def test_what_is_typed_mends_any_shape():
    ours = ModelConfig(vocab_size=9, width=8, mlp_width=4, num_layers=2, num_heads=2)
    theirs = dataclasses.replace(MODEL, num_kv_heads=1, prelude_layers=1)
    with pytest.raises(UserError) as caught:
        check_shape("base", ours, theirs)
    flags = str(caught.value).partition("type --model.")[2].partition(", or")[0].split(" --model.")
    values = dict(flag.split() for flag in flags)
    mended = from_dict(ModelConfig, {**to_dict(ours), **values})
    check_shape("base", mended, theirs)


# The optimizer.


def test_a_checkpoint_without_optimizer_is_refused_where_its_state_is_asked_for(base, tmp_path):
    whole = read_raw(base)
    bare = {name: array for name, array in whole.arrays.items() if name.startswith("params.")}
    write_raw(tmp_path / "bare", dataclasses.replace(whole, arrays=bare))
    first_state(started(tmp_path / "bare"))
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", started(tmp_path / "bare", optimizer=True))
    assert str(caught.value) == f"{tmp_path}/bare holds no optimizer state; set start.optimizer to false"
    assert not (tmp_path / "run").exists()


def test_the_state_of_another_optimizer_is_refused(base, tmp_path):
    muon = OptimizerConfig(kind=OptimizerKind.MUON)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", started(base, optimizer=True, optimizer_config=muon))
    assert str(caught.value) == (
        f"{base} holds the optimizer state of adamw, not of muon; type --optimizer.kind adamw, or set start.optimizer "
        "to false"
    )
    assert not (tmp_path / "run").exists()


def test_the_optimizer_of_other_parameters_is_refused(base, tmp_path):
    gate = dataclasses.replace(GATE, steps=1)
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", started(base, optimizer=True, stages=(gate,)))
    assert str(caught.value).startswith(
        f"stage 'gate' cannot take over the optimizer state: {base}/checkpoints/2 holds another state: "
    )
    assert str(caught.value).endswith(
        "; set start.optimizer to false, or name a step of a stage that trains the same parameters"
    )
    assert not (tmp_path / "run").exists()


def test_an_optimizer_state_without_a_checkpoint_is_refused():
    with pytest.raises(UserError, match=r"^start.optimizer needs start.checkpoint; set both$"):
        StartConfig(optimizer=True)


# The tokenizer.

READING = "reading 1 file (1 .txt)"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Writes two folders with one file of words each."""
    folder, words = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    for name, letters in (("first", "abcdefgh"), ("second", "stuvwxyz")):
        vocabulary = ["".join(words.choice(list(letters), 5)) for _ in range(80)]
        paragraphs = [" ".join(words.choice(vocabulary, 30)) for _ in range(60)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


def on_text(path: Path, recipe: Recipe, **data) -> Recipe:
    config = DataConfig(sources=(SourceConfig(path=str(path)),), validation_fraction=0.2, **data)
    return dataclasses.replace(recipe, data=config, model=dataclasses.replace(MODEL, vocab_size=300))


@pytest.fixture(scope="module")
def trained_on_text(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("on-text") / "run"
    assert "training a tokenizer" in train(folder, on_text(texts / "first.txt", BASE))
    return folder


@pytest.mark.slow
def test_a_run_that_goes_on_needs_the_checkpoint_no_more_not_even_for_its_tokenizer(trained_on_text, texts, tmp_path):
    start = shutil.copytree(trained_on_text, tmp_path / "start")
    recipe = on_text(texts / "second.txt", dataclasses.replace(started(start), checkpoint=CheckpointConfig(every=1)))
    said = train(tmp_path / "run", recipe)
    assert said.splitlines()[:2] == [READING, f"starting from the parameters of {start}, step 2"]
    assert "training a tokenizer" not in said
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2]
    finished = read_raw(tmp_path / "run")
    assert finished.metadata.tokenizer == read_metadata(str(start)).tokenizer
    assert from_dict(Recipe, finished.metadata.config).start.checkpoint == str(start)

    shutil.rmtree(start)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    assert train(tmp_path / "run", recipe).splitlines()[:2] == [READING, "resuming from step 1 of stage pretrain"]
    again = read_raw(tmp_path / "run")
    assert (again.step, again.metadata) == (finished.step, finished.metadata)
    assert_identical(again.arrays, finished.arrays)


def test_the_same_tokenizer_may_be_given(trained_on_text, texts, tmp_path):
    given = str(trained_on_text / "tokenizer.model")
    prepared(tmp_path / "run", on_text(texts / "second.txt", started(trained_on_text), tokenizer=given))


def test_another_tokenizer_is_refused(trained_on_text, texts, tmp_path):
    given = str(tmp_path / "other.model")
    Path(given).write_bytes(train_sentencepiece((texts / "second.txt").read_text().split("\n\n"), 300).serialize())
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", on_text(texts / "second.txt", started(trained_on_text), tokenizer=given))
    assert str(caught.value) == (
        f"{given} is another tokenizer than that of {trained_on_text}; leave data.tokenizer empty to use that"
    )


def test_a_task_with_another_vocabulary_is_refused(base, tmp_path):
    task = "mano:length=2,modulus=7"
    with pytest.raises(UserError) as caught:
        train(tmp_path / "run", started(base, data=DataConfig(sources=(SourceConfig(path=task),))))
    assert str(caught.value) == (
        f"{task!r} has another vocabulary than {base}; start from a checkpoint of the same task"
    )


# A Hugging Face folder.


@pytest.fixture(scope="module")
def exported(trained_on_text, tmp_path_factory):
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("exported") / "hf"
    convert_to_hf(trained_on_text, folder, dtype="bfloat16")
    return folder


def test_a_run_starts_from_a_hugging_face_folder(exported, trained_on_text, texts, tmp_path):
    recipe = on_text(texts / "second.txt", started(exported, mesh=MESHES[1]))
    position, said = prepared(tmp_path / "run", recipe)
    assert said == f"{READING}\nstarting from the parameters of {exported}\n"
    saved = read_raw(trained_on_text).arrays
    wanted = [saved[name].astype(jnp.bfloat16).astype(jnp.float32) for name in sorted(saved) if "params." in name]
    assert_identical(arrays(position.state.params), wanted)


def test_rows_prepared_with_the_folder_of_the_start(exported, texts, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    turn = load_tokenizer(str(folder)).token_id("<|im_end|>")
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": turn}))
    options = (str(texts / "second.txt"), "--sequence-length", str(SHORT.sequence_length), "--workers", "1")
    options += ("--validation-fraction", "0.4")
    recipe = on_text(tmp_path / "rows", started(folder))

    main(["tokenize", *options, "--tokenizer", str(folder / "tokenizer.json"), "--out", str(tmp_path / "rows")])
    with pytest.raises(UserError) as caught:
        prepared(tmp_path / "run", recipe)
    assert str(caught.value) == (
        f"{str(tmp_path / 'rows')!r} is prepared with another tokenizer than that of {folder}; "
        f"prepare it with --tokenizer {folder}"
    )

    shutil.rmtree(tmp_path / "rows")
    main(["tokenize", *options, "--tokenizer", str(folder), "--out", str(tmp_path / "rows")])
    for given in ("", str(folder)):
        data = dataclasses.replace(recipe.data, tokenizer=given)
        _, said = prepared(tmp_path / "run", dataclasses.replace(recipe, data=data))
        assert f"note: {folder}: tokenizer_config.json has eos 0, but config.json has {turn}, which is used" in said
        assert said.splitlines()[-1] == f"starting from the parameters of {folder}"


def test_a_hugging_face_folder_of_another_shape_or_with_an_optimizer_is_refused(exported, texts, tmp_path):
    recipe = on_text(texts / "second.txt", started(exported, optimizer=True))
    with pytest.raises(UserError, match=r"hf holds no optimizer state; set start.optimizer to false$"):
        train(tmp_path / "run", recipe)
    wider = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, mlp_width=40))
    with pytest.raises(UserError, match=r"hf holds a model of another shape \(mlp_width: 40, 24 there\)"):
        train(tmp_path / "run", wider)


# Older checkpoints, and folders that are not checkpoints.


def test_recipes_and_runs_from_before_there_was_a_start_go_on(base, tmp_path):
    old = {name: value for name, value in to_dict(BASE).items() if name != "start"}
    assert from_dict(Recipe, old) == BASE
    whole = read_raw(base)
    assert whole.metadata.config == {**old, "start": dataclasses.asdict(StartConfig())}
    write_raw(tmp_path / "run", dataclasses.replace(whole, metadata=dataclasses.replace(whole.metadata, config=old)))
    (tmp_path / "run" / "config.json").write_text(json.dumps(old))
    assert train(tmp_path / "run", BASE) == "resuming from step 2 of stage pretrain\n"


def test_what_is_no_checkpoint_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match=r"missing is not a checkpoint: expected a run folder"):
        train(tmp_path / "run", started(tmp_path / "missing"))
    assert not (tmp_path / "run").exists()


def test_a_run_of_another_start_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    with pytest.raises(UserError, match=r"start.checkpoint: , now elsewhere\); use another --out"):
        train(tmp_path / "run", started("elsewhere"))


def test_the_base_is_left_as_it_was(base):
    assert [path.name for path in (base / "checkpoints").iterdir()] == ["2"]
    assert RECIPE.start == StartConfig()
