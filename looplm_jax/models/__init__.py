"""The looped language model: one shared stack of layers, applied T times, with a head and an exit gate at every loop.

    >>> import jax
    >>> from looplm_jax.models import LoopLM, head_matrix, init_params, presets
    >>> model = LoopLM(presets.tiny())  # width D = 32, vocabulary V = 97
    >>> params = init_params(model, jax.random.key(0))
    >>> tokens = jax.numpy.ones((2, 8), int)  # [B, S]
    >>> output = model.apply({"params": params}, tokens, loops=4)  # any number of loops
    >>> output.hidden.shape, output.gate_logits.shape  # [T, B, S, D] and [T, B, S]
    ((4, 2, 8, 32), (4, 2, 8))
    >>> (output.hidden[-1] @ head_matrix(params, model.config)).shape  # logits of the last loop, [B, S, V]
    (2, 8, 97)

The model: `LoopLM`, a Flax module for a `ModelConfig` and a `ComputeConfig` of `looplm_jax.config`; its output,
`LoopLMOutput`; `last_loop`, which runs each sequence its own number of loops with gradients through the last ones; and
`mixed_loops`, which halts each token by itself and mixes its states (ACT), with its output `MixedOutput`. `LoopTime` is
the time of a loop in a call, for modulation.
`looplm_jax.losses` trains it, `looplm_jax.halting` stops its loops, `looplm_jax.inference` generates.

Parameters, `Params`, are nested dictionaries of arrays: `init_params`, `head_matrix`, `count_params`; `parameter_axes`
has the logical names of their axes, for sharding.

Fixed points, of any function of a state: `fixed_point` solves `z = f(z)` with a `Solver` of `looplm_jax.config`, and
returns `SolverMetrics` too; `implicit` also has the gradient, at the memory of one evaluation; `phantom` has that of a
few last loops. `equilibrium` solves for that of a model's loop, with an `Equilibrium` as result, and `loop_of` returns
the loop as such a function.

    >>> from looplm_jax.config import Solver, SolverKind
    >>> from looplm_jax.models import implicit
    >>> f = lambda a, z: jax.numpy.cos(a * z)
    >>> solver = Solver(kind=SolverKind.BROYDEN, tolerance=1e-6)
    >>> z, metrics = implicit(f, 1.0, jax.numpy.zeros((1, 1)), solver)  # [B, ...]: one row of one entry
    >>> print(z)
    [[0.73908...]]
    >>> int(metrics.evaluations[0]) < 10
    True
    >>> print(jax.grad(lambda a: implicit(f, a, z, solver)[0].sum())(1.0))
    -0.297...

Configurations by name, such as `presets.ouro_1_4b()`, are in the module `looplm_jax.models.presets`.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    # The model, its parameters, its loops in training, and fixed points of any function.
    from looplm_jax.models._drawn_depth import last_loop
    from looplm_jax.models._equilibrium import Equilibrium, equilibrium, loop_of
    from looplm_jax.models._fixed_point import SolverMetrics, fixed_point, implicit, phantom
    from looplm_jax.models._looplm import (
        LoopLM,
        LoopLMOutput,
        Params,
        count_params,
        head_matrix,
        init_params,
        parameter_axes,
    )
    from looplm_jax.models._mixed_loops import MixedOutput, mixed_loops
    from looplm_jax.models._modulation import LoopTime

__all__ = [
    "Equilibrium",
    "LoopLM",
    "LoopLMOutput",
    "LoopTime",
    "MixedOutput",
    "Params",
    "SolverMetrics",
    "count_params",
    "equilibrium",
    "fixed_point",
    "head_matrix",
    "implicit",
    "init_params",
    "last_loop",
    "loop_of",
    "mixed_loops",
    "parameter_axes",
    "phantom",
]
