"""What a SentencePiece `.model` file holds and its Python package does not give: kinds of pieces, and settings.

The file is a protocol buffer, `sentencepiece_model.proto`. The generated reader that comes with SentencePiece refuses
every `protobuf` older than the one that generated it, so the few fields of interest are read from the wire format.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterator
from typing import Any

from looplm_jax.errors import UserError


class PieceKind(enum.IntEnum):
    """`ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(enum.IntEnum):
    """`TrainerSpec.ModelType`."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token; its id is its place in the model. Of two merges the one with the higher score comes first."""

    text: str
    score: float
    kind: PieceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides how text becomes pieces, by the names of SentencePiece's trainer."""

    model_type: Algorithm
    byte_fallback: bool
    normalization_rules: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """The pieces in the order of their ids, and the settings."""

    pieces: tuple[Piece, ...]
    settings: Settings


def read_model(content: bytes) -> SentencePieceModel:
    """Read the bytes of a `.model` file. Raises UserError where they are none."""
    try:
        fields = list(_fields(content))
        return SentencePieceModel(tuple(_piece(value) for number, value in fields if number == 1), _settings(fields))
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise UserError("this is not a SentencePiece model; give a .model file") from None


def _piece(message: bytes) -> Piece:
    fields = dict(_fields(message))
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, PieceKind(fields.get(3, PieceKind.NORMAL)))


def _settings(model: list[tuple[int, Any]]) -> Settings:
    parts = dict(model)
    trainer, normalizer, denormalizer = (dict(_fields(parts.get(number, b""))) for number in (2, 3, 5))
    return Settings(
        model_type=Algorithm(trainer.get(3, Algorithm.UNIGRAM)),
        byte_fallback=bool(trainer.get(35, False)),
        normalization_rules=bool(normalizer.get(2) or denormalizer.get(2)),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field: an int of kind 0 (varint), else its bytes (kinds 1, 2 and 5)."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, kind = divmod(key, 8)
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
        else:
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, position = _varint(message, position)
            yield number, message[position : position + size]
            position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Seven bits a byte, lowest first; the last byte is below 128. Returns the number and where it ends."""
    value = shift = 0
    while message[position] >= 128:
        value |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | message[position] << shift, position + 1
