import pytest
from inference_models import make_model
from serving_models import SOUND, finish, make_engine


@pytest.fixture(scope="session")
def tiny_model():
    return make_model()


@pytest.fixture(scope="module")
def engine():
    """Returns an engine with a queue of three requests."""
    return make_engine(queue=3)


@pytest.fixture(scope="module")
def answer(engine):
    """Returns the tokens of an undisturbed request."""
    return finish(engine, [engine.submit(SOUND)])[0].tokens
