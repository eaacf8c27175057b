"""The text of Capo's biographies: pools of names and facts with the sizes of the paper (B.1), and sentence templates.

All entries and phrases are original to this module.

An entry of a pool has one or two symbols. A symbol that starts with a hyphen continues the previous one, so `Ash -ford`
is Ashford. A few stems and endings combine to hundreds of names, which keeps the vocabulary small.

There are fifty templates for each attribute, from five openings and ten phrases. A sentence is `opening subject phrase
value .`, such as `Later she graduated from Oak College .`. The value comes after the subject. The preceding words
determine whether a subject or a value comes next, because an opening is one word and no phrase is a prefix of another.
Uncertainty about the wording therefore never counts as uncertainty about a person.
"""

import dataclasses
import enum
import itertools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

Entry = tuple[str, ...]  # symbols
Pool = tuple[Entry, ...]

# A sentence that follows the first has one of these as its subject.
PRONOUNS = ("he", "she")

END = "."


# Pools


def _words(text: str) -> tuple[str, ...]:
    """Returns the words of a text."""
    return tuple(text.split())


# Given names, first and middle, are a stem of _GIVEN with an ending; places and last names start with _PLACES.
_GIVEN = _words("Al Ber Cor Dan El Fer Gal Har Is Jul Kat Lor Mar Mel Nor Or Per Ros Sal Tam")
_FIRST = _words("-a -ana -anne -ard -as -ela -elle -en -ette -ia -in -ina -ine -is -ita -ius -on -or -ric -us")
_MIDDLE = _words(
    "-abel -ami -ander -bert -een -esta -eth -ey -iel -ilde -ith -issa -olf -ola -ond -ora -orin -ow -una -yn"
)
_PLACES = _words(
    "Ash Birch Brook Cald Clay Dun East Elm Fair Glen Green Hart Hazel Holm King Lang Lin Marsh Mill North "
    "Oak Pem Red Rock Stan Thorn Wake West White Wood"
)
_SURNAMES = _words(
    "-berg -brook -bury -by -cott -croft -dale -den -ell -er -field -ford -gate -ham -house -hurst -ings -land -ley "
    "-lock -low -man -mere -more -nell -rick -ridge -shaw -side -smith -son -stein -stone -ton -ward -way -well -wick "
    "-wood -worth"
)
_CITIES = _words("-bridge -burg -chester -haven -minster -mouth -polis -port -stead -ville")
_SCHOOLS = _words("Academy Athenaeum College Conservatory Faculty Institute Polytechnic School Seminary University")
_FIELDS = _words("Biology Chemistry Design Economics Geography History Law Music Physics Statistics")
_BRANCHES = _words("Applied Classical Comparative Digital Industrial Marine Medical Modern Rural Social")
_TRADES = _words("-air -bank -corp -foods -gen -labs -media -soft -tech -works")
_MONTHS = _words("January February March April May June July August September October November December")


def _pairs(first: Iterable[str], second: Iterable[str]) -> Pool:
    """Returns all combinations of a first and a second symbol."""
    return tuple(itertools.product(first, second))


def _numbers(start: int, stop: int, digits: int) -> Pool:
    """Returns numbers with leading zeros, in which the last digit is a separate symbol."""
    # One symbol for the leading digits and one for the last, instead of one for each number.
    written = (f"{number:0{digits}d}" for number in range(start, stop))
    return tuple((number[:-1], f"-{number[-1]}") for number in written)


# The slices below give the pools exactly the sizes of the paper.
FIRST_NAMES = _pairs(_GIVEN, _FIRST)
MIDDLE_NAMES = _pairs(_GIVEN, _MIDDLE)
LAST_NAMES = _pairs(_PLACES[:25], _SURNAMES)
MONTHS: Pool = tuple((month,) for month in _MONTHS)
DAYS = _numbers(1, 29, digits=2)
YEARS = _numbers(1900, 2100, digits=4)
CITIES = _pairs(_PLACES[:20], _CITIES)
UNIVERSITIES = _pairs(_PLACES, _SCHOOLS)
MAJORS = _pairs(_BRANCHES, _FIELDS)
# 27 times 10 combinations, of which the paper has 263.
COMPANIES = _pairs(_PLACES[:27], _TRADES)[:263]

NAME_POOLS = (FIRST_NAMES, MIDDLE_NAMES, LAST_NAMES)
FACT_POOLS: Mapping[str, Pool] = MappingProxyType(
    {
        "pronoun": tuple((pronoun,) for pronoun in PRONOUNS),
        "month": MONTHS,
        "day": DAYS,
        "year": YEARS,
        "birth_city": CITIES,
        "university": UNIVERSITIES,
        "major": MAJORS,
        "company": COMPANIES,
    }
)

NAMES = math.prod(map(len, NAME_POOLS))
"""N0 of the paper: full names that there are, 1.6e8."""

FACTS = math.prod(map(len, FACT_POOLS.values()))
"""S0 of the paper: combinations of facts about a person, without the name, 2^47.59. A company implies its city."""


def symbols_of(pools: Iterable[Pool]) -> list[str]:
    """Returns all symbols of the entries, without repetition, in order of first use."""
    return list(dict.fromkeys(symbol for pool in pools for entry in pool for symbol in entry))


# Templates


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
    # The order determines the ids, so this is not a set.
    templates = itertools.chain.from_iterable(TEMPLATES.values())
    return list(dict.fromkeys(word for each in templates for word in (each.opening, *each.phrase)))
