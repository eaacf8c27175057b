import pytest
from quick_looplm import SHUFFLED_PIECES


@pytest.fixture(scope="module", autouse=True)
def small_windows():
    """Windows as those of the processes that these tests start, also where both are compared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("looplm_jax.data.packing._SHUFFLED_PIECES", SHUFFLED_PIECES)
        yield
