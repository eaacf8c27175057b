"""A folder of experiments whose documents are there already, and few; and programs that are compiled once."""

import json
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache


def with_documents(root):
    """The text models of `root` will find these documents in the place of the standard library's."""
    sources = sorted(Path(json.__file__).parent.glob("*.py"))
    lines = [{"text": part} for path in sources for part in path.read_text().split("\n\n") if part.strip()]
    lines += [{"text": path.read_text()} for path in sources]
    (root / "text-models").mkdir(parents=True)
    (root / "text-models" / "stdlib.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return root


def programs_on_disk(folder):
    """Runs of the same shape have the same programs: they are kept in a folder while this generator waits."""
    settings = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in settings]
    for name, value in zip(settings, (str(folder), 0.0), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in zip(settings, before, strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
