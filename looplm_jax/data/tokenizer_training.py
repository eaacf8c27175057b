"""Training of SentencePiece tokenizers."""

import io
import re
from collections.abc import Iterable, Iterator

from looplm_jax.data.tokenizers.base import END_OF_TEXT, IM_END, IM_START
from looplm_jax.data.tokenizers.sentencepiece import SPACE_MARK, SentencePieceTokenizer
from looplm_jax.errors import UserError

# SentencePiece drops longer lines. Splitting a line loses only the one pair of symbols across the split.
_LINE_CHARACTERS = 2_000
_MAX_UTF8_BYTES = 4  # per character


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
