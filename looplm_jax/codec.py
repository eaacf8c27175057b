"""Converts configurations to JSON and back, and overrides single fields by their dotted paths.

A stage is addressed by its name (`stages.pretrain.beta`), and its settings for a topology by the topology
(`stages.pretrain.settings.v5e:16x16.accumulation`). `stage.beta` is that field of every stage.
"""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from looplm_jax.config import help_text
from looplm_jax.errors import UserError, suggest

C = TypeVar("C")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """A field with a plain value.

    Attributes:
      path: its dotted path.
      annotation: its type.
      help: its help text.
      value: its value.
    """

    path: str
    annotation: Any
    help: str
    value: Any


# Conversion and overrides


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as plain JSON values: enums by value, tuples as lists."""
    return {field.name: _encode(getattr(config, field.name)) for field in dataclasses.fields(config)}


def from_dict(kind: type[C], values: Any, where: str = "") -> C:
    """Returns the configuration that `to_dict` converted.

    Args:
      kind: the dataclass.
      values: the plain values.
      where: the dotted path of the configuration, for messages.

    Raises:
      UserError: a field is unknown, missing or of the wrong type. The message has its dotted path.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where or kind.__name__}: expected an object with named fields, got {values!r}")

    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    # Unknown fields come first: a misspelled field is missing as well, and this message suggests its name.
    for name in values:
        if name not in fields:
            raise UserError(f"unknown field {_join(where, str(name))!r}{suggest(str(name), fields)}")

    missing = [name for name, field in fields.items() if name not in values and _is_required(field)]
    if missing:
        raise UserError(f"missing field {_join(where, missing[0])!r}")

    return kind(**{name: _decode(hints[name], value, _join(where, name)) for name, value in values.items()})


