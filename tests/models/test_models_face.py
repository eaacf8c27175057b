"""The public face of `models`."""

from docstring_examples import run_examples

from looplm_jax import models


def test_examples_of_the_package_run():
    assert run_examples(models) > 0
    assert set(models.__all__) <= set(dir(models))
