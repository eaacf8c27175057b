"""Planning: memory, communication and time of a training stage or a decoder, on devices that need not be attached.

The program is compiled as `looplm train` or the engine would compile it, for real TPU topologies too, and the plan is
read from the compiled program. `looplm plan` prints the same plans as tables.

>>> from looplm_jax.planning import find_target, plan_stage
>>> from looplm_jax.recipes import Scale, named_recipe, scaled
>>> recipe = scaled(named_recipe("mano-small"), Scale.TINY)
>>> plan = plan_stage(recipe, recipe.stages[0], find_target("here"))  # or "v5p:4x8x8"
>>> plan.fits, plan.stage
(True, 'pretrain')

Targets: `find_target` returns a `Target`, the devices to plan for: a TPU topology, or `HERE` for the attached devices.

Training: `plan_stage` returns a `StagePlan` with the `Memory` of a device, the `Collective` exchanges of a step, its
`Timing` and advice. `search` compiles the most promising settings of a stage, and `fastest_settings` selects from its
`SearchResult`.

Decoding: `plan_decode` returns a `DecodePlan` for the engine that a `DecodeRequest` describes: its memory, and the
bytes that a tick moves compared with those that it must move.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # isort: off
    # The devices to plan for.
    from looplm_jax.planning._targets import HERE, Target, find_target

    # Training.
    from looplm_jax.planning._stage_plan import StagePlan, plan_stage
    from looplm_jax.planning._program_facts import Collective, Matmuls
    from looplm_jax.planning._budget import Memory, Timing
    from looplm_jax.planning._search import Candidate, SearchResult, Trial, fastest_settings, search

    # Decoding.
    from looplm_jax.planning._decode_plan import DecodeMemory, DecodePlan, DecodeRequest, Floor, plan_decode
    from looplm_jax.planning._budget import DecodeTiming

__all__ = [
    "HERE",
    "Candidate",
    "Collective",
    "DecodeMemory",
    "DecodePlan",
    "DecodeRequest",
    "DecodeTiming",
    "Floor",
    "Matmuls",
    "Memory",
    "SearchResult",
    "StagePlan",
    "Target",
    "Timing",
    "Trial",
    "fastest_settings",
    "find_target",
    "plan_decode",
    "plan_stage",
    "search",
]
