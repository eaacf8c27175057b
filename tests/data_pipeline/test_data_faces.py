"""The public pages of the data packages: their examples run, and their lists are complete and lazy."""

import doctest
import importlib
import re
import subprocess
import sys

import pytest

FACES = (
    "looplm_jax.data",
    "looplm_jax.data.sources",
    "looplm_jax.data.tasks",
    "looplm_jax.data.tokenizers",
    "looplm_jax.corpus",
)


@pytest.mark.parametrize("name", FACES)
def test_example_of_a_page_runs(name):
    package = importlib.import_module(name)
    [example] = [test for test in doctest.DocTestFinder(recurse=False).find(package) if test.examples]
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert result.attempted >= 3
    assert result.failed == 0


@pytest.mark.parametrize("name", FACES)
def test_page_lists_names_that_exist_and_explains_each(name):
    package = importlib.import_module(name)
    assert set(package.__all__) <= set(dir(package))
    assert set(package.__all__) == set(package.__getattr__.keywords["imported_symbols"])
    for public in package.__all__:
        assert getattr(package, public) is not None
        assert re.search(rf"`{public}\b", package.__doc__), public


def test_pages_do_not_import_jax():
    program = "import sys\n" + "".join(f"import {name}\n" for name in FACES) + "print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
