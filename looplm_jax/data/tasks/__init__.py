"""Synthetic tasks, one module each, with problems generated on demand from a seed.

A task is a source like any other, named by `name:option=value,...` in `data.sources`. Every problem is a pure function
of the task's options, a seed and an index, and no training stream contains a held-out problem:

    >>> from looplm_jax.data.tasks import make_task
    >>> task = make_task("addition:digits=2,terms=2")
    >>> task.tokenizer.decode(task.validation_example(0).tokens)
    '<end> 1 3 + 4 5 = 5 8 <end>'

By name:
  `make_task` returns the task of a specification, `is_task` recognizes one.

The tasks:
  `Addition`, `Capo`, `Mano` (with `Supervise`), `PHop` (with `Sequences`), `Reachability`, `ThreeHop`. All implement
  the protocol `Task`, which draws many `Problems` at once; their attributes are the options.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # Tasks by name.
    from looplm_jax.data.tasks._registry import is_task, make_task

    # The interface of all tasks.
    from looplm_jax.data.tasks._base import Problems, Task

    # The tasks.
    from looplm_jax.data.tasks._addition import Addition
    from looplm_jax.data.tasks._capo import Capo
    from looplm_jax.data.tasks._mano import Mano, Supervise
    from looplm_jax.data.tasks._p_hop import PHop, Sequences
    from looplm_jax.data.tasks._reachability import Reachability
    from looplm_jax.data.tasks._three_hop import ThreeHop

__all__ = [
    "Addition",
    "Capo",
    "Mano",
    "PHop",
    "Problems",
    "Reachability",
    "Sequences",
    "Supervise",
    "Task",
    "ThreeHop",
    "is_task",
    "make_task",
]
