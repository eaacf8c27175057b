"""What `import looplm_jax` offers: every public name and subpackage, without importing JAX before it is needed."""

import doctest
import importlib
import pkgutil
import subprocess
import sys
import types

import pytest

import looplm_jax
from looplm_jax import checkpoints, distributed, planning, recipes, rl, sharding, testing, training

WITH_EXAMPLES = [looplm_jax, checkpoints, distributed, planning, recipes, rl, sharding, testing, training]
SUBPACKAGES = sorted(module.name for module in pkgutil.iter_modules(looplm_jax.__path__) if module.ispkg)


def test_the_package_imports_no_jax_and_lists_every_public_name():
    program = (
        "import sys, looplm_jax; print(sorted(set(looplm_jax.__all__) - set(dir(looplm_jax))), 'jax' in sys.modules);"
        "print(looplm_jax.halting.q_exit.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\nq_exit\n"


def test_every_subpackage_is_an_attribute():
    assert set(SUBPACKAGES) <= set(looplm_jax.__all__)
    for name in SUBPACKAGES:
        assert isinstance(getattr(looplm_jax, name), types.ModuleType)


@pytest.mark.parametrize("name", ["looplm_jax", *(f"looplm_jax.{package}" for package in SUBPACKAGES)])
def test_every_name_of_a_face_exists(name):
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert getattr(module, public) is not None


@pytest.mark.parametrize(
    "module",
    WITH_EXAMPLES,
    ids=lambda m: m.__name__,
)
def test_examples_of_docstrings(module):
    done = doctest.testmod(module)
    assert done.attempted > 0
    assert done.failed == 0
