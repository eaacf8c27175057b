"""Sends metrics to Weights & Biases, an optional dependency that is imported only on request."""

from collections.abc import Mapping
from typing import Any

from looplm_jax.errors import UserError


class WandbLog:
    """The scalars of a run in a Weights & Biases project.

    Args:
      project: the project.
      name: the name and id of the run. A resumed run continues the run with the same id.
      config: the configuration to record.

    Raises:
      UserError: Weights & Biases is not installed.
    """

    def __init__(self, project: str, *, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs Weights & Biases: `pip install wandb`") from None
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=dict(config))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends one line of metrics."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
