"""Compile the train step of each stage of a recipe for a TPU slice that need not exist here, and report its cost.

With --decode: compile a tick of the engine, which generates text, instead of the train steps.

    looplm plan ouro-1.4b --topology v5e:16x16
    looplm plan ouro-1.4b --topology v5p:8x8x8 --slices 2 --stage long-context --json plan.json
    looplm plan ouro-1.4b --decode --topology v5e:1x1 --slots 8 --capacity 2048 --loops-mean 2.3

Reports whether it fits, bytes by kind, what devices send each other, and a lower bound of the time; if it does not fit,
what to change. Needs neither a TPU nor a network. Fields of the recipe are flags, as in `looplm train`.
"""

import argparse
from pathlib import Path

from looplm_jax.cli.chosen_recipe import chosen_recipe, recipe_or_checkpoint, with_overrides
from looplm_jax.codec import parse_flags
from looplm_jax.errors import UserError
from looplm_jax.recipes import RECIPES, Scale

OVERRIDES = True
_OF_STAGES = ("search", "limit", "write", "slices", "stage")
_OF_DECODE = ("slots", "capacity", "page_size", "pages", "filled", "cache", "loops_mean")


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `looplm plan`."""
    parser.add_argument("recipe", help=f"{', '.join(RECIPES)}, or a .json file; with --decode also a checkpoint")
    parser.add_argument(
        "--topology", required=True, help="a slice, such as v5e:16x16 or v5p:4x8x8; or here: the attached devices"
    )
    parser.add_argument("--slices", type=int, help="how many such slices (default: 1)")
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this stage; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file too")

    parser.add_argument(
        "--search",
        action="store_true",
        help="try accumulation, remat, mesh, gathering and reduction; print the best choices",
    )
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="--search: write the recipe with the fastest choices, as settings for the topology, to this .json",
    )
    parser.add_argument(
        "--limit", type=int, help="--search: programs compiled for a stage, the most promising (default: 8)"
    )

    parser.add_argument(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.FULL.value,
        help="tiny: every stage of the recipe at a thousandth of the size (default: full)",
    )

    decode = parser.add_argument_group("a tick of the engine")
    decode.add_argument("--decode", action="store_true", help="plan one tick of the engine instead of the train steps")
    decode.add_argument("--slots", type=int, metavar="N", help="requests at one time (default: 8)")
    decode.add_argument("--capacity", type=int, metavar="N", help="positions of the longest request (default: 2048)")
    decode.add_argument("--page-size", type=int, metavar="N", help="positions of a page of the cache (default: 128)")
    decode.add_argument(
        "--pages",
        type=int,
        metavar="N",
        help="pages that all slots share (default: as many as all need for the longest request)",
    )
    decode.add_argument("--filled", type=int, metavar="N", help="positions of each slot in use (default: half of them)")
    decode.add_argument(
        "--cache",
        choices=["full", "last", "average", "first"],
        help="loops whose keys and values are kept (default: full)",
    )
    decode.add_argument("--loops-mean", type=float, metavar="T", help="loops of a token on average, if some exit early")


def run(arguments: argparse.Namespace) -> int:
    """Plans, prints and writes. Returns 1 if a stage, or the tick, does not fit."""
    _refuse_without_effect(arguments)
    if arguments.decode:
        return _run_decode(arguments)

    recipe = chosen_recipe(arguments.recipe, arguments.scale)
    recipe = with_overrides(recipe, arguments.overrides, arguments.flags, "plan")
    from looplm_jax.cli.plan_session import PlanRequest, run_plan

    return run_plan(
        PlanRequest(
            recipe=recipe,
            typed=arguments.recipe,
            given=frozenset(parse_flags(arguments.overrides)),
            topology=arguments.topology,
            slices=1 if arguments.slices is None else arguments.slices,
            stages=tuple(arguments.stage or ()),
            out=arguments.json,
            search=arguments.search,
            limit=8 if arguments.limit is None else arguments.limit,
            write=arguments.write,
        )
    )


def _run_decode(arguments: argparse.Namespace) -> int:
    """Plans a tick of the engine."""
    recipe = recipe_or_checkpoint(arguments.recipe, arguments.scale)
    recipe = with_overrides(recipe, arguments.overrides, arguments.flags, "plan")
    from looplm_jax.cli.decode_plan_session import run_decode_plan
    from looplm_jax.inference import CacheStrategy
    from looplm_jax.planning._decode_plan import DecodeRequest

    given = {name: getattr(arguments, name) for name in ("slots", "page_size", "pages", "filled", "loops_mean")}
    given["capacity"] = arguments.capacity
    if arguments.capacity is None:
        # The default must fit models with fewer positions.
        given["capacity"] = min(DecodeRequest.capacity, recipe.model.max_positions)
    if arguments.cache is not None:
        given["cache"] = CacheStrategy(arguments.cache)

    request = DecodeRequest(**{name: value for name, value in given.items() if value is not None})
    return run_decode_plan(recipe, request, given=arguments.recipe, topology=arguments.topology, out=arguments.json)


def _refuse_without_effect(arguments: argparse.Namespace) -> None:
    """Raises UserError for a flag of the other kind of plan."""
    if arguments.write is not None and not arguments.search and not arguments.decode:
        raise UserError("--write has no effect without --search; add --search")

    unused = _OF_STAGES if arguments.decode else _OF_DECODE
    named = [name for name in unused if getattr(arguments, name) not in (None, False)]
    if named:
        flag = f"--{named[0].replace('_', '-')}"
        remedy = "leave one of them out" if arguments.decode else "add --decode"
        raise UserError(f"{flag} has no effect {'with' if arguments.decode else 'without'} --decode; {remedy}")

    if arguments.decode:
        for path in parse_flags(arguments.overrides):
            # Fields of training have no effect on a tick.
            if "." in path and not path.startswith("model.") and path != "compute.dtype":
                raise UserError(f"--{path} has no effect with --decode; only --model.* and --compute.dtype do")
