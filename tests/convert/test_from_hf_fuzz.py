"""For any content of the files: a model or a one-line error, never another error, a hang or a huge allocation."""

import functools
import json
import os
import struct
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hf_folders import MULTI_HEAD, config_json, make_tensors, write_hf_folder, write_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from looplm_jax.convert import _placement
from looplm_jax.convert._import_hf import read_hf_config
from looplm_jax.convert._placement import match_tensors
from looplm_jax.convert._safetensors_io import INDEX, SINGLE, WeightFolder
from looplm_jax.errors import UserError

MUCH_MEMORY = 64 * 2**20
SMALL = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(3, np.float16)}
VALID_FILE = save(SMALL)
VALID_CONFIG = config_json(MULTI_HEAD)

numbers = (
    st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1.5, 2**31 - 1, 2**31, 2**63, 10**400, float("nan"), float("inf"), -0.0])
)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def folder():
    """Returns one folder for all examples; each overwrites the files that it changes."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path)


def measured(function, *arguments):
    """Returns the result, the lines of the error, and the peak memory of Python and NumPy in all threads."""
    tracemalloc.start()
    try:
        return function(*arguments), [""], tracemalloc.get_traced_memory()[1]
    except UserError as error:
        return None, str(error).splitlines(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def result_or_line(function, *arguments):
    """Returns the result, or None after a one-line error, and checks that peak memory is small."""
    result, lines, peak = measured(function, *arguments)
    if peak >= MUCH_MEMORY:  # a thread of an earlier test may still allocate, so measure again
        *_, peak = measured(function, *arguments)
    assert peak < MUCH_MEMORY
    assert len(lines) == 1
    assert len(lines[0]) < 1000
    return result


def read_all(path):
    weights = WeightFolder.open(path)
    return {name: weights.read(name) for name, stored in weights.tensors.items() if stored.nbytes}


@st.composite
def mutated(draw, valid: bytes):
    """Flips bits, removes a range, or inserts bytes."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["flip", "cut", "insert", "truncate"])):
            case "flip" if at < len(content):
                content[at] ^= draw(st.integers(1, 255))
            case "cut":
                del content[at : at + draw(st.integers(1, 16))]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=16))
            case "truncate":
                del content[at:]
    return bytes(content)


def with_length(content: bytes, length: int) -> bytes:
    return struct.pack("<Q", length) + content[8:]


safetensors_files = (
    st.binary(max_size=200)
    | mutated(VALID_FILE)
    | st.builds(with_length, st.just(VALID_FILE), st.integers(0, 2**64 - 1))
    | st.builds(with_length, mutated(VALID_FILE).filter(lambda x: len(x) > 8), st.integers(0, 300))
)


@given(content=safetensors_files)
@settings(max_examples=200)
def test_safetensors(folder, content):
    (folder / SINGLE).write_bytes(content)
    result_or_line(read_all, folder)


tensor_headers = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "F4", "C64", "BOOL", "X", ""]),
        "shape": st.lists(numbers, max_size=4),
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | st.just([0, 24]),
    }
)


@given(header=st.dictionaries(st.text(max_size=8), tensor_headers | json_values, max_size=3), data=st.binary())
@settings(max_examples=80)
def test_safetensors_headers(folder, header, data):
    text = json.dumps(header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
    result_or_line(read_all, folder)


@st.composite
def configs(draw):
    """Draws the valid config with fields removed, replaced or added."""
    known = sorted(VALID_CONFIG)
    changed = draw(st.dictionaries(st.sampled_from(known), json_values, max_size=2))
    added = draw(st.dictionaries(st.text(max_size=20), json_values, max_size=1))
    dropped = draw(st.lists(st.sampled_from(known), max_size=1))
    return {name: value for name, value in (VALID_CONFIG | changed | added).items() if name not in dropped}


@pytest.fixture(scope="module", autouse=True)
def shapes_once():
    """Caches shapes, which are slow to trace: most examples that get this far have the same model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_placement, "array_shapes", functools.cache(_placement.array_shapes))
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_hf_folder(path)
    return path


def read_config_and_account(path):
    """Runs the two steps that a config can make large: the layers and the shapes."""
    return match_tensors(WeightFolder.open(path), read_hf_config(path))


@given(values=configs())
@settings(max_examples=80)
def test_configs(model_folder, values):
    (model_folder / "config.json").write_text(json.dumps(values))
    result_or_line(read_config_and_account, model_folder)


@given(content=st.binary(max_size=100) | mutated(json.dumps(VALID_CONFIG).encode()) | json_values)
@settings(max_examples=80)
def test_config_files(model_folder, content):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (model_folder / "config.json").write_bytes(raw)
    result_or_line(read_config_and_account, model_folder)


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded")
    write_weights(path, SMALL, shards=2)
    return path


VALID_INDEX = {
    "metadata": {"total_size": 30},
    "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
}
file_names = st.text(max_size=12) | st.sampled_from(
    ["..", "/", "../x.safetensors", *VALID_INDEX["weight_map"].values()]
)
weight_maps = st.dictionaries(
    st.sampled_from(["a", "b", "c"]) | st.text(max_size=4), file_names | json_values, max_size=3
)


@given(
    content=mutated(json.dumps(VALID_INDEX).encode())
    | json_values
    | st.fixed_dictionaries({"weight_map": weight_maps | json_values})
)
@settings(max_examples=80)
def test_index_files(sharded_folder, content):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    (sharded_folder / INDEX).write_bytes(raw)
    tensors = result_or_line(read_all, sharded_folder)
    assert tensors is None or tensors.keys() <= SMALL.keys()


HOSTILE = """
import resource, sys
from pathlib import Path
from looplm_jax.convert._safetensors_io import WeightFolder
from looplm_jax.errors import UserError

(line,) = [line for line in open("/proc/self/status") if line.startswith("VmSize")]
limit = int(line.split()[1]) * 1024 + 64 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    try:
        WeightFolder.open(folder)
    except UserError:
        print(folder.name)
"""


def test_files_that_claim_much_do_not_get_it(tmp_path):
    """In a process that cannot allocate another 64 MB, including allocations of the safetensors library."""
    huge = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    headers = {
        "length": with_length(VALID_FILE, 2**63),
        "length-below-the-limit": with_length(VALID_FILE, 99_000_000),
        "shape": struct.pack("<Q", len(json.dumps({"a": huge}))) + json.dumps({"a": huge}).encode(),
        "nested": struct.pack("<Q", 1_000_000) + b"[" * 1_000_000,
    }
    for name, content in headers.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / SINGLE).write_bytes(content)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", HOSTILE, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == sorted(headers)


def test_the_folder_of_the_fuzz_is_a_good_one(model_folder):
    (model_folder / "config.json").write_text(json.dumps(VALID_CONFIG))
    assert len(read_config_and_account(model_folder)) == len(make_tensors(MULTI_HEAD))
