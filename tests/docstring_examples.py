"""Runs the examples in a docstring of a module or class, as doctest does."""

import doctest
import io
from typing import Any

OPTIONS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def run_examples(documented: Any) -> int:
    """Runs the examples of one docstring and returns their number. Raises AssertionError for other output."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=OPTIONS)
    count, report = 0, io.StringIO()
    for examples in finder.find(documented, documented.__name__, globs={}):
        assert runner.run(examples, out=report.write).failed == 0, report.getvalue()
        count += len(examples.examples)
    return count
