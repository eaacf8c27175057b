import os

import pytest


@pytest.fixture(scope="session")
def compiled_programs():
    """The folder of this session's compiled programs."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]
