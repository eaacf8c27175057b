"""Fixtures for the `conftest.py` of folders whose tests run PyTorch and transformers."""

import sys

import pytest


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Limits PyTorch to one thread, because the tensors are too small to divide."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package", autouse=True)
def own_copies_of_remote_code(tmp_path_factory):
    """Keeps the code that transformers copies from a folder in a temporary place, apart from the user's copies."""
    dynamic_module_utils = pytest.importorskip("transformers.dynamic_module_utils")
    folder = tmp_path_factory.mktemp("remote_code")
    (folder / "__init__.py").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(str(folder))
        _forget_remote_code()
        yield
    _forget_remote_code()


def _forget_remote_code():
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
