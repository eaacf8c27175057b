"""Fields of configurations: their help texts, and checks of their values."""

import dataclasses
import enum
import sys
import typing
from typing import Any

from looplm_jax.errors import UserError

_HELP = "help"  # the key of the help text in the metadata of a field
_TOO_LARGE = 2**63  # larger integers do not fit the 64 bits of JSON readers and of NumPy


def field(help_text: str, default: Any = dataclasses.MISSING) -> Any:
    """Returns a dataclass field with a help text."""
    metadata = {_HELP: help_text}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raises UserError with `message` unless the condition holds."""
    if not condition:
        raise UserError(message)


def check_kinds(config: Any, where: str) -> None:
    """Raises UserError if a value does not have the type of its field, or is NaN or infinite.

    Values from Python code are checked too, not only decoded ones.
    """
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}.{field.name}" if where else field.name

        if field.type is int:
            require(_is_number(value, int), f"{name} must be a whole number, not {value!r}")
            require(abs(value) < _TOO_LARGE, f"{name} must be below 2**63, not {value}")
        elif field.type is float:
            require(_is_number(value, int | float), f"{name} must be a number, not {value!r}")
            require(abs(value) <= sys.float_info.max, f"{name} must be a finite number, not {value}")
        elif isinstance(field.type, type) and not typing.get_origin(field.type):
            require(isinstance(value, field.type), f"{name} must be of type {field.type.__name__}, not {value!r}")
        else:
            # All other annotations are those of tuples.
            require(isinstance(value, tuple), f"{name} must be a tuple, not {value!r}")


def _is_number(value: Any, kind: Any) -> bool:
    # A boolean is an int in Python.
    return isinstance(value, kind) and not isinstance(value, bool)


def refuse_without_effect(config: Any, where: str, names: tuple[str, ...]) -> None:
    """Raises UserError if one of the fields, which the kind of `config` does not read, differs from its default."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in names:
        value, default = getattr(config, name), defaults[name]
        require(
            value == default,
            f"{where}.{name}={_shown(value)} has no effect with {where}.kind={config.kind.value}; "
            f"leave it at {_shown(default)}, or choose another kind",
        )


def _shown(value: Any) -> Any:
    return value.value if isinstance(value, enum.Enum) else value


def help_text(field: dataclasses.Field) -> str:
    """Returns the help text of a field."""
    return field.metadata.get(_HELP, "")
