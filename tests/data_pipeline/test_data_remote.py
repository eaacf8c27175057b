"""Files at URLs, from a real HTTP server and from an emulated bucket."""

import contextlib
import functools
import http.server
import os
import threading

import fsspec
import pytest
from data_files import WRITERS, every_way, read_all

from looplm_jax.config import SourceConfig
from looplm_jax.data.sources import DataFile, find_inputs, open_files
from looplm_jax.data.sources._files import file_system
from looplm_jax.errors import UserError

DOCUMENTS = ["first\n", "zwei — два", *(f"document {number} " * 20 for number in range(30))]
NAMES = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrayrecord")


class WholeFiles(http.server.SimpleHTTPRequestHandler):
    """Serves files without range requests."""

    def log_message(self, *_arguments):
        pass


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves files with range requests, as data servers do."""

    def send_head(self):
        path, wanted = self.translate_path(self.path), self.headers.get("Range")
        if wanted is None or self.command == "HEAD":
            return super().send_head()
        with open(path, "rb") as stream:
            content = stream.read()
        start, end = wanted.removeprefix("bytes=").split("-")
        last = min(int(end or len(content) - 1), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last + 1 - int(start)))
        self.end_headers()
        self.wfile.write(content[int(start) : last + 1])
        return None

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a reader disconnects once it has what it needs
            super().handle()

    def log_message(self, *_arguments):
        pass


@contextlib.contextmanager
def serving(folder, handler):
    with http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(handler, directory=str(folder))) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://localhost:{served.server_port}"
        served.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    for name in NAMES:
        WRITERS[name](folder / name, DOCUMENTS)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with serving(folder, Files) as url:
        yield url


@pytest.mark.parametrize("name", NAMES)
def test_files_of_a_server(server, name):
    assert every_way(f"{server}/{name}", unit_bytes=(300, 2**26)) == DOCUMENTS


def test_a_file_that_the_server_lacks(server):
    with pytest.raises(UserError, match=r"no file matches 'http://localhost:\d+/b.jsonl'; check the path"):
        open_files(SourceConfig(path=f"{server}/b.jsonl"))


def test_a_server_that_gives_no_parts(folder):
    with serving(folder, WholeFiles) as url:
        assert every_way(f"{url}/a.jsonl.gz") == DOCUMENTS
        for name in ("a.jsonl", "a.parquet"):
            with pytest.raises(
                UserError, match=f"{name}: the server does not support reading parts of files; download it, and"
            ):
                open_files(SourceConfig(path=f"{url}/{name}"))


class Unversioned(WholeFiles):
    """Serves files without any header that identifies their version."""

    def send_header(self, keyword, value):
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


@pytest.mark.parametrize("handler", [Files, Unversioned])
def test_a_digest_shows_that_a_file_of_a_server_has_changed(tmp_path, handler):
    path = tmp_path / "a.txt"
    path.write_text("one")
    with serving(tmp_path, handler) as url:
        file = DataFile(*file_system(f"{url}/a.txt"))
        before, again = file.digest(), file.digest()
        path.write_text("two")
        os.utime(path, (0, 0))
        assert before == again != file.digest()


@pytest.fixture
def corpus(bucket, tmp_path):
    """Returns a folder in a bucket with a file of each format."""
    for name in NAMES:
        WRITERS[name](tmp_path / name, DOCUMENTS)
        fsspec.filesystem("gs").put(str(tmp_path / name), f"{bucket}/corpus/{name}")
    return f"{bucket}/corpus"


def test_files_of_a_bucket(corpus):
    for name in NAMES:
        assert every_way(f"{corpus}/{name}", unit_bytes=(3000, 2**26)) == DOCUMENTS
    assert [file.name for file in find_inputs(f"{corpus}/*.jsonl*")] == [f"{corpus}/{name}" for name in NAMES[:3]]
    assert read_all(open_files(SourceConfig(path=corpus))) == DOCUMENTS * len(NAMES)


def test_a_file_of_a_bucket_that_vanishes(corpus):
    opened = {name: open_files(SourceConfig(path=f"{corpus}/{name}")) for name in ("a.jsonl", "a.jsonl.gz")}
    fsspec.filesystem("gs").rm(corpus, recursive=True)
    with pytest.raises(UserError, match=rf"{corpus}/a.jsonl: there is no such file; check the path"):
        opened["a.jsonl"][3]
    assert opened["a.jsonl.gz"][3] == DOCUMENTS[3]


def test_what_a_bucket_lacks(bucket):
    for path in (f"{bucket}/nothing", f"{bucket}/*.jsonl", "gs://no-such-bucket/a.jsonl"):
        with pytest.raises(UserError, match=f"no file matches '{path.replace('*', '[*]')}'; check the path"):
            open_files(SourceConfig(path=path))
