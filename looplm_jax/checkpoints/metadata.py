"""What a checkpoint holds besides arrays, and its form on the disk: JSON under a checksum."""

import base64
import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from looplm_jax.checkpoints.errors import DamagedError
from looplm_jax.codec import from_dict
from looplm_jax.config import Recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """What makes a checkpoint self-describing. Everything but `tokenizer` is plain JSON.

    Each process saves the part of `data_state` that it knows; read back, it is all parts together, on any number of
    processes. What several of them know is saved by each alike.
    """

    config: dict[str, Any]
    tokenizer_kind: str
    tokenizer: bytes
    tokenizer_fingerprint: str
    data_state: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def recipe(self) -> Recipe:
        """The recipe of the run, its model as it was in the stage of this checkpoint; a converted one is of no stage.

        Raises:
          UserError: the configuration is not one of this version.
        """
        recipe = from_dict(Recipe, self.config)
        stages = [stage for stage in recipe.stages if stage.name == self.extra.get("stage")]
        return dataclasses.replace(recipe, model=recipe.model_of(stages[0])) if stages else recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """What is known of one array before it is read."""

    shape: tuple[int, ...]
    dtype: str
    digest: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The JSON that is committed together with the arrays of a step."""

    metadata: Metadata
    arrays: dict[str, ArrayRecord]
    permanent: bool


def encode(metadata: Metadata, arrays: dict[str, ArrayRecord], *, permanent: bool) -> dict[str, str]:
    """The JSON of a sidecar. All processes must call this together."""
    values = {
        **dataclasses.asdict(metadata),
        "tokenizer": base64.b64encode(metadata.tokenizer).decode(),
        "data_state": _from_all_processes(metadata.data_state),
        "arrays": {name: dataclasses.asdict(record) for name, record in arrays.items()},
        "permanent": permanent,
    }
    body = json.dumps(values)
    return {"body": body, "sha256": _checksum(body)}


def decode(value: Any) -> Sidecar:
    """The inverse of `encode`.

    Raises:
      DamagedError: the checksum differs.
    """
    if not isinstance(value, dict) or _checksum(str(value.get("body"))) != value.get("sha256"):
        raise DamagedError("the checksum of its metadata differs")
    values = json.loads(value["body"])
    arrays, states, permanent = (values.pop(name) for name in ("arrays", "data_state", "permanent"))
    return Sidecar(
        metadata=Metadata(
            **{
                **values,
                "tokenizer": base64.b64decode(values["tokenizer"]),
                "data_state": functools.reduce(_joined, states),
            }
        ),
        arrays={name: ArrayRecord(**{**record, "shape": tuple(record["shape"])}) for name, record in arrays.items()},
        permanent=permanent,
    )


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()


def _joined(first: Any, second: Any) -> Any:
    """Both, key by key; of values that are no dictionaries the second."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    return {key: _joined(first.get(key, {}), second.get(key, first.get(key))) for key in {**first, **second}}


def _from_all_processes(value: Any) -> list[Any]:
    """The JSON `value` of every process, in the order of their indices."""
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(encoded.tobytes())]
    sizes = multihost_utils.process_allgather(np.array(encoded.size, np.int32))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, int(sizes.max()) - encoded.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]
