"""Rollouts for training: the engine answers problems with the parameters of a step, and rewards become advantages."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from looplm_jax.config import InitialState, PolicyConfig
from looplm_jax.errors import UserError
from looplm_jax.halting import parse_exit_policy
from looplm_jax.inference import Engine, EngineConfig, Result, Rollouts, Sampling
from looplm_jax.losses import group_advantages
from looplm_jax.models._looplm import Params
from looplm_jax.rl._evaluate import Answer, ProblemScore, answer_problems
from looplm_jax.rl._problems import training_questions
from looplm_jax.rl._rewards import REWARDS, RewardFunction
from looplm_jax.training._feeds import Collector, OpenCollector
from looplm_jax.training._policy import CollectedRollouts, RolloutBatch
from looplm_jax.training._setup import Setup

_LINES = 4  # answers of each step that are logged
_PAGE = 128
_CHUNK = 256


def rollout_collector(reward: RewardFunction | None = None) -> OpenCollector:
    """Returns the argument `collect` of `train`, for stages with the objective `policy_gradient`.

    Args:
      reward: judges the answers, in place of `policy.reward` of the stage.
    """

    def open_collector(setup: Setup, index: int) -> Collector:
        return StageCollector(setup, index, reward)

    return open_collector


class StageCollector:
    """Generates the answers of the steps of a stage.

    They follow from the parameters, the seed of the recipe and the number of the step alone, so a run that resumes
    generates them again. The engine is compiled once.

    Args:
      setup: the run.
      index: the index of the stage.
      reward: judges the answers, in place of `policy.reward`.
    """

    def __init__(self, setup: Setup, index: int, reward: RewardFunction | None = None):
        recipe = setup.recipe
        self._stage, self._model, self._mesh = recipe.stages[index], setup.models[index], setup.meshes[index]
        if self._model.config.initial_state is InitialState.NOISE:
            raise UserError("this model starts from random states, which no replay reproduces; use another model")
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

    def __call__(self, params: Params, step: int) -> CollectedRollouts:
        """Returns the answers of a step, generated with these parameters. `step` counts the steps of the run before it.

        Raises the errors of `answer_problems`.
        """
        prompts, number = self._stage.batch_size, step - self._first
        first = number * prompts
        answers = answer_problems(
            self._engine_with(params),
            self._tokenizer,
            [self._questions[first + place] for place in range(prompts)],
            self._reward,
            max_new_tokens=self._config.max_new_tokens,
            samples=self._config.answers,
            policy=self._policy,
            # Temperature 1 and no filters: the distribution that is drawn from is the one that is replayed.
            sampling=Sampling(temperature=1.0, seed=self._seed, index=first % 2**31),
            first=first + 1,
        )

        rewards = np.array([self._reward_of(answer) for answer in answers], np.float32)
        groups = rewards.reshape(prompts, self._config.answers)
        advantages = np.asarray(group_advantages(jnp.asarray(groups), self._config.advantage)).reshape(-1)
        return CollectedRollouts(
            batch=self._batch([answer.result for answer in answers], advantages),
            metrics=_metrics(answers, groups),
            lines=[_line(answer, float(rewards[row])) for row, answer in enumerate(answers[:_LINES])],
        )

    def _engine_with(self, params: Params) -> Engine:
        """Returns the engine with these parameters."""
        if self._engine is None:
            rows, length = self._stage.batch_size * self._config.answers, self._stage.sequence_length
            config = EngineConfig(
                slots=min(self._config.slots, rows),
                capacity=length,
                page_size=min(_PAGE, length),
                chunk=min(_CHUNK, length),
                loops=self._stage.loops,
            )
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
