"""The tokenizer of a Hugging Face folder: its `tokenizer.json`, and the files that name ids and are carried along.

These are chat templates, generation defaults and licenses.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from looplm_jax.data.sources._files import read_file
from looplm_jax.data.tokenizers._tokenizer_json import JsonTokenizer, check_expansion
from looplm_jax.errors import UserError
from looplm_jax.json_io import read_json_object

# Files are searched in this order, and the first that names a token wins. `JsonTokenizer` falls back to common names.
_BY_ID = ("config.json", "generation_config.json")
_BY_NAME = ("tokenizer_config.json", "special_tokens_map.json")
_STOPS = ("generation_config.json", "config.json", *_BY_NAME)  # the precedence in transformers
_KINDS = ("bos", "eos", "pad")

_KEPT_WHOLE = ("generation_config.json", *_BY_NAME, "chat_template.jinja", "chat_template.json")
_MORE_TEMPLATES = "additional_chat_templates"
_LICENSE = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use)[\w.-]*", re.IGNORECASE)
_LICENSE_FIELD = re.compile(r"^license(?:_name|_link)?:[ \t]*\S.*$", re.MULTILINE)
_LARGEST_TEXT = 2**20  # bytes

Named = Mapping[str, Mapping[str, tuple[int, ...]]]  # kind of token -> file name -> ids that the file names


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenIds:
    """The ids of special tokens that the files of a folder name."""

    bos: int
    eos: int
    pad: int | None
    stop: tuple[int, ...]  # ids that end generation


class FolderTokenizer(JsonTokenizer):
    """A `tokenizer.json` together with the other files of its folder, which name the special ids.

    The tokenizer carries the chat template, the generation defaults and the licenses along, so they are part of every
    checkpoint that descends from the folder and of every folder exported from such a checkpoint.
    """

    kind: ClassVar[str] = "hugging face folder"

    def __init__(self, content: bytes):
        values = json.loads(content)
        check_expansion(values["tokenizer.json"].encode())
        self.ids = TokenIds(**{**values["ids"], "stop": tuple(values["ids"]["stop"])})
        # Stop tokens and the padding token structure text, so they are special even if the file does not mark them.
        special = {*self.ids.stop} if self.ids.pad is None else {*self.ids.stop, self.ids.pad}
        super().__init__(values["tokenizer.json"].encode(), self.ids.bos, self.ids.eos, special)
        self.files: Mapping[str, str] = values["files"]

    @classmethod
    def of(cls, tokenizer_json: bytes, ids: TokenIds, files: Mapping[str, str]) -> "FolderTokenizer":
        """Returns the tokenizer of a `tokenizer.json` with the given ids and the texts of the other files, by name."""
        values = {"tokenizer.json": tokenizer_json.decode(), "ids": dataclasses.asdict(ids), "files": dict(files)}
        return cls(json.dumps(values, sort_keys=True).encode())

    @property
    def tokenizer_json(self) -> bytes:
        """The content of the `tokenizer.json`."""
        return self._content

    def serialize(self) -> bytes:
        """Returns the `tokenizer.json`, the ids and the other files as JSON."""
        values = {
            "tokenizer.json": self._content.decode(),
            "ids": dataclasses.asdict(self.ids),
            "files": dict(self.files),
        }
        return json.dumps(values, sort_keys=True).encode()

    @property
    def fingerprint(self) -> str:
        """The SHA-256 digest of everything that affects tokenization, in hexadecimal.

        It is the digest of the `tokenizer.json` alone if that implies the same bos and eos. The files that are only
        carried along do not count.
        """
        implied = self.implied_ids() == (self.bos_id, self.eos_id)
        ids = b"" if implied else f"{self.bos_id} {self.eos_id}".encode()
        return hashlib.sha256(self._content + ids).hexdigest()


# Reading of a folder


def read_folder_tokenizer(folder: Path, vocab_size: int | None = None) -> tuple[FolderTokenizer, tuple[str, ...]]:
    """Reads the tokenizer of a folder.

    Args:
      folder: a folder with a `tokenizer.json`; all other files are optional.
      vocab_size: the number of ids of the model, which may exceed that of the tokenizer; by default the value in
        `config.json`.

    Returns:
      The tokenizer, and notes about ids that no file names or that files contradict, and about files that cannot be
      kept.

    Raises:
      UserError: a file is damaged, the `tokenizers` package is not installed, or an id is outside the vocabulary.
    """
    file = folder / "tokenizer.json"
    content = read_file(str(file))

    try:
        check_expansion(content)
        # The ids are placeholders: this instance only looks up names and the vocabulary size.
        plain = JsonTokenizer(content, 0, 0)
        vocab_size = vocab_size or _vocab_size(folder) or plain.vocab_size
        named, notes = _named_ids(folder, plain, vocab_size)
        bos, eos, pad = (_first(named[kind]) for kind in _KINDS)
        tokenizer = JsonTokenizer(content, bos, eos)
    except UserError as error:
        raise error if str(folder) in str(error) else UserError(f"{file}: {error}") from None

    for kind, given, used in (("bos", bos, tokenizer.bos_id), ("eos", eos, tokenizer.eos_id)):
        if given is None:
            notes.append(f"{folder}: no file names the {kind} token; {tokenizer.piece(used)!r} ({used}) is used")

    # Generation always stops at eos, even if the file with the stop tokens does not list it.
    stops = next((named["eos"][name] for name in _STOPS if named["eos"].get(name)), ())
    ids = TokenIds(bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=pad, stop=tuple(sorted({*stops, tokenizer.eos_id})))

    files, lost = _kept_files(folder)
    return FolderTokenizer.of(content, ids, files), (*notes, *lost)


# Token ids


def _named_ids(folder: Path, tokenizer: JsonTokenizer, vocab_size: int) -> tuple[Named, list[str]]:
    """Returns the ids of bos, eos and pad that each file names, and notes about contradictions."""
    named: dict[str, dict[str, tuple[int, ...]]] = {kind: {} for kind in _KINDS}

    for name in (*_BY_ID, *_BY_NAME):
        values = _object(folder / name)
        for kind in _KINDS:
            # Padding may use an id of the model that the tokenizer does not have.
            largest = vocab_size if kind == "pad" else tokenizer.vocab_size
            if name in _BY_ID:
                field = f"{kind}_token_id"
                ids = _listed_ids(values.get(field), f"{folder}/{name}: {field}", largest)
            else:
                ids = _id_of_name(values.get(f"{kind}_token"), tokenizer)
            if ids:
                named[kind][name] = ids

    return named, list(_contradictions(folder, named))


def _object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file, or an empty one if the file does not exist."""
    return read_json_object(path) if path.is_file() else {}


