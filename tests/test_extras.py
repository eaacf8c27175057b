"""Optional packages are imported only when their feature is used, even if they are installed."""

import subprocess
import sys

EXTRAS = (
    *("torch", "transformers", "tokenizers", "lm_eval", "sklearn"),
    *("datasets", "datasketch", "wandb", "tensorflow", "matplotlib"),
)
ASKED = """
import importlib, sys
for name in sys.argv[2:]:
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        getattr(module, public)
found = sorted(set(sys.argv[1].split()) & set(sys.modules))
sys.exit(f"imported without being asked for: {found}" if found else 0)
"""


MODULES = (
    *("looplm_jax.training.run", "looplm_jax.cli.main", "looplm_jax.convert", "looplm_jax.inference"),
    *("looplm_jax.evaluation", "looplm_jax.recipes", "looplm_jax.planning"),
    *("experiments.registry", "experiments.command"),
)


def test_nothing_is_imported_that_nobody_asked_for():
    asked = subprocess.run(
        [sys.executable, "-c", ASKED, " ".join(EXTRAS), *MODULES], capture_output=True, text=True, check=False
    )
    assert asked.returncode == 0, asked.stderr
