"""A small tokenizer of the same kind as Ouro's: SmolLM2's byte-level BPE, which splits digits."""

import pytest

from looplm_jax.data.tokenizers import JsonTokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = ("the loop reads the state\n\n", "naïve café, straße, привет, 你好 🙂\n", "x = 2026 + 17\n\treturn x  \n")


def smollm2_tokenizer(vocab_size: int = 400) -> JsonTokenizer:
    """Returns a tokenizer trained on `TEXTS`; skips the test if `tokenizers` is not installed."""
    tokenizers = pytest.importorskip("tokenizers")
    pre_tokenizers = tokenizers.pre_tokenizers
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXTS * 20, trainer)
    return JsonTokenizer(inner.to_str().encode())
