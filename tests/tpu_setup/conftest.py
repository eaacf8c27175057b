import pytest
from fake_cloud import fake_cloud


@pytest.fixture
def cloud(tmp_path):
    yield from fake_cloud(tmp_path / "cloud")
