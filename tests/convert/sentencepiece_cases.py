"""SentencePiece models built by hand: any pieces and settings, in the wire format of `sentencepiece_model.proto`."""

import struct

from looplm_jax.convert._sentencepiece_json import PieceKind

BYTES = [(f"<0x{byte:02X}>", 0.0, PieceKind.BYTE) for byte in range(256)]
# The fields of a lossless model: BPE, byte fallback, no normalization.
BPE = {3: 2, 35: 1}
VERBATIM = {3: 0, 4: 0, 5: 1}


def model_bytes(pieces, trainer=BPE, normalizer=VERBATIM) -> bytes:
    """Returns a `.model` file with pieces `(text, score, kind)` after `<unk>`, `<s>`, `</s>` and the 256 bytes."""
    first = [("<unk>", 0.0, PieceKind.UNKNOWN), ("<s>", 0.0, PieceKind.CONTROL), ("</s>", 0.0, PieceKind.CONTROL)]
    body = b"".join(_field(1, _piece(*piece)) for piece in [*first, *BYTES, *pieces])
    return body + _field(2, _message(trainer)) + _field(3, _message(normalizer))


def merged(texts) -> list[tuple[str, float, PieceKind]]:
    """Returns the characters of the texts as pieces, and the texts, best first."""
    characters = sorted(set("".join(texts)))
    order = [*texts, *(character for character in characters if character not in texts)]
    return [(text, -float(rank), PieceKind.NORMAL) for rank, text in enumerate(order)]


def _piece(text, score, kind) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, int(kind))


def _message(fields) -> bytes:
    return b"".join(_field(number, value) for number, value in fields.items())


def _field(number, value) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
