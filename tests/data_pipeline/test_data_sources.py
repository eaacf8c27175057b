import json
import pickle

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.config import OnBadRecord
from looplm_jax.data.sources import open_files
from looplm_jax.data.splits import document_key
from looplm_jax.errors import UserError

TEXTS = ["first\ndocument ", "second — документ", "third"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def lines(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_all(source):
    return [source[index] for index in range(len(source))]


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
    """What a text file of that name is cut into."""
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
    fails(r"no column 'boddy'; did you mean 'body'\?", tmp_path / "a.parquet", text_key="boddy")
    fails(r"no column 'text'; known: body", tmp_path / "a.parquet")


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
    (b'{"text": "ok"\n', r"bad.jsonl:2: not JSON \(.* at column \d+\); mend it, or .* --on-bad-record skip"),
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
    fails(r"bad.txt: not UTF-8 at byte 3; mend it", path)
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


def test_unknown_protocol():
    fails("Protocol not known: nowhere", "nowhere://bucket/*.txt")
