"""The output of `looplm plan --decode`."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from looplm_jax.cli.plan_tables import memory_text
from looplm_jax.inference import CacheStrategy
from looplm_jax.planning._budget import DecodeTiming
from looplm_jax.planning._decode_plan import DecodePlan
from looplm_jax.planning._traffic import Buffer, Traffic
from looplm_jax.printing import literal

_GB = 10**9


def print_decode(name: str, plan: DecodePlan, out: Console) -> None:
    """Prints the plan of one tick."""
    request = plan.request
    verdict = "fits" if plan.fits else "DOES NOT FIT"

    out.print(f"\n[bold]{literal(name)}[/], a tick on {plan.target}: [bold]{verdict}[/], {_memory(plan)}")
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
    floor = plan.floor
    out.print(
        f"  floor: {floor.total / _GB:.3f} GB (parameters once {floor.parameters / _GB:.3f}, filled cache once "
        f"{floor.cache_read / _GB:.3f}, new positions {floor.cache_written / _GB:.4f})"
    )
    if plan.moved is not None:
        out.print(f"  ratio: {plan.ratio:.3f} ({plan.moved.total / _GB:.3f} GB moved)")

    if plan.timing is not None:
        _print_timing(plan, plan.timing, out)

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


def _print_timing(plan: DecodePlan, timing: DecodeTiming, out: Console) -> None:
    """Prints the lower bound of the time, and the throughput."""
    links = f", links {timing.links * 1e3:.3f} ms" if timing.links else ""
    out.print(
        f"  at best {timing.tick * 1e3:.3f} ms a tick (floor {timing.floor * 1e3:.3f} ms{links}), "
        f"{timing.ticks_per_second:,.1f} ticks/s"
    )
    mean = timing.tokens_per_second_at_mean
    early = "" if mean is None else f", {mean:,.1f} at a mean exit of {plan.request.loops_mean:g}"
    out.print(f"  at best {timing.tokens_per_second:,.1f} tokens/s at {plan.loops} loops a token{early}")


def _memory(plan: DecodePlan) -> str:
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
    if request.cache is CacheStrategy.FULL and plan.loops > 1:
        yield "keep one plane of the cache for all loops: --cache last"
    if request.slots > 1:
        yield f"fewer requests at one time: --slots {request.slots // 2}"
    fewer = max(request.pool.pages // 2, request.pool.pages_per_slot)
    if fewer < request.pool.pages:
        yield f"fewer pages, for which requests may have to wait: --pages {fewer}"
    yield f"shorter requests: --capacity {max(request.capacity // 2, 1)}"
    yield "more chips, among which the heads are divided: a larger --topology"
