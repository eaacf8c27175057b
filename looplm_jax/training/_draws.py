"""The random choices of a step, which follow from the key of the run and the number of the step alone."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32

from looplm_jax.config import Stage
from looplm_jax.random_keys import from_raw

# Distinguish the choices of a step from each other, and from other random numbers of the run.
_JACOBIAN, _SHORTCUT = 0x6A61636F, 0x73686F72


@flax.struct.dataclass
class ShortPass:
    """A pass with fewer loops than those of the stage.

    Attributes:
      loops: their number.
      steps: their steps (`LoopTime`), multiples of one over the loops of the stage; zero after the last one.
    """

    loops: Int[Array, ""]
    steps: Float[Array, "most"]


@flax.struct.dataclass
class Draws:
    """The choices of a step.

    Attributes:
      penalized: whether the loss has the penalty on the Jacobian of the loop; None if the stage has none.
      short: the short pass; None if the stage has none.
    """

    penalized: Bool[Array, ""] | None = None
    short: ShortPass | None = None


def draw_step(stage: Stage, key: UInt32[Array, "2"], step: Int[Array, ""], first_step: int) -> Draws:
    """Returns the choices of a step.

    Args:
      stage: the stage.
      key: the raw random key of the run.
      step: the number of the step.
      first_step: the number of steps of the run before the stage.
    """

    def key_of(choice: int) -> PRNGKeyArray:
        return jax.random.fold_in(jax.random.fold_in(from_raw(key), choice), step)

    penalized = None
    if stage.jacobian.weight:
        drawn = jax.random.uniform(key_of(_JACOBIAN))
        penalized = (drawn < stage.jacobian.share_of_steps) & (step - first_step >= stage.jacobian.after)

    return Draws(penalized=penalized, short=draw_short(key_of(_SHORTCUT), stage.loops) if stage.shortcut.any else None)


def draw_short(key: PRNGKeyArray, loops: int) -> ShortPass:
    """Draws a pass with fewer loops, as LoopFormer's published code does.

    The number is uniform in 1..loops-1. Each step but the last is uniform among the multiples of 1/loops that leave one
    for every later loop, and the last one completes the sum to 1.

    Args:
      key: the random key.
      loops: the number of loops of the whole pass, at least 2.
    """
    of_number, of_steps = jax.random.split(key)
    number = jax.random.randint(of_number, (), 1, loops)

    def step(left: Int[Array, ""], drawn: tuple[PRNGKeyArray, Int[Array, ""]]) -> tuple[Array, Array]:
        key, after = drawn[0], number - 1 - drawn[1]  # loops after this one; negative after the last
        units = jax.random.randint(key, (), 1, jnp.maximum(left - after, 1) + 1)
        units = jnp.where(after > 0, units, left)  # all that is left in the last loop, and then nothing
        return left - units, units

    numbers = jnp.arange(loops - 1, dtype=number.dtype)
    _, units = jax.lax.scan(step, jnp.asarray(loops, number.dtype), (jax.random.split(of_steps, loops - 1), numbers))
    return ShortPass(loops=number, steps=units.astype(jnp.float32) / loops)
