"""Rollouts for training: the engine answers problems with the parameters of a step, and rewards become advantages."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from looplm_jax.config import PolicyConfig
from looplm_jax.distributed import SINGLE_PROCESS, ProcessGroup
from looplm_jax.halting import parse_exit_policy
from looplm_jax.inference import Engine, Finish, Result, Rollouts, Sampling
from looplm_jax.losses import group_advantages
from looplm_jax.models._looplm import Params
from looplm_jax.rl._evaluate import Answer, ProblemScore, answer_problems
from looplm_jax.rl._problems import Question, training_questions
from looplm_jax.rl._rewards import REWARDS, RewardFunction
from looplm_jax.training._feeds import Collector, OpenCollector
from looplm_jax.training._local_params import local_mesh
from looplm_jax.training._policy import CollectedRollouts, RolloutBatch, engine_config
from looplm_jax.training._setup import Setup

_LINES = 4  # answers of each step that are logged


def rollout_collector(reward: RewardFunction | None = None) -> OpenCollector:
    """Returns the argument `collect` of `train`, for stages with the objective `policy_gradient`.

    Args:
      reward: judges the answers, in place of `policy.reward` of the stage.
    """

    def open_collector(setup: Setup, index: int, group: ProcessGroup) -> Collector:
        return StageCollector(setup, index, group, reward)

    return open_collector


class StageCollector:
    """Generates the answers of the steps of a stage.

    They follow from the parameters, the seed of the recipe and the number of the step alone, so a run that resumes, or
    has another number of processes, generates them again. The engine is compiled once.

    Args:
      setup: the run.
      index: the index of the stage.
      group: the processes of the run, each of which answers a share of the problems of a step.
      reward: judges the answers, in place of `policy.reward`.
    """

    def __init__(
        self,
        setup: Setup,
        index: int,
        group: ProcessGroup = SINGLE_PROCESS,
        reward: RewardFunction | None = None,
    ):
        recipe = setup.recipe
        self._stage, self._model, self._group = recipe.stages[index], setup.models[index], group
        self._mesh = local_mesh(setup.meshes[index])
        self._config: PolicyConfig = self._stage.policy
        self._tokenizer = setup.tokenizer
        self._reward = reward or REWARDS[self._config.reward]
        self._policy = parse_exit_policy(self._config.exits)
        # Stages with the same mixture see it in different orders.
        self._questions = training_questions(setup.corpora[index], setup.tokenizer, seed=recipe.data.seed + index)
        self._first = sum(stage.steps for stage in recipe.stages[:index])
        key = jax.device_get(setup.position.state.key)
        self._seed = int(np.random.default_rng([*key, index]).integers(2**31))
        self._engine: Engine | None = None

    def generate(self, params: Params, step: int) -> list[list[dict[str, Any]]]:
        """Returns this process's answers of a step, as JSON values: a list for each of its problems.

        Raises the errors of `answer_problems`.
        """
        first, questions = self._problems(step)
        begin, end = self._share
        if begin == end:  # there are more processes than problems
            return []

        samples = self._config.answers
        answers = answer_problems(
            self._engine_with(params),
            self._tokenizer,
            questions[begin:end],
            self._reward,
            max_new_tokens=self._config.max_new_tokens,
            samples=samples,
            policy=self._policy,
            # Temperature 1 and no filters: the distribution that is drawn from is the one that is replayed.
            sampling=Sampling(temperature=1.0, seed=self._seed, index=(first + begin) % 2**31),
            first=first + begin + 1,
        )
        return [
            [_to_json(answer) for answer in answers[row : row + samples]] for row in range(0, len(answers), samples)
        ]

    def collect(self, answers: Sequence[Sequence[dict[str, Any]]], step: int) -> CollectedRollouts:
        """Returns the rollouts of a step from the answers to each of its problems."""
        _, questions = self._problems(step)
        rows = [_from_json(value, question) for question, own in zip(questions, answers, strict=True) for value in own]

        rewards = np.array([self._reward_of(answer) for answer in rows], np.float32)
        groups = rewards.reshape(len(questions), self._config.answers)
        advantages = np.asarray(group_advantages(jnp.asarray(groups), self._config.advantage)).reshape(-1)
        return CollectedRollouts(
            batch=self._batch([answer.result for answer in rows], advantages),
            metrics=_metrics(rows, groups),
            lines=[_line(answer, float(rewards[row])) for row, answer in enumerate(rows[:_LINES])],
        )

    @property
    def _share(self) -> tuple[int, int]:
        """Returns the places of the problems of a step that this process answers, from the first to after the last."""
        prompts, index, count = self._stage.batch_size, self._group.index, self._group.count
        return prompts * index // count, prompts * (index + 1) // count

    def _problems(self, step: int) -> tuple[int, list[Question]]:
        """Returns the problems of a step, and the number of the first of them in the stage."""
        prompts = self._stage.batch_size
        first = (step - self._first) * prompts
        return first, [self._questions[first + place] for place in range(prompts)]

    def _engine_with(self, params: Params) -> Engine:
        """Returns the engine with these parameters."""
        if self._engine is None:
            begin, end = self._share
            config = engine_config(self._stage, end - begin)
            mesh = self._mesh if self._mesh.size > 1 else None
            self._engine = Engine(self._model, params, self._tokenizer, config=config, mesh=mesh)
        else:
            self._engine.use(params)
        return self._engine

    def _reward_of(self, answer: Answer) -> float:
        """Returns the reward of an answer, less the cost of its loops."""
        return answer.reward - self._config.loop_cost * answer.result.mean_loops / self._stage.loops

    def _batch(self, results: Sequence[Result], advantages: Float[np.ndarray, "R"]) -> RolloutBatch:
        """Returns the arrays of the answers."""
        rollouts = Rollouts.of(results, loops=self._stage.loops, longest=self._stage.sequence_length, tight=True)
        # Without the room of the longest row, which would be one more size to compile for.
        rollouts = dataclasses.replace(rollouts, room=None)

        def padded(rows: Sequence[Sequence[float]]) -> Float[np.ndarray, "R N"]:
            filled = np.zeros(rollouts.tokens.shape, np.float32)
            for row, own in enumerate(rows):
                filled[row, : len(own)] = own
            return filled

        # Arrays of the host, which are placed on the devices when the step is dispatched.
        arrays: dict[str, Any] = {
            "rollouts": jax.tree.map(np.asarray, rollouts),
            "advantages": advantages,
            "log_probs": padded([result.log_probs for result in results]),
            "exit_log_probs": padded([result.exit_log_probs for result in results]),
            "numbers": np.arange(len(results), dtype=np.int32),
        }
        return RolloutBatch(**arrays)


def _to_json(answer: Answer) -> dict[str, Any]:
    """Returns an answer without its question as a JSON value, which keeps all numbers exactly."""
    result = answer.result
    return {
        "tokens": result.tokens,
        "exit_loops": result.exit_loops,
        "log_probs": result.log_probs,
        "exit_log_probs": result.exit_log_probs,
        "finish": result.finish.value,
        "text": answer.text,
        "reward": answer.reward,
    }


def _from_json(value: dict[str, Any], question: Question) -> Answer:
    """Returns the answer of a JSON value to a question."""
    result = Result(
        prompt_ids=question.prompt_ids,
        tokens=tuple(value["tokens"]),
        exit_loops=tuple(value["exit_loops"]),
        log_probs=tuple(value["log_probs"]),
        exit_log_probs=tuple(value["exit_log_probs"]),
        text=value["text"],
        finish=Finish(value["finish"]),
    )
    return Answer(question=question, result=result, text=value["text"], reward=value["reward"])


def _metrics(answers: Sequence[Answer], rewards: Float[np.ndarray, "P G"]) -> dict[str, float]:
    """Returns the metrics of the answers of a step."""
    score = ProblemScore.of(answers)
    return {
        "reward": float(rewards.mean()),
        "share_right": score.share_right,
        "mean_exit_loop": score.mean_loops,
        "answer_tokens": score.mean_tokens,
        "share_cut": score.share_cut,
        # Prompts from which nothing is learned.
        "equal_groups": float(np.mean(rewards.min(axis=1) == rewards.max(axis=1))),
    }


def _line(answer: Answer, reward: float) -> dict[str, Any]:
    """Returns an answer as a line of `rollouts.jsonl`."""
    return {
        "prompt": answer.question.prompt,
        "answer": answer.question.answer,
        "text": answer.text,
        "reward": reward,
        "tokens": list(answer.result.tokens),
        "exit_loops": list(answer.result.exit_loops),
    }
