"""Depth by policy gradient: what a model of addition learns about when to stop, from rewards of its answers alone.

    python -m experiments policy-depth --scale cpu

The published attempts at reinforcement learning at adaptive depth failed, because rollout and update were not the same
policy (Ouro, section 4.5). Here they are (`docs/reinforcement.md`), and three questions are asked:

1. Start `last loop`: a model that adds after its last loop, trained on that loop alone. Its gate knows nothing, so with
   drawn exits nearly all answers are wrong. `gate only` trains the gate and nothing else, at no cost of loops: does
   depth alone bring the share of right answers back?
2. From the same start, `all parameters, cost of loops` trains everything, and subtracts a cost for the loops that an
   answer ran: do answers stay right with fewer loops?
3. Start `half-trained`: a model trained on all loops (Eq. 4) and stopped early. At equal prompts and steps: GRPO at the
   last loop, RLTT with three weights of the loops, the credit of tokens at exits of Q-exit, and the credit of tokens
   and exits, with and without a cost of loops.

Every cell is measured before and after, on held-out problems, greedily: the share of right answers at 1 to 2T loops,
and with drawn exits and Q-exit also the mean loops of a token. Differences have paired 95 % percentile bootstraps over
problems. Nothing like it is published. The published numbers of GRPO and RLTT (arXiv 2602.10520, MATH-500 with
Ouro-1.4B-Thinking) stand beside ours; they are of another task and of a model 10^4 times larger.

`cpu`: two numbers of two digits, one layer of width 64, three loops. `gpu`: up to four numbers, width 256, four loops.
Neither grid has been finished.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from rich.console import Console

from experiments.frame import Cell, Record, Report, Scale
from experiments.reporting import interval, resamples, union
from experiments.task_grid import TaskRun
from experiments.text_models import alone, trained
from looplm_jax.codec import override
from looplm_jax.config import Recipe, SourceConfig
from looplm_jax.data.tasks import make_task
from looplm_jax.evaluation import Table, figure, save_figure, task_accuracy
from looplm_jax.halting import parse_exit_policy
from looplm_jax.inference import Engine, EngineConfig
from looplm_jax.loading import Loaded, load
from looplm_jax.recipes import named_recipe
from looplm_jax.rl import Answer, answer_problems, exact, held_out_questions, rollout_collector
from looplm_jax.training._metrics import TRAIN, read_metrics

# The grid


LAST_LOOP, HALF = "last loop", "half-trained"  # starts
DRAWN, HALFWAY = "sampled", "q=0.5"  # exit rules of the measurements
_FIRST = 5  # arms that run before the others, so that a part of the grid answers the three questions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of learning from answers: the start, and the fields of the stage that differ from `grpo-depth`."""

    name: str
    start: str
    changes: Mapping[str, Any]


