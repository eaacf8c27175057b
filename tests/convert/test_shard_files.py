"""Weights in files of bounded size, and sizes as users write them."""

import itertools
import tempfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from looplm_jax.convert._layout import TorchTensor
from looplm_jax.convert._safetensors_io import parse_size, write_weights
from looplm_jax.errors import UserError


def vectors(sizes):
    """Returns bfloat16 tensors with these numbers of bytes."""
    return [
        TorchTensor(name=f"vector.{n}", path=("vector", str(n)), layer=None, our_shape=(size // 2,), contracted=0)
        for n, size in enumerate(sizes)
    ]


def write_random(folder, sizes, max_bytes):
    tensors = {t.name: np.random.default_rng(0).integers(0, 2**15, t.shape, np.uint16) for t in vectors(sizes)}
    written = write_weights(folder, vectors(sizes), lambda t: tensors[t.name], dtype="bfloat16", max_bytes=max_bytes)
    return written, tensors


SIZES = st.lists(st.integers(1, 50).map(lambda half: 2 * half), min_size=1, max_size=20)


@given(sizes=SIZES, max_bytes=st.integers(1, 300))
def test_every_file_is_as_full_as_it_may_be(sizes, max_bytes):
    with tempfile.TemporaryDirectory() as folder:
        written, tensors = write_random(Path(folder), sizes, max_bytes)
        files = [load_file(Path(folder) / name) for name in written.files]
        assert {*written.files} == {path.name for path in Path(folder).glob("*.safetensors")}
    assert written.bytes == sum(sizes)
    assert [name for file in files for name in sorted(file, key=list(tensors).index)] == list(tensors)
    for file in files:
        assert len(file) == 1 or sum(tensors[name].nbytes for name in file) <= max_bytes
        assert all(file[name].tobytes() == tensors[name].tobytes() for name in file)
    for file, following in itertools.pairwise(files):
        first = min(following, key=list(tensors).index)
        assert sum(tensors[name].nbytes for name in file) + tensors[first].nbytes > max_bytes


@pytest.mark.parametrize(("max_bytes", "files"), [(60, 1), (61, 1), (59, 2), (1, 3)])
def test_the_boundary_of_one_file(tmp_path, max_bytes, files):
    written, _ = write_random(tmp_path, [10, 20, 30], max_bytes)
    assert len(written.files) == files
    assert (tmp_path / "model.safetensors").exists() == (files == 1)
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)


def test_the_bytes_begin_where_the_library_puts_them(tmp_path):
    _, tensors = write_random(tmp_path, [10], 99)
    theirs = save({name: tensor.view(jnp.bfloat16) for name, tensor in tensors.items()}, {"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == theirs


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("5GiB", 5 * 2**30),
        ("1.5KiB", 1536),
        ("123", 123),
        ("7B", 7),
        (" 2TB ", 2 * 10**12),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 elephants", "5XB", "1e9", "9" * 99, "٥GB", "5GB5", "\n"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match=r"is not a size; write 500MB, 5GB, 5GiB, or a number of bytes"):
        parse_size(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.1B"])
def test_a_size_of_nothing(text):
    with pytest.raises(UserError, match=r"is less than one byte"):
        parse_size(text)
