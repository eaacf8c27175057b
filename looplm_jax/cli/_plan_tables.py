"""The output of `looplm plan`: the train step of a stage, a search, and a tick of the engine."""

from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.table import Table

from looplm_jax.inference import CacheStrategy
from looplm_jax.planning._budget import DecodeTiming, Timing
from looplm_jax.planning._decode_plan import DecodePlan
from looplm_jax.planning._program_facts import Collective
from looplm_jax.planning._search import SearchResult, Trial
from looplm_jax.planning._stage_plan import ProgramFacts, StagePlan
from looplm_jax.planning._traffic import Buffer, Traffic
from looplm_jax.terminal import literal

# Memory is printed in GiB and traffic in GB, as vendors of chips do.
_GIB, _GB = 2**30, 10**9


# Stages


def print_stage(plan: StagePlan, out: Console) -> None:
    """Prints the plan of one stage."""
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "one device"

    verdict = "fits" if plan.fits else "DOES NOT FIT"
    out.print(f"\n[bold]{literal(plan.stage)}[/] on {plan.target} ({mesh}): [bold]{verdict}[/], {_memory(plan)}")
    out.print(f"  compiled in {plan.compile_seconds:.0f} s for {plan.devices} device(s)")

    if plan.inside is not None:
        _print_facts(plan.inside, out)
    if plan.timing is not None:
        _print_timing(plan.timing, out)

    for line in plan.advice:
        out.print(f"  change: {line}", markup=False)


def print_search(stage: str, result: SearchResult, out: Console) -> None:
    """Prints the trials of a stage, and marks the choices that no other beats in both time and memory."""
    table = Table(
        "", "flags", "GiB a device", "at best", "sent, GB", title=f"{literal(stage)}: best first, * = nothing beats it"
    )

    for trial in result.trials:
        table.add_row("*" if trial in result.best else "", trial.candidate.flags, *_trial(trial))
    for failure in result.failures:
        table.add_row("", failure.candidate.flags, "", "does not compile", "")
    out.print(table)

    for failure in result.failures:
        out.print(f"  skipped {failure.candidate.flags}: {failure.error}", markup=False)
    out.print(f"  not compiled: {result.cannot_fit} that cannot fit by arithmetic, {result.skipped} less promising")


def _trial(trial: Trial) -> tuple[str, str, str]:
    """Returns memory, step time and sent bytes of a trial as text."""
    plan = trial.plan
    if not plan.fits:
        return f"{plan.memory.total / _GIB:.2f}", "does not fit", ""
    # Traffic is in GB, memory in GiB.
    sent = sum(each.bytes for each in plan.inside.collectives) if plan.inside else 0
    return f"{plan.memory.total / _GIB:.2f}", _seconds(plan.timing.step) if plan.timing else "", f"{sent / _GB:.1f}"


def _memory(plan: StagePlan) -> str:
    """Returns the memory of a device as text."""
    memory = plan.memory
    kinds = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "other": memory.other,
        **({"engine": memory.engine} if memory.engine else {}),
    }
    host = f"; {memory.host / _GIB:.2f} GiB in the host's memory" if memory.host else ""
    return memory_text(kinds, total=memory.total, capacity=memory.capacity) + host


def memory_text(kinds: Mapping[str, int], *, total: int, capacity: int | None) -> str:
    """Returns the bytes of a device in GiB, in total and by kind, with its capacity if known."""
    parts = ", ".join(f"{name} {size / _GIB:.3f}" for name, size in kinds.items())
    limit = f" of {capacity / _GIB:.2f}" if capacity else ""
    return f"{total / _GIB:.2f}{limit} GiB a device ({parts})"


def _print_facts(inside: ProgramFacts, out: Console) -> None:
    """Prints facts about the compiled program: attention, matrix products, donation and collectives."""
    products = ", ".join(f"{count} in {dtype}" for dtype, count in inside.matmuls.by_type.items())
    # "mha" is in the names of attention kernels.
    kernels = ", ".join(name for name in inside.kernels if "mha" in name)
    out.print(f"  attention: {inside.attention}{f' ({kernels})' if kernels else ''}; matrix products: {products}")
    for name in inside.matmuls.float32_at:
        out.print(f"  float32: {name}", markup=False)
    out.print(f"  donated: {inside.donated} of the {inside.state_arrays} arrays of the state are updated in place")

    if not inside.collectives:
        return

    table = Table(
        "devices exchange",
        "inside the loops over",
        "with",
        "times a step",
        "each sends, GB",
        "while",
        box=None,
        padding=(0, 2),
    )

    for each in inside.collectives:
        loops = " > ".join("t" if name == "loops" else name for name in each.loops)
        # XLA starts an asynchronous collective early, and computes until its result is needed.
        meanwhile = "computing" if each.asynchronous else "waiting"
        table.add_row(each.kind, loops, _with(each), f"{each.count:,}", f"{each.bytes / _GB:.3f}", meanwhile)
    out.print(table)


