"""Capo: biographies of invented people, bioS(N), to measure how much a model can know (Ouro paper 6.1, B.1).

A person has a full name, one of 1.6e8 and nobody else's, and facts, each drawn uniformly: pronoun, birth date, birth
city, university, major and company, which has its seat in a city of its own. A biography tells them in six sentences,
in this order, with the full name in the first:

    <bio> Indeed Mar -ia El -iel Ash -ford was born on March 2 -7 198 -4 . Reportedly she grew up in Elm -port . …

which reads "Indeed Maria Eliel Ashford was born on March 27 1984. Reportedly she grew up in Elmport. …". Every
exposure of a person is worded anew, a pure function of (seed, exposure, person); an exposure holds everybody once.
Every token but the first is a target.

Knowledge cannot be held out, as what was never told cannot be known. What is tested is what was told: the validation
items are the people again, in words of a stream that no seed trains on.

The paper takes GPT-2's tokeniser. Ours has a symbol for each word of the templates and for each stem and ending of the
pools (`capo_pools`), 315 in all, since the embedding counts among a small model's parameters.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Int8, Int64

from looplm_jax.data.documents import Example
from looplm_jax.data.tasks.base import Problems
from looplm_jax.data.tasks.capo_pools import CITIES, FACT_POOLS, NAME_POOLS, NAMES, Entry, symbols_of
from looplm_jax.data.tasks.capo_templates import END, TEMPLATES, Attribute, words_of_templates
from looplm_jax.data.tasks.draws import generator
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer
from looplm_jax.errors import UserError

START = "<bio>"
_TEMPLATES = 50  # for each attribute


class Kind(enum.IntEnum):
    """What a token of a biography counts as.

    Values are the facts where they are told: birth date, birth city, university, major, company, and the pronoun
    where it first stands. The company's city is none, as it follows from the company, nor are later pronouns.
    """

    OTHER = 0
    NAME = 1
    VALUE = 2


# What the subject and the value of each sentence count as.
_COUNTS: Mapping[Attribute, tuple[Kind, Kind]] = MappingProxyType(
    {
        Attribute.BIRTH_DATE: (Kind.NAME, Kind.VALUE),
        Attribute.BIRTH_CITY: (Kind.VALUE, Kind.VALUE),
        Attribute.UNIVERSITY: (Kind.OTHER, Kind.VALUE),
        Attribute.MAJOR: (Kind.OTHER, Kind.VALUE),
        Attribute.COMPANY: (Kind.OTHER, Kind.VALUE),
        Attribute.COMPANY_CITY: (Kind.OTHER, Kind.OTHER),
    }
)


@dataclasses.dataclass(frozen=True)
class Person:
    """The symbols of a full name and of each attribute, and the pronoun."""

    name: Entry
    pronoun: str
    values: Mapping[Attribute, Entry]


@dataclasses.dataclass(frozen=True)
class Biography:
    """A biography in parts, each with what its symbols count as."""

    parts: tuple[tuple[Kind, Entry], ...]

    @property
    def symbols(self) -> Entry:
        """Those of all parts."""
        return tuple(itertools.chain.from_iterable(symbols for _, symbols in self.parts))

    @property
    def kinds(self) -> Int8[np.ndarray, "N"]:
        """The kind of each symbol."""
        kinds, parts = zip(*self.parts, strict=True)
        return np.repeat(np.array(kinds, np.int8), [len(symbols) for symbols in parts])

    @property
    def text(self) -> str:
        """As one would write it."""
        return " ".join(self.symbols[1:]).replace(" -", "").replace(f" {END}", END)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capo:
    """The task and its generator: people are a pure function of `world`, biographies of (seed, exposure, person)."""

    people: int = 20_000
    world: int = 0
    validation_draws: int = 1

    def __post_init__(self) -> None:
        for name, least in (("people", 1), ("validation_draws", 0)):
            if getattr(self, name) < least:
                raise UserError(f"capo.{name} must be at least {least}, not {getattr(self, name)}")
        if self.people > NAMES:
            raise UserError(f"capo.people={self.people} is more than the {NAMES} names that there are; lower it")

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """The start, the full stop, the words of the templates, and the symbols of the pools."""
        return SymbolTokenizer([START, END, *words_of_templates(), *symbols_of([*NAME_POOLS, *FACT_POOLS.values()])])

    @functools.cached_property
    def max_tokens(self) -> int:
        """Tokens of a biography whose templates are the longest."""
        return self._fixed_tokens + sum(max(len(each.phrase) for each in templates) for templates in TEMPLATES.values())

    @functools.cached_property
    def mean_tokens(self) -> float:
        """Tokens of a biography, on average over templates."""
        words = sum(len(each.phrase) for templates in TEMPLATES.values() for each in templates)
        return self._fixed_tokens + words / _TEMPLATES

    @property
    def _fixed_tokens(self) -> int:
        """The start, name, values, and each sentence's opening, pronoun and full stop: all but the phrases."""
        person = self.person(0)
        return 1 + len(person.name) - 1 + sum(map(len, person.values.values())) + 3 * len(Attribute)

    @property
    def validation_items(self) -> int:
        """Everybody, `validation_draws` times."""
        return self.validation_draws * self.people

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns problems `start` to `start + count` of the training stream of a seed."""
        return Problems.of(self.train_example(seed, index) for index in range(start, start + count))

    def train_example(self, seed: int, index: int) -> Example:
        """The next person of an exposure, which goes through all people in an order of its own."""
        exposure, place = divmod(index, self.people)
        return self._example(self.biography(seed, exposure, int(_shuffled(self.people, seed, exposure)[place])))

    def validation_example(self, index: int) -> Example:
        """A person, in words that no seed trains on."""
        return self._example(self.validation_biography(index))

    def validation_biography(self, index: int) -> Biography:
        """The same with what each token counts as."""
        draw, person = divmod(index, self.people)
        return self._biography(person, generator("capo-validation", draw, person))

    def biography(self, seed: int, exposure: int, person: int) -> Biography:
        """How a person is described in an exposure."""
        return self._biography(person, generator("capo-words", seed, exposure, person))

    def person(self, index: int) -> Person:
        """Name and facts of a person."""
        numbers = self._people[index].tolist()
        name, facts = numbers[: len(NAME_POOLS)], dict(zip(FACT_POOLS, numbers[len(NAME_POOLS) :], strict=True))
        told = {key: FACT_POOLS[key][fact] for key, fact in facts.items()}
        values = {
            Attribute.BIRTH_DATE: told["month"] + told["day"] + told["year"],
            Attribute.BIRTH_CITY: told["birth_city"],
            Attribute.UNIVERSITY: told["university"],
            Attribute.MAJOR: told["major"],
            Attribute.COMPANY: told["company"],
            Attribute.COMPANY_CITY: CITIES[self._seats[facts["company"]]],
        }
        full = tuple(symbol for pool, number in zip(NAME_POOLS, name, strict=True) for symbol in pool[number])
        return Person(name=full, pronoun=told["pronoun"][0], values=values)

    @functools.cached_property
    def _people(self) -> Int64[np.ndarray, "people entries"]:
        """Numbers of everybody's entries in the pools of names and of facts."""
        names = generator("capo-names", self.world).choice(NAMES, size=self.people, replace=False)
        parts = np.stack(np.unravel_index(names, tuple(map(len, NAME_POOLS))), axis=1)
        sizes = tuple(map(len, FACT_POOLS.values()))
        facts = generator("capo-facts", self.world).integers(sizes, size=(self.people, len(sizes)))
        return np.concatenate([parts, facts], axis=1)

    @functools.cached_property
    def _seats(self) -> list[int]:
        """The city of each company."""
        return generator("capo-companies", self.world).integers(len(CITIES), size=len(FACT_POOLS["company"])).tolist()

    def _biography(self, person: int, words: np.random.Generator) -> Biography:
        about = self.person(person)
        parts: list[tuple[Kind, Entry]] = [(Kind.OTHER, (START,))]
        for attribute, choice in zip(Attribute, words.integers(_TEMPLATES, size=len(Attribute)).tolist(), strict=True):
            template = TEMPLATES[attribute][choice]
            subject = about.name if attribute is Attribute.BIRTH_DATE else (about.pronoun,)
            of_subject, of_value = _COUNTS[attribute]
            parts += [
                (Kind.OTHER, (template.opening,)),
                (of_subject, subject),
                (Kind.OTHER, template.phrase),
                (of_value, about.values[attribute]),
                (Kind.OTHER, (END,)),
            ]
        return Biography(tuple(parts))

    def _example(self, biography: Biography) -> Example:
        tokens = self.tokenizer.encode(" ".join(biography.symbols), special=True)
        return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


@functools.lru_cache(maxsize=4)
def _shuffled(people: int, seed: int, exposure: int) -> Int64[np.ndarray, "people"]:
    """The order of an exposure."""
    return generator("capo-exposure", seed, exposure).permutation(people)
