"""A local bucket emulator: fixtures for the `conftest.py` of folders whose tests use `gs://`.

The emulator runs in a separate process, because readers written in C++ may hold the GIL while they wait.
"""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

_SECONDS_TO_START = 30.0
_SERVER = Path(__file__).with_name("bucket_server.py")


@contextlib.contextmanager
def emulator(port: int = 0) -> Iterator[str]:
    """Starts an empty in-memory emulator. Yields its URL."""
    port = port or _free_port()
    process = subprocess.Popen(
        [sys.executable, str(_SERVER), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(process, port)
        yield f"http://localhost:{port}"
    finally:
        process.kill()
        process.wait()


def variables(url: str) -> dict[str, str]:
    """Returns environment variables that make gcsfs, ArrayRecord and TensorStore use it, without credentials."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # detecting the kind of a bucket needs credentials
    }


@pytest.fixture(scope="session")
def gcs() -> Iterator[str]:
    """Yields the URL of an emulator that all clients of this process and its child processes use."""
    pytest.importorskip("gcp_storage_emulator")
    with emulator() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in variables(url).items():
            patch.setenv(name, value)
        yield url


@pytest.fixture
def bucket(gcs: str) -> str:
    """Returns a new, empty bucket: `gs://…`."""
    return new_bucket()


def new_bucket() -> str:
    """Creates a bucket. Clients cache listings, so each test uses a new bucket."""
    gcsfs = pytest.importorskip("gcsfs")
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    gcsfs.GCSFileSystem().mkdir(name)
    return f"gs://{name}"


def make_read_only(url: str, bucket: str, *, read_only: bool = True) -> None:
    """Refuses every change of the bucket with status 403 from now on, or stops doing so."""
    switch = f"{url}/_read_only/{bucket.removeprefix('gs://')}"
    urllib.request.urlopen(urllib.request.Request(switch, method="PUT" if read_only else "DELETE")).close()


def a_checkpoint_was_refused(url: str, bucket: str) -> bool:
    """Returns whether a write of a checkpoint file was refused while the bucket was read-only."""
    try:
        urllib.request.urlopen(f"{url}/_read_only/{bucket.removeprefix('gs://')}").close()
    except urllib.error.HTTPError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + _SECONDS_TO_START
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1):
            return
        time.sleep(0.05)
    raise RuntimeError("the emulator of buckets did not start")
