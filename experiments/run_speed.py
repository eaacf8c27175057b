"""How fast a run trained, and where its time went."""

from pathlib import Path

from looplm_jax.training.goodput import Activity, shares, total_seconds
from looplm_jax.training.metrics import read_metrics
from looplm_jax.training.run_folder import read_recipe


def run_speed(folder: Path) -> dict[str, float]:
    """Of a finished run.

    Returns:
      tokens_per_second: of the packed rows, where few tokens may be targets and some are padding, while in steps;
      share_in_steps: the part of the run's whole time, with compilation, saves and evaluation, that went to steps;
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
