"""The file of each tensor, and refusals before any tensor is read."""

import json
import os
import pickle
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import write_weights
from safetensors.numpy import save_file

from looplm_jax.convert._safetensors_io import INDEX, SINGLE, WeightFolder, has_weights
from looplm_jax.errors import UserError
from looplm_jax.json_io import read_json_object

TWO = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def tensors() -> dict[str, np.ndarray]:
    values = np.arange(6).reshape(2, 3)
    return {"a": values.astype(np.float32), "b": values.astype(jnp.bfloat16), "c": values[0].astype(np.float16)}


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        WeightFolder.open(folder)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_tensor_is_listed_and_read_as_it_was_saved(tmp_path, shards):
    write_weights(tmp_path, tensors(), shards)
    weights = WeightFolder.open(tmp_path)
    assert weights.tensors.keys() == tensors().keys()
    for name, saved in tensors().items():
        stored, read = weights.tensors[name], weights.read(name)
        assert (stored.shape, stored.dtype, stored.nbytes) == (saved.shape, saved.dtype, saved.nbytes)
        assert (read.shape, read.dtype, read.tobytes()) == (saved.shape, saved.dtype, saved.tobytes())


def test_one_dtype(tmp_path):
    write_weights(tmp_path, tensors())
    weights = WeightFolder.open(tmp_path)
    assert weights.common_dtype(["b"]) == jnp.bfloat16
    with pytest.raises(UserError, match=r"several types \(a in float32, c in float16\); choose one with dtype"):
        weights.common_dtype(["a", "c"])


def test_what_counts_as_a_folder_with_weights(tmp_path):
    assert not has_weights(tmp_path)
    assert not has_weights(tmp_path / "nowhere")
    (tmp_path / "pytorch_model.bin").touch()
    assert has_weights(tmp_path)
    write_weights(tmp_path, tensors())
    assert has_weights(tmp_path)


def test_a_wrong_folder(tmp_path):
    give = "give the folder of a Hugging Face model"
    assert refusal(tmp_path / "no") == f"{tmp_path}/no does not exist; {give}"
    assert refusal(tmp_path) == f"{tmp_path} holds neither {SINGLE} nor {INDEX}; {give}"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == f"{tmp_path}/file is not a folder; {give}"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path} holds '{name}' but no safetensors; a pickled file is refused, since reading it")
    assert line.endswith("save the model again with save_pretrained(..., safe_serialization=True)")


class Bomb:
    """Shows that reading a pickle can run any code."""

    def __reduce__(self):
        return os.abort, ()


def test_pickled_weights_beside_safetensors_do_not_matter(tmp_path):
    write_weights(tmp_path, tensors())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    assert WeightFolder.open(tmp_path).tensors.keys() == tensors().keys()


def test_two_sets_of_weights(tmp_path):
    write_weights(tmp_path, tensors())
    write_weights(tmp_path, tensors(), shards=2)
    assert refusal(tmp_path) == f"{tmp_path} holds both {SINGLE} and {INDEX}; remove the one that is out of date"


