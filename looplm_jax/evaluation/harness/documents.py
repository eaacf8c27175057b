"""Loads the documents of the tasks in this package, from the folder of their YAML files."""

import json
from typing import Any

from looplm_jax.evaluation.harness import TASKS


def load(*, documents: str, **metadata: Any) -> dict[str, Any]:
    """Returns the split `test` of a JSON Lines file, in the form that the harness expects of a `custom_dataset`."""
    import datasets

    del metadata  # metadata of the task and of the model
    lines = (TASKS / documents).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
