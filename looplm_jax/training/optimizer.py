"""AdamW, and the learning rate of a stage."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from looplm_jax.config import OptimizerConfig, Schedule, Stage

_NOT_DECAYED = ("scale", "bias")


def adamw(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW without its learning rate: the train step multiplies by `-learning_rate`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )


def direction(
    config: OptimizerConfig, gradients: PyTree, state: optax.OptState, params: PyTree
) -> tuple[PyTree, optax.OptState]:
    """AdamW's updates before the learning rate, and its next state."""
    with jax.numpy_dtype_promotion(
        "standard"
    ):  # Optax raises a float to an integer power, which strict promotion refuses
        return adamw(config).update(gradients, state, params)


def decayed(params: PyTree) -> PyTree:
    """True for the leaves that weight decay applies to: all but the scales of norms and biases, told by their names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) not in _NOT_DECAYED, params)


def learning_rate(stage: Stage, step: Int[Array, ""]) -> Float[Array, ""]:
    """Returns the rate of a stage's step (counted from 0): linear warm-up to the peak, then the stage's schedule.

    The last step of the warm-up has the peak, and the last step of a cosine or a decay has the final rate. A cosine
    falls from the last step of the warm-up, or without one from the first step; a decay over N steps is lower by an
    N-th of the way in each of the stage's last N steps.
    """
    step, last = step.astype(jnp.float32), stage.steps - 1
    warmup = jnp.minimum(1.0, (step + 1.0) / max(stage.warmup_steps, 1))
    peak, final = stage.learning_rate, stage.final_learning_rate
    match stage.schedule:
        case Schedule.CONSTANT:
            rate = jnp.full_like(step, peak)
        case Schedule.COSINE:
            done = _fraction(step, max(stage.warmup_steps - 1, 0), last)
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            rate = peak * left + final * (1.0 - left)  # exact at both ends
        case Schedule.WARMUP_STABLE_DECAY:
            done = _fraction(step, last - stage.decay_steps, last)
            rate = peak * (1.0 - done) + final * done
    return warmup * rate


def _fraction(step: Float[Array, ""], first: int, last: int) -> Float[Array, ""]:
    """Returns how far a step is on the way from the step `first` to `last`; 0 where there is no way between them."""
    return jnp.clip((step - first) / max(last - first, 1), 0.0, 1.0)


def _leaf_name(path: tuple) -> str:
    # Inside a box with axis names the last key is the box's own field; the name is the last key of a dictionary.
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    return str(names[-1]) if names else ""
