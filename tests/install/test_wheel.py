"""The wheel holds the whole library and nothing else, and works outside the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IMPORT_ALL = """
import importlib, pkgutil, looplm_jax
names = [module.name for module in pkgutil.walk_packages(looplm_jax.__path__, "looplm_jax.")]
for name in names:
    if ".torch_model" not in name and ".harness" not in name:  # those need an extra
        importlib.import_module(name)
print(looplm_jax.__file__)
"""


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in (folder / "looplm_jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy of the sources, because a build leaves files behind."""
    copy = tmp_path_factory.mktemp("sources")
    # With the experiments, which the wheel must leave out.
    for name in ("looplm_jax", "experiments", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", copy / "dist", copy], check=True, capture_output=True)
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Returns a folder with the content of the wheel, as an install writes it."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def test_the_wheel_holds_every_file(installed):
    assert files(ROOT) - files(installed) == set()
    assert files(installed) - files(ROOT) == set()


def test_the_wheel_installs_one_package_and_one_command(installed):
    (metadata,) = installed.glob("*.dist-info")
    assert sorted(path.name for path in installed.iterdir()) == ["looplm_jax", metadata.name]
    assert (metadata / "entry_points.txt").read_text().split("\n")[:2] == [
        "[console_scripts]",
        "looplm = looplm_jax.cli.main:main",
    ]


@pytest.mark.slow
def test_every_module_is_imported_from_the_wheel(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).is_relative_to(installed)
