"""Connects a process to the other processes of its run, found through flags, a TPU pod or Slurm."""

import dataclasses
import errno
import hashlib
import os
import socket

import jax

from looplm_jax.distributed._connection import Connection, Rendezvous, reach_coordinator
from looplm_jax.distributed._process_group import SINGLE_PROCESS, Peer, ProcessGroup
from looplm_jax.errors import UserError

SECRET = "LOOPLM_JOB_SECRET"
_BIND = "JAX_COORDINATOR_BIND_ADDRESS"
_HINT = "give --coordinator, --processes and --process"
_START_SECONDS = 60  # timeout of the JAX runtime, which is started only after all processes have connected


# Flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """The values of the flags about other processes.

    Attributes:
      automatic: whether to ask the TPU pod or Slurm (`--distributed`).
      coordinator: HOST:PORT of process 0.
      processes: the number of processes.
      process: the index of this process.

    Raises:
      UserError: the flags are incomplete or contradict each other.
    """

    automatic: bool = False
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None

    def __post_init__(self) -> None:
        given = [self.coordinator, self.processes, self.process]
        if all(value is None for value in given):
            return

        if self.automatic or any(value is None for value in given):
            raise UserError("give --coordinator, --processes and --process together, or --distributed alone")
        # Validates the values.
        _Placement(address=self.coordinator or "", index=self.process or 0, count=self.processes or 0)

    @property
    def requested(self) -> bool:
        """Whether the flags ask for other processes."""
        return self.automatic or self.coordinator is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Placement:
    """The index of this process, the number of processes, and the address of process 0.

    Raises:
      UserError: the address has no valid port, or the index is out of range.
    """

    address: str
    index: int
    count: int

    def __post_init__(self) -> None:
        host, _, port = self.address.rpartition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
            raise UserError(f"--coordinator must be HOST:PORT of process 0, not {self.address!r}")
        if not 0 <= self.index < self.count:
            raise UserError(f"--process must be in 0..{self.count - 1} (--processes {self.count})")

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The host, without the brackets of an IPv6 address, and the port."""
        host, _, port = self.address.rpartition(":")
        return host.strip("[]"), int(port)


def join(options: JoinOptions) -> ProcessGroup:
    """Connects to the other processes. Must be called before JAX is asked for a device.

    Returns:
      The processes of the run. Without flags about others, or with a count of 1, the group of a single process.

    Raises:
      UserError: the other processes cannot be found, the port of process 0 is in use, or the JAX runtime does not
        start.
    """
    if not options.requested:
        return SINGLE_PROCESS
    place = _placement(options)
    if place.count == 1:
        return SINGLE_PROCESS

    # The peers watch each other before the runtime starts. Later the runtime aborts this process (SIGABRT) if it misses
    # another one, but a closed connection is noticed first, and ends the process with one line and the status LOST.
    connections, bind_address = _connections(place)
    peer = Peer(place.index, place.count, connections)

    try:
        jax.distributed.initialize(
            place.address,
            place.count,
            place.index,
            initialization_timeout=_START_SECONDS,
            coordinator_bind_address=bind_address,
        )
    except (ValueError, RuntimeError) as error:
        peer.abort_all(f"the JAX runtime did not start: {error}", 2)

    return peer


def check_single_process() -> None:
    """Raises UserError if this process is one of several of a pod but was started without `--distributed`."""
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(f"this is one of {jax.process_count()} processes of a pod; give --distributed on all of them")


def _placement(options: JoinOptions) -> _Placement:
    """Returns the index of this process among the others. Raises UserError if it cannot be determined."""
    from jax._src.clusters import ClusterEnv  # detects TPU pods, Slurm and others; has no public counterpart

    address, count, index = options.coordinator, options.processes, options.process
    if options.automatic:
        address = os.environ.get("JAX_COORDINATOR_ADDRESS")
        try:
            address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
                address, None, None, None, None, _START_SECONDS
            )
        except (ValueError, RuntimeError, OSError, KeyError) as error:
            raise UserError(f"the other processes cannot be detected ({error!r}); {_HINT}") from None

    if address is None or count is None or index is None:
        raise UserError(f"this is neither a TPU pod nor a Slurm job, so the other processes are unknown; {_HINT}")
    return _Placement(address=address, index=index, count=count)


# Rendezvous


def _connections(place: _Placement) -> tuple[dict[int, Connection], str | None]:
    """Returns the connections to the other processes and, on process 0, the address that it binds to."""
    token = _token()
    if place.index > 0:
        return {0: reach_coordinator(place.host_and_port, token, place.index, place.count)}, None

    host, port = _bind_address(place)
    with _listener(host, port, place.count) as listener:
        connections = Rendezvous(token, place.count).accept(listener)

    # The JAX runtime needs brackets around an IPv6 address, and [::] to listen on all addresses.
    return connections, f"[{host or '::'}]:{port}" if not host or ":" in host else f"{host}:{port}"


def _token() -> bytes:
    """Returns the first message of every process of this run. It depends on the job's secret, if there is one."""
    content = f"looplm_jax processes, version 1\0{os.environ.get(SECRET, '')}"
    return hashlib.sha256(content.encode(errors="surrogateescape")).digest()[:16]


def _listener(host: str, port: int, count: int) -> socket.socket:
    """Returns a socket that listens on `host` and `port`. Raises UserError if process 0 cannot listen there."""
    where = f"process 0 cannot listen on port {port}{f' of {host}' if host else ''}"
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = found[0]
        return socket.create_server(address[:2], family=family, backlog=count + socket.SOMAXCONN)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = "another program has it; choose another port in --coordinator, the same on all processes"
        else:
            hint = f"{error.strerror}; start process 0 on the host of --coordinator, or set {_BIND}=ADDRESS:PORT"
        raise UserError(f"{where}: {hint}") from None


# Addresses


def _bind_address(place: _Placement) -> tuple[str, int]:
    """Returns the host and port on which process 0 listens.

    This is the host that all processes were given. Process 0 listens on all addresses (an empty host) if its own name
    resolves only to loopback addresses: many machines resolve their name to 127.0.1.1, where no other machine can reach
    them.
    """
    host, port = place.host_and_port
    # An explicit address takes precedence.
    if own := os.environ.get(_BIND):
        place = dataclasses.replace(place, address=own)
        return place.host_and_port

    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return host, port

    # A loopback address that was given literally is meant literally.
    literal = host == "localhost" or host in found
    only_here = all(str(address).startswith("127.") or address == "::1" for address in found)
    return ("" if only_here and not literal else host), port
