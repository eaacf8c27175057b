"""Runs the examples in a docstring of a module or class, as doctest does."""

import doctest
from typing import Any

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_examples(documented: Any) -> int:
    """Runs the examples of one docstring and returns their number. Raises AssertionError for other output."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DebugRunner(optionflags=OPTIONS)
    count = 0
    for examples in finder.find(documented, documented.__name__, globs={}):
        runner.run(examples)
        count += len(examples.examples)
    return count
