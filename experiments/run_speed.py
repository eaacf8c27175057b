"""The training speed of a run, and how its time was spent."""

from pathlib import Path

from looplm_jax.training._goodput import Activity, shares, total_seconds
from looplm_jax.training._metrics import read_metrics
from looplm_jax.training._run_folder import read_recipe


def run_speed(folder: Path) -> dict[str, float]:
    """Returns the speed of a finished run.

    Returns:
      tokens_per_second: tokens of the packed rows, of which few may be targets and some are padding, per second of
        steps;
      share_in_steps: the fraction of the total time, including compilation, saves and evaluation, that was spent in
        steps;
      share_waiting_for_input.
    """
    recipe = read_recipe(folder / "config.json")
    tokens = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in recipe.stages)
    seconds = total_seconds(read_metrics(folder))
    parts = shares(seconds)

    return {
        "tokens_per_second": tokens / seconds[Activity.STEP],
        "share_in_steps": parts[Activity.STEP],
        "share_waiting_for_input": parts[Activity.INPUT],
    }
