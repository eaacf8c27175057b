"""SentencePiece models: BPE with byte fallback, which encodes any text without loss."""

import enum
import functools
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import sentencepiece

from looplm_jax.data.tokenizers._base import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    Tokenizer,
    is_special_name,
    not_unicode,
    only_as_special,
)
from looplm_jax.errors import UserError

# SentencePiece represents spaces by this character, so a literal one must be encoded as its UTF-8 bytes.
SPACE_MARK = "\u2581"
_PACKAGE = "looplm_jax.sentencepiece"  # not SentencePiece's own name, which may be registered in the same process

# SentencePiece drops longer lines. Splitting a line loses only the one pair of symbols across the split.
_LINE_CHARACTERS = 2_000
_MAX_UTF8_BYTES = 4  # per character


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, given by the content of its `.model` file.

    Raises:
      UserError: the content is not a model, or the model has neither a bos nor an eos token.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(self, model: bytes):
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise UserError("this is not a SentencePiece model; give a .model file or a tokenizer.json") from None
        # The byte tokens that encode a literal space mark.
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]

        self._special = frozenset(filter(self._is_special, range(self.vocab_size)))
        if self.eos_id < 0:
            raise UserError("the SentencePiece model has neither a bos nor an eos token; train it with one of them")

    @property
    def vocab_size(self) -> int:
        """The number of ids."""
        return self._processor.get_piece_size()

    @property
    def bos_id(self) -> int:
        """The model's bos, or its eos if it has no bos."""
        bos = self._processor.bos_id()
        return bos if bos >= 0 else self._processor.eos_id()

    @property
    def eos_id(self) -> int:
        """The model's eos, or its bos if it has no eos. The models trained here use one `<|endoftext|>` for both."""
        eos = self._processor.eos_id()
        return eos if eos >= 0 else self._processor.bos_id()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Returns the ids of a text; with `special`, names of special tokens in it are parsed as these tokens.

        Raises:
          UserError: the text has a lone surrogate, which is not valid Unicode.
        """
        if special:
            return self._ids(self._parsing, text)

        # SentencePiece never produces control tokens from text, but it does produce user-defined ones.
        ids = self._ids(self._processor, text)
        if not self._special.isdisjoint(ids):
            # The variant costs memory and time to build, so it is used only for the few texts that need it.
            ids = self._ids(self._plain, text)

        # A model whose vocabulary has no other way to write the text.
        for token in self._special.intersection(ids):
            raise only_as_special(self.piece(token))

        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of a sequence of ids, without special tokens.

        Invalid UTF-8 becomes the replacement character.
        """
        # SentencePiece itself would show user-defined tokens.
        return self._processor.decode([int(token) for token in ids if int(token) not in self._special])

    def piece(self, token_id: int) -> str:
        """Returns one token for display."""
        return self._processor.id_to_piece(int(token_id)).replace(SPACE_MARK, " ")

    def token_id(self, piece: str) -> int | None:
        """Returns the id of a special token by name, or None."""
        token = self._processor.piece_to_id(piece)
        return token if token in self._special else None

    def serialize(self) -> bytes:
        """Returns the content of the `.model` file."""
        return self._model

    def _ids(self, processor: Any, text: str) -> list[int]:
        """Encodes a text, with literal space marks as their UTF-8 bytes."""
        try:
            # The parts between literal marks are encoded separately and joined by the bytes of the mark.
            first, *rest = (processor.encode(part) for part in text.split(SPACE_MARK))
        except RuntimeError:
            raise not_unicode() from None
        return first + [token for part in rest for token in self._mark_ids + part]

    def _is_special(self, token: int) -> bool:
        """Whether a token is a control token, or a user-defined one with the name of a special token.

        The unknown token is ordinary text, not structure.
        """
        if self._processor.is_unknown(token):
            return False
        return self._processor.is_control(token) or is_special_name(self._processor.id_to_piece(token))

    @functools.cached_property
    def _plain(self) -> Any:
        """A variant of the model in which special tokens are control tokens, which no text produces."""
        return _retyped(self._model, self._special, _PieceType.CONTROL)

    @functools.cached_property
    def _parsing(self) -> Any:
        """A variant of the model in which special tokens are user-defined ones, which their names produce."""
        return _retyped(self._model, self._special, _PieceType.USER_DEFINED)


# Editing of the model's protobuf message


class _PieceType(enum.IntEnum):
    """Values of `ModelProto.SentencePiece.Type`: tokens that text never produces, and tokens that names produce."""

    CONTROL = 3
    USER_DEFINED = 4


def _retyped(content: bytes, tokens: frozenset[int], kind: _PieceType) -> Any:
    """Returns a processor for the model with the type of some tokens changed."""
    model = model_message().FromString(content)
    for token in tokens:
        model.pieces[token].type = kind
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def with_control_pieces(content: bytes, names: Sequence[str]) -> bytes:
    """Returns the model with additional control tokens, which no text becomes, after its last id."""
    model = model_message().FromString(content)
    for name in names:
        model.pieces.add(piece=name.encode(), type=_PieceType.CONTROL)
    return model.SerializeToString()


