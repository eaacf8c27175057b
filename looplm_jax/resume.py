"""What may differ when a run is resumed: one table for the recipe, the place in the data and the saved arrays."""

import dataclasses
import fnmatch


@dataclasses.dataclass(frozen=True)
class Rule:
    """Whether some fields may differ between a run and its resumption, and why. A `*` stands for any part of a path."""

    fields: tuple[str, ...]
    free: bool
    why: str


RULES = (
    Rule(("name", "description", "log_every"), True, "how the run is called and logged"),
    Rule(("checkpoint.*", "evaluation.*"), True, "when the run is saved and measured, and how much of that is kept"),
    Rule(
        ("compute.*", "mesh.*", "stages.*.accumulation", "stages.*.context"),
        True,
        "how a step is computed: the batches are the same, and the result is the same to rounding",
    ),
    Rule(("guard.*",), True, "what is skipped from now on; another window keeps the newest losses"),
    Rule(
        ("data.root", "data.tokenizer", "data.on_bad_record", "data.limits.*"),
        True,
        "where files are and how they are read: the digests of the documents and of the tokenizer are compared",
    ),
    Rule(("tokenizer",), False, "the fingerprint of the tokenizer decides what every token is"),
    Rule(("seed", "data.seed", "data.validation_fraction"), False, "the order of the data, and what is held out of it"),
    Rule(("data.sources*", "stages.*.sources*"), False, "the mixture; files that were moved are found by `data.root`"),
    Rule(("start.*",), False, "what the run began with"),
    Rule(("model.*", "optimizer.*"), False, "what the parameters are, and how they are updated"),
    Rule(("stages.*",), False, "the course of the training"),
)


def may_differ(path: str) -> bool:
    """Returns whether the field at a dotted path of the recipe is free on resume; a field without a rule is fixed."""
    rule = rule_of(path)
    return rule is not None and rule.free


def rule_of(path: str) -> Rule | None:
    """Returns the first rule that names the field, or None."""
    return next((rule for rule in RULES if any(fnmatch.fnmatchcase(path, name) for name in rule.fields)), None)


def markdown() -> str:
    """Returns the table as the documentation prints it."""
    rows = [f"| {_named(rule)} | {'may differ' if rule.free else 'must be the same'} | {rule.why} |" for rule in RULES]
    return "\n".join(["| fields | on resume | why |", "|---|---|---|", *rows])


def _named(rule: Rule) -> str:
    return ", ".join(f"`{name}`" for name in rule.fields)
