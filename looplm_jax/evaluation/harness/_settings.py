"""Parses and checks the harness's `--model_args`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from looplm_jax.errors import UserError, suggest
from looplm_jax.halting import ExitPolicy, FixedLoops, parse_exit_policy
from looplm_jax.inference import CacheStrategy

# Arguments that the harness always passes, and arguments for PyTorch models.
_IGNORED = ("device", "max_batch_size", "trust_remote_code")
_EXAMPLE = "checkpoint=runs/text-small exit=q=0.5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """The settings that decide how a model answers the harness."""

    policy: ExitPolicy | None = None  # None: the trained number of loops
    batch_size: int = 8  # requests processed together
    max_length: int | None = None  # number of tokens that the model reads; None: all its positions
    add_bos_token: bool = False  # before every context; the harness's own models add none to ours either
    special_tokens: bool = False  # encode the names of special tokens as these tokens
    cache: CacheStrategy = CacheStrategy.FULL  # for generated text

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A checkpoint and the settings."""

    checkpoint: str
    step: int | None
    settings: HarnessSettings

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> "ModelArgs":
        """Parses names and values as the harness's command line reads them.

        Raises:
          UserError: the checkpoint is missing, a name is unknown, a value is invalid, or both `loops` and `exit` are
            given.
        """
        rest = {name: value for name, value in given.items() if name not in _IGNORED and value is not None}
        checkpoint = rest.pop("checkpoint", None)
        if checkpoint is None:
            raise UserError(f"--model_args has no checkpoint; write --model_args {_EXAMPLE}")

        step = _whole("step", rest.pop("step", None))
        settings = HarnessSettings(
            policy=exit_policy(loops=_whole("loops", rest.pop("loops", None)), rule=rest.pop("exit", None)),
            batch_size=_batch_size(rest.pop("batch_size", "auto")),
            max_length=_whole("max_length", rest.pop("max_length", None)),
            add_bos_token=_truth("add_bos_token", rest.pop("add_bos_token", False)),
            special_tokens=_truth("special_tokens", rest.pop("special_tokens", False)),
            cache=CacheStrategy(rest.pop("cache", CacheStrategy.FULL.value)),
        )

        for name in rest:
            # The first field of the settings, the policy, is given as loops or exit.
            fields = (field.name for field in dataclasses.fields(HarnessSettings)[1:])
            known = ("checkpoint", "step", "loops", "exit", *fields)
            raise UserError(f"unknown model argument {name!r}{suggest(name, known)}")
        return cls(checkpoint=str(checkpoint), step=step, settings=settings)


def exit_policy(*, loops: int | None, rule: str | None) -> ExitPolicy | None:
    """Returns the policy of a number of loops, or of a rule for `parse_exit_policy`.

    Raises UserError if both are given.
    """
    if loops is not None and rule is not None:
        raise UserError("loops and exit both set the exit rule; keep one")
    if loops is not None:
        return FixedLoops(loops=loops)
    return None if rule is None else parse_exit_policy(str(rule))


def _whole(name: str, value: Any) -> int | None:
    """Returns an integer or None. Raises UserError for anything else."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{name} must be a whole number, not {value!r}")
    return value


def _truth(name: str, value: Any) -> bool:
    """Returns a bool. Raises UserError for anything else."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, not {value!r}")
    return value


def _batch_size(value: Any) -> int:
    """Returns the batch size, which the harness passes as text. `auto` and `auto:4` give the default.

    For the harness they search for the largest batch that fits, which is not supported here.
    """
    if str(value).startswith("auto"):
        return HarnessSettings.batch_size
    if not str(value).lstrip("-").isdigit():
        raise UserError(f"batch_size must be a whole number or auto, not {value!r}")
    return int(value)
