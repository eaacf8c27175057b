"""Reads the kinds of pieces and the settings of a SentencePiece `.model` file.

SentencePiece's Python package exposes neither. The file is a protocol buffer, `sentencepiece_model.proto`. The
generated reader that ships with SentencePiece rejects every `protobuf` older than the one that generated it, so the few
fields of interest are read from the wire format.
"""

import dataclasses
import enum
import struct
from collections.abc import Iterator
from typing import Any

from looplm_jax.errors import UserError


class PieceKind(enum.IntEnum):
    """The kind of a piece: `ModelProto.SentencePiece.Type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Algorithm(enum.IntEnum):
    """The kind of a model: `TrainerSpec.ModelType`."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclasses.dataclass(frozen=True)
class Piece:
    """One token; its id is its index in the model. Of two possible merges, the higher score is done first."""

    text: str
    score: float
    kind: PieceKind


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings that decide how text is split into pieces, under the names of SentencePiece's trainer."""

    model_type: Algorithm
    byte_fallback: bool
    normalization_rules: bool
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool


@dataclasses.dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model: its pieces, in the order of their ids, and its settings."""

    pieces: tuple[Piece, ...]
    settings: Settings


def read_model(content: bytes) -> SentencePieceModel:
    """Parses the bytes of a `.model` file. Raises UserError if they are not a SentencePiece model."""
    try:
        fields = list(_fields(content))

        # 1: the repeated field `pieces` of `ModelProto`.
        return SentencePieceModel(tuple(_piece(value) for number, value in fields if number == 1), _settings(fields))
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise UserError("this is not a SentencePiece model; give a .model file") from None


def _piece(message: bytes) -> Piece:
    # 2: score, 1: text, 3: type.
    fields = dict(_fields(message))
    # An unset field is not written: a missing score is 0.0.
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, PieceKind(fields.get(3, PieceKind.NORMAL)))


def _settings(model: list[tuple[int, Any]]) -> Settings:
    parts = dict(model)

    # 2: trainer_spec, 3: normalizer_spec, 5: denormalizer_spec. The defaults below are those of the .proto file.
    trainer, normalizer, denormalizer = (dict(_fields(parts.get(number, b""))) for number in (2, 3, 5))

    return Settings(
        model_type=Algorithm(trainer.get(3, Algorithm.UNIGRAM)),
        # Field numbers of TrainerSpec (3, 35) and NormalizerSpec (2 to 5).
        byte_fallback=bool(trainer.get(35, False)),
        # 2: precompiled_charsmap, empty if the text is not normalized.
        normalization_rules=bool(normalizer.get(2) or denormalizer.get(2)),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
        escape_whitespaces=bool(normalizer.get(5, True)),
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yields the number and the value of each field: an int for wire type 0 (varint), bytes for types 1, 2 and 5."""
    position = 0

    while position < len(message):
        key, position = _varint(message, position)

        number, kind = divmod(key, 8)
        if kind == 0:
            value, position = _varint(message, position)
            yield number, value
        else:
            # 1: eight bytes, 5: four bytes; any other type starts with its length.
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, position = _varint(message, position)
            yield number, message[position : position + size]
            position += size


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Decodes a varint: seven bits per byte, lowest first; the last byte is below 128.

    Returns the number and the position after it.
    """
    value = shift = 0
    while message[position] >= 128:
        value |= (message[position] & 127) << shift
        position, shift = position + 1, shift + 7
    return value | message[position] << shift, position + 1
