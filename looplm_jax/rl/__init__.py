r"""Reinforcement learning on answers: problems, rewards, and the answers of a model.

    >>> from looplm_jax.data.tasks import make_task
    >>> from looplm_jax.rl import boxed, exact, to_question
    >>> task = make_task("addition:digits=2,terms=2")
    >>> question = to_question(task.validation_example(0), task.tokenizer)
    >>> question.prompt, question.answer
    ('<end> 1 3 + 4 5 =', '5 8')
    >>> exact(question.prompt, "5 8 ", question.answer)
    1.0
    >>> boxed("", r"so it is $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}")
    1.0

Problems: `to_question` turns a `looplm_jax.data.Problem`, or the problem of a synthetic task, into a `Question` for the
engine. `training_questions` is an endless dataset of those of a corpus, and `held_out_questions` are those to test on.

Rewards: `exact`, `number` and `boxed` compare a text with the right answer; `REWARDS` has them by name. A
`RewardFunction` of your own takes the prompt, the text and the answer.

Answers: `answer_problems` returns each `Answer` of a model, and `ProblemScore.of` their score.

Training: `train(recipe, out, collect=rollout_collector())` runs stages with the objective `policy_gradient`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Problems.
    from looplm_jax.rl._problems import Question, held_out_questions, to_question, training_questions

    # Rewards.
    from looplm_jax.rl._rewards import REWARDS, RewardFunction, boxed, exact, number

    # Answers of a model.
    from looplm_jax.rl._evaluate import Answer, ProblemScore, answer_problems

    # Training.
    from looplm_jax.rl._collect import rollout_collector

__all__ = [
    "REWARDS",
    "Answer",
    "ProblemScore",
    "Question",
    "RewardFunction",
    "answer_problems",
    "boxed",
    "exact",
    "held_out_questions",
    "number",
    "rollout_collector",
    "to_question",
    "training_questions",
]
