"""Converts a SentencePiece BPE model to a Hugging Face `tokenizer.json` that gives the same ids.

SentencePiece merges any two neighbors whose joined text is a piece; Hugging Face merges listed pairs. One pair per
piece is enough: until a piece is formed, nothing inside it has merged with anything outside. So the merges inside are
the same as when the piece is encoded alone, and its last merge is always the same (`_last_merge`). Both merge equal
neighbors from the left.

SentencePiece writes a space as U+2581. Here it stays a space, which leaves U+2581 itself to the byte tokens, as in
`SentencePieceTokenizer`. The decoded texts agree too, with two exceptions: for bytes that are not UTF-8 the number of
replacement characters differs, and the unknown token, which no text encodes to, is shown by its name.
"""

import collections
import dataclasses
import enum
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from looplm_jax.data.tokenizers._sentencepiece import SPACE_MARK, model_message
from looplm_jax.errors import UserError

# Reading a model


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
class ModelSettings:
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
    settings: ModelSettings


def read_model(content: bytes) -> SentencePieceModel:
    """Parses the bytes of a `.model` file. SentencePiece's Python package exposes neither kinds nor settings.

    Raises:
      UserError: the bytes are not a SentencePiece model.
    """
    from google.protobuf.message import DecodeError

    try:
        model = model_message().FromString(content)
        return SentencePieceModel(tuple(map(_piece, model.pieces)), _settings(model))
    # ValueError: an unknown kind or algorithm, or a text that is not UTF-8.
    except (DecodeError, ValueError):
        raise UserError("this is not a SentencePiece model; give a .model file") from None


def _piece(message: Any) -> Piece:
    # The message class has only optional fields, so a message of another kind may parse as one.
    if not message.HasField("piece"):
        raise ValueError("a piece without a text")
    return Piece(message.piece.decode(), message.score, PieceKind(message.type))


def _settings(model: Any) -> ModelSettings:
    normalizer = model.normalizer_spec

    return ModelSettings(
        model_type=Algorithm(model.trainer_spec.model_type),
        byte_fallback=model.trainer_spec.byte_fallback,
        # The rules are empty if the text is not normalized.
        normalization_rules=bool(normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap),
        add_dummy_prefix=normalizer.add_dummy_prefix,
        remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
        escape_whitespaces=normalizer.escape_whitespaces,
    )


# Converting it

# The models that `train_sentencepiece` trains have these settings.
_EXPRESSIBLE = ModelSettings(
    model_type=Algorithm.BPE,
    byte_fallback=True,
    normalization_rules=False,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    escape_whitespaces=True,
)
# Pieces that the decoder of Hugging Face takes for a byte, regardless of their kind.
_LIKE_A_BYTE = re.compile("<0x[0-9A-Fa-f+][0-9A-Fa-f]>")


def sentencepiece_json(content: bytes) -> bytes:
    """Returns the `tokenizer.json` for the bytes of a `.model` file.

    Raises UserError, naming the setting or piece, if the ids would differ: for a model that is not BPE with byte
    fallback, that changes the text before encoding it, or that has pieces with equal scores.
    """
    model = read_model(content)
    _check_settings(model.settings)

    pieces = [dataclasses.replace(piece, text=piece.text.replace(SPACE_MARK, " ")) for piece in model.pieces]
    _check_pieces(pieces)

    return json.dumps(_document(pieces), ensure_ascii=False).encode()


# The document


def _document(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Returns a document in the format of the `tokenizers` package, with every field that its own files have."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, piece) for token, piece in enumerate(pieces) if _is_added(piece)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "ByteFallback"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece.text: token for token, piece in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _is_added(piece: Piece) -> bool:
    """Whether the token is matched before merges: never in plain text (control), or always (user-defined).

    A user-defined single character needs no entry, because no merge involves it.
    """
    return piece.kind is PieceKind.CONTROL or (piece.kind is PieceKind.USER_DEFINED and len(piece.text) > 1)


def _added_token(token: int, piece: Piece) -> dict[str, Any]:
    return {
        "id": token,
        "content": piece.text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": piece.kind is PieceKind.CONTROL,
    }


def _merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Returns the pair that forms each piece, best first. Nothing merges with a user-defined piece."""
    # SentencePiece matches user-defined pieces first, so no merge may cross them.
    fixed = [piece.text for piece in pieces if piece.kind is PieceKind.USER_DEFINED]
    scores = {
        piece.text: piece.score
        for piece in pieces
        if _is_merged(piece) and not any(text in piece.text for text in fixed)
    }

    merges = [_last_merge(text, scores) for text in sorted(scores, key=scores.__getitem__, reverse=True)]
    return [pair for pair in merges if pair is not None]


def _is_merged(piece: Piece) -> bool:
    return piece.kind is PieceKind.NORMAL and len(piece.text) > 1


def _last_merge(text: str, scores: Mapping[str, float]) -> tuple[str, str] | None:
    """Returns the two parts that SentencePiece merges last when it encodes `text` alone; None if they never merge."""
    parts = list(text)
    while len(parts) > 2:
        joined = [left + right for left, right in itertools.pairwise(parts)]
        # max returns the first of equal scores: merges start from the left.
        best = max(range(len(joined)), key=lambda place: scores.get(joined[place], -float("inf")))
        # No two neighbors can merge any more, so encoding never forms this piece.
        if joined[best] not in scores:
            return None
        parts[best : best + 2] = [joined[best]]

    # The loop leaves two parts, because every merged piece has at least two characters.
    left, right = parts
    return left, right


# What cannot be converted


def _check_settings(settings: ModelSettings) -> None:
    """Raises UserError unless a `tokenizer.json` can express the settings."""
    for name, wanted in dataclasses.asdict(_EXPRESSIBLE).items():
        value = getattr(settings, name)
        if value != wanted:
            raise UserError(
                f"the SentencePiece model has {name} {_shown(value)}, and only with {_shown(wanted)} can a "
                "tokenizer.json give the same ids; train another tokenizer, or keep its .model file"
            )


def _shown(value: bool | Algorithm) -> str:
    return value.name.lower() if isinstance(value, Algorithm) else str(value).lower()


def _check_pieces(pieces: Sequence[Piece]) -> None:
    """Raises UserError for the first piece that a `tokenizer.json` cannot express."""
    problem = next(_problems(pieces), None)
    if problem:
        raise UserError(
            f"in the SentencePiece model {problem}, so no tokenizer.json gives the same ids; "
            "train another tokenizer, or keep its .model file"
        )


def _problems(pieces: Sequence[Piece]) -> Iterator[str]:
    """Yields what Hugging Face's BPE would interpret differently."""
    # Merges are listed by score, so equal scores would leave their order open.
    texts = collections.Counter(piece.text for piece in pieces)
    scores = collections.Counter(piece.score for piece in pieces if _is_merged(piece))
    if " " not in texts:
        yield "there is no piece for the space"

    for piece in pieces:
        if piece.kind is PieceKind.UNUSED:
            yield f"the piece {piece.text!r} is marked as unused"
        if texts[piece.text] > 1:
            yield f"the piece {piece.text!r} is there twice, with a space and with its mark"
        if piece.kind is not PieceKind.BYTE and _LIKE_A_BYTE.fullmatch(piece.text):
            yield f"the piece {piece.text!r} looks like a byte"
        if _is_merged(piece) and scores[piece.score] > 1:
            yield f"the piece {piece.text!r} has the score of another"
        if _is_merged(piece) and not all(character in texts for character in piece.text):
            yield f"the piece {piece.text!r} has a character without a piece of its own"