def saved_file(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DAMAGED = {
    "empty": b"",
    "cut in the length": b"\x08\x00",
    "cut in the header": saved_file({"a": TWO}, bytes(8))[:20],
    "cut in the data": saved_file({"a": TWO}, bytes(7)),
    "more than the header says": saved_file({"a": TWO}, bytes(9)),
    "header beyond the file": saved_file({"a": TWO}, bytes(8), length=1000),
    "header of 2^63 bytes": saved_file({"a": TWO}, bytes(8), length=2**63),
    "header of 2^64 - 1 bytes": saved_file({"a": TWO}, bytes(8), length=2**64 - 1),
    "no JSON": saved_file(b'{"a": '),
    "no object": saved_file(b"[]"),
    "no Unicode": saved_file(b'{"\xff": 1}'),
    "nested": saved_file(b"[" * 100_000),
    "overlapping": saved_file({"a": TWO, "b": TWO}, bytes(8)),
    "with a hole": saved_file({"a": TWO, "b": {**TWO, "data_offsets": [12, 20]}}, bytes(20)),
    "negative shape": saved_file({"a": {**TWO, "shape": [-2]}}, bytes(8)),
    "shape of 2^66 bytes": saved_file({"a": {**TWO, "shape": [2**62, 4]}}, bytes(8)),
    "unknown type": saved_file({"a": {**TWO, "dtype": "X7"}}, bytes(8)),
    "name on two lines": saved_file({"a\nb": {**TWO, "data_offsets": [0, 7]}}, bytes(8)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file(tmp_path, content):
    (tmp_path / SINGLE).write_bytes(content)
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}/{SINGLE} is damaged, or is not safetensors (SafetensorError: ")
    assert line.endswith("); copy it again")


def test_a_file_that_is_damaged_after_it_was_opened(tmp_path):
    write_weights(tmp_path, tensors())
    weights = WeightFolder.open(tmp_path)
    os.truncate(tmp_path / SINGLE, 40)
    with pytest.raises(UserError, match="is damaged, or is not safetensors"):
        weights.read("a")
    (tmp_path / SINGLE).unlink()
    with pytest.raises(UserError, match=rf"{SINGLE} cannot be read \(FileNotFoundError"):
        weights.read("a")


def test_what_is_not_a_plain_file(tmp_path):
    os.mkfifo(tmp_path / SINGLE)
    assert refusal(tmp_path) == f"{tmp_path}/{SINGLE} is not a file; copy it again"


@pytest.mark.parametrize(
    ("dtype", "size"), [("F8_E4M3", 1), ("F8_E5M2", 1), ("I8", 1), ("U8", 1), ("I64", 8), ("F64", 8), ("BOOL", 1)]
)
def test_another_type_of_number(tmp_path, dtype, size):
    header = {"a": {"dtype": dtype, "shape": [2], "data_offsets": [0, 2 * size]}}
    (tmp_path / SINGLE).write_bytes(saved_file(header, bytes(2 * size)))
    assert refusal(tmp_path) == f"{tmp_path}/{SINGLE}: tensor a is stored as {dtype}; weights are F32, BF16 or F16"


def test_a_name_that_cannot_be_printed(tmp_path):
    (tmp_path / SINGLE).write_bytes(saved_file({"a\nb": TWO}, bytes(8)))
    assert refusal(tmp_path) == f"{tmp_path}/{SINGLE} holds a tensor called 'a\\nb', which is not a PyTorch name"


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(json.dumps(content))


def test_an_index_that_is_no_index(tmp_path):
    for content in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": "a"}):
        write_index(tmp_path, content)
        assert refusal(tmp_path) == f"{tmp_path}/{INDEX} has no weight_map from tensors to files; copy it again"


@pytest.mark.parametrize(
    "shard",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "..",
        "sub/a.safetensors",
        "a.bin",
        "a\0b.safetensors",
        7,
        None,
        [],
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
    ],
)
def test_an_index_that_names_what_is_no_shard(tmp_path, shard):
    write_index(tmp_path, {"weight_map": {"a": shard}})
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}/{INDEX} names the file ")
    assert line.endswith("; a shard is a .safetensors file of the same folder")


def test_a_missing_shard(tmp_path):
    write_weights(tmp_path, tensors(), shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    missing = "model-00002-of-00002.safetensors"
    assert refusal(tmp_path) == f"{tmp_path}/{INDEX} names {missing}, which is missing; copy it to {tmp_path}"


def test_a_tensor_that_its_shard_lacks(tmp_path):
    shard = "model-00001-of-00001.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / shard)
    write_index(tmp_path, {"weight_map": {"a": shard, "b": shard}})
    assert refusal(tmp_path) == f"{tmp_path}/{INDEX} names tensor 'b' in {shard}, which does not hold it"


def test_a_tensor_that_the_index_does_not_name(tmp_path):
    shard, other = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / shard)
    save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / other)
    write_index(tmp_path, {"weight_map": {"a": shard, "b": other}})
    assert refusal(tmp_path) == f"{tmp_path}/{other} holds tensor a, which {INDEX} does not name there"


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    write_weights(tmp_path, {"a": np.zeros(2, np.float32)})
    monkeypatch.setattr("looplm_jax.convert._safetensors_io.safe_open", refuse_permission)
    line = refusal(tmp_path)
    assert line.startswith(f"{tmp_path}/{SINGLE} cannot be read (PermissionError: ")
    assert line.endswith("); check its permissions and its disk")


def refuse_permission(*_, **__):
    raise PermissionError(13, "Permission denied")


NO_JSON = {
    "empty": b"",
    "cut": b'{"a": 1',
    "no Unicode": b'{"a": "\xff"}',
    "a number of 5000 digits": b'{"a": ' + b"1" * 5000 + b"}",
}


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_not_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{path} is not JSON \(.*\); copy it again$"):
        read_json_object(path)


def test_json_that_is_no_object(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object, not a list; copy it again"):
        read_json_object(path)


@pytest.mark.parametrize("levels", [17, 900, 100_000])
def test_json_that_is_nested(tmp_path, levels):
    path = tmp_path / "config.json"
    path.write_text('{"a": ' + "[" * levels + "]" * levels + "}")
    with pytest.raises(UserError, match=r"is nested more than 16 levels deep; it is not a config\.json"):
        read_json_object(path)


def test_json_that_is_large_missing_or_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="is missing; copy it from where the model comes from"):
        read_json_object(path)
    with path.open("wb") as stream:
        stream.truncate(10 * 2**20 + 1)
    with pytest.raises(UserError, match=r"is larger than 10 MiB; it is not a config\.json"):
        read_json_object(path)
    path.write_text("{}")
    assert read_json_object(path) == {}
    monkeypatch.setattr(Path, "read_bytes", refuse_permission)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\); check its permissions"):
        read_json_object(path)