def arms(loops: int, loop_cost: float) -> tuple[Arm, ...]:
    """Returns all arms, for models of so many loops."""
    everywhere = {"credit": "trajectory", "exits": f"loops={loops}", "loop_cost": 0.0}
    policies: Mapping[str, Mapping[str, Any]] = {
        "tokens and exits, cost of loops": {"credit": "action", "loop_cost": loop_cost},
        "GRPO at the last loop": {"credit": "token", "exits": f"loops={loops}", "loop_cost": 0.0},
        "RLTT, exit distribution": {**everywhere, "loop_weights": "exit_pdf"},
        "tokens and exits": {"credit": "action", "loop_cost": 0.0},
        "tokens at Q-exit": {"credit": "token", "exits": HALFWAY, "loop_cost": 0.0},
        "RLTT, uniform": {**everywhere, "loop_weights": "uniform"},
        "RLTT, progressive": {**everywhere, "loop_weights": "progressive"},
    }

    def changes(policy: Mapping[str, Any]) -> dict[str, Any]:
        return {f"stage.policy.{name}": value for name, value in policy.items()}

    gate = {**changes(policies["tokens and exits"]), "stage.trainable": ["gate"]}
    everything = changes(policies["tokens and exits, cost of loops"])
    return (
        Arm(name="gate only", start=LAST_LOOP, changes=gate),
        Arm(name="all parameters, cost of loops", start=LAST_LOOP, changes=everything),
        *(Arm(name=name, start=HALF, changes=changes(policy)) for name, policy in policies.items()),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGrid:
    """The cells of a scale: every arm, for every seed.

    Args:
      start: the settings of a start; its task is that of the rollouts.
      steps: the steps of each start.
      arms: the arms.
      changes: new values of fields of `grpo-depth`, by their dotted paths, for all arms.
      gate_rate: the learning rate where only the gate is trained.
      seeds: the number of seeds.
      problems: the number of held-out problems.
    """

    start: TaskRun
    steps: Mapping[str, int]
    arms: Sequence[Arm]
    changes: Mapping[str, Any]
    gate_rate: float
    seeds: int
    problems: int

    def cells(self) -> tuple[Cell, ...]:
        """Returns the cells, seed by seed: first all seeds of the first arms, then those of the others."""
        groups = self.arms[:_FIRST], self.arms[_FIRST:]
        return tuple(self._cell(arm, seed) for group in groups for seed in range(self.seeds) for arm in group)

    def _cell(self, arm: Arm, seed: int) -> Cell:
        """Returns the cell of an arm and a seed."""
        start = dataclasses.replace(
            self.start, steps=self.steps[arm.start], seed=seed, last_loop_only=arm.start == LAST_LOOP
        )
        gate = {"stage.learning_rate": self.gate_rate} if "stage.trainable" in arm.changes else {}
        return Cell(
            name=f"{arm.name} from {arm.start} seed{seed}".replace(",", "").replace(" ", "-"),
            settings={
                "arm": arm.name,
                "start": arm.start,
                "model": dataclasses.asdict(start),
                "changes": {**self.changes, **arm.changes, **gate},
                "problems": self.problems,
            },
        )


def _start(task: str, **settings: Any) -> TaskRun:
    """Returns the settings of a start. Its tests are those of this experiment."""
    return TaskRun(task=task, tests={}, steps=1, learning_rate=3e-3, seed=0, **settings)


_CPU = PolicyGrid(
    start=_start(
        "addition:longest=2,digits=2,terms=2",
        layers=1,
        loops=3,
        width=64,
        heads=4,
        batch_size=32,
        sequence_length=33,
        warmup_steps=50,
        # one over the square root of the width
        init_std=0.125,
    ),
    steps={LAST_LOOP: 800, HALF: 300},
    arms=arms(3, 0.3),
    changes={
        "stage.steps": 60,
        "stage.batch_size": 16,
        "stage.sequence_length": 11,
        "stage.learning_rate": 1e-3,
        "stage.warmup_steps": 5,
        "mesh.data": 1,
    },
    gate_rate=5e-2,
    seeds=3,
    problems=256,
)
_GPU = PolicyGrid(
    start=_start(
        "addition:longest=4,digits=2,terms=4",
        layers=1,
        loops=4,
        width=256,
        heads=8,
        batch_size=430,
        sequence_length=136,
        warmup_steps=500,
        init_std=0.0625,
    ),
    steps={LAST_LOOP: 6000, HALF: 2000},
    arms=arms(4, 0.3),
    changes={
        "stage.steps": 300,
        "stage.batch_size": 128,
        "stage.policy.slots": 1024,
        "stage.policy.gap_tolerance": 0.3,
        "stage.learning_rate": 1e-4,
        "mesh.data": 1,
    },
    gate_rate=1e-2,
    seeds=3,
    problems=1024,
)
_SMOKE = PolicyGrid(
    start=_start(
        "addition:longest=2,digits=1,terms=2",
        layers=1,
        loops=2,
        width=16,
        heads=2,
        batch_size=4,
        sequence_length=16,
        init_std=0.25,
    ),
    steps={LAST_LOOP: 2, HALF: 2},
    arms=arms(2, 0.3)[:1],
    changes={
        "stage.steps": 2,
        "stage.batch_size": 2,
        "stage.sequence_length": 8,
        "stage.warmup_steps": 0,
        "stage.policy.max_new_tokens": 3,
        "stage.policy.answers": 2,
        "mesh.data": 1,
    },
    gate_rate=1e-2,
    seeds=1,
    problems=4,
)
GRIDS: Mapping[Scale, PolicyGrid] = MappingProxyType({Scale.SMOKE: _SMOKE, Scale.CPU: _CPU, Scale.GPU: _GPU})


class PolicyDepth:
    """The experiment on depth by policy gradient."""

    name = "policy-depth"
    claim = "rewards of answers teach a model when to stop: more right answers at equal or fewer loops"
    scales = tuple(GRIDS)

    def cells(self, scale: Scale) -> tuple[Cell, ...]:
        """Returns one cell per seed and arm."""
        return GRIDS[scale].cells()

    def run(self, cell: Cell, folder: Path, console: Console) -> Mapping[str, Any]:
        """Trains the start, unless it is trained, trains the arm from it, and measures both."""
        # The results folder has `cells/CELL`; the arms of a seed share their starts.
        start = _trained_start(cell, folder.parent.parent / "starts", console)
        run = folder / "run"
        trained(_recipe(cell, start), run, console, collect=rollout_collector())

        task, problems = cell.settings["model"]["task"], cell.settings["problems"]
        before, after = (measure(load(each), task, problems) for each in (start, run))
        steps = [row for row in read_metrics(run) if row["kind"] == TRAIN]
        return {
            "arm": cell.settings["arm"],
            "start": cell.settings["start"],
            "loops": cell.settings["model"]["loops"],
            "before": before.to_json(),
            "after": after.to_json(),
            "change": {rule: change(before.rules[rule], after.rules[rule]) for rule in before.rules},
            "curve": [[row["step"], row["share_right"], row["mean_exit_loop"]] for row in steps],
            "equal_groups": float(np.mean([row["equal_groups"] for row in steps])),
            "rollout_gap": max(row["rollout_gap"] for row in steps),
        }

    def report(self, records: Sequence[Record]) -> Report:
        """Returns tables of answers and loops before and after, the changes in words, and the paths of training."""
        by_arm = _by_arm(records)
        return Report(
            tables=[_table(by_arm, rule) for rule in (DRAWN, HALFWAY)] + [_depths(by_arm)],
            findings=_findings(by_arm),
            figures={"paths.png": functools.partial(_plot, by_arm)},
        )


# Runs


def _trained_start(cell: Cell, folder: Path, console: Console) -> Path:
    """Trains the start of a cell, unless it is trained. Returns its run folder."""
    model = TaskRun(**cell.settings["model"])
    name = f"{cell.settings['start']}-seed{model.seed}".replace(" ", "-")
    with alone(folder, name, console):
        return trained(model.recipe(), folder / name, console)


def _recipe(cell: Cell, start: Path) -> Recipe:
    """Returns the recipe of an arm."""
    model = cell.settings["model"]
    recipe = override(
        named_recipe("grpo-depth"),
        {
            "seed": model["seed"],
            "data.seed": model["seed"],
            "start.checkpoint": str(start),
            "stage.loops": model["loops"],
            **cell.settings["changes"],
        },
    )
    return dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, sources=(SourceConfig(path=model["task"]),))
    )


