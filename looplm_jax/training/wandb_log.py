"""Weights & Biases, an extra that is imported only where it is asked for."""

from collections.abc import Mapping
from typing import Any

from looplm_jax.errors import UserError


class WandbLog:
    """The scalars of a run in a project. A run that goes on is the same run there: `name` is its identity."""

    def __init__(self, project: str, *, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs Weights & Biases: `pip install wandb`") from None
        self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=dict(config))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """One line of the metrics."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()
