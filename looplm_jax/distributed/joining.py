"""How a process finds the others: told so by flags, or by a TPU pod or Slurm."""

import dataclasses
import secrets
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

from looplm_jax.distributed.abort import on_abort
from looplm_jax.distributed.cluster import ALONE, LOST, Cluster
from looplm_jax.distributed.link import Link
from looplm_jax.distributed.star import Member
from looplm_jax.errors import UserError

_SECONDS = 120.0  # to connect
_TOKEN_BYTES = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Join:
    """What a process was told about the others. `automatic`: the surroundings know."""

    automatic: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [self.coordinator, self.processes, self.process]
        if all(value is None for value in given):
            return
        if self.automatic or any(value is None for value in given):
            raise UserError("say --coordinator, --processes and --process together, or --distributed alone")
        assert self.coordinator is not None
        assert self.processes is not None
        assert self.process is not None
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator must be HOST:PORT of process 0, not {self.coordinator!r}")
        if not 0 <= self.process < self.processes:
            raise UserError(f"--process must be in 0..{self.processes - 1} (--processes {self.processes})")

    @property
    def asked(self) -> bool:
        """Whether there may be others at all."""
        return self.automatic or self.coordinator is not None


def join(told: Join) -> Cluster:
    """Meet the other processes; before anything asks JAX for a device. One that was told nothing is alone.

    Raises:
      UserError: the others cannot be found, or this process is one of many and was not told so.
    """
    if not told.asked:
        return ALONE
    try:
        jax.distributed.initialize(told.coordinator, told.processes, told.process)
    except (ValueError, RuntimeError) as error:
        hint = "" if told.coordinator else "; or say --coordinator, --processes and --process"
        reason = " ".join(str(error).split())
        raise UserError(f"the processes did not find each other ({reason}){hint}") from None
    if jax.process_count() == 1:
        return ALONE
    index = jax.process_index()
    on_abort(f"process {index}: the JAX runtime gave up, most likely because process 0 was lost (see above)", LOST)
    return _connect(_coordinator_host(), index, jax.process_count())


def check_alone() -> None:
    """Raises UserError where a process that was told of no others is one of many."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"this is one of {jax.process_count()} processes of a pod; say --distributed on all of them")


def _coordinator_host() -> str:
    from jax._src import distributed  # where the surroundings were asked, nothing public says what they answered

    address = distributed.global_state.coordinator_address
    assert address is not None
    return address.rpartition(":")[0].strip("[]")


def _connect(host: str, index: int, count: int) -> Member:
    """Links to process 0, which lets in who knows the number that only the devices of this run were told."""
    listener = socket.create_server(("", 0), backlog=count) if index == 0 else None
    token = secrets.token_bytes(_TOKEN_BYTES)
    port, token = _from_process_0(listener.getsockname()[1] if listener else 0, token)
    if listener is None:
        connection = socket.create_connection((host, port), timeout=_SECONDS)
        link = Link(connection)
        link.send([token.hex(), index])
        return Member(index, count, {0: link})
    with listener:
        return Member(index, count, _accept(listener, token, count))


def _accept(listener: socket.socket, token: bytes, count: int) -> dict[int, Link]:
    listener.settimeout(_SECONDS)
    links: dict[int, Link] = {}
    while len(links) < count - 1:
        link = Link(listener.accept()[0])
        match link.receive():
            case [str(given), int(index)] if secrets.compare_digest(given, token.hex()):
                links[index] = link
            case _:
                link.close()
    return links


def _from_process_0(port: int, token: bytes) -> tuple[int, bytes]:
    own = np.frombuffer(port.to_bytes(4, "big") + token, np.uint8)
    first = np.asarray(multihost_utils.process_allgather(own))[0].tobytes()
    return int.from_bytes(first[:4], "big"), first[4:]
