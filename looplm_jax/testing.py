"""Small models and laws for the tests of programs that use this package. Nothing is downloaded and little is compiled.

    >>> from looplm_jax.testing import tiny_model, tiny_tokenizer
    >>> import jax.numpy as jnp
    >>> model, params = tiny_model()
    >>> tokens = jnp.asarray([tiny_tokenizer().encode("a b c")])
    >>> model.apply({"params": params}, tokens).gate_logits.shape  # [loops, batch, positions]
    (3, 1, 3)

`tiny_config` and `tiny_tokenizer` fit each other. `assert_resumes_exactly` states the law that every stream of batches
in this package obeys.
"""

import dataclasses
import json
import string
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from looplm_jax.config import ComputeConfig, ModelConfig
from looplm_jax.data.tokenizers import END_OF_TEXT, IM_END, IM_START, SymbolTokenizer
from looplm_jax.models._looplm import LoopLM, Params, init_params

__all__ = ["ResumableStream", "assert_resumes_exactly", "tiny_config", "tiny_model", "tiny_tokenizer"]

_SYMBOLS = (END_OF_TEXT, IM_START, IM_END, *string.ascii_lowercase, *string.digits)


@runtime_checkable
class ResumableStream(Protocol):
    """A stream of batches whose position can be saved and restored."""

    def __next__(self) -> Any:
        """Returns the next batch: a dataclass or a dictionary of arrays."""

    def state(self) -> Mapping[str, Any]:
        """Returns the position after the last returned batch as plain JSON values."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to the position at which `state` was taken."""


# Models


def tiny_config(**changes: Any) -> ModelConfig:
    """Returns the configuration of a model with about 6,000 parameters: two layers of width 16, looped three times.

    Args:
      **changes: fields of `ModelConfig` to replace.
    """
    # Loops, layers and heads differ, so that a test with swapped axes fails.
    config = ModelConfig(
        vocab_size=len(_SYMBOLS),
        width=16,
        mlp_width=24,
        num_layers=2,
        num_heads=4,
        loops=3,
        max_positions=64,
        rope_theta=100.0,
    )
    return dataclasses.replace(config, **changes)


def tiny_model(
    config: ModelConfig | None = None, *, compute: ComputeConfig | None = None, seed: int = 0
) -> tuple[LoopLM, Params]:
    """Returns a model and parameters, such that every norm, bias and matrix matters.

    The parameters are drawn by NumPy, which compiles nothing. They are larger than those of `init_params`, so the
    results of two models differ visibly.

    Args:
      config: the configuration of the model; by default `tiny_config()`.
      compute: how it computes; by default in float32 on a CPU.
      seed: the seed of the parameters.
    """
    config = config or tiny_config()
    random = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(LoopLM(config), jax.random.key(0)))
    # Norms would be one and biases zero after `init_params`, and mistakes in them would go unnoticed.
    params = jax.tree.map(lambda leaf: jnp.asarray(random.normal(0.1, 0.3, leaf.shape), jnp.float32), shapes)

    return LoopLM(config, compute or ComputeConfig()), params


def tiny_tokenizer() -> SymbolTokenizer:
    """Returns a tokenizer of letters and digits, separated by spaces, with the special tokens of the chat format.

    It has the vocabulary of `tiny_config` and can be saved in a checkpoint.
    """
    return SymbolTokenizer(_SYMBOLS)


# Laws


def assert_resumes_exactly(make: Callable[[], ResumableStream], *, done: int, more: int) -> None:
    """Asserts that a stream that is restored from its state returns the batches of one that was not interrupted.

    The state passes through JSON, as in a checkpoint. It is restored by a new stream and by one that has returned
    batches before.

    Args:
      make: creates a stream. All streams that it creates are equal.
      done: the number of batches before the state is taken.
      more: the number of batches to compare.

    Raises:
      AssertionError: a batch or a state differs.
    """
    original, new, used = make(), make(), make()
    _take(original, done)
    state = json.loads(json.dumps(original.state()))
    expected = _take(original, more)

    _take(used, more // 2 + 1)
    for resumed in (new, used):
        resumed.restore(state)
        assert resumed.state() == state
        np.testing.assert_equal(_take(resumed, more), expected)
        assert resumed.state() == original.state()


def _take(stream: ResumableStream, count: int) -> list[Any]:
    """Returns the next batches of a stream as dictionaries of NumPy arrays."""
    batches = [stream.__next__() for _ in range(count)]
    plain = [dataclasses.asdict(batch) if dataclasses.is_dataclass(batch) else batch for batch in batches]  # type: ignore[arg-type]
    return jax.tree.map(np.asarray, plain)
