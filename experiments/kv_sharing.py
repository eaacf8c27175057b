"""KV sharing (paper, section 5.4.2 and Table 14): the last loop's keys and values suffice for decoding.

    python -m experiments kv-sharing --scale cpu

Each loop has its own keys and values, so the cache takes T times the memory of a plain model's. In decoding, a model
may keep one plane for all loops: that of a token's last loop, of its first loop, or the mean
(`looplm_jax.inference._kv_cache` has the rules; the paper does not state them). Published: with the last loop alone,
GSM8K and MATH-500 hardly change; with the first, they collapse; and sharing in the prefill as well costs more than 10
points of GSM8K.

Measured here on held-out text that is fed to the model token by token, as in decoding (`states_in_turn`), with all T
loops for every token: loss and accuracy of the second half of each sequence. With a full prefill, the first half is
read by all T planes and then shared. With a shared prefill it also goes through the one plane, token by token, so that
only the loops that are kept are ever visible. In addition, the engine continues the first halves greedily with each
cache: the result is how many tokens precede the first difference from the full cache's. Intervals are 95 % bootstraps
over sequences.

`cpu`: the text models of early-exit, two seeds. `gpu` (not run): `text-small`. `paper` (not run): the published
Ouro-1.4B, in `checkpoints/ouro-1.4b`; the published benchmarks themselves are not run.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console

from experiments.frame import Cell, Record, Report
from experiments.reporting import interval, resamples, union
from experiments.text_models import OnTextModels
from looplm_jax.data import Batch
from looplm_jax.errors import UserError
from looplm_jax.evaluation import Table, figure, save_figure
from looplm_jax.halting import FixedLoops
from looplm_jax.inference import CacheStrategy, Engine, EngineConfig, bytes_per_token
from looplm_jax.inference._replay import states_in_turn
from looplm_jax.inference._rollouts import Rollouts
from looplm_jax.loading import load
from looplm_jax.losses import token_scores
from looplm_jax.models import LoopLM, Params, head_matrix
from looplm_jax.models._looplm import compute_dtype
from looplm_jax.models.presets import ouro_1_4b

_PRINTED = {
    CacheStrategy.FULL: ("78.92", "82.40"),
    CacheStrategy.FIRST: ("18.73", "8.43"),
    CacheStrategy.LAST: ("78.85", "80.40"),
    CacheStrategy.AVERAGE: ("78.73", "78.52"),
}
_PREFILLS = ("full", "shared")
_RESAMPLES = 1000
_SLOTS = 32


class KVSharing(OnTextModels):
    """The KV-sharing experiment."""

    name = "kv-sharing"
    claim = "the last loop's cache is enough: four cache strategies in decoding, and sharing during the prefill"

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains Stage I, unless it is trained, and decodes with every cache."""
        models, model, held_out = self.studied(cell, folder, console)
        loaded = load(models.stage1(model))
        texts = whole_rows(models.held_out(model, loaded, **held_out))
        config, dtype = loaded.model.config, compute_dtype(loaded.model.compute)

        return {
            "loops": config.loops,
            "sequences": len(texts),
            "told": quality(loaded.model, loaded.params, texts, held_out["batch_size"]),
            "greedy": agreement(loaded.model, loaded.params, texts),
            "bytes": {each.value: bytes_per_token(config, each, loops=config.loops, dtype=dtype) for each in _PRINTED},
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns one table, and the cost of each way of sharing."""
        results = [record.result for record in records]
        return Report(
            tables=[_table(results)],
            findings=_findings(results),
            figures={"sharing.png": functools.partial(_plot, results)},
        )


# Quality, token by token


def whole_rows(batches: Sequence[Batch] | Any) -> Int[np.ndarray, "N S"]:
    """Returns the rows that a single piece of a document fills.

    Raises:
      UserError: there is no such row.
    """
    rows = [
        row
        for batch in batches
        for row, segments in zip(batch.tokens, batch.segment_ids, strict=True)
        # Other rows hold several documents, or padding.
        if (segments == 1).all()
    ]

    if not rows:
        raise UserError("no held-out document fills a sequence; lower sequence_length, or give longer documents")
    return np.stack(rows)


def quality(
    model: LoopLM,
    params: Params,
    texts: Int[np.ndarray, "N S"],
    batch_size: int,
    caches: Sequence[CacheStrategy] = tuple(_PRINTED),
) -> dict[str, Any]:
    """Returns loss and accuracy of the second halves, by cache and prefill, and the cost of sharing.

    `caches` must include the full cache, which the others are compared with.
    """
    measured = {
        (strategy, prefill): _told(model, params, texts, batch_size, strategy, prefill)
        for strategy in caches
        for prefill in _PREFILLS
    }

    # The same resamples for all caches, so that the differences are paired.
    drawn = resamples(len(texts), _RESAMPLES)
    base = measured[CacheStrategy.FULL, "full"]
    return {
        f"{strategy.value}, {prefill} prefill": {
            "loss": float(own[0].mean()),
            "accuracy": float(own[1].mean()),
            "loss_difference": float((own[0] - base[0]).mean()),
            # A resample draws rows with repetition, so a product with their counts is the sum over the resample.
            "loss_interval": list(interval(drawn @ (own[0] - base[0]).mean(axis=1) / len(texts))),
            "accuracy_difference": float((own[1] - base[1]).mean()),
            "accuracy_interval": list(interval(drawn @ (own[1] - base[1]).mean(axis=1) / len(texts))),
        }
        for (strategy, prefill), own in measured.items()
    }


def _told(
    model: LoopLM,
    params: Params,
    texts: Int[np.ndarray, "N S"],
    batch_size: int,
    strategy: CacheStrategy,
    prefill: str,
) -> Float[np.ndarray, "2 N H"]:
    """Returns loss and correctness of each token of the second halves."""
    half, parts = texts.shape[1] // 2, []

    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        # The last batch repeats its first row, so that one program serves all batches.
        # The padding repeats a row, because every row must have tokens.
        padded = np.concatenate([rows, np.repeat(rows[:1], batch_size - len(rows), axis=0)])
        read = half if prefill == "full" else 1
        scores = _told_scores(model, params, padded, read=read, wanted=half, strategy=strategy)
        parts.append(jax.device_get(scores)[:, : len(rows)])

    return np.concatenate(parts, axis=1).astype(np.float64)


@functools.partial(jax.jit, static_argnames=("model", "read", "wanted", "strategy"))
def _told_scores(
    model: LoopLM, params: Params, texts: Int[Array, "B S"], *, read: int, wanted: int, strategy: CacheStrategy
) -> Float[Array, "2 B H"]:
    """Feeds a prompt of `read` tokens, then the rest one by one. Returns scores from token `wanted` on."""
    rows, loops = texts.shape[0], model.config.loops
    tokens = texts[:, read:]

    rollouts = Rollouts(
        prompts=texts[:, :read],
        prompt_lengths=jnp.full(rows, read),
        tokens=tokens,
        exit_loops=jnp.full_like(tokens, loops),
        lengths=jnp.full(rows, tokens.shape[1]),
    )

    hidden, _ = states_in_turn(model, params, rollouts, strategy=strategy, loops=loops)
    scored = token_scores(hidden[None], head_matrix(params, model.config), tokens, chunk=model.compute.loss_chunk)
    return jnp.stack([scored.loss[0], scored.correct[0].astype(jnp.float32)])[..., wanted - read :]


# Greedy continuations


def agreement(model: LoopLM, params: Params, texts: Int[np.ndarray, "N S"]) -> dict[str, Any]:
    """Compares greedy continuations of the first halves with each cache against those with the full cache.

    Returns:
      By cache: the fraction of continuations that are equal to the end, and the mean fraction of tokens before the
        first
      difference.
    """
    half = texts.shape[1] // 2
    prompts = [row[:half].tolist() for row in texts]
    continued = {each: _continued(model, params, prompts, half, each) for each in _PRINTED}
    same = {each: tokens == continued[CacheStrategy.FULL] for each, tokens in continued.items()}

    return {
        each.value: {
            "whole": float(equal.all(axis=1).mean()),
            # A cumulative product stays 0 after the first difference.
            "before_first_difference": float(np.cumprod(equal, axis=1).mean()),
        }
        for each, equal in same.items()
    }


def _continued(
    model: LoopLM, params: Params, prompts: Sequence[Sequence[int]], tokens: int, strategy: CacheStrategy
) -> Int[np.ndarray, "N H"]:
    """Returns the greedy continuation of each prompt with one cache."""
    config = EngineConfig(slots=_SLOTS, capacity=len(prompts[0]) + tokens, cache=strategy, chunk=_SLOTS * tokens)
    # Without a tokenizer nothing stops early: all continuations have the same length.
    results = Engine(model, params, config=config).generate(
        prompts, max_new_tokens=tokens, policy=FixedLoops(loops=model.config.loops)
    )
    return np.array([result.tokens for result in results])


# Reporting


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Returns the table of all caches and prefills."""
    columns = ["cache", "prefill", "loss", "against full", "accuracy", "greedy tokens as with full"]
    columns += ["bytes a token", "Ouro-1.4B, bf16", "printed GSM8K", "printed MATH-500"]
    rows = [_row(results, strategy, prefill) for prefill in _PREFILLS for strategy in _PRINTED]
    return Table(title=f"KV sharing, mean of {len(results)} seeds", columns=columns, rows=rows)


def _row(results: Sequence[Mapping[str, Any]], strategy: CacheStrategy, prefill: str) -> list[str]:
    """Returns the row of a cache and a prefill."""
    measured = [result["told"][f"{strategy.value}, {prefill} prefill"] for result in results]
    same = np.mean([result["greedy"][strategy.value]["before_first_difference"] for result in results])
    decoding = prefill == "full"  # the published setting, and the engine's
    shape = ouro_1_4b()

    return [
        strategy.value,
        prefill,
        f"{np.mean([each['loss'] for each in measured]):.4f}",
        _with_interval(measured, "loss"),
        f"{100 * np.mean([each['accuracy'] for each in measured]):.2f} %",
        f"{100 * same:.1f} %" if decoding else "",
        f"{results[0]['bytes'][strategy.value]:,}",
        f"{bytes_per_token(shape, strategy, loops=shape.loops, dtype=jnp.bfloat16):,}",
        *(_PRINTED[strategy] if decoding else ("", "")),
    ]


def _with_interval(measured: Sequence[Mapping[str, Any]], quantity: str) -> str:
    """Returns the mean difference over seeds, and the union of their intervals, as text."""
    low, high = union([each[f"{quantity}_interval"] for each in measured])
    mean = np.mean([each[f"{quantity}_difference"] for each in measured])
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def _findings(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns one sentence per way of sharing."""
    found = []
    for strategy in (CacheStrategy.LAST, CacheStrategy.AVERAGE, CacheStrategy.FIRST):
        decoding, both = (
            _with_interval([result["told"][f"{strategy.value}, {prefill} prefill"] for result in results], "loss")
            for prefill in _PREFILLS
        )
        found.append(
            f"{strategy.value}: loss {decoding} nats a token where decoding shares, {both} where the prefill does too."
        )
    sequences = results[0]["sequences"]
    return [*found, f"{sequences} held-out sequences; 95 % intervals over sequences, their union over seeds."]


def _plot(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots the cost of each way of sharing: one bar per cache and prefill, one dot per seed."""
    made, (axes,) = figure(width=6.0)
    shared = [strategy for strategy in _PRINTED if strategy.shares]

    for side, prefill in enumerate(_PREFILLS):
        costs = [
            [result["told"][f"{strategy.value}, {prefill} prefill"]["loss_difference"] for result in results]
            for strategy in shared
        ]
        places = np.arange(len(shared)) + 0.4 * side - 0.2
        axes.bar(places, np.mean(costs, axis=1), width=0.36, color=f"C{side}", label=f"{prefill} prefill")
        for place, seeds in zip(places, costs, strict=True):
            axes.plot([place] * len(seeds), seeds, "k.", markersize=5)

    axes.set_xticks(range(len(shared)), [strategy.value for strategy in shared])
    axes.set(xlabel="what one plane keeps", ylabel="loss above the full cache (nats/token)")
    axes.legend(frameon=False)
    save_figure(made, path)


KV_SHARING = KVSharing()