@functools.cache
def model_message() -> Any:
    """Returns a message class with the needed fields of `sentencepiece_model.proto`; protobuf preserves the others.

    The generated module that SentencePiece ships rejects every `protobuf` release older than the one that generated it.
    Enums are declared as integers, so that unknown values are preserved, and the text of a piece as bytes.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="looplm_jax/sentencepiece.proto", package=_PACKAGE, syntax="proto2")

    def declare(name: str, *fields: tuple[str, int, int, str]) -> Any:
        """Adds a message with optional fields, each with its name, number, type and default value."""
        message = file.message_type.add(name=name)
        for field, number, kind, default in fields:
            message.field.add(
                name=field, number=number, type=kind, label=kinds.LABEL_OPTIONAL, default_value=default or None
            )
        return message

    declare(
        "SentencePiece",
        ("piece", 1, kinds.TYPE_BYTES, ""),
        ("score", 2, kinds.TYPE_FLOAT, ""),
        ("type", 3, kinds.TYPE_INT32, "1"),
    )
    declare("TrainerSpec", ("model_type", 3, kinds.TYPE_INT32, "1"), ("byte_fallback", 35, kinds.TYPE_BOOL, ""))
    declare(
        "NormalizerSpec",
        ("precompiled_charsmap", 2, kinds.TYPE_BYTES, ""),
        ("add_dummy_prefix", 3, kinds.TYPE_BOOL, "true"),
        ("remove_extra_whitespaces", 4, kinds.TYPE_BOOL, "true"),
        ("escape_whitespaces", 5, kinds.TYPE_BOOL, "true"),
    )

    model = file.message_type.add(name="ModelProto")
    for name, number, of in (
        ("pieces", 1, "SentencePiece"),
        ("trainer_spec", 2, "TrainerSpec"),
        ("normalizer_spec", 3, "NormalizerSpec"),
        ("denormalizer_spec", 5, "NormalizerSpec"),
    ):
        label = kinds.LABEL_REPEATED if name == "pieces" else kinds.LABEL_OPTIONAL
        field = model.field.add(name=name, number=number, type=kinds.TYPE_MESSAGE, label=label)
        field.type_name = f".{_PACKAGE}.{of}"

    # A pool of its own: the default one is shared with every other package in the process.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.ModelProto"))


# Training


def train_sentencepiece(texts: Iterable[str], vocab_size: int, *, max_bytes: int = 8_000_000) -> SentencePieceTokenizer:
    """Trains BPE with byte fallback on the first `max_bytes` bytes of `texts`. Training is deterministic.

    Text is not normalized, so `decode(encode(x)) == x` for all Unicode text. The ids are those of Ouro: 0
    `<|endoftext|>` (bos and eos), 1 `<|im_start|>`, 2 `<|im_end|>`, then `<|unk|>` (never produced), newline, tab, the
    256 bytes, and the merges.

    Args:
      texts: the training documents.
      vocab_size: the exact number of tokens.
      max_bytes: UTF-8 bytes of text to use.

    Raises:
      UserError: the texts are too short, or have too many distinct characters, for `vocab_size`.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            # Lossless: unknown characters become bytes, and neither characters nor white space are changed.
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=_MAX_UTF8_BYTES * _LINE_CHARACTERS,
            # The ids of Ouro. One token is both bos and eos, so there is no separate eos.
            bos_id=0,
            bos_piece=END_OF_TEXT,
            eos_id=-1,
            pad_id=-1,
            control_symbols=[IM_START, IM_END],
            unk_id=3,
            unk_piece="<|unk|>",
            user_defined_symbols=["\n", "\t"],
            required_chars=SPACE_MARK,
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    return SentencePieceTokenizer(model.getvalue())


def _lines(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Yields the texts in lines that SentencePiece accepts, up to `max_bytes`."""
    # Counted in bytes, so that texts in any script take the same memory.
    left = max_bytes
    for text in texts:
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), _LINE_CHARACTERS):
                if left <= 0:
                    return
                part = line[start : start + _LINE_CHARACTERS]
                left -= len(part.encode())
                # The mark represents a space inside SentencePiece, so a literal one is never part of a piece.
                yield part.replace(SPACE_MARK, " ")


def _explain(error: str, vocab_size: int) -> str:
    """Converts SentencePiece's error about the vocabulary size to one line with a remedy."""
    # SentencePiece reports the bounds of a possible vocabulary size in its messages.
    if most := re.search(r"too high.*<= (\d+)", error):
        return (
            f"there is too little text for a vocabulary of {vocab_size}: it gives at most {most[1]} tokens; "
            f"lower model.vocab_size to {most[1]}, or give more text"
        )

    if least := re.search(r"required_chars\. \d+ vs (\d+)", error):
        return (
            f"a vocabulary of {vocab_size} cannot hold the characters of this text; "
            f"raise model.vocab_size to at least {least[1]}"
        )

    if "sentences_.empty" in error:
        return "there is no text to train a tokenizer on; give data.sources with text in them"
    return f"SentencePiece could not train a tokenizer of {vocab_size} tokens: {' '.join(error.split())}"
