"""Capo: biographies of invented people, bioS(N), to measure how much knowledge a model can store (Ouro paper 6.1, B.1).

A person has a unique full name, one of 1.6e8, and facts, each drawn uniformly: pronoun, birth date, birth city,
university, major and company. Every company has a seat in one city. A biography states the facts in six sentences, in
this order, with the full name in the first:

    <bio> Indeed Mar -ia El -iel Ash -ford was born on March 2 -7 198 -4 . Reportedly she grew up in Elm -port . …

This reads "Indeed Maria Eliel Ashford was born on March 27 1984. Reportedly she grew up in Elmport. …". Each exposure
contains every person once, in new words, which are a pure function of (seed, exposure, person). Every token but the
first is a target.

Knowledge cannot be held out, because a fact that was never stated cannot be known. The test therefore asks for stated
facts: validation items are the same people, in the words of a stream that no seed trains on.

The paper uses the tokenizer of GPT-2. Here, each word of the templates and each stem and ending of the pools
(`capo_pools`) is a symbol, 315 in all, because embeddings count toward the parameters of a small model.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Int8, Int64

from looplm_jax.data._examples import Example
from looplm_jax.data.tasks._base import Problems, generator
from looplm_jax.data.tasks._capo_text import (
    CITIES,
    END,
    FACT_POOLS,
    NAME_POOLS,
    NAMES,
    TEMPLATES,
    Attribute,
    Entry,
    symbols_of,
    words_of_templates,
)
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError

# Takes the place of a bos token.
START = "<bio>"
_TEMPLATES = 50  # templates per attribute


# People and biographies


class Kind(enum.IntEnum):
    """The kind of a token in a biography.

    Values are the facts where they are stated: birth date, birth city, university, major, company, and the first
    pronoun. The company's city is not a value, because it follows from the company, nor are later pronouns.
    """

    OTHER = 0
    NAME = 1
    VALUE = 2


# The kinds of the subject and the value of each sentence.
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
    """The symbols of a person's full name and of the value of each attribute, and the pronoun."""

    name: Entry
    pronoun: str
    values: Mapping[Attribute, Entry]


@dataclasses.dataclass(frozen=True)
class Biography:
    """A biography as segments of symbols, each with the kind of its symbols."""

    parts: tuple[tuple[Kind, Entry], ...]

    @property
    def symbols(self) -> Entry:
        """The symbols of all segments."""
        return tuple(itertools.chain.from_iterable(symbols for _, symbols in self.parts))

    @property
    def kinds(self) -> Int8[np.ndarray, "N"]:
        """The kind of each of the N symbols."""
        kinds, parts = zip(*self.parts, strict=True)
        return np.repeat(np.array(kinds, np.int8), [len(symbols) for symbols in parts])

    @property
    def text(self) -> str:
        """The biography as ordinary text."""
        # Symbols that begin with a hyphen, and full stops, are joined to the previous symbol.
        return " ".join(self.symbols[1:]).replace(" -", "").replace(f" {END}", END)


