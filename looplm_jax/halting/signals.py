"""What exit policies look at: the signals of one loop, and what of it the signals of the next loop need."""

import enum

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Needs(enum.Flag):
    """What a policy reads besides the number of the loop. `Needs(0)` is nothing."""

    GATE = 1  # gate logits and log survival
    HIDDEN = 2  # states of this loop and of the one before
    LOGITS = 4  # predictions of this loop
    PREVIOUS_LOGITS = 8 | LOGITS  # of the loop before, too: an array [B, V] that is kept between loops


@flax.struct.dataclass
class Signals:
    """After one loop. What no policy of the program needs is None.

    At loop 1 there is no loop before it: `previous_*` are then anything of the right shape, and `unchanged` is 0.
    """

    loop: Int[Array, "*B"]  # 1-based
    gate_logits: Float[Array, "*B"]
    log_survival: Float[Array, "*B"]  # log S_loop
    hidden: Float[Array, "*B D"] | None = None
    previous_hidden: Float[Array, "*B D"] | None = None
    logits: Float[Array, "*B V"] | None = None  # float32
    previous_logits: Float[Array, "*B V"] | None = None
    prediction: Int[Array, "*B"] | None = None  # the most probable token
    unchanged: Int[Array, "*B"] | None = None  # loops in a row, up to this one, that predict as the loop before did

    def memory(self) -> "LoopMemory":
        """What the next loop needs."""
        return LoopMemory(
            loop=self.loop,
            log_survival=self.log_survival,
            hidden=self.hidden,
            logits=None if self.previous_logits is None else self.logits,
            prediction=self.prediction,
            unchanged=self.unchanged,
        )


@flax.struct.dataclass
class LoopMemory:
    """What the signals of a loop need of the loops before it. Names as in `Signals`; `loop` counts the loops done."""

    loop: Int[Array, "*B"]
    log_survival: Float[Array, "*B"]
    hidden: Float[Array, "*B D"] | None
    logits: Float[Array, "*B V"] | None
    prediction: Int[Array, "*B"] | None
    unchanged: Int[Array, "*B"] | None

    @classmethod
    def before_loops(
        cls, needs: Needs, hidden: jax.ShapeDtypeStruct, logits: jax.ShapeDtypeStruct | None = None
    ) -> "LoopMemory":
        """Zeros: no loop is done. Of `[*B, D]` and `[*B, V]` only what is needed is kept."""
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
        )

    def observe(
        self,
        gate_logits: Float[Array, "*B"],
        hidden: Float[Array, "*B D"] | None = None,
        logits: Float[Array, "*B V"] | None = None,
    ) -> Signals:
        """The signals of one more loop. States and predictions that nobody needs, by this memory, are left out."""
        loop, gate_logits = self.loop + 1, gate_logits.astype(jnp.float32)
        if self.prediction is None or self.unchanged is None or logits is None:
            logits, prediction, unchanged = None, None, None
        else:
            logits = logits.astype(jnp.float32)
            prediction = jnp.argmax(logits, axis=-1).astype(jnp.int32)
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
        )
