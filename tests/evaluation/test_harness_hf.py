"""The harness's own Hugging Face model on the PyTorch twin gives the same answers."""

import dataclasses
import types

import numpy as np
import pytest
from hf_folders import MULTI_HEAD, make_tensors, write_hf_folder

pytest.importorskip("lm_eval")
pytest.importorskip("tokenizers")
pytest.importorskip("torch")
pytest.importorskip("transformers")

from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerFast

from looplm_jax.convert.torch_model.modeling_looplm import OuroForCausalLM
from looplm_jax.evaluation.harness.adapter import LoopLMAdapter
from looplm_jax.evaluation.harness.settings import Settings
from looplm_jax.loading import load

CONFIG = dataclasses.replace(MULTI_HEAD, num_layers=1)
WINDOW = 32


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our adapter, and the harness's."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tensors = {name: tensor * np.float32(0.3) for name, tensor in make_tensors(CONFIG).items()}
    write_hf_folder(folder, CONFIG, tensors=tensors)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=end, eos_token=end, pad_token=end
    )
    model = OuroForCausalLM.from_pretrained(folder).eval()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=WINDOW, batch_size=4)
    return LoopLMAdapter(load(folder), Settings(max_length=WINDOW)), theirs


def requests(*arguments):
    return [
        types.SimpleNamespace(args=one, arguments=one, request_type="loglikelihood", repeats=1) for one in arguments
    ]


def test_log_likelihoods(both):
    pairs = [("a cat", " sat"), ("a cat ", "sat"), ("", "the end"), ("x", "y"), ("0123456789" * 6, "abcde")]
    ours, theirs = (model.loglikelihood(requests(*pairs)) for model in both)
    np.testing.assert_allclose([found for found, _ in ours], [found for found, _ in theirs], rtol=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods(both):
    texts = [("abc",), ("0123456789" * 7 + "abc",), ("the end " * 4,)]
    ours, theirs = (model.loglikelihood_rolling(requests(*texts)) for model in both)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_text(both):
    arguments = {"until": ["e"], "max_gen_toks": 6, "do_sample": False}
    asked = [("12", arguments), ("a cat", arguments), ("0123456789" * 6, arguments)]
    ours, theirs = (model.generate_until(requests(*asked)) for model in both)
    assert ours == theirs
