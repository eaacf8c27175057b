"""LoopRPT (arXiv 2603.19714) against more of Stage I, at equal steps and at equal compute, with its ablations.

    python -m experiments looprpt --scale cpu

The published comparison is with a base that was not trained on the data of LoopRPT, although the term L_rep is weighted
next-token training on these data. Here every arm starts from the same base and reads the same new text in the same
order, with the same learning rates and optimizer:

* `Eq. 4`: Stage I continued, on all tokens; and at equal compute, with as many more steps as a step of LoopRPT has more
  forward passes: (4 + 3 G) / 3 for G rollouts.
* `LoopRPT`, and without one of its parts: the policy gradient of exits, L_rep, noise, the price of loops, the selection
  of hard tokens, and the movement of the teacher.
* `Stage II`: the gate alone, on the base.

Measured on held-out tokens in three buckets, by the entropy of the base at loop 1 (as published: easy 0.5 to 1 nats,
medium to 1.5, hard above): accuracy at every loop, and accuracy and mean loops at Q-exit 0.5. Claims to test: accuracy
at the first loops rises most, loops fall at equal accuracy, and hard tokens gain.

Published (2.6B, hard tokens): accuracy at the last loop 34.52 to 38.10, at Q-exit 34.35 to 37.24, loops 3.51 to 2.28.
Not published, and so our choices: the base and its text, and one learning rate for all arms, that at which Stage I
ended, except for Stage II, which keeps its own. Eq. 4 on hard tokens alone is not an objective of this library; LoopRPT
without its policy gradient is near it.

`cpu`: a text model of one layer of width 96, four loops, vocabulary 512, and G = 4. `gpu`: the recipe `text-small`, and
G = 8, as published. Neither has been run.
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
from experiments.text_models import SMALLEST, TextModel, TextModels, trained
from looplm_jax.codec import override
from looplm_jax.config import EvaluationConfig, OptimizerConfig, Recipe, Stage, StartConfig
from looplm_jax.data import ValidationBatches
from looplm_jax.evaluation import BucketScore, Table, bucket_scores, exit_curve, figure, save_figure
from looplm_jax.evaluation._buckets import ENTROPY_BOUNDS
from looplm_jax.loading import Loaded, load

# The grid


EQ4, LOOPRPT_ARM, STAGE2 = "Eq. 4", "LoopRPT", "Stage II"
_Q = 0.5
_FIRST = 3  # arms that run before the others, so that a part of the grid has the comparison with Stage I


def arms(rollouts: int) -> dict[str, dict[str, Any]]:
    """Returns the fields of the stage by arm, except those that all arms share."""

    def looprpt(**changes: Any) -> dict[str, Any]:
        settings = {"rollouts": rollouts, **changes}
        return {"objective": "looprpt", **{f"looprpt.{name}": value for name, value in settings.items()}}

    return {
        EQ4: {"objective": "expected_loss"},
        LOOPRPT_ARM: looprpt(),
        f"{EQ4}, equal compute": {"objective": "expected_loss", "steps": (4 + 3 * rollouts) / 3},
        # The gate alone needs a higher rate: that of Stage II in the recipe `demo`.
        STAGE2: {"objective": "gate", "learning_rate": 1e-2},
        "LoopRPT without policy gradient": looprpt(policy_weight=0.0),
        "LoopRPT without L_rep": looprpt(representation_weight=0.0),
        "LoopRPT without noise": looprpt(noise=0.0),
        "LoopRPT without price of loops": looprpt(penalty=0.0),
        "LoopRPT on all tokens": looprpt(hard_share=1.0),
        "LoopRPT with a frozen teacher": looprpt(teacher_decay=1.0),
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopRPTGrid:
    """The cells of a scale: every arm, for every seed.

    Args:
      recipe: the recipe of the base, whose first stage is Stage I.
      changes: new values of its fields.
      arms: the fields of the stage by arm; `steps` are relative to those of the others.
      stage: the fields of the stage that all arms share.
      seeds: the number of seeds.
      held_out: the sequences to measure on, the arguments of `TextModels.held_out`.
    """

    recipe: str
    changes: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    stage: Mapping[str, Any]
    seeds: int
    held_out: Mapping[str, int]

    def cells(self) -> tuple[Cell, ...]:
        """Returns the cells, seed by seed: first all seeds of the first arms, then those of the others."""
        names = list(self.arms)
        groups = names[:_FIRST], names[_FIRST:]
        return tuple(self._cell(arm, seed) for group in groups for seed in range(self.seeds) for arm in group)

    def _cell(self, arm: str, seed: int) -> Cell:
        """Returns the cell of an arm and a seed."""
        own = {**self.stage, **self.arms[arm]}
        own["steps"] = round(self.stage["steps"] * self.arms[arm].get("steps", 1))
        return Cell(
            name=f"{arm} seed{seed}".replace(".", "").replace(",", "").replace(" ", "-"),
            settings={
                "arm": arm,
                "model": dataclasses.asdict(TextModel(recipe=self.recipe, changes=dict(self.changes), seed=seed)),
                "stage": own,
                "held_out": dict(self.held_out),
            },
        )


GRIDS: Mapping[Scale, LoopRPTGrid] = MappingProxyType(
    {
        Scale.SMOKE: LoopRPTGrid(
            recipe="demo",
            changes=SMALLEST,
            arms={name: own for name, own in arms(2).items() if name == LOOPRPT_ARM},
            stage={"steps": 2, "batch_size": 2, "sequence_length": 64, "learning_rate": 1e-3, "warmup_steps": 0},
            seeds=1,
            held_out={"sequences": 4, "sequence_length": 64, "batch_size": 4},
        ),
        Scale.CPU: LoopRPTGrid(
            recipe="demo",
            changes={
                "model.vocab_size": 512,
                "model.width": 96,
                "model.mlp_width": 256,
                "stages.pretrain.steps": 800,
                "stages.pretrain.decay_steps": 300,
                "mesh.data": 1,
            },
            arms=arms(4),
            stage={"steps": 60, "batch_size": 4, "sequence_length": 128, "learning_rate": 1.5e-4, "warmup_steps": 4},
            seeds=3,
            held_out={"sequences": 128, "sequence_length": 128, "batch_size": 8},
        ),
        Scale.GPU: LoopRPTGrid(
            recipe="text-small",
            changes={"stage.batch_size": 32, "mesh.data": 1, "data.validation_fraction": 0.05},
            arms=arms(8),
            stage={"steps": 500, "batch_size": 32, "sequence_length": 256, "learning_rate": 1e-4, "warmup_steps": 15},
            seeds=3,
            held_out={"sequences": 1024, "sequence_length": 256, "batch_size": 32},
        ),
    }
)


class LoopRPT:
    """The LoopRPT experiment."""

    name = "looprpt"
    claim = "LoopRPT raises accuracy at early loops and on hard tokens, and needs fewer loops, at equal data or compute"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per seed and arm."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains the base, unless it is trained, and the arm from it, and measures both."""
        models = TextModels.beside(folder, self.name, console)
        model = TextModel(**cell.settings["model"])
        start = models.stage1(model)
        run = trained(_recipe(cell, models, model, start), folder / "run", console)

        base = load(start)
        batches = models.held_out(model, base, **cell.settings["held_out"])
        return {
            "arm": cell.settings["arm"],
            "steps": cell.settings["stage"]["steps"],
            "loops": base.model.config.loops,
            "before": measure(base, base, batches),
            "after": measure(load(run), base, batches),
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns a table per bucket, the claims in words, and the accuracies by loop."""
        by_arm = _by_arm(records)
        return Report(
            tables=[_table(by_arm, bucket) for bucket in _PLACES],
            findings=_findings(by_arm),
            figures={"looprpt.png": functools.partial(_plot, by_arm)},
        )


# Runs


_NEW_ORDER = 1000  # added to the data seed: text in another order than in Stage I


def _recipe(cell: Cell, models: TextModels, model: TextModel, start: Path) -> Recipe:
    """Returns the recipe of an arm."""
    recipe = models.recipe(model)
    shared = {"schedule": "cosine", "beta": recipe.stages[0].beta, "loops": recipe.model.loops}
    placeholder = Stage(name="arm", steps=1, batch_size=1, sequence_length=1, loops=recipe.model.loops)
    return dataclasses.replace(
        recipe,
        data=dataclasses.replace(recipe.data, seed=model.seed + _NEW_ORDER),
        stages=(override(placeholder, {**shared, **cell.settings["stage"]}),),
        optimizer=OptimizerConfig(b2=0.999, weight_decay=0.01),  # those of the recipe `looprpt`
        start=StartConfig(checkpoint=str(start)),
        evaluation=EvaluationConfig(sequences=1),
    )


def measure(loaded: Loaded, base: Loaded, batches: ValidationBatches) -> dict[str, Any]:
    """Returns the accuracies and loops of a model in every bucket, and on all tokens with its loss after each loop."""
    curve = exit_curve(loaded.model, loaded.params, batches, q_grid=(_Q,))
    everywhere = {
        "tokens": curve.tokens,
        "accuracy": list(curve.fixed.accuracy),
        "adaptive": curve.q_exit.accuracy[0],
        "loops": curve.q_exit.loops[0],
        "loss": list(curve.fixed.loss),
    }
    scores = bucket_scores(loaded.model, loaded.params, base.model, base.params, batches, q=_Q)
    return {**{own.name: _bucket(own) for own in scores}, _ALL: everywhere}


def _bucket(score: BucketScore) -> dict[str, Any]:
    """Returns the scores of a bucket as plain JSON values."""
    return {
        "tokens": score.tokens,
        "accuracy": list(score.accuracy),
        "adaptive": score.adaptive_accuracy,
        "loops": score.mean_loops,
    }


# Reporting


_ALL = "all"
_PLACES = (_ALL, *ENTROPY_BOUNDS)
_PRINTED = ("published, 2.6B: base", "published, 2.6B: LoopRPT")
_PRINTED_HARD = {_PRINTED[0]: ("34.52", "34.35", "3.51"), _PRINTED[1]: ("38.10", "37.24", "2.28")}

ByArm = Mapping[str, Sequence[Mapping[str, Any]]]  # the results of all seeds


def _by_arm(records: Sequence[Record]) -> ByArm:
    """Returns the results by arm, in the order in which they first appear."""
    names = dict.fromkeys(record.result["arm"] for record in records)
    return {name: [record.result for record in records if record.result["arm"] == name] for name in names}


def _values(result: Mapping[str, Any], bucket: str, when: str) -> np.ndarray:
    """Returns the accuracy at each loop and at Q-exit in percent, and the mean loops at Q-exit."""
    own = result[when][bucket]
    return np.array([*(100 * share for share in (*own["accuracy"], own["adaptive"])), own["loops"]])


def _table(by_arm: ByArm, bucket: str) -> Table:
    """Returns the table of a bucket: the base, and the changes of every arm from it."""
    loops = next(iter(by_arm.values()))[0]["loops"]
    every = [result for results in by_arm.values() for result in results]
    # The arms of a seed have the same base.
    base = np.mean([_values(result, bucket, "before") for result in every], axis=0)
    rows = [["base", "", "", *("-" if np.isnan(value) else f"{value:.2f}" for value in base)]]

    for arm, results in by_arm.items():
        changes = np.array([_values(each, bucket, "after") - _values(each, bucket, "before") for each in results])
        rows.append([arm, str(results[0]["steps"]), str(len(results)), *map(_spread, changes.T)])

    if bucket == "hard":
        rows += [[name, "", "", *[""] * (loops - 1), *values] for name, values in _PRINTED_HARD.items()]

    tokens = int(np.mean([result["before"][bucket]["tokens"] for result in every]))
    columns = ["arm", "steps", "seeds", *(f"loop {loop}" for loop in range(1, loops + 1)), f"q={_Q:g}", "loops"]
    return Table(
        title=f"Accuracy (%) and mean loops, {bucket} tokens ({tokens:,}): base, and changes from it",
        columns=columns,
        rows=rows,
    )


def _spread(changes: np.ndarray) -> str:
    """Returns the mean change over seeds, and their range, as text; a bucket without tokens has none."""
    if np.isnan(changes).any():
        return "-"
    return f"{changes.mean():+.2f} ({changes.min():+.2f} to {changes.max():+.2f})"


def _findings(by_arm: ByArm) -> list[str]:
    """Returns LoopRPT against Eq. 4, seed by seed, at the first and last loop and at Q-exit, on all and hard tokens."""
    found = []
    for other in (EQ4, f"{EQ4}, equal compute"):
        pairs = list(zip(by_arm.get(LOOPRPT_ARM, ()), by_arm.get(other, ()), strict=False))
        for bucket in (_ALL, "hard") if pairs else ():
            gaps = np.array([_values(own, bucket, "after") - _values(base, bucket, "after") for own, base in pairs])
            first, last, adaptive, loops = (
                ", ".join(f"{value:+.2f}" for value in gaps[:, place]) for place in (0, -3, -2, -1)
            )
            found.append(
                f"LoopRPT minus {other}, {bucket} tokens, seed by seed: accuracy at loop 1 {first}, at the last loop "
                f"{last}, at Q-exit {adaptive}; loops at Q-exit {loops}."
            )
    return [*found, "Changes are means over seeds with their range. Printed: 2.6B, trained on Omni-MATH."]


def _plot(by_arm: ByArm, path: Path) -> None:
    """Plots the change of accuracy by loop, on all and on hard tokens, and accuracy against loops at Q-exit."""
    made, panels = figure(columns=3, width=5.2)
    for number, (arm, results) in enumerate(by_arm.items()):
        style: dict[str, Any] = {"color": f"C{number % 10}", "marker": "o", "label": arm}
        for axes, bucket in zip(panels[:2], (_ALL, "hard"), strict=True):
            change = np.mean([_values(each, bucket, "after") - _values(each, bucket, "before") for each in results], 0)
            axes.plot(range(1, len(change) - 1), change[:-2], **style)
        adaptive, loops = np.mean([_values(each, _ALL, "after") for each in results], axis=0)[-2:]
        panels[2].plot([loops], [adaptive], **style, linestyle="none")

    every = [result for results in by_arm.values() for result in results]
    adaptive, loops = np.mean([_values(result, _ALL, "before") for result in every], axis=0)[-2:]
    panels[2].plot([loops], [adaptive], color="#3a3a3a", marker="*", markersize=12, linestyle="none", label="base")

    for axes, bucket in zip(panels[:2], (_ALL, "hard"), strict=True):
        axes.set(title=f"{bucket} tokens", xlabel="loop", ylabel="change of accuracy (points)")
    panels[2].set(title=f"all tokens, Q-exit at {_Q:g}", xlabel="mean loops", ylabel="accuracy (%)")
    panels[2].legend(frameon=False, fontsize="x-small")
    save_figure(made, path)


LOOPRPT = LoopRPT()
