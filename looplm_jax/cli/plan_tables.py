"""The tables of `looplm plan`."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from looplm_jax.planning._budget import Timing
from looplm_jax.planning._program_facts import Collective
from looplm_jax.planning._search import SearchResult, Trial
from looplm_jax.planning._stage_plan import Inside, StagePlan
from looplm_jax.printing import literal

_GIB, _GB = 2**30, 10**9


def print_stage(plan: StagePlan, out: Console) -> None:
    """Prints the plan of one stage."""
    mesh = " ".join(f"{name}={size}" for name, size in plan.mesh.items() if size > 1) or "one device"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    out.print(f"\n[bold]{literal(plan.stage)}[/] on {plan.target} ({mesh}): [bold]{verdict}[/], {_memory(plan)}")
    out.print(f"  compiled in {plan.compile_seconds:.0f} s for {plan.devices} device(s)")

    if plan.inside is not None:
        _print_inside(plan.inside, out)
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
    out.print(table)
    out.print(f"  not compiled: {result.cannot_fit} that cannot fit by arithmetic, {result.passed_over} less promising")


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
        "optimiser": memory.optimizer,
        "activations": memory.activations,
        "other": memory.other,
    }
    host = f"; {memory.host / _GIB:.2f} GiB in the host's memory" if memory.host else ""
    return memory_text(kinds, total=memory.total, capacity=memory.capacity) + host


def memory_text(kinds: Mapping[str, int], *, total: int, capacity: int | None) -> str:
    """Returns the bytes of a device in GiB, in total and by kind, with its capacity if known."""
    parts = ", ".join(f"{name} {size / _GIB:.3f}" for name, size in kinds.items())
    limit = f" of {capacity / _GIB:.2f}" if capacity else ""
    return f"{total / _GIB:.2f}{limit} GiB a device ({parts})"


def _print_inside(inside: Inside, out: Console) -> None:
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
        f"{timing.days:,.1f} days for the stage, {timing.model_flops_utilisation:.0%} of the peak"
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{seconds * 1e3:.3f} ms"
