"""Sets eight fake devices and strict promotion for every test, before anything imports JAX."""

import gc

gc.disable()  # imported modules and collected tests stay alive: searching them takes a fifth of the collection time

import atexit
import os
import pkgutil
import shutil
import signal
import tempfile
import tracemalloc

import shape_checks
from quick_looplm import SHUFFLED_PIECES
from xla_flags import quick_to_compile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick_to_compile(devices=8)}"

# Test processes, and the processes that tests start, share compiled programs through this folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="looplm-compiled-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import looplm_jax

# Checks arguments and results of every function of the subpackages that has shapes in its signature. Tests pass invalid
# values or fakes to functions of the packages in SHAPES_CHECKED, so only arrays are checked there. Tests of
# `distributed` replace sockets and the end of a process, and it has no arrays.
SHAPES_CHECKED = {"convert", "corpus", "data", "inference"}
PACKAGES = {module.name for module in pkgutil.iter_modules(looplm_jax.__path__) if module.ispkg} - {"distributed"}
shape_checks.install()
install_import_hook([f"looplm_jax.{name}" for name in PACKAGES - SHAPES_CHECKED], "shape_checks.checked")
install_import_hook([f"looplm_jax.{name}" for name in SHAPES_CHECKED], "shape_checks.shapes_checked")

# A background job (`nohup`, some CI runners) inherits SIGINT as ignored, and so would every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "allow")

settings.register_profile("looplm", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("looplm")


# This module compares the test process with a user's process, whose shuffle windows are larger.
WITH_WINDOWS_OF_USERS = "test_experiment_grid"


@pytest.fixture(scope="module", autouse=True)
def small_windows(request):
    """Makes shuffle windows small. Every stream first fills its window, and the tested laws hold for any size."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem != WITH_WINDOWS_OF_USERS:
            patch.setattr("looplm_jax.data._packing._SHUFFLED_PIECES", SHUFFLED_PIECES)
        yield


# Tests in these folders compare with other libraries or run whole programs. Ranks may be promoted there.
LENIENT_RANKS = ("benchmarks", "docs", "evaluation", "experiments", "parity", "torch_model", "tpu_compile")


@pytest.fixture(scope="module", autouse=True)
def strict_ranks(request):
    """Makes implicit promotion of ranks raise."""
    with jax.numpy_rank_promotion("allow" if request.path.parent.name in LENIENT_RANKS else "raise"):
        yield


@pytest.fixture(scope="module", autouse=True)
def settled_heap():
    """Excludes objects that a module leaves behind from later garbage collections.

    JAX keeps traced and compiled programs. After a thousand tests, searching them repeatedly takes longer than tracing.
    Allocations that tracemalloc still follows would also slow down all later tests.
    """
    yield
    assert not tracemalloc.is_tracing()
    gc.collect()
    gc.freeze()


LONGEST = (
    "test_two_processes",
    "test_killed_runs",
    "test_run",
    "test_gathered_weights",
    "test_ouro_recipes",
    "test_replay",
    "test_speculation",
    "test_buckets",
    "test_vanished_source",
    "test_experiment_text_models",
    "test_step",
    "test_start",
    "test_engine",
    "test_generate",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the longest files first, so that workers that share the files finish at about the same time."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    gc.freeze()
    gc.enable()
