"""Errors of the compiler: a lack of memory is measured, and all others are explained in one line."""

import jax
import jax.numpy as jnp
import pytest

from looplm_jax.planning._compiler import DoesNotCompile, OutOfMemory, compile_program


class Refused:
    """A lowered program that the compiler refuses."""

    def __init__(self, message):
        self._message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self._message)


def compiled(lower):
    return compile_program(lower, "stage first for v5e:2x2", "use --compute.remat layer")


def test_a_program_that_compiles():
    program = compiled(lambda: jax.jit(jnp.sin).lower(1.0))
    assert program(0.0) == 0.0


@pytest.mark.parametrize(
    ("message", "used", "limit"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.",
            20.5,
            15.75,
        ),
        ("RESOURCE_EXHAUSTED: total memory required for HLO temporaries (2.00G) exceeds available HBM (1.00G).", 2, 1),
    ],
)
def test_a_lack_of_memory(message, used, limit):
    assert compiled(lambda: Refused(message)) == OutOfMemory(used=int(used * 2**30), limit=int(limit * 2**30))


def test_any_other_failure_is_one_line():
    with pytest.raises(DoesNotCompile) as caught:
        compiled(lambda: Refused("INTERNAL: during context [hlo verifier]:\n  Check failed: " + 99 * "it is long "))
    message = str(caught.value)
    assert message.startswith(
        "stage first for v5e:2x2 does not compile; use --compute.remat layer (JaxRuntimeError: INTERNAL: "
        "during context [hlo verifier]: Check failed: it is long"
    )
    assert "\n" not in message
    assert len(message) < 400


def test_a_failure_while_the_program_is_lowered():
    def lower():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no such kernel")

    with pytest.raises(DoesNotCompile, match="UNIMPLEMENTED: no such kernel"):
        compiled(lower)
