"""Prior over exit steps (paper, Appendix A and Figure 10): a uniform prior explores all depths and trains best.

    python -m experiments prior --scale cpu

The Stage I loss is an expected loss plus beta times the divergence of the exit distribution from a prior (Eq. 4 is the
uniform case, up to a constant). The experiment trains the same model on the same data and seeds with a uniform prior
and with geometric ones, `rate (1 - rate)^(t-1)` truncated at T: a larger rate puts more weight on the first loop.
Published: the uniform prior has the lowest training loss, and uses all depths.

Reported: the training loss `sum_t p_t L_t` over the last tenth of the steps, without the regularizer, which differs
between priors; held-out loss at every depth up to twice the trained one, and at the exits; mean exit loop, entropy of
the exit distribution, and the fraction of exits at each loop. The loss at the exits and the loss at full depth are
reported separately: a prior on early exits may harm one and not the other.

Published, and used at `paper` (not run): rates 0.1 to 0.9 and 40,000 steps of 50,000 tokens, 2e9 in total. Not
published where we could read it, and so our choices: the model (twelve layers of Ouro's width, 0.8e9 parameters, T =
4), sequences of 2,048 tokens, beta 0.1, AdamW at 3e-4, and the documents, which are expected in `corpora/fineweb-edu`.

`cpu`: a text model of 1.2M parameters instead of a task: text has easy and hard tokens next to each other, so that
every depth is useful to some of them. 1,000 steps, five priors, two seeds. `gpu` (not run): `text-small`.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.reporting import run_speed
from experiments.text_models import SMALLEST, TextModel, TextModels
from looplm_jax.evaluation import Table, evaluate, figure, save_figure
from looplm_jax.loading import load
from looplm_jax.training._metrics import TRAIN, read_metrics
from looplm_jax.training._stopping import Stopped
from looplm_jax.training.run import train

_TAIL = 0.1  # the fraction of steps, at the end, over which the training loss is averaged


@dataclasses.dataclass(frozen=True, kw_only=True)
class PriorGrid:
    """A scale: a model, the rates of its geometric priors in addition to the uniform one, and the held-out data."""

    recipe: str
    changes: Mapping[str, Any]
    rates: Sequence[float]
    seeds: int
    held_out: Mapping[str, int]
    documents: str = ""

    def cells(self) -> tuple[Cell, ...]:
        """Returns one cell per prior and seed."""
        return tuple(
            Cell(
                name=f"{_name(rate).replace(' ', '-')}-seed{seed}",
                settings={
                    "prior": _name(rate),
                    "model": dataclasses.asdict(self._model(rate, seed)),
                    "held_out": dict(self.held_out),
                },
            )
            for rate in (None, *self.rates)
            for seed in range(self.seeds)
        )

    def _model(self, rate: float | None, seed: int) -> TextModel:
        """Returns the model of a prior and a seed."""
        prior = {} if rate is None else {"stages.pretrain.prior.kind": "geometric", "stages.pretrain.prior.rate": rate}
        return TextModel(recipe=self.recipe, changes={**self.changes, **prior}, seed=seed, documents=self.documents)


def _name(rate: float | None) -> str:
    """Returns the name of a prior."""
    return UNIFORM if rate is None else f"geometric {rate:g}"


GRIDS: Mapping[Scale, PriorGrid] = MappingProxyType(
    {
        Scale.SMOKE: PriorGrid(
            recipe="demo",
            changes=SMALLEST,
            rates=(0.5,),
            seeds=1,
            held_out={"sequences": 8, "sequence_length": 64, "batch_size": 4},
        ),
        Scale.CPU: PriorGrid(
            recipe="demo",
            changes={
                "stages.pretrain.steps": 1000,
                "stages.pretrain.decay_steps": 300,
                "log_every": 4,
                "mesh.data": 1,
            },
            rates=(0.1, 0.3, 0.5, 0.9),
            seeds=2,
            held_out={"sequences": 256, "sequence_length": 128, "batch_size": 8},
        ),
        Scale.GPU: PriorGrid(
            recipe="text-small",
            changes={
                "stages.pretrain.batch_size": 32,
                "stages.pretrain.beta": 0.1,
                "log_every": 4,
                "mesh.data": 1,
                "data.validation_fraction": 0.05,
            },
            rates=(0.1, 0.3, 0.5, 0.7, 0.9),
            seeds=2,
            held_out={"sequences": 1024, "sequence_length": 256, "batch_size": 32},
        ),
        Scale.PAPER: PriorGrid(
            recipe="text-small",
            changes={
                "model.vocab_size": 49152,
                "model.width": 2048,
                "model.mlp_width": 5632,
                "model.num_layers": 12,
                "model.num_heads": 16,
                "stages.pretrain.steps": 40_000,
                "stages.pretrain.batch_size": 24,
                "stages.pretrain.sequence_length": 2048,
                "stages.pretrain.beta": 0.1,
                "stages.pretrain.learning_rate": 3e-4,
                "stages.pretrain.final_learning_rate": 3e-5,
                "stages.pretrain.warmup_steps": 1000,
                "stages.pretrain.decay_steps": 8000,
                "data.validation_fraction": 0.001,
            },
            rates=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            seeds=1,
            held_out={"sequences": 2048, "sequence_length": 2048, "batch_size": 8},
            documents="corpora/fineweb-edu/*.jsonl",
        ),
    }
)


class Prior:
    """The prior experiment."""

    name = "prior"
    claim = "a uniform prior over exit steps explores all depths and has the lowest training loss"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per prior and seed."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains Stage I with the prior, and measures the model."""
        models = TextModels.beside(folder, self.name, console)
        model, run = TextModel(**cell.settings["model"]), folder / "run"
        outcome = train(models.stage1_recipe(model), run, console=console)
        if outcome.stopped_by is not None:
            raise Stopped(outcome.stopped_by)

        loaded = load(run)
        evaluation = evaluate(
            loaded.model, loaded.params, models.held_out(model, loaded, **cell.settings["held_out"])
        ).to_json()

        return {
            "prior": cell.settings["prior"],
            "loops": loaded.model.config.loops,
            **training_figures([row for row in read_metrics(run) if row["kind"] == TRAIN]),
            "held_out": {
                "loss": evaluation["depths"]["loss"],
                **{
                    name: evaluation["exits"][name]
                    for name in ("exit_pdf", "expected_loss", "mean_exit_loop", "tokens")
                },
            },
            **run_speed(run),
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns a table of the priors, the depths they use, and the training curves."""
        return prior_report(records)


def training_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the curve of the expected loss, and means over the last tenth of the steps, from a run's metrics.

    Returns:
      curve: step and expected loss; training_loss; and loss_per_loop, exit_entropy and mean_exit_loop in training.
    """
    # By steps, because not every step is logged.
    last = [row for row in rows if row["step"] > (1 - _TAIL) * rows[-1]["step"]]

    def mean(name: str) -> Any:
        return np.mean([row[name] for row in last], axis=0).tolist()

    return {
        "curve": [[row["step"], row["expected_loss"]] for row in rows],
        "training_loss": mean("expected_loss"),
        "loss_per_loop": mean("loss_per_loop"),
        "exit_entropy": mean("exit_entropy"),
        "mean_exit_loop": mean("mean_exit_loop"),
    }


PRIOR = Prior()


# Reporting


UNIFORM = "uniform"

ByPrior = Mapping[str, Sequence[Mapping[str, Any]]]


def prior_report(records: Sequence[Record]) -> Report:
    """Returns a table of the priors, the depths they use, and the training curves."""
    by_prior: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_prior.setdefault(record.result["prior"], []).append(record.result)

    return Report(
        tables=[_table(by_prior), _depths(by_prior)],
        findings=_findings(by_prior),
        figures={"priors.png": functools.partial(_plot, by_prior)},
    )


def _table(by_prior: ByPrior) -> Table:
    """Returns the table of losses, one row per prior."""
    columns = ("prior", "seeds", "training loss", "range", "at full depth", "held-out, by exits", "at full depth")
    rows = []

    for prior, results in by_prior.items():
        training = np.array([result["training_loss"] for result in results])
        rows.append(
            [
                prior,
                str(len(results)),
                f"{training.mean():.4f}",
                f"{training.min():.4f} to {training.max():.4f}",
                f"{np.mean([result['loss_per_loop'][-1] for result in results]):.4f}",
                f"{np.mean([result['held_out']['expected_loss'] for result in results]):.4f}",
                f"{np.mean([_full_depth(result) for result in results]):.4f}",
            ]
        )

    title = "Prior over exit steps: loss (nats/token), mean of seeds"
    marked = list(by_prior).index(UNIFORM) if UNIFORM in by_prior else None
    return Table(title=title, columns=columns, rows=rows, marked=marked)


def _depths(by_prior: ByPrior) -> Table:
    """Returns the table of exits and losses per loop, one row per prior."""
    loops = next(iter(by_prior.values()))[0]["loops"]
    columns = ["prior", "mean exit loop", "entropy (nats)"]
    columns += [f"exits at {loop}" for loop in range(1, loops + 1)] + [
        f"loss at {loop}" for loop in range(1, loops + 1)
    ]

    rows = []
    for prior, results in by_prior.items():
        held_out = [result["held_out"] for result in results]
        shares = np.mean([each["exit_pdf"] for each in held_out], axis=0)
        losses = np.mean([each["loss"][:loops] for each in held_out], axis=0)
        rows.append(
            [
                prior,
                f"{np.mean([each['mean_exit_loop'] for each in held_out]):.2f}",
                f"{np.mean([result['exit_entropy'] for result in results]):.3f}",
                *(f"{share:.1%}" for share in shares),
                *(f"{loss:.4f}" for loss in losses),
            ]
        )

    return Table(
        title=f"Depths that are used, held-out text (entropy at most {np.log(loops):.3f})", columns=columns, rows=rows
    )


def _full_depth(result: Mapping[str, Any]) -> float:
    """Returns the held-out loss at the trained depth."""
    return float(result["held_out"]["loss"][result["loops"] - 1])


def _findings(by_prior: ByPrior) -> list[str]:
    """Returns the best prior, and the differences from uniform per seed: equal seeds see the same data."""
    means = {prior: np.mean([result["training_loss"] for result in results]) for prior, results in by_prior.items()}
    best = min(means, key=lambda prior: means[prior])
    found = [f"The lowest training loss: {best} ({means[best]:.4f} nats a token). Printed: uniform."]

    if UNIFORM not in by_prior:
        return found
    for prior, results in by_prior.items():
        pairs = list(zip(results, by_prior[UNIFORM], strict=False))
        if prior != UNIFORM and pairs:
            training = ", ".join(f"{own['training_loss'] - base['training_loss']:+.4f}" for own, base in pairs)
            deep = ", ".join(f"{_full_depth(own) - _full_depth(base):+.4f}" for own, base in pairs)
            found.append(
                f"{prior} against uniform, seed by seed: training loss {training}; held-out loss at full depth {deep}."
            )
    return found


def _plot(by_prior: ByPrior, path: Path) -> None:
    """Plots the first seed's training loss, a moving mean over a tenth of the steps, and the exits by loop."""
    made, (left, right) = figure(columns=2)

    for number, (prior, results) in enumerate(by_prior.items()):
        steps, losses = np.array(results[0]["curve"]).T
        # of the moving mean, in logged steps
        width = max(len(steps) // 10, 1)
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        left.plot(steps[width - 1 :], smooth, color=f"C{number}", label=prior)
        shares = np.mean([result["held_out"]["exit_pdf"] for result in results], axis=0)
        right.plot(range(1, len(shares) + 1), 100 * shares, marker="o", color=f"C{number}", label=prior)

    left.set(xlabel="step", ylabel="expected training loss (nats/token)")
    left.legend(frameon=False)
    right.set(xlabel="loop", ylabel="exits (%)", ylim=(0, None))
    right.set_xticks(range(1, next(iter(by_prior.values()))[0]["loops"] + 1))
    save_figure(made, path)
