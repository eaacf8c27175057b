"""Documents of the tasks that come with this package, read from beside their YAML files."""

import json
from typing import Any

from looplm_jax.evaluation.harness import TASKS


def load(*, documents: str, **metadata: Any) -> dict[str, Any]:
    """The split `test` of a JSON Lines file, as the harness asks a `custom_dataset` for it."""
    import datasets

    del metadata  # of the task and of the model
    lines = (TASKS / documents).read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
