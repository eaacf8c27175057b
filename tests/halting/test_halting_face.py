"""The public face of `halting`: its examples, its names, and arguments that cannot be confused."""

import jax.numpy as jnp
import pytest
from docstring_examples import run_examples

from looplm_jax import halting


def test_examples_of_the_package_run():
    assert run_examples(halting) > 0


def test_internals_of_the_engine_are_not_listed():
    assert set(halting.__all__) <= set(dir(halting))
    assert set(halting.__all__).isdisjoint({"Needs", "Signals", "LoopMemory", "PolicyTable"})


@pytest.mark.parametrize("function", [halting.entropy, halting.kl_divergence])
def test_functions_of_log_probabilities_name_their_arguments(function):
    pdf = halting.exit_distribution(jnp.zeros((4, 2)))
    with pytest.raises(TypeError, match="positional argument"):
        function(pdf)
