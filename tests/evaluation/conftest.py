import pytest
from evaluation_cases import make_loaded


@pytest.fixture(scope="session")
def loaded():
    return make_loaded()
