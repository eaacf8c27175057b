"""The library imports exactly the packages that `setup.cfg` declares."""

import ast
import configparser
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Distributions whose modules have other names
MODULES = {"orbax-checkpoint": "orbax", "protobuf": "google"}
# Never imported by this library: fsspec needs them for gs:// and http://
PLUGINS = {"gcsfs", "aiohttp"}
# JAX needs it to bound its compilation cache
OF_JAX = {"filelock", "flatbuffers"}
# A dependency of lm_eval, imported only with lm_eval
THEIRS = {"tqdm"}


def module_of(requirement: str) -> str:
    name = re.match(r"[\w.-]+", requirement).group()
    return MODULES.get(name, name.replace("-", "_"))


def declared() -> tuple[set[str], set[str]]:
    """Returns the modules of the requirements, and those of all extras for users."""
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    lines = options["options"]["install_requires"].split("\n")
    extras = (
        line for name, text in options["options.extras_require"].items() if name != "dev" for line in text.split("\n")
    )
    return {module_of(line) for line in lines if line}, {module_of(line) for line in extras if line}


def imported(package: str) -> set[str]:
    """Returns the top-level modules that any file of a package imports, at any place."""
    found = set()
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"looplm_jax"}


def test_every_import_is_declared():
    required, extras = declared()
    assert imported("looplm_jax") - required - extras - THEIRS == set()
    assert imported("experiments") - required - extras == {"experiments"}


def test_the_library_never_imports_the_experiments():
    assert "experiments" not in imported("looplm_jax")


def test_everything_declared_is_imported():
    required, extras = declared()
    ours = imported("looplm_jax")
    assert required - ours == OF_JAX
    assert extras - ours - PLUGINS - required == set()


def test_every_folder_of_modules_is_a_package():
    folders = {path.parent for name in ("looplm_jax", "experiments") for path in (ROOT / name).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
