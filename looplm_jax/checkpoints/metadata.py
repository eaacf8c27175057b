"""What a checkpoint holds besides arrays, and its form on the disk: JSON under a checksum."""

import base64
import binascii
import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from looplm_jax.checkpoints.errors import DamagedError, OtherVersionError
from looplm_jax.codec import from_dict
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError

FORMAT = 1  # of a sidecar; the first ones did not name it

_KINDS: dict[str, type] = {
    "config": dict,
    "tokenizer_kind": str,
    "tokenizer": str,
    "tokenizer_fingerprint": str,
    "data_state": list,
    "extra": dict,
    "arrays": dict,
    "permanent": bool,
}
_RECORD_KINDS: dict[str, type] = {"shape": list, "dtype": str, "digest": str}


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
        recipe = self.saved_recipe()
        stages = [stage for stage in recipe.stages if stage.name == self.extra.get("stage")]
        return dataclasses.replace(recipe, model=recipe.model_of(stages[0])) if stages else recipe

    def saved_recipe(self) -> Recipe:
        """The recipe of the run as it was saved, with the defaults of fields that are newer than the checkpoint.

        Raises:
          UserError: the configuration is not one of this version.
        """
        try:
            return from_dict(Recipe, self.config)
        except UserError as error:
            raise UserError(f"the checkpoint is of another version of looplm_jax; in its recipe: {error}") from None


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
        "format": FORMAT,
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
      OtherVersionError: the checksum is right, and the fields are not those of this version.
    """
    if not isinstance(value, dict) or _checksum(str(value.get("body"))) != value.get("sha256"):
        raise DamagedError("the checksum of its metadata differs")
    values = _checked(json.loads(value["body"]))
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


def _checked(body: Any) -> dict[str, Any]:
    """The fields of a sidecar. Raises OtherVersionError where they are not those of this version."""
    if not isinstance(body, dict):
        raise _other_version(None, "it is no object")
    version = body.get("format", FORMAT)
    if version != FORMAT:
        raise _other_version(version, f"this version reads format {FORMAT}")
    fields = {name: value for name, value in body.items() if name != "format"}
    wrong = _wrong_field(fields, _KINDS) or _wrong_value(fields)
    if wrong:
        raise _other_version(version, wrong)
    return fields


def _wrong_value(fields: dict[str, Any]) -> str | None:
    try:
        base64.b64decode(fields["tokenizer"], validate=True)
    except (binascii.Error, ValueError):
        return "'tokenizer' is not base64"
    if not fields["data_state"]:
        return "'data_state' is empty"
    if not isinstance(fields["extra"].get("stage", ""), str):
        return "'extra.stage' has another type"
    for name, record in fields["arrays"].items():
        wrong = _wrong_record(record)
        if wrong:
            return f"{wrong} of array {name}"
    return None


def _wrong_record(record: Any) -> str | None:
    wrong = "not the fields" if not isinstance(record, dict) else _wrong_field(record, _RECORD_KINDS)
    if wrong:
        return wrong
    if not all(type(size) is int and size >= 0 for size in record["shape"]):
        return "no shape is 'shape'"
    try:
        jnp.dtype(record["dtype"])
    except TypeError:
        return f"unknown dtype {record['dtype']!r}"
    return None


def _wrong_field(values: dict[str, Any], kinds: dict[str, type]) -> str | None:
    """The first field that is unknown, missing or of another type."""
    for name in {**values, **kinds}:
        if name not in kinds:
            return f"unknown field {name!r}"
        if name not in values:
            return f"no field {name!r}"
        if not isinstance(values[name], kinds[name]):
            return f"field {name!r} has another type"
    return None


def _other_version(version: Any, why: str) -> OtherVersionError:
    known = f"format {version!r}; " if version is not None else ""
    return OtherVersionError(f"was written by another version of looplm_jax ({known}{why})")


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
