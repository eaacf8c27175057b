"""Conversion: Hugging Face folders to checkpoints and back, PyTorch state dicts, dense starts, and deeper stacks.

    from looplm_jax.convert import convert_from_hf, convert_to_hf, load_hf

    model, params, tokenizer = load_hf("Ouro-1.4B")
    print(convert_from_hf("Ouro-1.4B", "runs/ouro"))  # a checkpoint to train, evaluate and generate from
    print(convert_to_hf("runs/ouro", "Ouro-1.4B-copy"))  # a folder for transformers, vLLM and `load_hf`

Every tensor is matched with the model before the first one is read, and an output folder is complete or absent.

Hugging Face folders: `load_hf` returns the `HfModel` of a folder. `convert_from_hf` writes it as a checkpoint and
returns `Converted`. `convert_to_hf` writes a checkpoint as a folder that holds its own PyTorch model, in files up to a
size (see `parse_size`), and returns `Exported`.

PyTorch: `to_torch_state_dict` and `from_torch_state_dict` convert parameters without transformers.

Dense models: `convert_from_dense` starts a looped model from the weights of a Llama; `load_dense` returns it as an
`HfModel`.

Deeper stacks: `upcycle` repeats the layers of a checkpoint in an `Order`, and returns `Upcycled`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Hugging Face folders.
    from looplm_jax.convert._import_hf import Converted, HfModel, convert_from_hf, load_hf
    from looplm_jax.convert._export_hf import Exported, convert_to_hf
    from looplm_jax.convert._safetensors_io import parse_size

    # PyTorch.
    from looplm_jax.convert._state_dict import from_torch_state_dict, to_torch_state_dict

    # Dense models.
    from looplm_jax.convert._dense import convert_from_dense, load_dense

    # Deeper stacks.
    from looplm_jax.convert._upcycle import Order, Upcycled, upcycle

__all__ = [
    "Converted",
    "Exported",
    "HfModel",
    "Order",
    "Upcycled",
    "convert_from_dense",
    "convert_from_hf",
    "convert_to_hf",
    "from_torch_state_dict",
    "load_dense",
    "load_hf",
    "parse_size",
    "to_torch_state_dict",
    "upcycle",
]
