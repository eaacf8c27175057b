"""The public names of `looplm_jax.convert`: its example runs, and `load_hf` reads a folder into memory."""

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import MULTI_HEAD, write_hf_folder

import looplm_jax
from looplm_jax import convert

pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Returns the folder that the example names, in the current directory."""
    monkeypatch.chdir(tmp_path)
    write_hf_folder(tmp_path / "Ouro-1.4B")
    return tmp_path / "Ouro-1.4B"


def test_the_example_runs(folder, capsys):
    (example,) = re.findall(r"\n\n((?:    .*\n|\n)+)", convert.__doc__)
    exec(textwrap.dedent(example), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()][-1] == "wrote"
    assert {path.name for path in folder.parent.iterdir()} == {"Ouro-1.4B", "Ouro-1.4B-copy", "runs"}


def test_a_folder_is_loaded_into_memory(folder):
    model, params, tokenizer = convert.load_hf(folder)

    everything = looplm_jax.load(folder)
    assert model.config == everything.model.config
    assert tokenizer.fingerprint == everything.tokenizer.fingerprint
    jax.tree.map(np.testing.assert_array_equal, params, everything.params)

    tokens = jnp.arange(6, dtype=jnp.int32)[None]
    assert model.apply({"params": params}, tokens).hidden.shape == (MULTI_HEAD.loops, 1, 6, MULTI_HEAD.width)


def test_every_public_name_exists():
    assert set(convert.__all__) <= set(dir(convert))
    assert all(getattr(convert, name) is not None for name in convert.__all__)