# The task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capo:
    """The Capo task and its generator.

    People are a pure function of `world`, and biographies are a pure function of (seed, exposure, person).

    Attributes:
      people: the number of people, N.
      world: the seed of names, facts and seats of companies.
      validation_draws: the number of held-out biographies per person.
    """

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
        """The vocabulary: the start token, the full stop, the words of the templates, and the symbols of the pools."""
        return SymbolTokenizer([START, END, *words_of_templates(), *symbols_of([*NAME_POOLS, *FACT_POOLS.values()])])

    @functools.cached_property
    def max_tokens(self) -> int:
        """The number of tokens of a biography with the longest templates."""
        return self._fixed_tokens + sum(max(len(each.phrase) for each in templates) for templates in TEMPLATES.values())

    @functools.cached_property
    def mean_tokens(self) -> float:
        """The mean number of tokens of a biography over all templates."""
        words = sum(len(each.phrase) for templates in TEMPLATES.values() for each in templates)
        return self._fixed_tokens + words / _TEMPLATES

    @property
    def _fixed_tokens(self) -> int:
        """The number of tokens outside phrases: start, name, values, and openings, pronouns and full stops."""
        person = self.person(0)
        # The name takes the place of one of the pronouns.
        return 1 + len(person.name) - 1 + sum(map(len, person.values.values())) + 3 * len(Attribute)

    @property
    def validation_items(self) -> int:
        """The number of held-out biographies: `validation_draws` for each person."""
        return self.validation_draws * self.people

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns problems `start` to `start + count` of the training stream of a seed."""
        return Problems.of(self.train_example(seed, index) for index in range(start, start + count))

    def train_example(self, seed: int, index: int) -> Example:
        """Returns biography `index` of the training stream. Each exposure visits all people in its own random order."""
        exposure, place = divmod(index, self.people)
        return self._example(self.biography(seed, exposure, int(_shuffled(self.people, seed, exposure)[place])))

    def validation_example(self, index: int) -> Example:
        """Returns a biography in words that no seed trains on."""
        return self._example(self.validation_biography(index))

    def validation_biography(self, index: int) -> Biography:
        """Returns the biography of `validation_example`, with the kind of each token."""
        # Every person occurs once before anyone occurs twice, so a prefix of the items covers as many people as
        # possible.
        draw, person = divmod(index, self.people)
        return self._biography(person, generator("capo-validation", draw, person))

    def biography(self, seed: int, exposure: int, person: int) -> Biography:
        """Returns the biography of a person in one exposure."""
        return self._biography(person, generator("capo-words", seed, exposure, person))

    def person(self, index: int) -> Person:
        """Returns the name and the facts of a person."""
        # Indices into the name pools, followed by indices into the fact pools.
        numbers = self._people[index].tolist()
        name, facts = numbers[: len(NAME_POOLS)], dict(zip(FACT_POOLS, numbers[len(NAME_POOLS) :], strict=True))

        known = {key: FACT_POOLS[key][fact] for key, fact in facts.items()}
        values = {
            Attribute.BIRTH_DATE: known["month"] + known["day"] + known["year"],
            Attribute.BIRTH_CITY: known["birth_city"],
            Attribute.UNIVERSITY: known["university"],
            Attribute.MAJOR: known["major"],
            Attribute.COMPANY: known["company"],
            Attribute.COMPANY_CITY: CITIES[self._seats[facts["company"]]],
        }

        full = tuple(symbol for pool, number in zip(NAME_POOLS, name, strict=True) for symbol in pool[number])
        return Person(name=full, pronoun=known["pronoun"][0], values=values)

    @functools.cached_property
    def _people(self) -> Int64[np.ndarray, "people entries"]:
        """The indices of each person's entries in the pools of names and of facts."""
        names = generator("capo-names", self.world).choice(NAMES, size=self.people, replace=False)
        # Names are drawn without replacement as numbers in mixed radix, one digit for each pool.
        parts = np.stack(np.unravel_index(names, tuple(map(len, NAME_POOLS))), axis=1)

        # Facts are independent of names, so two people may share all of their facts but not their name.
        sizes = tuple(map(len, FACT_POOLS.values()))
        facts = generator("capo-facts", self.world).integers(sizes, size=(self.people, len(sizes)))
        return np.concatenate([parts, facts], axis=1)

    @functools.cached_property
    def _seats(self) -> list[int]:
        """The index of the city of each company."""
        return generator("capo-companies", self.world).integers(len(CITIES), size=len(FACT_POOLS["company"])).tolist()

    def _biography(self, person: int, words: np.random.Generator) -> Biography:
        """Returns the biography of a person, with templates drawn from `words`."""
        about = self.person(person)
        parts: list[tuple[Kind, Entry]] = [(Kind.OTHER, (START,))]

        for attribute, choice in zip(Attribute, words.integers(_TEMPLATES, size=len(Attribute)).tolist(), strict=True):
            template = TEMPLATES[attribute][choice]
            # The first sentence uses the full name, all others the pronoun.
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
        """Returns a biography as tokens, of which all but the first are targets."""
        tokens = self.tokenizer.encode(" ".join(biography.symbols), special=True)
        return Example.of(tokens, [False] + [True] * (len(tokens) - 1))


@functools.lru_cache(maxsize=4)
def _shuffled(people: int, seed: int, exposure: int) -> Int64[np.ndarray, "people"]:
    """Returns the order of people in an exposure. Cached, because consecutive examples need the same order."""
    return generator("capo-exposure", seed, exposure).permutation(people)