def leaves(config: Any, where: str = "") -> Iterator[Leaf]:
    """Yields every plain field below `config`, depth first, in order of declaration. Stages are addressed by name."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        path = _join(where, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, path)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            # Stages and other named items are addressed by name.
            for key, item in _named(value).items():
                yield from leaves(item, _join(path, key))
        else:
            yield Leaf(path=path, annotation=hints[field.name], help=help_text(field), value=value)


def override(config: C, changes: Mapping[str, Any]) -> C:
    """Returns a copy of `config` with the fields at the given dotted paths replaced.

    Values may be strings as typed on a command line. The result is validated as a whole.

    Raises:
      UserError: a path is unknown or a value is invalid.
    """
    # Changes are applied to the plain values, so that the result is decoded and validated as a whole.
    tree = to_dict(config)
    known = [leaf.path for leaf in leaves(config)]

    for path, value in changes.items():
        targets = _expand(path, known)
        if not targets:
            raise UserError(f"unknown field {path!r}{_suggest_path(path, known)}")
        for target in targets:
            _assign(tree, target.split("."), value)

    return from_dict(type(config), tree)


def parse_flags(arguments: Sequence[str]) -> dict[str, str]:
    """Returns the pairs of `--path value` and `--path=value` on a command line. Raises UserError for anything else."""
    changes: dict[str, str] = {}
    words = iter(arguments)

    for word in words:
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; fields are set with --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            # A value that starts with two dashes is another flag: the value was forgotten.
            value = next(words, "")
            if not value or value.startswith("--"):
                raise UserError(f"--{name} needs a value")
        changes[name] = value
    return changes


# Differences


class _Absent:
    """The value of a field that does not exist."""

    def __repr__(self) -> str:
        return "absent"


# Different from None, which is a value that a field may have.
ABSENT = _Absent()


@dataclasses.dataclass(frozen=True)
class Difference:
    """A field in which two configurations differ.

    Attributes:
      path: its dotted path.
      ours: its value in the first configuration as plain JSON, or `ABSENT`.
      theirs: its value in the second configuration as plain JSON, or `ABSENT`.
    """

    path: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.ours!r}, {self.theirs!r}"


def differences(ours: Any, theirs: Any) -> list[Difference]:
    """Returns the fields in which two configurations differ, in order of declaration.

    Args:
      ours: a configuration, or plain JSON values with string keys such as `to_dict` returns.
      theirs: the one to compare with. A field that only one side has is a difference, unless its value is None.
    """
    # The union of the paths, because either side may have fields that the other lacks.
    a, b = dict(_plain_fields(_encode(ours))), dict(_plain_fields(_encode(theirs)))
    return [
        Difference(path, a.get(path, ABSENT), b.get(path, ABSENT)) for path in {**a, **b} if a.get(path) != b.get(path)
    ]


def _plain_fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every plain value with its dotted path. Items of a list of objects are addressed as in `leaves`."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = {
            item_name(item, index) if isinstance(item, dict) else str(index): item for index, item in enumerate(value)
        }
    if not isinstance(value, dict):
        yield path, value
        return
    for key, item in value.items():
        yield from _plain_fields(item, _join(path, key))


# Fields and paths


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def item_name(item: Mapping[str, Any], index: int) -> str:
    """Returns what an item of a list goes by in a dotted path: its name, its topology, or else its index."""
    return str(item.get("name", item.get("topology", index)))


def _named(items: tuple[Any, ...]) -> dict[str, Any]:
    """Returns the items by their names in dotted paths."""
    return {item_name(vars(item), index): item for index, item in enumerate(items)}


def _encode(value: Any) -> Any:
    """Returns a value as plain JSON."""
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


# Decoding


def _decode(annotation: Any, value: Any, where: str) -> Any:
    """Returns the value of a field of the given type. Raises UserError if it has another type."""
    if dataclasses.is_dataclass(annotation):
        return from_dict(typing.cast(type, annotation), value, where)
    # All tuples in configurations have one type of item.
    if typing.get_origin(annotation) in (tuple, types.GenericAlias):
        return _decode_tuple(typing.get_args(annotation)[0], value, where)
    if issubclass(annotation, enum.Enum):
        return _decode_enum(annotation, value, where)
    return _decode_scalar(annotation, value, where)


def _decode_tuple(item: Any, value: Any, where: str) -> tuple[Any, ...]:
    """Returns a tuple from a list, or from comma-separated text."""
    if isinstance(value, str):
        # Text from a command line.
        value = [part for part in value.split(",") if part]
    if not isinstance(value, list | tuple):
        raise UserError(f"{where}: expected a list, got {value!r}")
    return tuple(_decode(item, part, _join(where, str(index))) for index, part in enumerate(value))


def _decode_enum(kind: type[enum.Enum], value: Any, where: str) -> enum.Enum:
    """Returns the member of an enum with this value."""
    values = [str(member.value) for member in kind]
    if value not in values:
        raise UserError(f"{where}: no such choice {value!r}{suggest(str(value), values)}")
    return kind(value)


def _decode_scalar(kind: type, value: Any, where: str) -> Any:
    """Returns a bool, str, int or float, from a value of this type or from text."""
    # `bool("false")` would be True.
    if kind is bool:
        words = {"true": True, "false": False}
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        raise UserError(f"{where}: expected true or false, got {value!r}")

    if kind is str:
        if isinstance(value, str):
            return value
        raise UserError(f"{where}: expected text, got {value!r}")

    name = {int: "a whole number", float: "a number"}[kind]
    # A boolean is an int in Python, but not a number in a configuration.
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UserError(f"{where}: expected {name}, got {value!r}")
    if kind is int and isinstance(value, float):
        raise UserError(f"{where}: expected {name}, got {value!r}")

    try:
        number = kind(value)
    except (ValueError, OverflowError):  # OverflowError: an integer that is too large for a float
        raise UserError(f"{where}: expected {name}, got {value!r}") from None

    # NaN differs from itself.
    if number != number or number in (float("inf"), float("-inf")):
        raise UserError(f"{where}: expected a finite number, got {value!r}")
    return number


# Overrides


def _expand(path: str, known: list[str]) -> list[str]:
    """Returns the known paths that `path` refers to; `stage.x` is field x of every stage."""
    if path in known:
        return [path]

    first, _, rest = path.partition(".")
    if first == "stage" and rest:
        return [full for full in known if full.startswith("stages.") and full.split(".", 2)[2] == rest]
    return []


def _suggest_path(path: str, known: list[str]) -> str:
    """Returns a hint for an unknown path."""
    if path.startswith("stage."):
        known = sorted({"stage." + full.split(".", 2)[2] for full in known if full.startswith("stages.")})
    return suggest(path, known, otherwise="; `--help` lists them")


def _assign(tree: Any, path: list[str], value: Any) -> None:
    """Sets the value at a path in nested dictionaries and lists."""
    for key in path[:-1]:
        tree = _named_entry(tree, key) if isinstance(tree, list) else tree[key]
    tree[path[-1]] = value


def _named_entry(items: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Returns the item of a list with this name in dotted paths."""
    return next(item for index, item in enumerate(items) if item_name(item, index) == key)
