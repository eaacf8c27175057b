import json
import pathlib
import pickle
import tempfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from data_files import WRITERS, every_way, read_all
from hypothesis import given, settings
from hypothesis import strategies as st

from looplm_jax.config import OnBadRecord, SourceConfig
from looplm_jax.data import sources
from looplm_jax.data._documents import document_key
from looplm_jax.data.sources import BadRecordPolicy
from looplm_jax.errors import UserError

TEXTS = ["first\ndocument ", "second — документ", "third"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def open_files(path, *, on_bad_record=OnBadRecord.STOP, **fields):
    return sources.open_files(SourceConfig(path=path, **fields), on_bad_record=on_bad_record)


def fails(match, path, **options):
    with pytest.raises(UserError, match=match) as error:
        open_files(str(path), **options)
    assert "\n" not in str(error.value)


def test_text_files_in_sorted_order(tmp_path):
    for name, text in zip(("c.txt", "a.md", "b/x.py"), TEXTS):
        write(tmp_path / name, text)
    write(tmp_path / "ignored.bin", b"\xff")
    source = open_files(str(tmp_path))
    assert read_all(source) == [TEXTS[1], TEXTS[2], TEXTS[0]]
    assert repr(source) == f"FileSource({str(tmp_path)!r}, documents=3)"
    with pytest.raises(IndexError):
        source[3]


def documents(name, text):
    """Returns the documents that a text file with this name is split into."""
    fs = fsspec.filesystem("memory")
    fs.pipe(f"/{name}", text.encode())
    source = open_files(f"memory://{name}")
    assert source.keys.tolist() == [document_key(document) for document in read_all(source)]
    return read_all(source)


def test_a_book_is_cut_at_blank_lines():
    paragraphs = [f"Paragraph {n}.\n" + "a line of it\n" * (n % 30) + "\n" * (1 + n % 3) for n in range(12_000)]
    book = "".join(paragraphs)
    cut = documents("book.txt", book)
    assert "".join(cut) == book
    assert all(part.startswith("Paragraph ") and part.endswith("\n\n") for part in cut)
    assert all(8192 <= len(part) < 9192 for part in cut[:-1])
    assert documents("notes.md", book) == documents("notes.RST", book) == cut
    assert documents("module.py", book) == [book]


def test_a_short_text_gives_enough_documents_for_a_validation_split():
    cut = documents("story.txt", "Some forty characters of a short story.\n\n" * 2500)
    assert 90 <= len(cut) <= 110
    assert all(len(part) >= 1024 for part in cut[:-1])


@pytest.mark.parametrize(
    ("paragraph", "last"),
    [
        ("A word. " * 10_000, " "),
        ("line\n" * 20_000, "\n"),
        ("\u5faa\u74b0" * 30_000, "\u5faa\u74b0"),
        ("x" * 65_537, "x"),
    ],
)
def test_only_a_very_long_paragraph_is_cut_inside(paragraph, last):
    cut = documents("long.txt", "Before.\n\n" + paragraph + "\n\nAfter.")
    assert "".join(cut) == "Before.\n\n" + paragraph + "\n\nAfter."
    assert all(len(part.encode()) <= 8192 + 1024 and part[-1] in last + "\n" for part in cut[:-1])
    long_but_whole = "x " * 32_768
    assert documents("long.txt", long_but_whole) == [long_but_whole]


@given(
    st.lists(
        st.tuples(st.sampled_from(["\n", " ", "\r\n", "\n\n", "word", "\u00e9", "\U0001f600"]), st.integers(1, 9000))
    )
)
def test_the_documents_of_a_file_are_the_file(parts):
    text = "".join(part * count for part, count in parts)
    if text:
        cut = documents("any.txt", text)
        assert "".join(cut) == text
        assert all(cut)


def test_jsonl_by_glob(tmp_path):
    write(tmp_path / "b.jsonl", lines({"text": TEXTS[2]}))
    write(tmp_path / "a.jsonl", lines({"text": TEXTS[0]}) + "\n" + lines({"text": ""}, {"text": TEXTS[1]}).rstrip("\n"))
    source = open_files(str(tmp_path / "*.jsonl"))
    assert read_all(source) == TEXTS
    assert source.keys.tolist() == [document_key(text) for text in TEXTS]
    assert read_all(pickle.loads(pickle.dumps(source))) == TEXTS


def test_jsonl_reads_one_line_only(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", lines(*({"text": text} for text in TEXTS)))
    source, sizes = open_files(path), []
    fs = type(fsspec.filesystem("file"))
    whole = fs.cat_file

    def spy(self, path, start=None, end=None, **kwargs):
        sizes.append(end - start)
        return whole(self, path, start=start, end=end, **kwargs)

    monkeypatch.setattr(fs, "cat_file", spy)
    assert source[2] == TEXTS[2]
    assert sizes == [len(lines({"text": TEXTS[2]}))]


def test_byte_order_mark(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines({"text": "x"}).encode())
    assert read_all(open_files(path)) == ["x"]


def test_parquet_row_groups(tmp_path):
    texts = [f"text {n}" for n in range(25)]
    table = pyarrow.table({"body": [*texts, "", None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    source = open_files(str(tmp_path / "a.parquet"), text_key="body", on_bad_record=OnBadRecord.SKIP)
    assert read_all(source) == texts
    assert source.skipped == 1
    assert pickle.loads(pickle.dumps(source))[17] == "text 17"
    fails(r"a.parquet: row 26: the text is not a string but NoneType", tmp_path / "a.parquet", text_key="body")
    fails(r"no column text_key='boddy'; did you mean 'body'\?$", tmp_path / "a.parquet", text_key="boddy")
    fails(r"no column text_key='text'; known: body", tmp_path / "a.parquet")


def test_memory_file_system():
    fs = fsspec.filesystem("memory")
    fs.pipe("/corpus/a.jsonl", lines({"text": TEXTS[0]}).encode())
    fs.pipe("/corpus/b.txt", TEXTS[1].encode())
    fs.pipe("/corpus/bad.jsonl", b"nonsense\n")
    assert read_all(open_files("memory://corpus/[ab].*")) == TEXTS[:2]
    assert read_all(open_files("memory://corpus/b.txt")) == [TEXTS[1]]
    fails(r"memory://.*bad.jsonl:1: not JSON", "memory://corpus")
    fs.rm("/corpus", recursive=True)


BAD_LINES = [
    (b'{"text": "ok"\n', r"bad.jsonl:2: not JSON \(.* at column \d+\); fix it, or .* --on-bad-record skip"),
    (b'["ok"]\n', "bad.jsonl:2: not a JSON object but list"),
    (b'{"texts": "ok"}\n', r"bad.jsonl:2: the record has no field 'text'; did you mean 'texts'\?"),
    (b'{"text": 5}\n', "bad.jsonl:2: the text is not a string but int"),
    (b'{"text": "\xff"}\n', "bad.jsonl:2: not UTF-8 at byte 10 of the line"),
    (b'{"text": "\\ud800"}\n', "bad.jsonl:2: the text holds half a surrogate pair"),
    (b"[" * 200_000 + b"\n", r"bad.jsonl:2: not JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_lines_stop_or_are_skipped(tmp_path, line, message):
    good = lines({"text": "good"}).encode()
    path = write(tmp_path / "bad.jsonl", good + line + good)
    fails(message, path)
    source = open_files(path, on_bad_record=OnBadRecord.SKIP)
    assert read_all(source) == ["good", "good"]
    assert source.skipped == 1


def test_text_that_is_not_utf8(tmp_path):
    path = write(tmp_path / "bad.txt", b"caf\xe9 au lait")
    fails(r"bad.txt: not UTF-8 at byte 3; fix it", path)
    fails(r"the 1 files hold no text \(1 bad records were left out\)", path, on_bad_record=OnBadRecord.SKIP)


def test_nothing_to_read(tmp_path):
    fails(r"no file matches '.*\*.txt'; check the path, and quote a glob", tmp_path / "*.txt")
    fails("no file matches", tmp_path / "missing.txt")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "empty.jsonl", "\n")
    fails("the 2 files hold no text; give files with text in them", tmp_path)


def test_not_parquet(tmp_path):
    fails(r"a.parquet: not a Parquet file", write(tmp_path / "a.parquet", "PAR1"))


def test_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(fsspec.filesystem("file")), "cat_file", refuse)
    fails(r"a.txt: cannot be read \(Permission denied\); check its permissions", path)


def test_file_that_vanishes(tmp_path):
    path = tmp_path / "a.txt"
    source = open_files(write(path, "text"))
    path.unlink()
    with pytest.raises(UserError, match=r"a.txt: there is no such file"):
        source[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.parquet"])
def test_a_file_that_changes_after_it_was_opened(tmp_path, name):
    write_documents = WRITERS.get(name, lambda path, documents: path.write_text("\n\n".join(documents)))
    write_documents(tmp_path / name, ["x" * 5000] * 9)
    source = open_files(str(tmp_path / name))
    write_documents(tmp_path / name, ["é" * 2400])
    with pytest.raises(UserError, match=rf"{name}: changed since it was opened \(.*\); start again") as error:
        source[len(source) - 1]
    assert "\n" not in str(error.value)


def test_unknown_protocol():
    fails("Protocol not known: nowhere", "nowhere://bucket/*.txt")


@pytest.mark.parametrize("name", WRITERS)
@given(documents=st.lists(st.text(st.characters(codec="utf-8")) | st.sampled_from(["", "\n", "\r\n", "\u2028"])))
@settings(max_examples=12)
def test_every_format_gives_the_documents(name, documents):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        WRITERS[name](path, documents)
        assert every_way(path) == [document for document in documents if document]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.arrayrecord"])
@given(place=st.floats(0, 1, exclude_max=True), damage=st.sampled_from(["cut", "zeros", "more"]))
@settings(max_examples=40)
def test_damage_is_named_in_one_line_or_does_no_harm(name, place, damage):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        WRITERS[name](path, ["a document of some words " * (number % 7 + 1) for number in range(60)])
        content = path.read_bytes()
        at = int(place * len(content))
        tails = {"cut": b"", "zeros": bytes(20) + content[at + 20 :], "more": b"surplus" + content[at:]}
        path.write_bytes(content[:at] + tails[damage])
        message = f"{path}: harmless"
        try:
            read_all(open_files(str(path)))
        except UserError as error:
            message = str(error)
        assert message.startswith(str(path))
        assert "\n" not in message


@given(parts=st.lists(st.sampled_from(["\n\n", "word ", "\u00e9", "x" * 700, "\n", " \n\n\n"]), max_size=60))
def test_prose_is_the_same_in_sections(parts):
    text = "".join(parts)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("looplm_jax.data.sources._text._SECTION_BYTES", 1500)
        path = pathlib.Path(folder, "a.txt")
        path.write_text(text, encoding="utf-8", newline="")
        assert "".join(every_way(path, unit_bytes=(1, 3000, 10_000))) == text


def test_a_long_text_is_cut_in_sections(tmp_path, monkeypatch):
    monkeypatch.setattr("looplm_jax.data.sources._text._SECTION_BYTES", 2**20)
    path = tmp_path / "a.txt"
    path.write_bytes(b"A paragraph of some words.\n\n" * 50_000)
    [file] = sources.find_inputs(str(path))
    assert [span.end - span.start for span in sources.spans(file, 1)] == [2**20, 50_000 * 28 - 2**20]
    assert "".join(every_way(path)) == path.read_text()


def test_lines_are_numbered_wherever_a_span_begins(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(*[{"text": "good"}] * 30) + "bad\n")
    [file] = sources.find_inputs(path)
    policy = BadRecordPolicy(OnBadRecord.STOP)
    with pytest.raises(UserError, match=r"a.jsonl:31: not JSON"):
        list(sources.scan(file, SourceConfig(path=path), policy, sources.spans(file, 100)[-1]))
    policy = BadRecordPolicy(OnBadRecord.SKIP)
    assert list(sources.scan(file, SourceConfig(path=path), policy)) == ["good"] * 30
    assert (policy.skipped, policy.first) == (
        1,
        f"{path}:31: not JSON (Expecting value at column 1)",
    )


def test_a_file_that_is_written_anew(tmp_path):
    for name in ("a.parquet", "a.arrayrecord"):
        for documents in (["one", "two"], ["three", "four", "five"]):
            WRITERS[name](tmp_path / name, documents)
            assert every_way(tmp_path / name) == documents


def test_a_folder_holds_files_of_all_kinds(tmp_path):
    for name, write_documents in WRITERS.items():
        write_documents(tmp_path / name, [name])
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "archive.tar.gz", "nonsense")
    assert sorted(every_way(tmp_path)) == sorted(name for name in WRITERS if name != "a.json")
