"""Fine-tuning on chats of a model that has never seen the chat format, as `looplm train --recipe sft` does it."""

import dataclasses
import io
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console
from training_cases import MODEL

from looplm_jax.config import CheckpointConfig, ComputeConfig, MeshConfig, Remat, StartConfig
from looplm_jax.convert._export_hf import convert_to_hf
from looplm_jax.convert._import_hf import converted_recipe, write_converted
from looplm_jax.data import train_sentencepiece
from looplm_jax.data.tokenizers import IM_END, IM_START, SentencePieceTokenizer
from looplm_jax.data.tokenizers._sentencepiece import model_message
from looplm_jax.errors import UserError
from looplm_jax.inference import Conversation, Engine, EngineConfig
from looplm_jax.loading import load
from looplm_jax.models._looplm import LoopLM, init_params
from looplm_jax.recipes import named_recipe
from looplm_jax.sharding import make_mesh
from looplm_jax.training import read_metrics, run
from looplm_jax.training._initialize_from import read_init_checkpoint, with_model_of_start

TEXT = "the loop reads the state of a layer and exits when depth is enough for one more token"


def plain_tokenizer():
    """Returns a SentencePiece model without the tokens of the chat format."""
    model = model_message().FromString(train_sentencepiece([TEXT] * 50, 300).serialize())
    kept = [piece for piece in model.pieces if piece.piece.decode() not in (IM_START, IM_END)]
    del model.pieces[:]
    model.pieces.extend(kept)
    return SentencePieceTokenizer(model.SerializeToString())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Returns a checkpoint of a model with three loops, whose vocabulary has no room for more tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("base") / "base", plain_tokenizer()
    model = dataclasses.replace(MODEL, vocab_size=tokenizer.vocab_size, loops=3, max_positions=128, num_layers=2)
    params = init_params(LoopLM(model), jax.random.key(0))
    write_converted(folder, converted_recipe(folder, model), params, tokenizer)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path, words = tmp_path_factory.mktemp("chats") / "chats.jsonl", TEXT.split()
    lines = []
    for n in range(40):
        turns = [("user", f"{words[n % 9]} {n}"), ("assistant", " ".join(words[n % 7 : n % 7 + 3]))]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    path.write_text("".join(lines))
    return path


def recipe_of(base, chats, **changes):
    recipe = named_recipe("sft")
    stage = dataclasses.replace(recipe.stages[0], steps=2, batch_size=2, sequence_length=64, warmup_steps=0)
    data = dataclasses.replace(
        recipe.data, sources=(dataclasses.replace(recipe.data.sources[0], path=str(chats)),), validation_fraction=0.2
    )
    start = dataclasses.replace(recipe.start, checkpoint=str(base))
    settings = {
        "stages": (stage,),
        "data": data,
        "start": start,
        "mesh": MeshConfig(data=1),
        "compute": ComputeConfig(remat=Remat.NONE, loss_chunk=64),
        "checkpoint": CheckpointConfig(every=2, keep=1),
        "log_every": 1,
    }
    return dataclasses.replace(recipe, **settings | changes)


@pytest.mark.slow
def test_a_model_without_chat_tokens_learns_to_chat(base, chats, tmp_path):
    size, said = load(base).model.config.vocab_size, io.StringIO()
    recipe, console = recipe_of(base, chats), Console(file=said, soft_wrap=True)
    run.train(recipe, tmp_path / "run", console=console)
    assert "added 2 tokens of the chat format to the tokenizer of" in said.getvalue()
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "run"))

    loaded = load(tmp_path / "run")
    assert loaded.model.config.loops == loaded.recipe.stages[0].loops == 3
    assert loaded.model.config.num_layers == 2
    ids = [loaded.tokenizer.token_id(name) for name in (IM_START, IM_END)]
    assert ids == [size, size + 1]

    engine = Engine(*loaded, loaded.tokenizer, config=EngineConfig(slots=1, capacity=64, chunk=32, page_size=32))
    chat = Conversation(engine, loaded.tokenizer)
    assert len(list(chat.say("the", max_new_tokens=3))) in range(1, 4)

    # The tokens survive the way to Hugging Face's format and back.
    convert_to_hf(tmp_path / "run", tmp_path / "hf")
    assert (tmp_path / "hf" / "chat_template.jinja").exists()
    back = load(tmp_path / "hf")
    assert [back.tokenizer.token_id(name) for name in (IM_START, IM_END)] == ids
    np.testing.assert_array_equal(back.params["embedding"], loaded.params["embedding"])


def test_known_tokens_keep_their_rows_and_new_ones_start_as_the_mean(base, chats):
    recipe = with_model_of_start(recipe_of(base, chats))
    mesh = make_mesh(recipe.mesh)
    start = read_init_checkpoint(recipe, LoopLM(recipe.model), mesh)
    old = load(base).params
    size = len(old["embedding"])
    np.testing.assert_array_equal(start.params["embedding"][:size], old["embedding"])
    np.testing.assert_array_equal(start.params["head"][:, :size], old["head"])
    added = recipe.model.vocab_size - size
    assert added >= 2
    assert recipe.model.vocab_size % np.gcd(size, 128) == 0  # as divisible over devices as before
    head, known_head = np.asarray(start.params["head"]).T, np.asarray(old["head"]).T
    for rows, known in ((start.params["embedding"][size:], old["embedding"]), (head[size:], known_head)):
        np.testing.assert_allclose(rows, np.broadcast_to(np.mean(known, axis=0), rows.shape), atol=1e-6)


@pytest.mark.slow
def test_a_run_resumes_without_the_checkpoint_that_it_started_from(base, chats, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    recipe = recipe_of(copy, chats)
    run.train(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    shutil.rmtree(copy)
    outcome = run.train(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    assert outcome.step == 2


def test_fields_that_are_given_win_over_those_of_the_checkpoint(base, chats):
    recipe = recipe_of(base, chats)
    model = dataclasses.replace(recipe.model, rope_theta=77.0)
    changed = dataclasses.replace(recipe, model=model)
    found = with_model_of_start(changed, None, {"model.rope_theta", "stage.loops"})
    assert (found.model.rope_theta, found.model.num_layers) == (77.0, 2)
    assert found.stages[0].loops == recipe.stages[0].loops == 4
    assert with_model_of_start(found) is found


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"checkpoint": ""}, r"recipe 'sft' starts from a trained model; say --start.checkpoint with a run folder"),
        ({"checkpoint": "/nowhere/at/all"}, r"/nowhere/at/all"),
    ],
)
def test_a_run_without_a_model_to_start_from_is_refused(base, chats, tmp_path, start, message):
    recipe = recipe_of(base, chats, start=StartConfig(model=True, chat_tokens=True, **start))
    with pytest.raises(UserError, match=message) as error:
        run.train(recipe, tmp_path / "run", console=Console(file=io.StringIO()))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_optimizer_has_no_state_for_new_tokens():
    with pytest.raises(UserError, match=r"start.chat_tokens may add rows to the embedding, of which start.optimizer"):
        StartConfig(checkpoint="x", optimizer=True, chat_tokens=True)
