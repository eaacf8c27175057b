import pytest
from inference_models import make_model


@pytest.fixture(scope="session")
def tiny_model():
    return make_model()
