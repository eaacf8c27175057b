"""Evaluation: quality at every depth and under early exit, scores of tasks, and their tables, figures and reports.

>>> import jax, numpy as np
>>> from looplm_jax import LoopLM, init_params
>>> from looplm_jax.data import Batch
>>> from looplm_jax.evaluation import evaluate
>>> from looplm_jax.models.presets import tiny
>>> model = LoopLM(tiny())
>>> tokens, ones = np.arange(33, dtype=np.int32)[None] % 7, np.ones((1, 32), np.int32)
>>> batch = Batch(
...     tokens=tokens[:, :-1], targets=tokens[:, 1:], positions=tokens[:, :-1], segment_ids=ones, loss_mask=ones
... )
>>> result = evaluate(model, init_params(model, jax.random.key(0)), [batch])
>>> result.depths.curve.loops  # up to twice the trained depth
(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)

Text: `evaluate` returns an `Evaluation`, which holds a `DepthSweep` and an `ExitCurve`; `depth_sweep` and `exit_curve`
return one of them. Their points are a `Curve` of loss and accuracy against loops. `evaluate_held_out` returns the
numbers that a training run records.

Easy, medium and hard tokens, by the entropy of a base model: `bucket_scores` returns a `BucketScore` for each, and
`bucket_table` their table.

Synthetic tasks: `task_accuracy` returns exact-match accuracy after each loop, and `commonest_answer` the accuracy of a
constant answer. `knowledge_loss` and `bits_per_parameter` measure the knowledge of a model of biographies, and
`most_bits_per_parameter` bounds it.

Tables, figures and reports: `depth_table` and `exit_table` return a `Table` for the terminal and for Markdown.
`plot_depths`, `plot_exits` and `plot_training` write PNG figures; `figure` and `save_figure` are for your own in the
same style. `write_run_report` writes the report of a run folder.

Tasks of EleutherAI's lm-evaluation-harness are in `looplm_jax.evaluation.harness`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Text.
    from looplm_jax.evaluation._evaluate import Evaluation, evaluate, evaluate_held_out
    from looplm_jax.evaluation._evaluate import Curve, DepthSweep, ExitCurve, depth_sweep, exit_curve

    # Easy, medium and hard tokens.
    from looplm_jax.evaluation._buckets import BucketScore, bucket_scores, bucket_table

    # Synthetic tasks.
    from looplm_jax.evaluation._synthetic_tasks import commonest_answer, task_accuracy
    from looplm_jax.evaluation._synthetic_tasks import KnowledgeLoss, bits_per_parameter, knowledge_loss
    from looplm_jax.evaluation._synthetic_tasks import most_bits_per_parameter

    # Tables, figures and reports.
    from looplm_jax.terminal import Table
    from looplm_jax.evaluation._reports import depth_table, exit_table, write_run_report
    from looplm_jax.evaluation._plots import figure, plot_depths, plot_exits, plot_training, save_figure

__all__ = [
    "BucketScore",
    "Curve",
    "DepthSweep",
    "Evaluation",
    "ExitCurve",
    "KnowledgeLoss",
    "Table",
    "bits_per_parameter",
    "bucket_scores",
    "bucket_table",
    "commonest_answer",
    "depth_sweep",
    "depth_table",
    "evaluate",
    "evaluate_held_out",
    "exit_curve",
    "exit_table",
    "figure",
    "knowledge_loss",
    "most_bits_per_parameter",
    "plot_depths",
    "plot_exits",
    "plot_training",
    "save_figure",
    "task_accuracy",
    "write_run_report",
]
