"""The batches of random tokens that the training benchmarks share."""

import numpy as np

from looplm_jax.data import Batch


def random_batch(vocab_size: int, *, sequences: int, length: int) -> Batch[np.ndarray]:
    """Returns sequences of random tokens, one document each. They are the same in every call."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (sequences, length + 1), dtype=np.int32)
    size = (sequences, length)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.ones(size, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), size),
        loss_mask=np.ones(size, np.float32),
    )
