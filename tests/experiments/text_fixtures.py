"""A folder of experiments with a few existing documents."""

import json
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "experiments" / "results"


def with_documents(root):
    """Makes the text models of `root` use these documents instead of the standard library's."""
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    lines = [{"text": part} for path in sources for part in path.read_text().split("\n\n") if part.strip()]
    lines += [{"text": path.read_text()} for path in sources]
    (root / "text-models").mkdir(parents=True)
    (root / "text-models" / "stdlib.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root