def _vocab_size(folder: Path) -> int | None:
    """Returns the vocabulary size of the model in `config.json`, or None."""
    value = _object(folder / "config.json").get("vocab_size")
    return value if isinstance(value, int) else None


def _listed_ids(value: Any, where: str, largest: int) -> tuple[int, ...]:
    """Returns the ids in a field that is a number, a list of numbers, or absent. -1 counts as absent."""
    listed = value if isinstance(value, list) else [value]
    ids = [token for token in listed if token is not None and token != -1]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < largest:
            raise UserError(f"{where}={str(value)[:60]} is not a token of 0 to {largest - 1}; correct it, or remove it")
    return tuple(ids)


def _id_of_name(value: Any, tokenizer: JsonTokenizer) -> tuple[int, ...]:
    """Returns the id of a token given by name: a string, or an object with the field `content`. Empty if unknown."""
    name = value.get("content") if isinstance(value, dict) else value
    token = tokenizer.token_id(name) if isinstance(name, str) else None
    return () if token is None else (token,)


def _first(by_file: Mapping[str, tuple[int, ...]]) -> int | None:
    """Returns the first id that any file names, or None."""
    return next((ids[0] for ids in by_file.values()), None)


def _contradictions(folder: Path, named: Named) -> Iterator[str]:
    """Yields a note for each file that names another id than the file that takes precedence."""
    for kind, by_file in named.items():
        winner = _first(by_file)
        for name, ids in by_file.items():
            if winner not in ids:
                first = next(iter(by_file))
                yield f"{folder}: {name} has {kind} {ids[0]}, but {first} has {winner}, which is used"


# Files that are carried along


def _kept_files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the texts of the files to carry along, by name, and notes about files that cannot be kept."""
    names = [name for name in _KEPT_WHOLE if (folder / name).is_file()]
    names += sorted(f"{_MORE_TEMPLATES}/{path.name}" for path in (folder / _MORE_TEMPLATES).glob("*.jinja"))
    names += sorted(path.name for path in folder.iterdir() if _LICENSE.fullmatch(path.name) and path.is_file())

    files, lost = {}, []
    for name in names:
        text = _read_text(folder / name)
        if text is None:
            lost.append(f"{folder / name} is not kept: it is not UTF-8 text of at most 1 MiB")
        else:
            files[name] = text

    # Of config.json and the model card, only the token ids and the license fields are kept.
    config = _object(folder / "config.json")
    files["config.json"] = json.dumps({f"{kind}_token_id": config.get(f"{kind}_token_id") for kind in _KINDS})
    fields = _license_fields(folder / "README.md")
    return {**files, **({"README.md": fields} if fields else {})}, lost


def _read_text(path: Path) -> str | None:
    """Returns the text of a file, or None if it is unreadable, not UTF-8, or larger than 1 MiB."""
    try:
        return path.read_bytes().decode() if path.stat().st_size <= _LARGEST_TEXT else None
    except (OSError, UnicodeDecodeError):
        return None


def _license_fields(readme: Path) -> str:
    """Returns the license lines of a model card's YAML front matter."""
    text = _read_text(readme) if readme.is_file() else None
    # Front matter is between two lines of dashes at the start of the file.
    parts = (text or "").split("---\n", 2)
    return "".join(f"{line}\n" for line in _LICENSE_FIELD.findall(parts[1])) if len(parts) == 3 and not parts[0] else ""


# Export


def other_files(tokenizer: FolderTokenizer) -> dict[str, bytes]:
    """Returns the files that are exported unchanged, by name: chat templates and licenses."""
    return {name: text.encode() for name, text in tokenizer.files.items() if _goes_out_unchanged(name)}


def _goes_out_unchanged(name: str) -> bool:
    """Whether a file is exported unchanged.

    The names come from a checkpoint, so paths that leave the folder are rejected.
    """
    if name in ("chat_template.jinja", "chat_template.json") or _LICENSE.fullmatch(name):
        return True
    return re.fullmatch(rf"{_MORE_TEMPLATES}/[\w-][\w.-]*\.jinja", name) is not None


def kept_json(tokenizer: FolderTokenizer, name: str) -> dict[str, Any]:
    """Returns the object in one of the kept JSON files, without null fields. Empty if the file was not kept."""
    values = json.loads(tokenizer.files.get(name, "{}"))
    return {field: value for field, value in values.items() if value is not None}
