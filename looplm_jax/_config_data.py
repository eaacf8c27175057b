"""The data: sources, their records, and how they are read and tokenized."""

import dataclasses
import enum
from collections.abc import Iterable

from looplm_jax._config_fields import check_kinds as _check_kinds
from looplm_jax._config_fields import field as _field
from looplm_jax._config_fields import require as _require

# Choices


class RecordKind(enum.Enum):
    """The kind of the records of a source.

    TEXT: texts. CHAT: chats, of which only the assistant's turns are learned. PROBLEM: prompts with an answer, which is
    learned, or which judges the answers of the model.
    """

    TEXT = "text"
    CHAT = "chat"
    PROBLEM = "problem"


class OnBadRecord(enum.Enum):
    """The action for a record that cannot be read: stop the run, or skip the record and count it."""

    STOP = "stop"
    SKIP = "skip"


# Sources


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A source of the mixture: files of documents, or a synthetic task such as `mano:length=10`."""

    # What is read, and how often it is drawn.
    path: str = _field(
        "files (a glob; local or any fsspec URL; .txt .jsonl .parquet .arrayrecord), "
        "`huggingface:dataset,split=...`, or `task:option=value,...`"
    )
    weight: float = _field("weight of this source among the documents that are drawn", 1.0)
    # How a record becomes text.
    kind: RecordKind = _field("kind of the records", RecordKind.TEXT)
    text_key: str = _field("field or column with the text", "text")
    messages_key: str = _field("field or column with the messages of a chat", "messages")
    prompt_key: str = _field("field with the prompt of a problem, a text or the messages of a chat", "prompt")
    answer_key: str = _field("field with the answer of a problem", "answer")
    template: str = _field("text of a problem, around its {prompt}", "{prompt}")
    special_tokens: bool = _field("encode the names of special tokens, such as <|im_end|>, as these tokens", False)

    def __post_init__(self) -> None:
        _check_kinds(self, "source")
        _require(bool(self.path), "a data source needs a path")
        _require(self.weight > 0, f"the weight of source {self.path!r} must be positive, not {self.weight}")
        _require(
            "{prompt}" in self.template, f"the template of a source must contain {{prompt}}, not {self.template!r}"
        )

    @property
    def key_setting(self) -> str:
        """The name of the setting that names the field or column to read; of a problem, that of the prompt."""
        match self.kind:
            case RecordKind.TEXT:
                return "text_key"
            case RecordKind.CHAT:
                return "messages_key"
            case RecordKind.PROBLEM:
                return "prompt_key"

    @property
    def key(self) -> str:
        """The field or column that is read; of a problem, that of the prompt."""
        return getattr(self, self.key_setting)


def sources_like(paths: Iterable[str], known: Iterable[SourceConfig]) -> tuple[SourceConfig, ...]:
    """Returns sources of equal weight with the kind and keys of the known ones, or text sources if those differ."""
    # Everything except path and weight, so that files given by a flag are read as those that they replace.
    patterns = {dataclasses.replace(source, path="-", weight=1.0) for source in known}
    pattern = patterns.pop() if len(patterns) == 1 else SourceConfig(path="-")
    return tuple(dataclasses.replace(pattern, path=path) for path in paths)


# The mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadLimits:
    """Limits on what data files may use, so that no file exhausts the memory or the disk."""

    record_bytes: int = _field(
        "longest line, ArrayRecord record or whole text file; a longer one is a bad record", 2**26
    )
    compression_ratio: int = _field("largest ratio of decompressed to compressed bytes; 1 GiB is always allowed", 256)
    window_bytes: int = _field("largest Zstandard window; the default is that of `zstd --long=31`", 2**31)
    row_group_bytes: int = _field("largest Parquet row group, in decompressed bytes of the column that is read", 2**32)

    def __post_init__(self) -> None:
        _check_kinds(self, "data.limits")
        for name, value in dataclasses.asdict(self).items():
            _require(value >= 1, f"data.limits.{name} must be at least 1, not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data: a mixture of sources, and how they are read and tokenized."""

    # What is read.
    sources: tuple[SourceConfig, ...] = _field("the mixture", ())
    root: str = _field(
        "folder or URL of sources with relative paths; `{length}` in it is the stage's sequence_length", ""
    )
    # How it is tokenized, held out and shuffled.
    tokenizer: str = _field(
        "a SentencePiece .model, a tokenizer.json or a Hugging Face folder; empty: train one on the data", ""
    )
    validation_fraction: float = _field("fraction of documents held out, chosen by a hash of their text", 0.02)
    seed: int = _field("seed of the order of documents", 0)
    # What happens when reading fails.
    on_bad_record: OnBadRecord = _field("action for a record that cannot be read", OnBadRecord.STOP)
    limits: ReadLimits = dataclasses.field(default_factory=ReadLimits)

    def __post_init__(self) -> None:
        _check_kinds(self, "data")
        fraction = self.validation_fraction
        _require(0 <= fraction < 1, f"data.validation_fraction must be in [0, 1), not {fraction}")
