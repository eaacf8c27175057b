import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture(scope="session")
def compiled_programs(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def _each_program_is_compiled_once(compiled_programs):
    """Runs of the same recipe have the same programs: the tests of this folder keep them on the disk."""
    before = [getattr(jax.config, name) for name in SETTINGS]
    for name, value in zip(SETTINGS, (str(compiled_programs), 0.0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(SETTINGS, before):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
