"""Exports a checkpoint to a Hugging Face folder: weights, configuration, tokenizer, PyTorch model, and model card."""

import dataclasses
import functools
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from looplm_jax.checkpoints import Restored, read_metadata, restore_params
from looplm_jax.config import ModelConfig
from looplm_jax.convert._huginn_config import is_huginn, to_huginn_config
from looplm_jax.convert._huginn_layout import by_tensor, huginn_layout, rotary_table, rotary_tensor
from looplm_jax.convert._layout import Path as ArrayPath
from looplm_jax.convert._layout import TorchTensor, array_shapes, flat_arrays, torch_layout
from looplm_jax.convert._model_card import model_card, training_record
from looplm_jax.convert._ouro_config import to_ouro_config
from looplm_jax.convert._safetensors_io import WrittenWeights, write_weights
from looplm_jax.convert._tokenizer_files import code_left_out, stop_ids, tokenizer_files
from looplm_jax.data.tokenizers import FolderTokenizer, Tokenizer, deserialize
from looplm_jax.data.tokenizers._folder import kept_json
from looplm_jax.errors import UserError
from looplm_jax.files import staged_folder

DEFAULT_SHARD_BYTES = 5 * 10**9
_DTYPES = ("float32", "bfloat16")
_TORCH_FILES = ("configuration_looplm.py", "modeling_looplm.py")
_HUGINN_FILES = ("configuration_huginn.py", "modeling_huginn.py", *_TORCH_FILES)  # the first two import the others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export. `warnings` name newer checkpoints that were skipped, and what was left out."""

    out: Path
    step: int
    dtype: str
    weights: WrittenWeights
    files: tuple[str, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        size = f"{self.weights.bytes:,} bytes of {self.dtype} in {len(self.weights.files)} file(s)"
        return "\n".join((*self.warnings, f"wrote step {self.step}, {size}, to {self.out}: {', '.join(self.files)}"))


def convert_to_hf(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Exported:
    """Writes a folder that transformers, vLLM and `looplm convert from-hf` can read.

    Args:
      checkpoint: a run folder, its `checkpoints` folder, or one step.
      out: a folder that does not exist, or is empty.
      step: the step to export; None exports the latest valid checkpoint.
      dtype: float32 or bfloat16; None keeps the stored dtype.
      max_shard_bytes: larger weights are split into several files.

    Raises:
      UserError: `checkpoint` is not a checkpoint, no step is valid, an option cannot be expressed in Hugging Face's
        Ouro, weights are not finite, `out` is not empty, or the file system refuses a write. No partial output remains.
    """
    if dtype not in (None, *_DTYPES):
        raise UserError(f"weights are written in {' or '.join(_DTYPES)}, not {dtype}")

    source = os.fspath(checkpoint)
    model = read_metadata(source, step).recipe().model
    _config_json(model, "float32")  # raises for unsupported options before the weights are read

    with staged_folder(out) as folder:
        restored = restore_params(source, array_shapes(model), step=step)
        dtype = dtype or _widest(restored.state)
        left_out = _write_small_files(folder, source, restored, dtype)  # first, because a tokenizer may be refused
        weights = _write_weights(folder, model, restored.state, dtype, max_shard_bytes)
        files = tuple(sorted(path.name for path in folder.iterdir()))

    return Exported(
        out=Path(out),
        step=restored.step,
        dtype=dtype,
        weights=weights,
        files=files,
        warnings=(*map(str, restored.skipped), *left_out),
    )


# Weights


def _widest(params: Any) -> str:
    """Returns the dtype that holds every parameter without loss; `config.json` can name only one."""
    stored = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    return stored.pop() if len(stored) == 1 else "float32"


def _write_weights(folder: Path, model: ModelConfig, params: Any, dtype: str, max_bytes: int) -> WrittenWeights:
    arrays = {path: np.asarray(array) for path, array in flat_arrays(params).items()}
    read = functools.partial(_read, arrays, jnp.dtype(dtype))
    if not is_huginn(model):
        return write_weights(folder, list(torch_layout(params)), read, dtype=dtype, max_bytes=max_bytes)

    # A tensor holds several of our arrays.
    slices = by_tensor(huginn_layout(model))
    # Huginn's code reads its table of rotary angles from the files.
    table = rotary_tensor(model)

    def read_whole(tensor: TorchTensor) -> np.ndarray:
        if tensor is table:
            own = np.dtype(jnp.dtype(dtype))
            return rotary_table(model).astype(own).view(f"u{own.itemsize}")
        return np.concatenate([read(part) for part in slices[tensor.name]])

    wholes = [table, *(parts[0] for parts in slices.values())]
    return write_weights(folder, wholes, read_whole, dtype=dtype, max_bytes=max_bytes)


def _read(arrays: dict[ArrayPath, np.ndarray], dtype: np.dtype, tensor: TorchTensor) -> np.ndarray:
    """Returns a tensor in PyTorch's layout. The bits are integers, which NumPy transposes faster than its bfloat16."""
    whole = arrays[tensor.path]
    # One layer at a time is converted, so that the weights are never in memory twice.
    ours = (whole if tensor.layer is None else whole[tensor.layer]).astype(dtype, copy=False)
    if not np.isfinite(ours).all():
        raise UserError(f"tensor {tensor.name} has values that are not finite in {dtype}; take another dtype or step")
    return tensor.to_torch(ours.view(f"u{dtype.itemsize}"))


# All other files


def _write_small_files(folder: Path, source: str, restored: Restored, dtype: str) -> tuple[str, ...]:
    """Writes everything except the weights. Returns warnings about what is left out."""
    metadata = restored.metadata
    recipe = metadata.recipe()
    tokenizer = deserialize(metadata.tokenizer_kind, metadata.tokenizer)
    special: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    if isinstance(tokenizer, FolderTokenizer):
        # The token ids of the original folder win.
        special |= kept_json(tokenizer, "config.json")

    _write_json(folder / "config.json", {**_config_json(recipe.model, dtype), **special})
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))
    for name, content in tokenizer_files(tokenizer, max_positions=recipe.model.max_positions).items():
        # Some names contain a folder.
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    # Transformers runs these files with `trust_remote_code=True`, without this package.
    code = importlib.resources.files("looplm_jax.convert.torch_model")
    for name in _HUGINN_FILES if is_huginn(recipe.model) else _TORCH_FILES:
        (folder / name).write_bytes((code / name).read_bytes())

    card = model_card(training_record(source, restored), dtype=dtype)
    if isinstance(tokenizer, FolderTokenizer):
        card = card.replace("---\n", f"---\n{tokenizer.files.get('README.md', '')}", 1)  # the license of the weights
    (folder / "README.md").write_text(card, encoding="utf-8")
    return code_left_out(tokenizer)


def _config_json(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the fields of `config.json`. Raises UserError for an option that the published code cannot express."""
    return (to_huginn_config if is_huginn(model) else to_ouro_config)(model, dtype=dtype)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the defaults of `generate`, which stops at the end of a text and at the end of a chat turn."""
    ours = {"bos_token_id": tokenizer.bos_id, "eos_token_id": stop_ids(tokenizer), "pad_token_id": tokenizer.eos_id}
    if not isinstance(tokenizer, FolderTokenizer):
        return ours

    theirs = kept_json(tokenizer, "generation_config.json")
    theirs.pop("_from_model_config", None)  # with it, transformers would derive the values from the model config again
    pad = {} if tokenizer.ids.pad is None else {"pad_token_id": tokenizer.ids.pad}
    return {**theirs, **ours, **pad}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
