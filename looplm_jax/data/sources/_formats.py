"""The interface of all file formats, and the conversion of a record, from any format, to a document."""

import codecs
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from looplm_jax.config import OnBadRecord, RecordKind, SourceConfig
from looplm_jax.data._documents import Document, Message, Problem
from looplm_jax.errors import UserError, suggest

ROLES = ("assistant", "developer", "system", "tool", "user")
_TEACHER = "assistant"


# Bad records


class BadRecord(ValueError):
    """Raised with the reason why a record is not a valid document."""


class BadRecordPolicy:
    """Stops at the first bad record, or skips and counts them."""

    def __init__(self, on_bad_record: OnBadRecord):
        self._on_bad_record = on_bad_record
        self.skipped = 0
        self.first = ""  # location and reason of the first one

    def handle(self, where: Callable[[], str], problem: object) -> None:
        """Counts a bad record, or raises a UserError with its location.

        `where` is a function because it can be slow to find the location.
        """
        if self._on_bad_record is OnBadRecord.STOP:
            raise UserError(f"{where()}: {problem}; fix it, or skip such records with --on-bad-record skip")
        self.skipped += 1
        self.first = self.first or f"{where()}: {problem}"


# Formats


@dataclasses.dataclass(frozen=True)
class Span:
    """A range `start..end` of a file, in the unit of its format: bytes, row groups, rows or records."""

    start: int
    end: int


WHOLE = Span(0, 2**63 - 1)


@dataclasses.dataclass(frozen=True)
class FoundDocument:
    """A document, and the two numbers with which its format can read it again."""

    place: tuple[int, int]
    document: Document


@runtime_checkable
class Format(Protocol):
    """A way to store documents in a file."""

    def spans(self, file: Any, unit_bytes: int) -> tuple[Span, ...]:
        """Returns spans that divide the file and together cover it. A pure function of the file and the unit size."""

    def scan(self, file: Any, source: SourceConfig, bad: BadRecordPolicy, span: Span) -> Iterator[FoundDocument]:
        """Yields the documents that begin in a span, in order, in one pass. Empty texts are skipped."""

    def read(self, file: Any, source: SourceConfig, place: tuple[int, int]) -> Document:
        """Returns one document at a place that `scan` found."""


def ranges(total: int, step: int) -> tuple[Span, ...]:
    """Divides `0..total` into spans of `step`. Returns one span if there is nothing to divide."""
    # An empty file is one empty span, so that it is still opened and checked.
    starts = range(0, max(total, 1), max(step, 1))
    return tuple(Span(start, min(start + starts.step, total)) for start in starts)


# Records


def load_json(line: bytes) -> Any:
    """Returns the value of a line of JSON. Raises BadRecord."""
    # `utf-8-sig` drops a byte order mark, which some tools write at the start of a file.
    text = decode(line, "line", "utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRecord(f"not JSON ({error.msg} at column {error.colno})") from None
    # `json` raises ValueError for an integer with too many digits.
    except (RecursionError, ValueError):
        raise BadRecord("not JSON that can be read (nested too deep, or a number too long)") from None


def decode(content: bytes, what: str, encoding: str = "utf-8") -> str:
    """Decodes bytes as text. Raises BadRecord."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise BadRecord(f"not UTF-8 at byte {error.start} of the {what}") from None


def check_encoding(head: bytes, name: str) -> None:
    """Raises UserError if a file begins with the byte order mark of UTF-16, in which case none of it is UTF-8."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{name} is UTF-16; convert it to UTF-8, for example with iconv -f UTF-16 -t UTF-8")


def too_long(limit: int) -> BadRecord:
    """Returns the error for a record that exceeds the size limit."""
    return BadRecord(f"longer than {limit:,} bytes, which data.limits.record_bytes allows")


def record_document(record: Any, source: SourceConfig) -> Document:
    """Returns the document in a record with named fields. Raises BadRecord."""
    if not isinstance(record, Mapping):
        raise BadRecord(f"not a JSON object but {type(record).__name__}")
    if source.key not in record:
        raise BadRecord(f"the record has no field {source.key!r}{suggest(source.key, record)}")
    return _problem(record, source) if source.kind is RecordKind.PROBLEM else value_document(record[source.key], source)


def value_document(value: Any, source: SourceConfig) -> Document:
    """Returns the document in the source's field or column. An empty text is falsy and is skipped. Raises BadRecord."""
    return _chat(value, source.messages_key) if source.kind is RecordKind.CHAT else _text(value, "the text")


def _problem(record: Mapping[str, Any], source: SourceConfig) -> Problem:
    """Returns the problem in a record. Raises BadRecord if it is malformed, or has no answer."""
    prompt = record[source.key]
    if isinstance(prompt, str):
        prompt = source.template.replace("{prompt}", _text(prompt, "the prompt"))
    else:
        prompt = _messages(prompt, source.key)

    answer = record.get(source.answer_key)
    if answer is None:
        raise BadRecord(f"the problem has no answer {source.answer_key!r}{suggest(source.answer_key, record)}")
    # Results of arithmetic are often numbers.
    answer = str(answer) if isinstance(answer, int | float) else _text(answer, "the answer")
    if not answer.strip():
        raise BadRecord("the answer of the problem is empty")

    return Problem(prompt, answer)


def _text(value: Any, what: str) -> str:
    """Returns `value` if it is a valid Unicode string. JSON can encode lone surrogates, which are not valid."""
    if not isinstance(value, str):
        raise BadRecord(f"{what} is not a string but {type(value).__name__}")
    try:
        # Strings in Python may hold lone surrogates, which no tokenizer can encode.
        value.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{what} holds half a surrogate pair, which is not Unicode") from None
    return value


def _messages(value: Any, key: str) -> tuple[Message, ...]:
    """Returns a list of messages. Raises BadRecord if it is malformed."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRecord(f"{key!r} is not a list of messages but {type(value).__name__}")
    if not value:
        raise BadRecord(f"{key!r} holds no message")
    return tuple(_message(message, number) for number, message in enumerate(value))


def _chat(value: Any, key: str) -> tuple[Message, ...]:
    """Returns the messages of a chat. Raises BadRecord if it is malformed, or has no content of the assistant."""
    chat = _messages(value, key)
    if not any(message.role == _TEACHER and message.content for message in chat):
        raise BadRecord("the assistant says nothing in this chat, so there is nothing to learn from it")
    return chat


def _message(value: Any, number: int) -> Message:
    """Returns one message of a chat. Raises BadRecord if it is malformed."""
    if not isinstance(value, Mapping):
        raise BadRecord(f"message {number} is not an object with role and content but {type(value).__name__}")
    for name in ("role", "content"):
        if name not in value:
            raise BadRecord(f"message {number} has no {name!r}{suggest(name, value)}")

    role = _text(value["role"], f"the role of message {number}")
    if role not in ROLES:
        raise BadRecord(f"message {number} has the unknown role {role!r}{suggest(role, ROLES)}")
    return Message(role, _text(value["content"], f"the content of message {number}"))
