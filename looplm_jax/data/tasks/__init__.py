"""Synthetic tasks, one file each, drawn online from a seed."""

from looplm_jax.data.tasks.mano import Mano, Supervise
from looplm_jax.data.tasks.registry import is_task, make_task

__all__ = ["Mano", "Supervise", "is_task", "make_task"]
