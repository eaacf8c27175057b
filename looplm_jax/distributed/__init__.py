"""The processes of one run on several machines: rendezvous, agreement and shutdown, over TCP.

Process 0 is the coordinator. The other processes connect to it, and it relays their messages. Every connection carries
a heartbeat, so a process that is lost ends all others within a minute, each with one line on standard error and an exit
status that means "start again". The package is independent of training and of devices.

    >>> from looplm_jax.distributed import JoinOptions, check_same, join
    >>> group = join(JoinOptions())  # no flags about other processes: a group of one
    >>> group.index, group.count, group.gather("seed", 3)
    (0, 1, [3])
    >>> check_same(group, "configuration", {"seed": 3})
    >>> group.shutdown()

The names in groups:

* Joining: `JoinOptions` has the values of the flags, `join` connects to the other processes. `check_single_process`
  reports a process of a pod that was started without them.
* The group: `ProcessGroup` is the interface, `SINGLE_PROCESS` the group of a run with one process. A process exits with
  the status `LOST` when another one is lost.
* Consistency: `check_same` compares a value on all processes, `first_on_process_0` orders work on a shared file system.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # Joining a run.
    from looplm_jax.distributed._join import JoinOptions, check_single_process, join

    # The processes of the run.
    from looplm_jax.distributed._process_group import (
        LOST,
        SINGLE_PROCESS,
        ProcessGroup,
        SingleProcess,
        check_same,
        first_on_process_0,
    )

__all__ = [
    "LOST",
    "SINGLE_PROCESS",
    "JoinOptions",
    "ProcessGroup",
    "SingleProcess",
    "check_same",
    "check_single_process",
    "first_on_process_0",
    "join",
]
