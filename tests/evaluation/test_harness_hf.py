"""The harness's own Hugging Face model on the PyTorch twin gives the same answers."""

import collections
import dataclasses
import types

import numpy as np
import pytest
from hf_folders import MULTI_HEAD, make_tensors, write_hf_folder

pytest.importorskip("lm_eval")
pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from lm_eval.models.huggingface import HFLM
from scipy import stats
from transformers import PreTrainedTokenizerFast

from looplm_jax.convert.torch_model.modeling_looplm import OuroForCausalLM
from looplm_jax.evaluation.harness._adapter import LoopLMAdapter
from looplm_jax.evaluation.harness._settings import HarnessSettings
from looplm_jax.loading import load

CONFIG = dataclasses.replace(MULTI_HEAD, num_layers=1)
WINDOW = 32


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Returns our adapter and the harness's."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tensors = {name: tensor * np.float32(0.3) for name, tensor in make_tensors(CONFIG).items()}
    write_hf_folder(folder, CONFIG, tensors=tensors)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token=end, eos_token=end, pad_token=end
    )
    model = OuroForCausalLM.from_pretrained(folder).eval()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, max_length=WINDOW, batch_size=40)
    return LoopLMAdapter(load(folder), HarnessSettings(max_length=WINDOW, batch_size=4)), theirs


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
    asked = [(text, arguments) for text in ("12", "a cat", "0123456789" * 6, "x")]
    ours, theirs = (model.generate_until(requests(*asked)) for model in both)
    assert ours == theirs


@pytest.mark.transformers
@pytest.mark.slow
def test_drawn_text_has_the_distribution_of_the_harness_own_model(both):
    """The first token of many repeats, which both sample from the 50 most likely tokens by default."""
    arguments = {"until": [], "max_gen_toks": 1, "do_sample": True, "temperature": 1.0}
    torch.manual_seed(0)
    ours, theirs = (model.generate_until(requests(*[("12", arguments)] * 400)) for model in both)
    counts = [collections.Counter(texts) for texts in (ours, theirs)]
    frequent = [text for text in counts[0] | counts[1] if counts[0][text] + counts[1][text] >= 10]
    table = [[count[text] for text in frequent] + [400 - sum(count[text] for text in frequent)] for count in counts]
    assert len(frequent) > 3
    assert stats.chi2_contingency([row if table[0][-1] + table[1][-1] else row[:-1] for row in table]).pvalue > 1e-3
    assert len(counts[0]) <= 50
