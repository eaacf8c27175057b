"""The public face of `losses`."""

from docstring_examples import run_examples

from looplm_jax import losses


def test_examples_of_the_package_run():
    assert run_examples(losses) > 0
    assert set(losses.__all__) <= set(dir(losses))
