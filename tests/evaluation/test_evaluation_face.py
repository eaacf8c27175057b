"""The public names of `looplm_jax.evaluation`: they exist, and the example in its docstring prints what it says."""

import doctest

from looplm_jax import evaluation


def test_the_example_prints_what_it_says():
    assert doctest.testmod(evaluation).failed == 0


def test_every_public_name_exists():
    assert set(evaluation.__all__) <= set(dir(evaluation))
    assert all(getattr(evaluation, name) is not None for name in evaluation.__all__)
