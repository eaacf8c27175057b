"""The conversion benchmark on a small model: it converts, measures, and detects differing bits."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.benchmarks import conversion
from looplm_jax.config import ModelConfig
from looplm_jax.data.tokenizers import JsonTokenizer

pytest.importorskip("tokenizers")

TINY = ModelConfig(vocab_size=300, width=16, mlp_width=24, num_layers=2, num_heads=2, max_positions=64)


@pytest.fixture
def in_this_process(monkeypatch, capsys):
    """Runs conversions in this process instead of starting new ones."""

    def run(name, source, out):
        assert conversion.main(["--process", name, str(source), str(out)]) == 0
        return conversion.Cost(name=name, seconds=1.0, peak_bytes=int(capsys.readouterr().out.splitlines()[-1]))

    monkeypatch.setattr(conversion, "_run", run)


@pytest.mark.slow
def test_there_and_back(in_this_process, tmp_path):
    measured = conversion.measure(tmp_path / "work", TINY)
    assert measured.differing == ()
    assert [cost.name for cost in measured.costs] == ["imports only", "from-hf", "to-hf", "from-hf"]
    assert measured.costs[0].peak_bytes > 10**7
    assert len(measured.markdown().splitlines()) == 2 + 3
    assert list(tmp_path.iterdir()) == []


def test_a_bit_that_differs_is_found(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        conversion.write_random_model(tmp_path / name, TINY)
    assert list(conversion._differing_tensors(tmp_path / "one", tmp_path / "other")) == []
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"].view(np.uint16)[3] ^= 1
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    assert list(conversion._differing_tensors(tmp_path / "one", tmp_path / "other")) == ["model.norm.weight"]


def test_the_tokenizer_has_the_size_and_the_special_tokens_of_ouro():
    tokenizer = JsonTokenizer(json.dumps(conversion.byte_level_tokenizer(49152)).encode())
    assert tokenizer.vocab_size == 49152
    assert [tokenizer.piece(token) for token in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.decode(tokenizer.encode("for ü in range(3):\n")) == "for ü in range(3):\n"


def test_a_folder_that_is_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        conversion.main(["--folder", str(tmp_path)])
    assert "--folder must name a folder that does not exist" in capsys.readouterr().err