def _with(each: Collective) -> str:
    """Returns the devices that take part in a collective."""
    return f"{each.devices} slices" if each.between_slices else str(each.devices)


def _print_timing(timing: Timing, out: Console) -> None:
    """Prints the lower bounds of the time of a step."""
    network = f", network between slices {_seconds(timing.network)}" if timing.network else ""
    out.print(
        f"  a step: {timing.model_flops:.3e} model FLOPs, {_seconds(timing.peak)} at the peak, "
        f"{_seconds(timing.compute)} with what is computed again; "
        f"links {_seconds(timing.links)}, {_seconds(timing.waiting)} of it waiting{network}"
    )
    out.print(
        f"  at best {_seconds(timing.step)} a step, {timing.tokens_per_second:,.0f} tokens/s, "
        f"{timing.days:,.1f} days for the stage, {timing.model_flops_utilization:.0%} of the peak"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.3f} ms"


# Ticks of the engine


def print_decode(name: str, plan: DecodePlan, out: Console) -> None:
    """Prints the plan of one tick."""
    request = plan.request
    verdict = "fits" if plan.fits else "DOES NOT FIT"

    out.print(f"\n[bold]{literal(name)}[/], a tick on {plan.target}: [bold]{verdict}[/], {_tick_memory(plan)}")
    out.print(
        f"  {request.slots} slot(s) of {request.capacity:,} positions, {request.positions:,} of each filled; "
        f"{request.pool.pages:,} page(s) of {request.pool.page_size:,}; "
        f"cache {request.cache.value}, {plan.loops} loops, {plan.dtype}; "
        f"compiled in {plan.compile_seconds:.0f} s for {plan.devices} device(s)"
    )

    if plan.reading:
        out.print(f"  a prompt of {request.capacity:,} tokens takes {plan.reading / _GB:.3f} GB more while it is read")
    if plan.moved is not None:
        out.print(_traffic(plan.moved))
    # The floor is what any program has to move.
    floor = plan.floor
    out.print(
        f"  floor: {floor.total / _GB:.3f} GB (parameters once {floor.parameters / _GB:.3f}, filled cache once "
        f"{floor.cache_read / _GB:.3f}, new positions {floor.cache_written / _GB:.4f})"
    )
    if plan.moved is not None:
        out.print(f"  ratio: {plan.ratio:.3f} ({plan.moved.total / _GB:.3f} GB moved)")

    if plan.timing is not None:
        _print_tick_timing(plan, plan.timing, out)

    if not plan.fits:
        for line in _changes(plan):
            out.print(f"  change: {line}", markup=False)


def _traffic(moved: Traffic) -> Table:
    """Returns the table of bytes that a device reads and writes in a tick."""
    table = Table("each device moves in a tick", "reads, GB", "writes, GB", box=None, padding=(0, 2))
    for buffer in Buffer:
        table.add_row(buffer.value, f"{moved.read[buffer] / _GB:.3f}", f"{moved.written[buffer] / _GB:.3f}")
    table.add_row("in all", f"{moved.read.total() / _GB:.3f}", f"{moved.written.total() / _GB:.3f}")
    return table


def _print_tick_timing(plan: DecodePlan, timing: DecodeTiming, out: Console) -> None:
    """Prints the lower bound of the time, and the throughput."""
    links = f", links {timing.links * 1e3:.3f} ms" if timing.links else ""
    out.print(
        f"  at best {timing.tick * 1e3:.3f} ms a tick (floor {timing.floor * 1e3:.3f} ms{links}), "
        f"{timing.ticks_per_second:,.1f} ticks/s"
    )
    mean = timing.tokens_per_second_at_mean
    # The estimate assumes that a token which exits early leaves its slot to the next token at once.
    early = "" if mean is None else f", {mean:,.1f} at a mean exit of {plan.request.loops_mean:g}"
    out.print(f"  at best {timing.tokens_per_second:,.1f} tokens/s at {plan.loops} loops a token{early}")


def _tick_memory(plan: DecodePlan) -> str:
    """Returns the memory of a device as text."""
    memory = plan.memory
    kinds = {
        "parameters": memory.parameters,
        "cache": memory.cache,
        "temporaries": memory.temporaries,
        "other": memory.other,
    }
    return memory_text(kinds, total=memory.total, capacity=memory.capacity)


def _changes(plan: DecodePlan) -> Iterator[str]:
    """Yields changes that would reduce the memory."""
    request = plan.request
    if request.cache == CacheStrategy.FULL and plan.loops > 1:
        yield "keep one plane of the cache for all loops: --cache last"
    if request.slots > 1:
        yield f"fewer requests at one time: --slots {request.slots // 2}"
    # Never fewer than the longest request needs.
    fewer = max(request.pool.pages // 2, request.pool.pages_per_slot)
    if fewer < request.pool.pages:
        yield f"fewer pages, for which requests may have to wait: --pages {fewer}"
    yield f"shorter requests: --capacity {max(request.capacity // 2, 1)}"
    yield "more chips, among which the heads are divided: a larger --topology"
