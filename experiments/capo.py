"""Capo (paper, 6.1 and B.1): looping adds no storage; bits of knowledge per parameter are the same with loops.

    python -m experiments capo --scale cpu

Models of k layers, plain or looped four times, read biographies of N synthetic people (`looplm_jax.data.tasks._capo`),
worded differently at each exposure, and are then tested on names and facts (`looplm_jax.evaluation.knowledge_loss`).
Published: about 2 bits per parameter after 1,000 exposures, with or without loops, and about 1 after 100.

Published, and used at `paper`: RoPE, tied head, heads of width 64, 512 packed positions, batch 192, AdamW (0.9, 0.98),
eps 1e-6, learning rate 1e-3, weight decay 0.02, warm-up 1,000, cosine to a tenth, 1,000 exposures, N from 20K to 500K,
1M to 40M parameters, 1 loop against 4. Not published, and so our choices:

* Depths and widths, two or three for each N, so that some models cannot hold all the knowledge; feed-forward width 8/3.
* Pre-norm layers as in GPT-2, with RMSNorm and SwiGLU as in Ouro.
* The loss: cross-entropy of all tokens, almost entirely after the last loop, as for a plain model of that depth. It is
  Eq. 4 with a prior that leaves 0.06 to the earlier loops, at weight 1.
* The order of the sentences. The pronoun counts at its first occurrence; the company's city does not count, since it
  follows from the company.
* The tokenizer is the task's own, with 315 symbols: GPT-2's 50,257 would be most of the parameters of such models.
  Pools and templates are our own text.

At `paper` the largest cell, N = 500K on 12⊗4, sees 2.8e10 tokens and takes 2.8e19 operations. At `cpu` the learning
rate and the initial matrices are larger, as a width of 32 requires, and batches are small: 2 sequences instead of 8
made little difference (0.69 against 0.64 bits at 94 exposures of 500 people), since exposures are what counts. With the
uniform prior (beta 0.1, and Ouro's four norms per layer) 2⊗4 reached 0.25 bits after 59 exposures of 500 people, where
2⊗1 reached 0.43. 2⊗4 uses half the learning rate of 2⊗1: at 1e-2 the run stopped at step 571, after ten bad steps in a
row.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from experiments.capo_report import capo_report
from experiments.capo_runs import CapoRun, run_capo
from experiments.experiment import Cell, Record, Report, Scale

_LOOPS = (1, 4)
_PAPER: dict[str, Any] = {
    "batch_size": 192,
    "sequence_length": 512,
    "learning_rate": 1e-3,
    "warmup_steps": 1000,
    "exposures": 1000,
    "remat": "layer",
}


def _pair(**settings: Any) -> list[CapoRun]:
    """Returns the runs of the same model, plain and looped."""
    return [CapoRun(loops=loops, **settings) for loops in _LOOPS]


def _printed(people: int, layers: int, width: int) -> list[CapoRun]:
    """Returns the pair of a model at the published settings."""
    return _pair(people=people, layers=layers, width=width, heads=width // 64, **_PAPER)


def _on_cpu(loops: int, learning_rate: float) -> CapoRun:
    """Returns a run for two CPU cores."""
    return CapoRun(
        loops=loops,
        learning_rate=learning_rate,
        people=1200,
        exposures=180,
        layers=2,
        width=32,
        heads=2,
        batch_size=8,
        sequence_length=120,
        warmup_steps=100,
        init_std=0.1,
    )


_RUNS: Mapping[Scale, Sequence[CapoRun]] = MappingProxyType(
    {
        Scale.SMOKE: _pair(
            people=20, exposures=2, layers=1, width=16, heads=2, batch_size=16, sequence_length=64, learning_rate=1e-3
        ),
        # Different learning rates: the looped model diverges at the higher one.
        Scale.CPU: [_on_cpu(loops=1, learning_rate=1e-2), _on_cpu(loops=4, learning_rate=5e-3)],
        Scale.GPU: _pair(
            **_PAPER | {"people": 20_000, "exposures": 100, "layers": 2, "width": 128, "heads": 2, "batch_size": 32}
        ),
        Scale.PAPER: [
            *_printed(people=20_000, layers=2, width=128),
            *_printed(people=20_000, layers=4, width=128),
            *_printed(people=50_000, layers=4, width=128),
            *_printed(people=50_000, layers=4, width=192),
            *_printed(people=100_000, layers=4, width=192),
            *_printed(people=100_000, layers=4, width=256),
            *_printed(people=200_000, layers=4, width=256),
            *_printed(people=200_000, layers=6, width=320),
            *_printed(people=500_000, layers=6, width=320),
            *_printed(people=500_000, layers=8, width=448),
            *_printed(people=500_000, layers=12, width=512),
        ],
    }
)


class Capo:
    """The Capo experiment at all scales."""

    name = "capo"
    claim = "looping adds no storage: as many bits of knowledge a parameter with 4 loops as with 1"
    scales = tuple(_RUNS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per model."""
        return tuple(Cell(name=run.name, settings=dataclasses.asdict(run)) for run in _RUNS[scale])

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains and tests one model."""
        return run_capo(CapoRun(**cell.settings), folder / "run", console)

    def report(self, records: Sequence[Record]) -> Report:
        """Reports bits per parameter, with and without loops."""
        return capo_report(records)


CAPO = Capo()
