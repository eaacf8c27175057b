"""The batches of a stage: for training, read one ahead with retries, and held out, for evaluation."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from looplm_jax import data
from looplm_jax.data import ValidationBatches
from looplm_jax.data._iterator import BatchIterator
from looplm_jax.data._packing import Batch
from looplm_jax.errors import UserError
from looplm_jax.sharding import process_rows
from looplm_jax.training._setup import Position, Setup

# 15 seconds in all, which covers a short interruption of a network file system or a bucket.
WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new attempt


@runtime_checkable
class Batches(Protocol):
    """A stream of batches that can be reopened at an earlier position."""

    def __next__(self) -> Batch:
        """Returns the next batch."""

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues at a position."""

    def close(self) -> None:
        """Stops the threads of the stream."""


class RetryingReader:
    """Reads a stream one batch ahead of its state. A failed read is retried by reopening the stream, then reported.

    Args:
      open_batches: opens the stream at its beginning.
      say: receives lines for the user.
      start: the position to begin at; None is the beginning.
      waits: the seconds before each retry.
    """

    def __init__(
        self,
        open_batches: Callable[[], Batches],
        say: Callable[[str], None],
        *,
        start: Mapping[str, Any] | None = None,
        waits: tuple[float, ...] = WAITS,
    ):
        self._open, self._say, self._waits = open_batches, say, waits
        self._batches = open_batches()
        if start is not None:
            self._batches.restore(start)
        # The stream is one batch ahead of `_place` between `read_ahead` and `next`.
        self._ahead: Batch | None = None
        self._place = self._batches.state()

    def read_ahead(self) -> str | None:
        """Reads the next batch. Returns None, or the reason if the read fails after all retries."""
        # Nothing is waited for after the last attempt.
        for attempt, wait in enumerate((*self._waits, None)):
            try:
                # A retry reopens the stream, because a failed source may have left it in an undefined state.
                if attempt:
                    self._reopen()
                self._ahead = next(self._batches)
                return None
            except (UserError, OSError) as error:
                if wait is None:
                    return str(error)
                self._say(f"warning: {error}; trying again in {wait:g} s")
            time.sleep(wait)
        return None

    def next(self) -> Batch:
        """Returns the batch that was read ahead, and advances `state` to the position after it."""
        batch, self._ahead = self._ahead, None
        assert batch is not None
        # Only now, because a batch that was read but not trained on must be read again on resume.
        self._place = self._batches.state()
        return batch

    def state(self) -> dict[str, Any]:
        """Returns the position after the last batch that was taken."""
        return self._place

    def close(self) -> None:
        """Stops the threads of the stream."""
        self._batches.close()

    def _reopen(self) -> None:
        """Reopens the stream at the position after the last batch that was taken."""
        self._batches.close()
        self._batches = self._open()
        self._batches.restore(self._place)


# The batches of a stage


def open_reader(setup: Setup, position: Position, warn: Callable[[str], None]) -> RetryingReader:
    """Opens the training batches of a stage, at the saved position if the run stopped inside this stage.

    Args:
      setup: the run.
      position: the position from which the stage continues.
      warn: receives a warning for each failed read.
    """
    stage, mesh = setup.recipe.stages[position.stage], setup.meshes[position.stage]
    substreams = data.substream_count(stage.batch_size, stage.sequence_length, position.data_state)
    microbatch_sequences = stage.batch_size // stage.accumulation

    def open_substream(substream: int) -> BatchIterator:
        return data.train_batches(
            setup.corpora[position.stage],
            setup.tokenizer,
            batch_size=stage.batch_size,
            sequence_length=stage.sequence_length,
            # Stages with the same mixture see it in different orders.
            seed=setup.recipe.data.seed + position.stage,
            # The pipeline knows no substreams: it opens each one as if it were the shard of a process.
            process_index=substream,
            process_count=substreams,
        )

    def open_stream() -> data.SubstreamBatches:
        return data.SubstreamBatches(
            open_substream,
            substreams=substreams,
            sequences=process_rows(mesh, microbatch_sequences),
            microbatch_sequences=microbatch_sequences,
            microbatches=stage.accumulation,
        )

    return RetryingReader(open_stream, warn, start=position.data_state)


def held_out_batches(setup: Setup, index: int) -> ValidationBatches | None:
    """Returns the held-out batches of a stage, or None if no data is held out. Every process has all of them."""
    if setup.recipe.data.validation_fraction == 0:
        return None

    stage = setup.recipe.stages[index]
    return data.validation_batches(
        setup.corpora[index],
        setup.tokenizer,
        # The devices have room for a microbatch; an evaluation does not accumulate.
        batch_size=stage.batch_size // stage.accumulation,
        sequence_length=stage.sequence_length,
        max_sequences=setup.recipe.evaluation.sequences,
    )
