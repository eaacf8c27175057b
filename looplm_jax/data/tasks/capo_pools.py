"""The pools from which names and facts of Capo's people are drawn, with the sizes of the paper (B.1).

All entries are original to this module. An entry has one or two symbols. A symbol that starts with a hyphen continues
the previous one, so `Ash -ford` is Ashford. A few stems and endings combine to hundreds of names, which keeps the
vocabulary small.
"""

import itertools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

Entry = tuple[str, ...]  # symbols
Pool = tuple[Entry, ...]

PRONOUNS = ("he", "she")


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
"""S0 of the paper: what there is to know of a person besides the name, 2^47.59. A company's city follows from it."""


def symbols_of(pools: Iterable[Pool]) -> list[str]:
    """Returns all symbols of the entries, without repetition, in order of first use."""
    return list(dict.fromkeys(symbol for pool in pools for entry in pool for symbol in entry))
