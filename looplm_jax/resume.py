"""The fields that may differ when a run is resumed, and the check of all others.

One table is used for the recipe, the position in the data and the saved arrays.
"""

import dataclasses
import fnmatch
from typing import Any

from looplm_jax.codec import differences
from looplm_jax.errors import UserError, at_most

_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule about fields: whether they may differ between a run and its resumption, and why.

    Attributes:
      fields: dotted paths, in which `*` matches any part.
      free: whether they may differ.
      why: the reason, for the documentation.
    """

    fields: tuple[str, ...]
    free: bool
    why: str


# The first matching rule applies, so single fields of stages come before `stages.*`.
RULES = (
    Rule(("name", "description", "log_every"), True, "how the run is named and logged"),
    Rule(("checkpoint.*", "evaluation.*"), True, "when the run is saved and evaluated, and how much is kept"),
    Rule(
        ("compute.*", "mesh.*", "topology", "stages.*.accumulation", "stages.*.context", "stages.*.settings*"),
        True,
        "how a step is computed: the batches are the same, and the result is the same to rounding",
    ),
    Rule(("guard.*",), True, "what is skipped from now on; a window of another size keeps the latest losses"),
    Rule(
        ("data.root", "data.tokenizer", "data.on_bad_record", "data.limits.*"),
        True,
        "where files are and how they are read: the digests of the documents and of the tokenizer are compared",
    ),
    Rule(("tokenizer",), False, "the fingerprint of the tokenizer decides what every token is"),
    Rule(("seed", "data.seed", "data.validation_fraction"), False, "the order of the data, and what is held out"),
    Rule(("data.sources*", "stages.*.sources*"), False, "the mixture; moved files are found with `data.root`"),
    Rule(("start.*",), False, "what the run started from"),
    Rule(("model.*", "optimizer.*"), False, "the parameters, and how they are updated"),
    Rule(("stages.*",), False, "the course of the training"),
)


def may_differ(path: str) -> bool:
    """Whether the field at a dotted path of the recipe may differ on resume. A field without a rule may not."""
    rule = rule_of(path)
    return rule is not None and rule.free


def rule_of(path: str) -> Rule | None:
    """Returns the first rule that matches the field, or None."""
    return next((rule for rule in RULES if any(fnmatch.fnmatchcase(path, name) for name in rule.fields)), None)


def check_same_run(folder: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError if a run of another configuration would resume in this folder.

    Args:
      folder: the run folder, for the message.
      saved: the saved configuration: a recipe as `codec.to_dict` writes it, and further values that must agree, such as
        the fingerprint of the tokenizer.
      wanted: the same values of the run that resumes.

    Raises:
      UserError: fields differ that may not. The message has the first few, with both values.
    """
    # Paths of the recipe are those of the rules, so the rules decide which differences matter.
    differing = [
        f"{field.path}: {field.ours}, now {field.theirs}"
        for field in differences(saved, wanted)
        if not may_differ(field.path)
    ]
    if differing:
        raise UserError(
            f"run folder {folder} was trained with another configuration ({at_most(differing, _SHOWN, '; ')}); "
            "use another --out or the saved recipe"
        )


def markdown() -> str:
    """Returns the table in Markdown, as it is in the documentation."""
    rows = [f"| {_named(rule)} | {'may differ' if rule.free else 'must be the same'} | {rule.why} |" for rule in RULES]
    return "\n".join(["| fields | on resume | why |", "|---|---|---|", *rows])


def _named(rule: Rule) -> str:
    return ", ".join(f"`{name}`" for name in rule.fields)
