"""Training: from a recipe to its last checkpoint, in a run folder that the same call resumes.

>>> import tempfile
>>> from looplm_jax.recipes import Scale, named_recipe, scaled
>>> from looplm_jax.training import read_metrics, train
>>> recipe = scaled(named_recipe("mano-small"), Scale.TINY)
>>> with tempfile.TemporaryDirectory() as folder:
...     outcome = train(recipe, f"{folder}/run")
...     losses = [row["loss"] for row in read_metrics(outcome.folder.path)]
>>> outcome.step, len(losses)
(4, 4)

Runs: `train` runs the stages of a recipe, or resumes an earlier run in its folder with bit-identical results, and
returns an `Outcome`. `ProfiledSteps` are steps to trace, and an `EventSink` such as `WandbLog` receives the metrics.
`Stopped` is raised if a signal stops work.

Run folders: `read_recipe` and `read_metrics` read the files of a run (the lines of metrics are of the kinds `TRAIN` and
`EVALUATION`). `total_seconds`, `shares` and `time_summary` tell how the time of a run was spent, by `Activity`.

Single steps: `initial_state` returns a `TrainState`, `StagePrograms` compiles the train step of a stage on its
`stage_mesh`, `to_device` transfers a batch, and each step returns `StepMetrics`. `learning_rate` is the schedule of a
stage.

Model FLOPs by formula: `forward_flops_per_token` and `train_flops_per_token`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Runs.
    from looplm_jax.training.run import Outcome, train
    from looplm_jax.training._profiling import ProfiledSteps
    from looplm_jax.training._loggers import EventSink, WandbLog
    from looplm_jax.training._stopping import Stopped

    # Run folders.
    from looplm_jax.training._run_folder import RunFolder, read_recipe
    from looplm_jax.training._metrics import EVALUATION, TRAIN, read_metrics
    from looplm_jax.training._goodput import Activity, shares, time_summary, total_seconds

    # Single steps.
    from looplm_jax.training._state import TrainState, initial_state
    from looplm_jax.training._compile import StagePrograms, to_device, stage_mesh
    from looplm_jax.training._step import StepMetrics
    from looplm_jax.training._optimizer import learning_rate

    # Model FLOPs.
    from looplm_jax.training._goodput import forward_flops_per_token, train_flops_per_token

__all__ = [
    "EVALUATION",
    "TRAIN",
    "Activity",
    "EventSink",
    "Outcome",
    "ProfiledSteps",
    "RunFolder",
    "StagePrograms",
    "StepMetrics",
    "Stopped",
    "TrainState",
    "WandbLog",
    "forward_flops_per_token",
    "initial_state",
    "learning_rate",
    "read_metrics",
    "read_recipe",
    "shares",
    "stage_mesh",
    "time_summary",
    "to_device",
    "total_seconds",
    "train",
    "train_flops_per_token",
]
