"""The answers of a model to problems, and their scores."""

import dataclasses
from collections.abc import Sequence

from looplm_jax.convert._tokenizer_files import stop_ids
from looplm_jax.data.tokenizers import Tokenizer
from looplm_jax.errors import UserError
from looplm_jax.halting import ExitPolicy
from looplm_jax.inference import Engine, Finish, Result, Sampling
from looplm_jax.rl._problems import Question, answer_text
from looplm_jax.rl._rewards import RewardFunction, judge

_GREEDY = Sampling()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer of the model, and its reward."""

    question: Question
    result: Result
    text: str
    reward: float

    @property
    def right(self) -> bool:
        """Whether the reward is that of a right answer, at least 1."""
        return self.reward >= 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProblemScore:
    """The score of a model on problems.

    Attributes:
      problems: the number of answers.
      share_right: the fraction of right answers.
      mean_reward: the mean reward of an answer.
      mean_loops: the mean number of loops of a token, over all tokens.
      mean_tokens: the mean number of tokens of an answer.
      share_cut: the fraction of answers that were cut at the limit of tokens.
    """

    problems: int
    share_right: float
    mean_reward: float
    mean_loops: float
    mean_tokens: float
    share_cut: float

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> "ProblemScore":
        """Returns the score of answers, at least one."""
        results, count = [answer.result for answer in answers], len(answers)
        tokens = sum(len(result.tokens) for result in results)
        return cls(
            problems=count,
            share_right=sum(answer.right for answer in answers) / count,
            mean_reward=sum(answer.reward for answer in answers) / count,
            mean_loops=sum(sum(result.exit_loops) for result in results) / max(tokens, 1),
            mean_tokens=tokens / count,
            share_cut=sum(result.finish is Finish.LENGTH for result in results) / count,
        )


def answer_problems(
    engine: Engine,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    reward: RewardFunction,
    *,
    max_new_tokens: int,
    samples: int = 1,
    policy: ExitPolicy | None = None,
    sampling: Sampling = _GREEDY,
    first: int = 1,
) -> list[Answer]:
    """Returns the answers of a model to problems, those to one problem one after the other.

    Args:
      engine: generates the answers.
      tokenizer: decodes them.
      questions: the problems, at least one.
      reward: judges the answers.
      max_new_tokens: the limit of an answer. One that is cut there is judged as it is.
      samples: answers to each problem.
      policy: the exits; None for the trained depth.
      sampling: greedy by default.
      first: the number of the first problem, for messages.

    Raises:
      UserError: there is no problem, a prompt is too long for the engine, a request failed, or the reward raised or
        returned something else than a finite number. The message has the number of the problem.
    """
    if not questions:
        raise UserError("there are no problems to answer; give at least one")
    # Checked before anything is generated, so that one long prompt among many costs no time.
    for number, question in enumerate(questions, first):
        if len(question.prompt_ids) + max_new_tokens > engine.window:
            raise UserError(
                f"problem {number}: the prompt has {len(question.prompt_ids)} tokens, which with {max_new_tokens} new "
                f"ones exceed a window of {engine.window}; leave it out, or ask for fewer new tokens"
            )

    # One call, so that all answers share the slots of the engine.
    results = engine.generate(
        [question.prompt_ids for question in questions],
        max_new_tokens=max_new_tokens,
        samples=samples,
        policy=policy,
        sampling=sampling,
        stop_ids=stop_ids(tokenizer),
    )

    answers = []
    for index, result in enumerate(results):
        # The samples of a prompt follow each other.
        number, question = index // samples + first, questions[index // samples]
        if result.finish is Finish.FAILED:
            raise UserError(f"problem {number}: {result.error}")
        text = answer_text(result, tokenizer)
        judged = judge(reward, question.prompt, text, question.answer, where=f"problem {number}")
        answers.append(Answer(question=question, result=result, text=text, reward=judged))
    return answers
