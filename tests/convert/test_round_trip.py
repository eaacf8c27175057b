"""Import then export, and export then import, are bit-identical; the exported folder runs in transformers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import GROUPED, MULTI_HEAD, TIED, write_hf_folder
from safetensors.numpy import load_file
from tiny_checkpoints import random_params, read_json, tiny_recipe, write_checkpoint

import looplm_jax
from looplm_jax.checkpoints import inspect_steps
from looplm_jax.config import ComputeConfig, Dtype
from looplm_jax.convert import convert_from_hf, convert_to_hf, from_torch_state_dict, to_torch_state_dict
from looplm_jax.convert._layout import flat_arrays
from looplm_jax.data.tokenizers import IM_END, IM_START, load_tokenizer
from looplm_jax.models._looplm import LoopLM

pytest.importorskip("tokenizers")

MODELS = {"multi-head": MULTI_HEAD, "grouped-query": GROUPED, "tied": TIED}
CASES = [("multi-head", jnp.bfloat16, 1), ("grouped-query", jnp.float32, 3), ("tied", jnp.float32, 2)]


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(actual, wanted):
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (actual[name].dtype, actual[name].shape) == (tensor.dtype, tensor.shape), name
        assert np.asarray(actual[name]).tobytes() == np.asarray(tensor).tobytes(), name


@pytest.mark.parametrize(("model", "dtype", "shards"), CASES, ids=[case[0] for case in CASES])
def test_in_and_out_again(tmp_path, model, dtype, shards):
    theirs = write_hf_folder(tmp_path / "theirs", MODELS[model], dtype=dtype, shards=shards)
    convert_from_hf(tmp_path / "theirs", tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "again", max_shard_bytes=20_000)
    assert_same_bits(tensors(tmp_path / "again"), theirs)
    tokenizer = "tokenizer.json"
    assert (tmp_path / "again" / tokenizer).read_bytes() == (tmp_path / "theirs" / tokenizer).read_bytes()
    published, written = (read_json(tmp_path / name / "config.json") for name in ("theirs", "again"))
    assert written == published


@pytest.mark.parametrize(("model", "dtype"), [case[:2] for case in CASES], ids=[case[0] for case in CASES])
def test_out_and_in_again(tmp_path, model, dtype):
    config, tokenizer = MODELS[model], json_tokenizer(tmp_path)
    run = write_checkpoint(tmp_path / "ours", tiny_recipe(config), dtype=dtype, tokenizer=tokenizer)
    convert_to_hf(run, tmp_path / "theirs", max_shard_bytes=20_000)
    convert_from_hf(tmp_path / "theirs", tmp_path / "again")
    before, after = (inspect_steps(str(tmp_path / name))[0] for name in ("ours", "again"))
    assert after.damage is None
    assert after.arrays == before.arrays
    assert after.metadata.tokenizer_fingerprint == before.metadata.tokenizer_fingerprint
    explicit = {"num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    assert looplm_jax.load(tmp_path / "again").recipe.model == dataclasses.replace(config, **explicit)
    assert_same_bits(
        flat_arrays(looplm_jax.load(tmp_path / "theirs").params), flat_arrays(random_params(config, dtype))
    )


def test_a_state_dict_in_between(tmp_path):
    pytest.importorskip("torch")
    params = random_params(GROUPED, jnp.bfloat16)
    state = to_torch_state_dict(params, GROUPED)
    assert_same_bits(flat_arrays(from_torch_state_dict(state, GROUPED)), flat_arrays(params))


def json_tokenizer(tmp_path):
    write_hf_folder(tmp_path / "for-its-tokenizer")
    return load_tokenizer(str(tmp_path / "for-its-tokenizer" / "tokenizer.json"))


# In transformers


@pytest.fixture(scope="module", params=["grouped-query", "tied"])
def exported(request, tmp_path_factory):
    """Returns the model, our parameters, and the folder that transformers reads."""
    folder = tmp_path_factory.mktemp("exported")
    config = dataclasses.replace(MODELS[request.param], loops=3)
    params = random_params(config)
    run = write_checkpoint(folder / "run", tiny_recipe(config), params=params, tokenizer=json_tokenizer(folder))
    convert_to_hf(run, folder / "model", max_shard_bytes=20_000)
    return config, params, folder / "model"


@pytest.mark.transformers
def test_transformers_gives_the_same_logits_and_exits(exported):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config, params, folder = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.endswith("modeling_looplm")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    ours = LoopLM(config, ComputeConfig(dtype=Dtype.FLOAT32))
    out = ours.apply({"params": params}, jnp.asarray(tokens))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens), output_hidden_states=True)
        at_loop = [model(torch.tensor(tokens), exit_loop=loop).logits for loop in (1, 2, 3)]
    np.testing.assert_allclose(np.stack(theirs.hidden_states), out.hidden, atol=1e-4)
    gates = np.moveaxis(theirs.gate_logits.numpy(), -1, 0)
    np.testing.assert_allclose(gates, out.gate_logits, atol=1e-4)
    head = params["embedding"].T if config.tied_head else params["head"]
    for loop, logits in enumerate(at_loop):
        np.testing.assert_allclose(logits, out.hidden[loop] @ head, atol=1e-4, rtol=1e-4)


@pytest.mark.transformers
def test_the_tokenizer_and_the_stops_of_generate(exported):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, _, folder = exported
    ours = load_tokenizer(str(folder / "tokenizer.json"))
    # transformers 5 first reads the configuration, which is code in the folder.
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    text = "the loop reads state\n"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    turn = [{"role": "user", "content": "Hi"}]
    chat = theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert chat == f"{IM_START}user\nHi{IM_END}\n{IM_START}assistant\n"
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id) == (0, [0, 2], 0)


@pytest.mark.transformers
def test_generate_stops_at_the_end_of_a_turn(exported):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, _, folder = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    prompt = torch.tensor([[5, 6, 7]])
    free = model.generate(prompt, max_new_tokens=4, do_sample=False, bad_words_ids=[[0], [2]])
    assert free.shape == (1, 7)
    ended = model.generate(prompt, max_new_tokens=4, do_sample=False, sequence_bias={(2,): 1e6})
    assert ended.tolist() == [[5, 6, 7, 2]]
