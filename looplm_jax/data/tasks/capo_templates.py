"""The sentences of Capo's biographies: fifty templates for each attribute, from five openings and ten phrases.

All phrases are original to this module. A sentence is `opening subject phrase value .`, such as `Later she graduated
from Oak College .`. The value comes after the subject. The preceding words determine whether a subject or a value comes
next, because an opening is one word and no phrase is a prefix of another. Uncertainty about the wording therefore never
counts as uncertainty about a person.
"""

import dataclasses
import enum
import itertools
from collections.abc import Mapping
from types import MappingProxyType

END = "."


class Attribute(enum.Enum):
    """The facts that a biography states, one sentence each, in this order."""

    BIRTH_DATE = "birth_date"
    BIRTH_CITY = "birth_city"
    UNIVERSITY = "university"
    MAJOR = "major"
    COMPANY = "company"
    COMPANY_CITY = "company_city"


@dataclasses.dataclass(frozen=True)
class Template:
    """The word of a sentence before its subject, and the words between subject and value."""

    opening: str
    phrase: tuple[str, ...]


# Openings, shared by two attributes each.
_BY_HEARSAY = ("Apparently", "Evidently", "Indeed", "Officially", "Reportedly")
_IN_TIME = ("Afterwards", "Eventually", "Later", "Subsequently", "Then")
_NOW = ("Currently", "Now", "Nowadays", "Presently", "Today")

# Phrases of each attribute.
_BIRTH_DATE = (
    "was born on",
    "was delivered on",
    "came into the world on",
    "entered the world on",
    "arrived on",
    "began life on",
    "has a birthday on",
    "keeps a birthday on",
    "first saw light on",
    "took a first breath on",
)
_BIRTH_CITY = (
    "was born in",
    "was raised in",
    "grew up in",
    "comes from",
    "hails from",
    "has roots in",
    "began life in",
    "first lived in",
    "is a native of",
    "spent childhood in",
)
_UNIVERSITY = (
    "studied at",
    "trained at",
    "learned at",
    "enrolled at",
    "attended",
    "graduated from",
    "earned a degree from",
    "took classes at",
    "was taught at",
    "was educated at",
)
_MAJOR = (
    "studied",
    "majored in",
    "focused on",
    "concentrated on",
    "specialised in",
    "took classes in",
    "took a degree in",
    "earned a degree in",
    "was trained in",
    "was educated in",
)
_COMPANY = (
    "works at",
    "works for",
    "serves at",
    "is employed at",
    "is employed by",
    "is on staff at",
    "has a job at",
    "has a role at",
    "holds a post at",
    "earns a living at",
)
_COMPANY_CITY = (
    "works in",
    "is based in",
    "is employed in",
    "has a desk in",
    "has an office in",
    "keeps an office in",
    "holds a job in",
    "goes to work in",
    "commutes to",
    "earns a living in",
)


def _templates(openings: tuple[str, ...], phrases: tuple[str, ...]) -> tuple[Template, ...]:
    """Returns all combinations of an opening and a phrase."""
    return tuple(Template(opening, tuple(phrase.split())) for opening, phrase in itertools.product(openings, phrases))


TEMPLATES: Mapping[Attribute, tuple[Template, ...]] = MappingProxyType(
    {
        Attribute.BIRTH_DATE: _templates(_BY_HEARSAY, _BIRTH_DATE),
        Attribute.BIRTH_CITY: _templates(_BY_HEARSAY, _BIRTH_CITY),
        Attribute.UNIVERSITY: _templates(_IN_TIME, _UNIVERSITY),
        Attribute.MAJOR: _templates(_IN_TIME, _MAJOR),
        Attribute.COMPANY: _templates(_NOW, _COMPANY),
        Attribute.COMPANY_CITY: _templates(_NOW, _COMPANY_CITY),
    }
)


def words_of_templates() -> list[str]:
    """Returns all words of all templates, without repetition, in order of first use."""
    templates = itertools.chain.from_iterable(TEMPLATES.values())
    return list(dict.fromkeys(word for each in templates for word in (each.opening, *each.phrase)))
