"""The work of `looplm plan`: shows progress while programs compile, prints the plans, and suggests the next command."""

import dataclasses
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from looplm_jax import json_io
from looplm_jax.cli._common import exit_process
from looplm_jax.cli._plan_tables import print_decode, print_search, print_stage
from looplm_jax.codec import to_dict
from looplm_jax.config import Recipe, Stage, TopologySettings
from looplm_jax.errors import UserError, suggest
from looplm_jax.files import quoted
from looplm_jax.planning._decode_plan import DecodeRequest, check_heads, plan_decode
from looplm_jax.planning._search import Candidate, fastest_settings, search
from looplm_jax.planning._stage_plan import StagePlan, plan_stage
from looplm_jax.planning._targets import HERE, Target, find_target
from looplm_jax.recipes._topologies import on_topology, settings_in_use, with_settings
from looplm_jax.sharding import topology_name
from looplm_jax.terminal import show, with_escapes
from looplm_jax.training._compile import stage_mesh
from looplm_jax.training._initialize_from import with_model_of_start
from looplm_jax.training._progress import progress_console
from looplm_jax.training._stopping import Stopped, StopRequest

R = TypeVar("R")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of a user.

    `typed` is the recipe as the user typed it; `given` has the dotted paths of the fields that flags set.
    """

    recipe: Recipe
    typed: str
    given: frozenset[str] = frozenset()
    topology: str
    slices: int = 1
    stages: tuple[str, ...] = ()
    out: Path | None = None
    search: bool = False
    limit: int = 8
    write: Path | None = None


class _Progress:
    """Shows what is being compiled. A signal ends the process at once, because a compilation cannot be interrupted."""

    def __init__(self, console: Console, stop: StopRequest):
        self._console, self._stop = console, stop

    def compile(self, what: str, function: Callable[[], R]) -> R:
        """Returns `function()`, showing `what` meanwhile, on a terminal with the elapsed seconds."""
        # A log gets one line instead of a moving bar.
        if not self._console.is_terminal:
            self._console.print(f"compiling {what}")
            return self._stop.run(function)
        from rich import progress as bars

        text = bars.TextColumn("{task.description}", markup=False)
        columns = bars.SpinnerColumn(), text, bars.TimeElapsedColumn()
        with bars.Progress(*columns, console=self._console, transient=True) as bar:
            bar.add_task(with_escapes(f"compiling {what}"))
            return self._stop.run(function)


def plan_stages(request: PlanOptions) -> int:
    """Plans every requested stage. Returns 1 if one does not fit; a signal ends the process."""
    # All checks precede the compilation, which may take minutes.
    _check_out(request.out)
    _check_write(request.write)
    target = find_target(request.topology, request.slices)
    # Without a checkpoint, a recipe that takes its model from one is planned with a model of its own.
    if request.recipe.start.checkpoint:
        request = dataclasses.replace(request, recipe=with_model_of_start(request.recipe, given=request.given))
    # A search tries settings of its own, so those that the recipe has for the topology are left out.
    if not request.search:
        request = dataclasses.replace(
            request, recipe=on_topology(request.recipe, topology_name(target.devices), request.given)
        )
    stages = _chosen_stages(request)
    for stage in stages:
        stage_mesh(request.recipe, stage, target.devices)  # refuses a bad mesh before compiling

    # Progress on standard error and the plan on standard output, so that the plan can be redirected.
    console, out = progress_console(), Console(highlight=False, soft_wrap=True)

    if not request.search and (settings := settings_in_use(request.recipe)):
        out.print(settings, markup=False)
    with StopRequest() as stop:
        try:
            progress = _Progress(console, stop)
            plan = _search_all if request.search else _plan_all
            found, fits = plan(request, stages, target, progress, out)
        except Stopped as stopped:
            # Exits without waiting for the thread that compiles.
            exit_process(console, f"stopped by {stopped.signal.name}; nothing was written", stopped.signal)

    _write_plan(request.out, found)
    show(_next(request, fits))
    return 0 if fits else 1


def plan_tick(recipe: Recipe, request: DecodeRequest, *, typed: str, topology: str, out: Path | None) -> int:
    """Plans a tick, then prints and writes the plan. Returns 1 if it does not fit; a signal ends the process."""
    # All checks precede the compilation, which may take minutes.
    _check_out(out)
    request.check(recipe.model)

    target = find_target(topology)
    if target.devices[0].platform != "tpu":
        raise UserError(f"--decode plans for TPUs, unlike {target.name}; choose a slice such as v5e:1x1")
    check_heads(recipe.model, target)

    console = progress_console()
    with StopRequest() as stop:
        try:
            what = f"a tick of {request.slots} slots for {target.name}"
            plan = _Progress(console, stop).compile(
                what, lambda: plan_decode(recipe.model, recipe.compute, request, target)
            )
        except Stopped as stopped:
            exit_process(console, f"stopped by {stopped.signal.name}; nothing was written", stopped.signal)

    print_decode(typed, plan, Console(highlight=False, soft_wrap=True))
    _write_plan(out, [plan.to_json()])
    if not plan.fits:
        show("next: the same command with one of the changes above")
    return 0 if plan.fits else 1


# Planning and searching


def _plan_all(
    request: PlanOptions, stages: Sequence[Stage], target: Target, progress: _Progress, out: Console
) -> tuple[list[dict], bool]:
    """Plans each stage. Returns the plans as JSON values, and whether all of them fit."""
    plans: list[StagePlan] = []
    for number, stage in enumerate(stages, 1):
        what = f"stage {stage.name} ({number} of {len(stages)}) for {target.name}"
        plans.append(progress.compile(what, functools.partial(plan_stage, request.recipe, stage, target)))
        print_stage(plans[-1], out)
    return [dataclasses.asdict(plan) for plan in plans], all(plan.fits for plan in plans)


def _search_all(
    request: PlanOptions, stages: Sequence[Stage], target: Target, progress: _Progress, out: Console
) -> tuple[list[dict], bool]:
    """Searches each stage. Returns the trials as JSON values, and whether every stage has one that fits."""
    found: list[dict] = []
    chosen: dict[str, TopologySettings] = {}
    for stage in stages:
        # `name` is a default argument, so that it is bound in this iteration.
        def compiled(candidate: Candidate, number: int, count: int, name: str = stage.name) -> StagePlan:
            what = f"stage {name} with {candidate.flags} ({number} of {count}) for {target.name}"
            return progress.compile(what, lambda: plan_stage(candidate.recipe, candidate.stage, target))

        result = search(request.recipe, stage, target, compiled, limit=request.limit)
        print_search(stage.name, result, out)
        if result.best:
            chosen[stage.name] = fastest_settings(result)
        found += [{"flags": trial.candidate.flags, **dataclasses.asdict(trial.plan)} for trial in result.trials]
        found += [{"flags": each.candidate.flags, "error": each.error} for each in result.failures]
    _write_recipe(request, chosen)

    return found, len(chosen) == len(stages)


# Checks before planning


def _chosen_stages(request: PlanOptions) -> list[Stage]:
    """Returns the requested stages, or all. Raises UserError for an unknown name."""
    names = [stage.name for stage in request.recipe.stages]
    for name in request.stages:
        if name not in names:
            raise UserError(f"recipe {request.recipe.name!r} has no stage {name!r}{suggest(name, names)}")
    return [stage for stage in request.recipe.stages if not request.stages or stage.name in request.stages]


def _check_out(out: Path | None) -> None:
    """Raises UserError if the file exists or cannot be written."""
    if out is not None and out.exists():
        raise UserError(f"{out} exists already; name another file, or remove it")
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write {out.name} to")


def _check_write(out: Path | None) -> None:
    """Raises UserError if `--write` cannot be used."""
    _check_out(out)
    if out is not None and out.suffix != ".json":
        raise UserError(f"--write {out} must end in .json, as recipes do")


# After planning


def _write_recipe(request: PlanOptions, chosen: Mapping[str, TopologySettings]) -> None:
    """Writes the recipe with the chosen settings of each stage that fits, if requested and if one fits."""
    if request.write is None or not chosen:
        return
    recipe = request.recipe
    stages = tuple(
        with_settings(stage, chosen[stage.name]) if stage.name in chosen else stage for stage in recipe.stages
    )
    recipe = dataclasses.replace(recipe, stages=stages)
    request.write.write_text(json_io.dumps(to_dict(recipe), indent=2) + "\n")
    show(f"wrote {request.write}")


def _write_plan(out: Path | None, plan: list[dict]) -> None:
    """Writes a plan as JSON, if requested."""
    if out is not None:
        out.write_text(json_io.dumps(plan, indent=2) + "\n")
        show(f"wrote {out}")


def _next(request: PlanOptions, fits: bool) -> str:
    """Returns the command to run next."""
    if not fits and request.search:
        return "next: the same command with a larger --limit, or more devices"
    if not fits:
        return "next: the same command with one of the changes above, or --search"

    if request.write is not None:
        return (
            f"next: looplm plan {quoted(str(request.write))} --topology {shlex.quote(request.topology)}  # all stages"
        )

    if request.search:
        command = f"looplm plan {quoted(request.typed)} --topology {shlex.quote(request.topology)}"
        return f"next: {command}  # with the flags you like best, or the same command with --write FILE.json"

    where = "" if request.topology == HERE else f"on {request.topology}, "
    return f"next: looplm train --recipe {quoted(request.typed)} --data.root YOUR_DATA  # {where}with the same flags"
