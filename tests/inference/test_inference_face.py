"""The public faces of `inference` and of its engine."""

import inspect

import pytest
from docstring_examples import run_examples

from looplm_jax import inference
from looplm_jax.inference import Conversation, Engine, Request


def test_examples_of_the_package_run():
    assert run_examples(inference) > 0
    assert set(inference.__all__) <= set(dir(inference))


@pytest.mark.parametrize("method", [Engine.generate, Engine.stream, Engine.requests, Conversation.say])
def test_options_of_a_request_are_named(method):
    """So that an editor completes them, and a misspelled one is refused before anything runs."""
    parameters = inspect.signature(method).parameters.values()
    assert all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters)


def test_every_field_of_a_request_is_an_option():
    options = set(inspect.signature(Engine.generate).parameters)
    assert set(inspect.signature(Request).parameters) - {"prompt_ids"} <= options
