"""The work of `looplm evaluate --problems`: answers problems, and prints and writes how many answers are right."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from looplm_jax import json_io
from looplm_jax.cli.evaluate import EvaluationOptions, load_evaluated
from looplm_jax.config import RecordKind, Reward, sources_like
from looplm_jax.errors import UserError
from looplm_jax.evaluation.harness._settings import exit_policy
from looplm_jax.halting import ExitPolicy, FixedLoops
from looplm_jax.inference import Engine, EngineConfig
from looplm_jax.loading import Loaded
from looplm_jax.rl import REWARDS, Answer, ProblemScore, Question, answer_problems, held_out_questions
from looplm_jax.sharding import require_compilation
from looplm_jax.terminal import Table, show

_SLOTS = 16  # answers that are generated at the same time
_NEW_TOKENS = 128  # of the longest answer, unless the flag says otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemOptions(EvaluationOptions):
    """The options of an evaluation on problems."""

    problems: str
    reward: str | None
    max_new_tokens: int | None
    prompt_key: str | None
    answer_key: str | None
    template: str | None
    exit: str | None
    loops: int | None
    depth_sweep: bool | None
    limit: int | None


def evaluate_problems(options: ProblemOptions) -> int:
    """Answers problems greedily, under one exit policy or at every depth. Returns the exit status."""
    require_compilation()
    rule = exit_policy(loops=options.loops, rule=options.exit)
    loaded, out = load_evaluated(options)
    questions = _questions(loaded, options)

    trained = loaded.model.config.loops
    # A policy is named by the flag that selects it.
    policies: dict[str, ExitPolicy] = {
        options.exit or f"loops={options.loops or trained}": rule or FixedLoops(loops=trained)
    }
    if options.depth_sweep:
        deepest = options.max_loops or loaded.model.config.deeper_loops
        policies = {f"loops={loops}": FixedLoops(loops=loops) for loops in range(1, deepest + 1)}

    answers = _answers(loaded, questions, policies, options)
    scores = {name: ProblemScore.of(own) for name, own in answers.items()}
    Console(highlight=False).print(_table(scores, options.problems).rich())

    about = {"step": loaded.step, "problems": options.problems, "reward": _reward(options).value}
    show(f"wrote {_write(out, about, scores, answers)}")
    return 0


def _questions(loaded: Loaded, options: ProblemOptions) -> list[Question]:
    """Returns the problems to answer. Keys and template are those of the run's own problems unless they are given."""
    recipe = loaded.recipe
    known = [source for source in recipe.data_of(recipe.stages[-1]).sources if source.kind is RecordKind.PROBLEM]
    (source,) = sources_like([options.problems], known)
    given = {name: getattr(options, name) for name in ("prompt_key", "answer_key", "template")}
    source = dataclasses.replace(source, **{name: value for name, value in given.items() if value is not None})

    # A task has any number of problems, so only those within the limit are read.
    found = itertools.islice(held_out_questions(source, loaded.need_tokenizer()), options.limit)
    questions = list(found)
    if not questions:
        raise UserError(f"{options.problems} has no held-out problems; give a task with validation_items, or a file")
    return questions


def _answers(
    loaded: Loaded, questions: Sequence[Question], policies: dict[str, ExitPolicy], options: ProblemOptions
) -> dict[str, list[Answer]]:
    """Returns the answers under each policy."""
    longest = max(len(question.prompt_ids) for question in questions)
    # A model with few positions has the room that the longest prompt leaves.
    new = options.max_new_tokens or min(_NEW_TOKENS, max(1, loaded.model.config.max_positions - longest))
    # One engine serves all policies, so its cache has room for the deepest.
    loops = max(loaded.model.config.loops, *(policy.max_loops or 0 for policy in policies.values()))
    config = EngineConfig(slots=min(_SLOTS, len(questions)), capacity=longest + new, loops=loops)
    engine = Engine(loaded.model, loaded.params, loaded.need_tokenizer(), config=config)

    reward, found = REWARDS[_reward(options)], {}
    with Console(stderr=True).status("answering") as status:
        for name, policy in policies.items():
            status.update(f"answering {len(questions):,} problems, --exit {name}")
            found[name] = answer_problems(
                engine, loaded.need_tokenizer(), questions, reward, max_new_tokens=new, policy=policy
            )
    return found


def _reward(options: ProblemOptions) -> Reward:
    return Reward.EXACT if options.reward is None else Reward(options.reward)


def _table(scores: dict[str, ProblemScore], problems: str) -> Table:
    """Returns the table of scores, one row for each policy."""
    return Table(
        title=f"{next(iter(scores.values())).problems:,} problems of {problems}",
        columns=["exit", "right", "mean loops", "tokens", "cut"],
        rows=[
            [name, f"{own.share_right:.1%}", f"{own.mean_loops:.2f}", f"{own.mean_tokens:.1f}", f"{own.share_cut:.1%}"]
            for name, own in scores.items()
        ],
    )


def _write(out: Path, about: dict[str, Any], scores: dict[str, ProblemScore], answers: dict[str, list[Answer]]) -> Path:
    """Writes a new file for each evaluation: problems.json, problems-2.json and so on. Returns its path."""
    out.mkdir(parents=True, exist_ok=True)
    content = {
        **about,
        "scores": {name: dataclasses.asdict(score) for name, score in scores.items()},
        "answers": {
            name: [
                {
                    "prompt": own.question.prompt,
                    "answer": own.question.answer,
                    "text": own.text,
                    "reward": own.reward,
                    "exit_loops": own.result.exit_loops,
                }
                for own in several
            ]
            for name, several in answers.items()
        },
    }
    # Results of another checkpoint or another policy may have been written here.
    paths = (out / f"problems{f'-{number}' if number > 1 else ''}.json" for number in itertools.count(1))
    path = next(path for path in paths if not path.exists())
    path.write_text(json_io.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
