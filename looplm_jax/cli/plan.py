"""Compile the train step of each stage of a recipe for a TPU slice that need not be here, and say what it would take.

    looplm plan ouro-1.4b --topology v5e:16x16
    looplm plan ouro-1.4b --topology v5p:8x8x8 --slices 2 --stage long-context --json plan.json

Says whether it fits, bytes by kind, what devices send each other, and the best possible time; where it does not fit,
what to change. Needs neither a TPU nor a network. Fields of the recipe are flags, as in `looplm train`.
"""

import argparse
from pathlib import Path

from looplm_jax.cli.chosen_recipe import chosen_recipe, with_overrides
from looplm_jax.recipes import RECIPES, Scale

OVERRIDES = True


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of `looplm plan`."""
    parser.add_argument("recipe", help=f"{', '.join(RECIPES)}, or a .json file")
    parser.add_argument(
        "--topology", required=True, help="a slice, such as v5e:16x16 or v5p:4x8x8; or here: the attached devices"
    )
    parser.add_argument("--slices", type=int, default=1, help="how many such slices (default: 1)")
    parser.add_argument("--stage", action="append", metavar="NAME", help="only this stage; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to this file too")
    parser.add_argument(
        "--search", action="store_true", help="try accumulation, remat, mesh and gathering; print the best choices"
    )
    parser.add_argument(
        "--limit", type=int, default=8, help="--search: programs compiled for a stage, the most promising (default: 8)"
    )
    parser.add_argument(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.FULL.value,
        help="tiny: every stage of the recipe at a thousandth of the size (default: full)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Plan, print and write. Status 1 if a stage does not fit."""
    recipe = chosen_recipe(arguments.recipe, arguments.scale)
    recipe = with_overrides(recipe, arguments.overrides, arguments.flags, "plan")
    from looplm_jax.cli.plan_session import PlanRequest, run_plan

    return run_plan(
        PlanRequest(
            recipe=recipe,
            given=arguments.recipe,
            topology=arguments.topology,
            slices=arguments.slices,
            stages=tuple(arguments.stage or ()),
            out=arguments.json,
            search=arguments.search,
            limit=arguments.limit,
        )
    )
