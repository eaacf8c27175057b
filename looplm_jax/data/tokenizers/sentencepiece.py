"""SentencePiece models: BPE with byte fallback that loses nothing of the text."""

import enum
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import sentencepiece

from looplm_jax.data.tokenizers.base import Tokenizer, not_unicode, only_as_special
from looplm_jax.data.tokenizers.special import is_special_name
from looplm_jax.errors import UserError

# SentencePiece writes spaces as this character and reads it back as a space, so the character itself must go as bytes.
SPACE_MARK = "\u2581"
_PACKAGE = "looplm_jax.sentencepiece"  # not that of SentencePiece, which may be in the same process


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model given by its bytes (the content of a `.model` file)."""

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("this is not a SentencePiece model; give a .model file or a tokenizer.json") from None
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._special = frozenset(filter(self._is_special, range(self.vocab_size)))
        if self.eos_id < 0:
            raise UserError("the SentencePiece model has neither a bos nor an eos token; train it with one of them")

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """The model's bos, or its eos where it has no bos."""
        bos = self._processor.bos_id()
        return bos if bos >= 0 else self._processor.eos_id()

    @property
    def eos_id(self) -> int:
        """The model's eos, or its bos where it has no eos (ours: one `<|endoftext|>` for both)."""
        eos = self._processor.eos_id()
        return eos if eos >= 0 else self._processor.bos_id()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text; with `special`, names of special tokens in it become these tokens.

        SentencePiece itself keeps control tokens out of a text, but not user-defined ones. Raises UserError for a lone
        surrogate, which is no Unicode text.
        """
        if special:
            return self._ids(self._parsing, text)
        ids = self._ids(self._processor, text)
        if not self._special.isdisjoint(ids):
            ids = self._ids(self._plain, text)
        for token in self._special.intersection(ids):
            raise only_as_special(self.piece(token))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without special tokens; broken UTF-8 becomes the replacement character."""
        return self._processor.decode([int(token) for token in ids if int(token) not in self._special])

    def piece(self, token_id: int) -> str:
        """One token as shown to people."""
        return self._processor.id_to_piece(int(token_id)).replace(SPACE_MARK, " ")

    def token_id(self, piece: str) -> int | None:
        """The id of a special token by name, or None."""
        token = self._processor.piece_to_id(piece)
        return token if token in self._special else None

    def serialize(self) -> bytes:
        """The bytes of the `.model` file."""
        return self._model

    def _ids(self, processor: Any, text: str) -> list[int]:
        try:
            first, *rest = (processor.encode(part) for part in text.split(SPACE_MARK))
        except RuntimeError:
            raise not_unicode() from None
        return first + [token for part in rest for token in self._mark_ids + part]

    def _is_special(self, token: int) -> bool:
        """Whether it is a control token, or a user-defined one of such a name. Unknown text is not structure."""
        if self._processor.is_unknown(token):
            return False
        return self._processor.is_control(token) or is_special_name(self._processor.id_to_piece(token))

    @functools.cached_property
    def _plain(self) -> Any:
        """The same model, in which no text gives a special token."""
        return _retyped(self._model, self._special, _PieceType.CONTROL)

    @functools.cached_property
    def _parsing(self) -> Any:
        """The same model, in which the name of each special token gives it."""
        return _retyped(self._model, self._special, _PieceType.USER_DEFINED)


class _PieceType(enum.IntEnum):
    """`ModelProto.SentencePiece.Type` of the tokens that no text gives, and of those that their names always give."""

    CONTROL = 3
    USER_DEFINED = 4


def _retyped(content: bytes, tokens: frozenset[int], kind: _PieceType) -> Any:
    model = _model_class().FromString(content)
    for token in tokens:
        model.pieces[token].type = kind
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@functools.cache
def _model_class() -> Any:
    """The fields of interest of `sentencepiece_model.proto`; protobuf keeps the others as they are.

    The generated reader that comes with SentencePiece refuses every `protobuf` older than the one that generated it.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="looplm_jax/sentencepiece.proto", package=_PACKAGE, syntax="proto2")
    piece = file.message_type.add(name="Piece")
    piece.field.add(name="type", number=3, type=kinds.TYPE_INT32, label=kinds.LABEL_OPTIONAL)
    model = file.message_type.add(name="Model")
    pieces = model.field.add(name="pieces", number=1, type=kinds.TYPE_MESSAGE, label=kinds.LABEL_REPEATED)
    pieces.type_name = f".{_PACKAGE}.Piece"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Model"))
