"""Our PyTorch Huginn computes what the published code computes, and what our own engine does."""

import math
import re

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import torch
from huginn_golden import CONFIG, PUBLISHED, SYMBOLS, huginn_arrays, huginn_params, write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from looplm_jax.convert import convert_from_hf, convert_to_hf
from looplm_jax.convert.torch_model.configuration_huginn import RavenConfig
from looplm_jax.convert.torch_model.modeling_huginn import RavenForCausalLM
from looplm_jax.inference import Engine, EngineConfig
from looplm_jax.models._looplm import LoopLM

pytestmark = pytest.mark.transformers


@pytest.fixture(scope="module")
def arrays():
    tensors = {name: torch.from_numpy(array) for name, array in huginn_arrays().items()}
    # The files have 32-bit ids, and PyTorch's losses read 64-bit ones.
    return {name: tensor if tensor.is_floating_point() else tensor.long() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the golden model after both conversions."""
    path = tmp_path_factory.mktemp("huginn")
    write_folder(path / "theirs")
    convert_from_hf(path / "theirs", path / "ours")
    convert_to_hf(path / "ours", path / "again")
    return path / "again"


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def assert_close(ours, theirs, tolerance=2e-5):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1, theirs.abs().max().item()))


def test_an_exported_folder_has_the_published_tensors_and_loads_completely(folder, arrays):
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values())
    assert (type(loaded).__name__, loaded.config.model_type) == ("RavenForCausalLM", "huginn_raven")
    assert loaded.lm_head.weight is loaded.transformer.wte.weight

    own = loaded.state_dict()
    theirs = {name[2:]: array for name, array in arrays.items() if name.startswith("w/")}
    assert own.keys() == theirs.keys() | {"lm_head.weight"}
    assert all(torch.equal(own[name], array) for name, array in theirs.items() if name != "freqs_cis")
    assert_close(own["freqs_cis"], theirs["freqs_cis"])
    assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True).eos_token_id == SYMBOLS.eos_id


def test_a_saved_folder_loads_again_with_its_own_copy_of_the_files(model, arrays, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    published, saved = ({name: own.config.to_dict().get(name) for name in PUBLISHED} for own in (model, again))
    assert saved == published
    assert (saved["head_dim"], saved["n_layers"], saved["padded_vocab_size"]) == (8, 8, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(arrays["tokens"]).logits, model(arrays["tokens"]).logits, rtol=0, atol=0)


def test_states_and_logits_are_the_published_ones(model, arrays):
    with torch.no_grad():
        output = model(arrays["tokens"], input_states=arrays["initial_state"], output_hidden_states=True)
        assert_close(torch.stack(output.hidden_states), arrays["states"][1:])
        assert_close(output.latent_states, arrays["latent_states"])
        assert_close(output.logits, arrays["logits"][-1])
        for loops in (1, 16):
            logits = model(arrays["tokens"], input_states=arrays["initial_state"], num_steps=loops).logits
            assert_close(logits, arrays["logits"][0] if loops == 1 else arrays["logits_r16"])


def test_gradients_of_the_last_loops_are_the_published_ones(model, arrays):
    # The golden labels are the next tokens.
    logits = model(arrays["tokens"], input_states=arrays["initial_state"], num_steps=(5, 3)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), arrays["labels"].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss.double(), arrays["grad_5_3/loss"], rtol=1e-5, atol=0)
    loss.backward()
    compared = [name for name in arrays if name.startswith("grad_5_3/transformer")]
    assert compared
    for name in compared:
        theirs = arrays[name]
        ours = model.get_parameter(name.removeprefix("grad_5_3/")).grad
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    model.zero_grad()


def test_the_loss_scores_each_position_against_the_next_label(model, arrays):
    tokens = arrays["tokens"]
    with torch.no_grad():
        output = model(tokens, labels=tokens)
        logits = output.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()))
    assert output.past_key_values is None


def generated(model, prompts, **options):
    """Returns six greedy tokens after each prompt, which are padded on the left."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    options |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(padded, attention_mask=mask, **options)[:, longest:].tolist()


def test_cached_greedy_decoding_is_that_of_the_published_code(model, arrays):
    ids = arrays["decode/full/ids"].tolist()
    assert generated(model, [ids[:5]]) == [ids[5:]]


@pytest.mark.slow
def test_cached_greedy_decoding_is_that_of_our_engine(model, arrays):
    prompts = [arrays["tokens"][0, :5].tolist(), arrays["tokens"][1, :3].tolist()]
    engine = Engine(LoopLM(CONFIG), huginn_params(), config=EngineConfig(slots=2, capacity=16, loops=4))
    results = engine.generate(prompts, max_new_tokens=6)
    assert generated(model, prompts, num_steps=4) == [list(result.tokens) for result in results]


def test_the_cache_and_packed_documents_change_nothing(model, arrays):
    tokens = arrays["tokens"]
    with torch.no_grad():
        whole = model(tokens).logits
        cache = DynamicCache()
        pieces = [model(piece, past_key_values=cache).logits for piece in tokens.split([4, 1, 6], dim=1)]
        assert_close(torch.cat(pieces, dim=1), whole)

        positions = torch.cat([torch.arange(11), torch.arange(11)])[None]
        packed = model(tokens.reshape(1, -1), position_ids=positions).logits
        assert_close(packed.reshape(2, 11, -1), whole)

        with pytest.raises(ValueError, match=r"^the cache was not filled with num_steps=3; keep its number of loops"):
            model(tokens[:, :1], past_key_values=cache, num_steps=3)


def test_noise_has_the_published_size_and_follows_the_seed_of_torch(model, arrays):
    embedded = torch.zeros(50, 20, PUBLISHED["n_embd"])
    noise = model._initial_state(embedded, None, 1.0)
    # The cut at three standard deviations takes 1.3 % of them.
    assert noise.std().item() == pytest.approx(0.987 * math.sqrt(2 / 5), rel=0.02)
    assert noise.abs().max().item() <= 3 * math.sqrt(2 / 5)

    def logits(seed, **options):
        torch.manual_seed(seed)
        with torch.no_grad():
            return model(arrays["tokens"], num_steps=1, **options).logits

    assert torch.equal(logits(0, init_scale=1.0), logits(0, init_scale=1.0))
    assert not torch.equal(logits(0, init_scale=1.0), logits(1, init_scale=1.0))
    assert torch.equal(logits(0), logits(1))


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    config = RavenConfig(**PUBLISHED)
    fresh = RavenForCausalLM(config)
    std, depth = math.sqrt(2 / (5 * 32)), 2 + 2 + 4 * 8
    block = fresh.transformer.core_block[1]
    gate, up = block.mlp.fc.weight.chunk(2)
    for weight, wanted in [
        (fresh.transformer.wte.weight, std),
        (block.attn.Wqkv.weight, std),
        (gate, std),
        (up, std / math.sqrt(2 * depth)),
        (block.attn.proj.weight, std / math.sqrt(2 * depth)),
    ]:
        assert weight.std().item() == pytest.approx(0.987 * wanted, rel=0.1)
    assert (block.attn.qk_bias == 0).all()
    assert (block.norm_4.weight == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, or a pair of at least 0 and at least 1, not 0"),
        ({"num_steps": (2, 0)}, "num_steps must be at least 1, or a pair of at least 0 and at least 1, not (2, 0)"),
        ({"init_scale": -1.0}, "init_scale must be at least 0, not -1.0"),
        ({"exit_threshold": 0.5}, "this model does not know exit_threshold; leave it out"),
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "give either input_ids or inputs_embeds"),
        ({"input_states": torch.zeros(1, 3, 32)}, "input_states must be [1, 2, 32], without init_scale"),
    ],
)
def test_arguments_that_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(torch.tensor([[1, 2]]), **arguments)


def test_other_caches_and_unsupported_fields_are_refused_by_name(model):
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(ValueError, match=r"^a StaticCache cannot hold 8 loops; pass a DynamicCache\(\) or nothing$"):
        model(torch.tensor([[1, 2]]), past_key_values=cache)

    for field, value in {
        "injection_type": "add",
        "bias": True,
        "n_layers": 9,
        "n_heads": 3,
        "mean_recurrence": 0,
    }.items():
        with pytest.raises(ValueError, match=f"^config field {field} must be "):
            RavenConfig(**{**PUBLISHED, field: value})
