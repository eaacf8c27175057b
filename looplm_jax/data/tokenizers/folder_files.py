"""What a Hugging Face folder says about tokens: ids, chat template, generation defaults, and the license."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from looplm_jax.data.sources.files import read_file
from looplm_jax.data.tokenizers.expansion import check_expansion
from looplm_jax.data.tokenizers.folder import FolderTokenizer, TokenIds
from looplm_jax.data.tokenizers.huggingface import JsonTokenizer
from looplm_jax.errors import UserError
from looplm_jax.json_files import read_json_object

# The first of these that names a token decides; names that everybody uses come last (`JsonTokenizer`).
_BY_ID = ("config.json", "generation_config.json")
_BY_NAME = ("tokenizer_config.json", "special_tokens_map.json")
_STOPS = ("generation_config.json", "config.json", *_BY_NAME)  # the order of transformers
_KINDS = ("bos", "eos", "pad")

_KEPT_WHOLE = ("generation_config.json", *_BY_NAME, "chat_template.jinja", "chat_template.json")
_MORE_TEMPLATES = "additional_chat_templates"
_LICENSE = re.compile(r"(licen[cs]e|notice|copying|use_policy|acceptable_use)[\w.-]*", re.IGNORECASE)
_LICENSE_FIELD = re.compile(r"^license(?:_name|_link)?:[ \t]*\S.*$", re.MULTILINE)
_LARGEST_TEXT = 2**20

Named = Mapping[str, Mapping[str, tuple[int, ...]]]  # kind of token -> file -> the ids that the file names


def read_folder_tokenizer(folder: Path, vocab_size: int | None = None) -> tuple[FolderTokenizer, tuple[str, ...]]:
    """Returns the tokenizer of a folder, and notes about what its files leave open, contradict or lose.

    Args:
      folder: has a `tokenizer.json`; the other files may be missing.
      vocab_size: ids of the model, which may be more than those of the tokenizer; None: what `config.json` says.

    Raises:
      UserError: a file is damaged, its package is not installed, or an id is outside the vocabulary.
    """
    file = folder / "tokenizer.json"
    content = read_file(str(file))
    try:
        check_expansion(content)
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
    stops = next((named["eos"][name] for name in _STOPS if named["eos"].get(name)), ())
    ids = TokenIds(bos=tokenizer.bos_id, eos=tokenizer.eos_id, pad=pad, stop=tuple(sorted({*stops, tokenizer.eos_id})))
    files, lost = _kept_files(folder)
    return FolderTokenizer.of(content, ids, files), (*notes, *lost)


def _named_ids(folder: Path, tokenizer: JsonTokenizer, vocab_size: int) -> tuple[Named, list[str]]:
    named: dict[str, dict[str, tuple[int, ...]]] = {kind: {} for kind in _KINDS}
    for name in (*_BY_ID, *_BY_NAME):
        values = _object(folder / name)
        for kind in _KINDS:
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
    """Returns the JSON object of a file, empty where there is no such file."""
    return read_json_object(path) if path.is_file() else {}


def _vocab_size(folder: Path) -> int | None:
    value = _object(folder / "config.json").get("vocab_size")
    return value if isinstance(value, int) else None


def _listed_ids(value: Any, where: str, largest: int) -> tuple[int, ...]:
    """Returns the ids of a field that is a number, a list of them, or nothing; -1 is nothing too."""
    listed = value if isinstance(value, list) else [value]
    ids = [token for token in listed if token is not None and token != -1]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < largest:
            raise UserError(f"{where}={str(value)[:60]} is not a token of 0 to {largest - 1}; correct it, or remove it")
    return tuple(ids)


def _id_of_name(value: Any, tokenizer: JsonTokenizer) -> tuple[int, ...]:
    name = value.get("content") if isinstance(value, dict) else value
    token = tokenizer.token_id(name) if isinstance(name, str) else None
    return () if token is None else (token,)


def _first(by_file: Mapping[str, tuple[int, ...]]) -> int | None:
    return next((ids[0] for ids in by_file.values()), None)


def _contradictions(folder: Path, named: Named) -> Iterator[str]:
    for kind, by_file in named.items():
        winner = _first(by_file)
        for name, ids in by_file.items():
            if winner not in ids:
                first = next(iter(by_file))
                yield f"{folder}: {name} has {kind} {ids[0]}, but {first} has {winner}, which is used"


def _kept_files(folder: Path) -> tuple[dict[str, str], list[str]]:
    """Returns the texts that go along with a tokenizer, and what cannot be kept."""
    names = [name for name in _KEPT_WHOLE if (folder / name).is_file()]
    names += sorted(f"{_MORE_TEMPLATES}/{path.name}" for path in (folder / _MORE_TEMPLATES).glob("*.jinja"))
    names += sorted(path.name for path in folder.iterdir() if _LICENSE.fullmatch(path.name) and path.is_file())
    files, lost = {}, []
    for name in names:
        text = _read_text(folder / name)
        if text is None:
            lost.append(f"{folder / name} is not kept: it is no UTF-8 text of at most 1 MiB")
        else:
            files[name] = text
    config = _object(folder / "config.json")
    files["config.json"] = json.dumps({f"{kind}_token_id": config.get(f"{kind}_token_id") for kind in _KINDS})
    fields = _license_fields(folder / "README.md")
    return {**files, **({"README.md": fields} if fields else {})}, lost


def _read_text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode() if path.stat().st_size <= _LARGEST_TEXT else None
    except (OSError, UnicodeDecodeError):
        return None


def _license_fields(readme: Path) -> str:
    """Returns the lines of the license in the front matter of a model card."""
    text = _read_text(readme) if readme.is_file() else None
    parts = (text or "").split("---\n", 2)
    return "".join(f"{line}\n" for line in _LICENSE_FIELD.findall(parts[1])) if len(parts) == 3 and not parts[0] else ""


def other_files(tokenizer: FolderTokenizer) -> dict[str, bytes]:
    """Returns chat templates and licenses by name: the files that are exported as they came."""
    return {name: text.encode() for name, text in tokenizer.files.items() if _goes_out_unchanged(name)}


def _goes_out_unchanged(name: str) -> bool:
    """Whether it is such a file; the names come from a checkpoint, so none may lead out of the folder."""
    if name in ("chat_template.jinja", "chat_template.json") or _LICENSE.fullmatch(name):
        return True
    return re.fullmatch(rf"{_MORE_TEMPLATES}/[\w-][\w.-]*\.jinja", name) is not None


def kept_json(tokenizer: FolderTokenizer, name: str) -> dict[str, Any]:
    """Returns the object of one of the JSON files, without its nulls; empty where the folder has no such file."""
    values = json.loads(tokenizer.files.get(name, "{}"))
    return {field: value for field, value in values.items() if value is not None}
