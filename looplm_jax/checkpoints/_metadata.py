"""The metadata of a checkpoint, its format on disk (JSON with a SHA-256 checksum), and the errors of a step.

The metadata file of a step (`sidecar/data.json`) contains the configuration, the tokenizer, the state of the data, and
shape, dtype and digest of each array.
"""

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

from looplm_jax.codec import from_dict
from looplm_jax.config import Recipe
from looplm_jax.errors import UserError

FORMAT = 1  # the version of the format; the oldest files do not contain it

# The types of the fields in JSON. Every field is checked before any is used: files of other versions, and of other
# programs, are refused by name instead of failing later.
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


# Errors


class DamagedError(Exception):
    """A step or a part of it is missing or altered, as its files show. The message names the part.

    The public functions of this package convert it to a `UserError`.
    """


class OtherVersionError(Exception):
    """A step is complete but was written by another version of this package. The message names its format.

    The public functions of this package convert it to a `UserError`.
    """


class UnreadableError(Exception):
    """A part of a step cannot be read, which does not imply that it is damaged.

    The public functions of this package convert it to a `UserError`.
    """


class RefusedError(UnreadableError):
    """The file system or the bucket refused to read a part of a step. A retry may succeed."""


class SaveError(UserError):
    """The file system or the bucket refused to write a step. Earlier steps are intact, and training can continue."""


# Metadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metadata:
    """The metadata that makes a checkpoint self-describing. All fields except `tokenizer` are plain JSON.

    Each process saves its own part of `data_state`. When the checkpoint is read, the parts of all processes are merged,
    and any number of processes may read it. An entry that several processes save has the same value in each.

    Attributes:
      config: the recipe, as `codec.to_dict` writes it.
      tokenizer_kind: the name of the tokenizer's format.
      tokenizer: the serialized tokenizer.
      tokenizer_fingerprint: a digest of the tokenizer.
      data_state: the position in the data.
      extra: further values, such as the name of the stage.
    """

    config: dict[str, Any]
    tokenizer_kind: str
    tokenizer: bytes
    tokenizer_fingerprint: str
    data_state: dict[str, Any]
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def recipe(self) -> Recipe:
        """Returns the recipe of the run, with the model of the stage in which this checkpoint was saved.

        A converted checkpoint has no stage; its recipe is returned as it was saved.

        Raises:
          UserError: the configuration is of another version of this package.
        """
        # Stages may differ in the model, for example in its number of loops.
        recipe = self.saved_recipe()
        stages = [stage for stage in recipe.stages if stage.name == self.extra.get("stage")]
        return dataclasses.replace(recipe, model=recipe.model_of(stages[0])) if stages else recipe

    def saved_recipe(self) -> Recipe:
        """Returns the recipe of the run as it was saved. Fields newer than the checkpoint have their defaults.

        Raises:
          UserError: the configuration is of another version of this package.
        """
        try:
            return from_dict(Recipe, self.config)
        except UserError as error:
            raise UserError(f"the checkpoint is of another version of looplm_jax; in its recipe: {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayInfo:
    """Shape, dtype and digest of one array, known before the array is read."""

    shape: tuple[int, ...]
    dtype: str
    digest: str

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetadataFile:
    """The JSON that is committed together with the arrays of a step."""

    metadata: Metadata
    arrays: dict[str, ArrayInfo]
    permanent: bool


# Encoding and decoding


def encode_metadata(metadata: Metadata, arrays: dict[str, ArrayInfo], *, permanent: bool) -> dict[str, str]:
    """Returns the metadata file as JSON with its checksum. All processes must call this together."""
    values = {
        "format": FORMAT,
        **dataclasses.asdict(metadata),
        "tokenizer": base64.b64encode(metadata.tokenizer).decode(),
        "data_state": _from_all_processes(metadata.data_state),
        "arrays": {name: dataclasses.asdict(record) for name, record in arrays.items()},
        "permanent": permanent,
    }
    # The checksum is that of the text itself, so it does not depend on how JSON would be written again.
    body = json.dumps(values)
    return {"body": body, "sha256": _checksum(body)}


def decode_metadata(value: Any) -> MetadataFile:
    """Returns the metadata file that `encode_metadata` wrote.

    Raises:
      DamagedError: the checksum differs.
      OtherVersionError: the checksum is correct, but the fields are not those of this version.
    """
    if not isinstance(value, dict) or _checksum(str(value.get("body"))) != value.get("sha256"):
        raise DamagedError("the checksum of its metadata differs")

    # The checksum is right, so the text is what some version wrote.
    values = _checked(json.loads(value["body"]))
    # The data state is saved as a list with one entry per process.
    arrays, states, permanent = (values.pop(name) for name in ("arrays", "data_state", "permanent"))

    return MetadataFile(
        metadata=Metadata(
            **{
                **values,
                "tokenizer": base64.b64decode(values["tokenizer"]),
                "data_state": functools.reduce(_joined, states),
            }
        ),
        arrays={name: ArrayInfo(**{**record, "shape": tuple(record["shape"])}) for name, record in arrays.items()},
        permanent=permanent,
    )


# Validation


def _checked(body: Any) -> dict[str, Any]:
    """Returns the fields of a metadata file. Raises OtherVersionError if they are not those of this version."""
    if not isinstance(body, dict):
        raise _other_version(None, "it is not an object")

    version = body.get("format", FORMAT)
    if version != FORMAT:
        raise _other_version(version, f"this version reads format {FORMAT}")

    fields = {name: value for name, value in body.items() if name != "format"}

    wrong = _wrong_field(fields, _KINDS) or _wrong_value(fields)
    if wrong:
        raise _other_version(version, wrong)
    return fields


def _wrong_value(fields: dict[str, Any]) -> str | None:
    """Returns a description of the first field with an invalid value, or None."""
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
    """Returns a description of what is wrong with the record of an array, or None."""
    wrong = "not the fields" if not isinstance(record, dict) else _wrong_field(record, _RECORD_KINDS)
    if wrong:
        return wrong

    # Not `isinstance`: true and false are integers in Python.
    if not all(type(size) is int and size >= 0 for size in record["shape"]):
        return "no shape is 'shape'"

    try:
        jnp.dtype(record["dtype"])
    except TypeError:
        return f"unknown dtype {record['dtype']!r}"
    return None


def _wrong_field(values: dict[str, Any], kinds: dict[str, type]) -> str | None:
    """Returns a description of the first field that is unknown, missing or of another type, or None."""
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
    # A damaged body may contain lone surrogates.
    return hashlib.sha256(body.encode(errors="surrogatepass")).hexdigest()


# Data state of several processes


def _joined(first: Any, second: Any) -> Any:
    """Merges two JSON values key by key. For values that are not both dictionaries, returns the second."""
    if not isinstance(first, dict) or not isinstance(second, dict):
        return second
    # A key that only one process has, such as a substream, is kept as it is.
    return {key: _joined(first.get(key, {}), second.get(key, first.get(key))) for key in {**first, **second}}


def _from_all_processes(value: Any) -> list[Any]:
    """Returns the JSON `value` of every process, ordered by process index."""
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if jax.process_count() == 1:
        return [json.loads(encoded.tobytes())]
    # An all-gather needs equal shapes, so the encoded values are padded to the longest.
    sizes = multihost_utils.process_allgather(np.array(encoded.size, np.int32))
    padded = multihost_utils.process_allgather(np.pad(encoded, (0, int(sizes.max()) - encoded.size)))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]