# Measuring


_SLOTS = 64
_RESAMPLES = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """The greedy answers to N problems under one exit rule."""

    right: Float[np.ndarray, "N"]
    loops: Int[np.ndarray, "N"]  # of all tokens of an answer
    tokens: Int[np.ndarray, "N"]

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "Answers":
        """Returns the numbers of answers."""
        return cls(
            right=np.array([answer.right for answer in answers], float),
            loops=np.array([sum(answer.result.exit_loops) for answer in answers]),
            tokens=np.array([len(answer.result.tokens) for answer in answers]),
        )

    def resampled(self, drawn: Int[np.ndarray, "R N"]) -> tuple[Float[np.ndarray, "R"], Float[np.ndarray, "R"]]:
        """Returns the share of right answers and the mean loops of a token in each resample."""
        return drawn @ self.right / len(self.right), (drawn @ self.loops) / (drawn @ self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A model on held-out problems: the share of right answers at 1 to 2T loops, and its answers under exit rules."""

    depths: Sequence[float]
    rules: Mapping[str, Answers]

    def to_json(self) -> dict[str, Any]:
        """Returns shares and means as plain JSON values."""
        return {
            "depths": list(self.depths),
            "rules": {
                name: {"right": float(own.right.mean()), "loops": float(own.loops.sum() / own.tokens.sum())}
                for name, own in self.rules.items()
            },
        }


def measure(loaded: Loaded, spec: str, problems: int) -> Measured:
    """Returns the answers of a model to the first held-out problems of a task, all greedy."""
    task, tokenizer, loops = make_task(spec), loaded.need_tokenizer(), loaded.model.config.loops
    questions = list(itertools.islice(held_out_questions(SourceConfig(path=spec), tokenizer), problems))
    longest = max(len(question.prompt_ids) for question in questions)
    new = task.max_tokens - longest
    config = EngineConfig(slots=min(_SLOTS, len(questions)), capacity=task.max_tokens, loops=loops)
    engine = Engine(loaded.model, loaded.params, tokenizer, config=config)

    # At a fixed depth, one pass over the right answers tells whether each of their tokens is the most probable.
    depths = task_accuracy(loaded.model, loaded.params, task, loops=2 * loops, items=problems)
    return Measured(
        depths=depths.tolist(),
        rules={
            rule: Answers.of(
                answer_problems(engine, tokenizer, questions, exact, max_new_tokens=new, policy=parse_exit_policy(rule))
            )
            for rule in (DRAWN, HALFWAY)
        },
    )


def change(before: Answers, after: Answers) -> dict[str, Any]:
    """Returns the differences of two models on the same problems, with their paired 95 % intervals."""
    rows = len(before.right)
    # The first resample is the sample itself.
    drawn = np.concatenate([np.ones((1, rows), int), resamples(rows, _RESAMPLES)])
    found: dict[str, Any] = {}
    pairs = zip(before.resampled(drawn), after.resampled(drawn), strict=True)
    for name, (first, second) in zip(("right", "loops"), pairs, strict=True):
        difference = second - first
        found |= {name: float(difference[0]), f"{name}_interval": list(interval(difference[1:]))}
    return found


# Reporting


ByArm = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]  # results of all seeds, by start and arm

# MATH-500, Ouro-1.4B-Thinking, at 1, 2 and 4 loops; the start is known at 4 loops only.
_PRINTED = {
    "before": "-, -, 73.2",
    "GRPO at the last loop": "32.4, 66.2, 77.4",
    "RLTT, exit distribution": "37.4, 81.2, 81.2",
}


def _by_arm(records: Sequence[Record]) -> ByArm:
    """Returns the results by start and arm, in the order in which they first appear."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record.result["start"], record.result["arm"]), []).append(record.result)
    return found


def _spread(values: Sequence[float], digits: int) -> str:
    """Returns the mean over seeds and their range, as text."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _changed(results: Sequence[Mapping[str, Any]], rule: str, quantity: str, factor: float, digits: int) -> str:
    """Returns the mean difference over seeds, and the union of their intervals, as text."""
    own = [result["change"][rule] for result in results]
    low, high = union([each[f"{quantity}_interval"] for each in own])
    mean = factor * np.mean([each[quantity] for each in own])
    return f"{mean:+.{digits}f} ({factor * low:+.{digits}f} to {factor * high:+.{digits}f})"


def _table(by_arm: ByArm, rule: str) -> Table:
    """Returns the table of answers and loops under an exit rule, before and after, one row per arm."""
    columns = ["start", "learned from", "seeds", "right before", "right after", "change", "loops before"]
    columns += ["loops after", "change"]
    rows = []
    for (start, arm), results in by_arm.items():
        row = [start, arm, str(len(results))]
        for quantity, factor, digits in (("right", 100, 1), ("loops", 1, 2)):
            for when in ("before", "after"):
                row.append(_spread([factor * each[when]["rules"][rule][quantity] for each in results], digits))
            row.append(_changed(results, rule, quantity, factor, digits))
        rows.append(row)
    return Table(title=f"Right answers (%) and mean loops, exits {rule}", columns=columns, rows=rows)


def _depths(by_arm: ByArm) -> Table:
    """Returns the table of right answers at fixed depths: the starts, and every arm."""
    loops = next(iter(by_arm.values()))[0]["loops"]
    rows: list[list[str]] = []
    starts: set[str] = set()
    for (start, arm), results in by_arm.items():
        shown = [(arm, "after")] if start in starts else [("before", "before"), (arm, "after")]
        starts.add(start)
        for name, when in shown:
            shares = 100 * np.mean([result[when]["depths"] for result in results], axis=0)
            # The published runs start from a trained model and judge all loops.
            printed = _PRINTED.get(name, "") if start == HALF else ""
            rows.append([start, name, *(f"{share:.1f}" for share in shares), printed])

    columns = ["start", "learned from", *(f"{loop} loops" for loop in range(1, 2 * loops + 1))]
    columns.append("printed, 1, 2, 4 loops")
    return Table(title=f"Right answers (%) at fixed depths, trained with {loops} loops", columns=columns, rows=rows)


def _findings(by_arm: ByArm) -> list[str]:
    """Returns the changes under drawn exits in words, and what every run had in common."""
    found = [
        f"{arm}, from {start}: with drawn exits, {_changed(results, DRAWN, 'right', 100, 1)} points of right answers "
        f"at {_changed(results, DRAWN, 'loops', 1, 2)} loops; "
        f"{100 * np.mean([result['equal_groups'] for result in results]):.0f} % of groups without a signal."
        for (start, arm), results in by_arm.items()
    ]
    gap = max(result["rollout_gap"] for results in by_arm.values() for result in results)
    return [
        *found,
        f"The largest difference between the log-probabilities of rollout and replay, in any step: {gap:.1e} nats.",
        "Ranges are over seeds; 95 % intervals of changes are over problems, their union over seeds.",
        "Printed: MATH-500 with Ouro-1.4B-Thinking, and 140 steps (arXiv 2602.10520).",
    ]


def _plot(by_arm: ByArm, path: Path) -> None:
    """Plots right answers against mean loops of the rollouts, from the first steps to the last, a panel per start."""
    starts = list(dict.fromkeys(start for start, _ in by_arm))
    made, panels = figure(columns=len(starts), width=6.0)

    for axes, start in zip(panels, starts, strict=True):
        mine: dict[str, Sequence[Mapping[str, Any]]] = {
            arm: own for (from_, arm), own in by_arm.items() if from_ == start
        }
        for number, (arm, results) in enumerate(mine.items()):
            _, right, loops = np.mean([result["curve"] for result in results], axis=0).T
            width = max(len(right) // 10, 1)
            smooth = [np.convolve(values, np.ones(width) / width, mode="valid") for values in (loops, 100 * right)]
            axes.plot(*smooth, color=f"C{number}", alpha=0.8, label=arm)
            axes.plot(*(values[-1:] for values in smooth), color=f"C{number}", marker="o")
        axes.set(title=f"start: {start}", xlabel="mean loops of a token in rollouts", ylabel="right answers (%)")
        axes.legend(frameon=False, fontsize="small")
    save_figure(made, path)


POLICY_DEPTH = PolicyDepth()
