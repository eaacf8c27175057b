"""The signals that exit policies read after each loop, and the memory that is carried from one loop to the next."""

import enum

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Needs(enum.Flag):
    """The signals that a policy reads in addition to the number of the loop. `Needs(0)` is none."""

    GATE = 1  # gate logits and log survival
    HIDDEN = 2  # what the head reads after this loop and after the previous one
    LOGITS = 4  # predictions of this loop
    PREVIOUS_LOGITS = 8 | LOGITS  # and of the previous loop: an array [B, V] is kept between loops
    DRAW = 16  # a random number per token, the same at all of its loops
    STATE = 32  # states before coda and readout norm, of this loop and the previous one


@flax.struct.dataclass
class Signals:
    """The signals after one loop. Those that no policy of the program needs are None.

    At loop 1, `previous_*` are zeros, which as logits are the uniform distribution, and `unchanged` is 0.
    """

    loop: Int[Array, "*B"]  # 1-based
    gate_logits: Float[Array, "*B"]
    log_survival: Float[Array, "*B"]  # log S_loop
    hidden: Float[Array, "*B D"] | None = None
    previous_hidden: Float[Array, "*B D"] | None = None
    logits: Float[Array, "*B V"] | None = None  # float32
    previous_logits: Float[Array, "*B V"] | None = None
    prediction: Int[Array, "*B"] | None = None  # the most probable token
    unchanged: Int[Array, "*B"] | None = (
        None  # consecutive loops, up to this one, with the prediction of the previous loop
    )
    draw: Float[Array, "*B"] | None = None  # uniform in [0, 1)
    state: Float[Array, "*B D"] | None = None  # from which the next loop starts
    previous_state: Float[Array, "*B D"] | None = None

    def memory(self) -> "LoopMemory":
        """Returns what the next loop needs."""
        return LoopMemory(
            loop=self.loop,
            log_survival=self.log_survival,
            hidden=self.hidden,
            logits=None if self.previous_logits is None else self.logits,
            prediction=self.prediction,
            unchanged=self.unchanged,
            state=self.state,
        )


@flax.struct.dataclass
class LoopMemory:
    """The values of earlier loops that the signals of the next loop need.

    Names are as in `Signals`. `loop` is the number of completed loops.
    """

    loop: Int[Array, "*B"]
    log_survival: Float[Array, "*B"]
    hidden: Float[Array, "*B D"] | None
    logits: Float[Array, "*B V"] | None
    prediction: Int[Array, "*B"] | None
    unchanged: Int[Array, "*B"] | None
    state: Float[Array, "*B D"] | None

    @classmethod
    def before_loops(
        cls, needs: Needs, hidden: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct | None = None
    ) -> "LoopMemory":
        """Returns the memory before the first loop, filled with zeros.

        Args:
          needs: the signals that will be read. Others are not kept.
          hidden: shape and dtype of the states of one loop, before and after the coda, `[*B, D]`.
          logits: shape and dtype of the predictions of one loop, `[*B, V]`.
        """
        rows = hidden.shape[:-1]
        predictions = logits if Needs.LOGITS in needs else None
        compared = logits if Needs.PREVIOUS_LOGITS in needs else None

        return cls(
            loop=jnp.zeros(rows, jnp.int32),
            log_survival=jnp.zeros(rows, jnp.float32),
            hidden=jnp.zeros(hidden.shape, hidden.dtype) if Needs.HIDDEN in needs else None,
            logits=None if compared is None else jnp.zeros(compared.shape, jnp.float32),
            prediction=None if predictions is None else jnp.zeros(rows, jnp.int32),
            unchanged=None if predictions is None else jnp.zeros(rows, jnp.int32),
            state=jnp.zeros(hidden.shape, hidden.dtype) if Needs.STATE in needs else None,
        )

    def observe(
        self,
        gate_logits: Float[Array, "*B"],
        hidden: Float[Array, "*B D"] | None = None,
        logits: Float[Array, "*B V"] | None = None,
        draw: Float[Array, "*B"] | None = None,
        state: Float[Array, "*B D"] | None = None,
    ) -> Signals:
        """Returns the signals after one more loop, without states and predictions that this memory does not need."""
        loop, gate_logits = self.loop + 1, gate_logits.astype(jnp.float32)

        if self.prediction is None or self.unchanged is None or logits is None:
            logits, prediction, unchanged = None, None, None
        else:
            logits = logits.astype(jnp.float32)
            prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            # At loop 1 the previous prediction is a placeholder.
            unchanged = jnp.where((prediction == self.prediction) & (loop > 1), self.unchanged + 1, 0)

        return Signals(
            loop=loop,
            gate_logits=gate_logits,
            log_survival=self.log_survival + jax.nn.log_sigmoid(-gate_logits),
            hidden=None if self.hidden is None else hidden,
            previous_hidden=self.hidden,
            logits=logits,
            previous_logits=self.logits,
            prediction=prediction,
            unchanged=unchanged,
            draw=draw,
            state=None if self.state is None else state,
            previous_state=self.state,
        )
