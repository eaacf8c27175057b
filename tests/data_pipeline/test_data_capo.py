"""Capo: pools of the published sizes, distributions, and biographies parsed by an independent reader."""

import collections
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from looplm_jax.data.tasks import Capo, make_task
from looplm_jax.data.tasks import _capo_text as pools
from looplm_jax.data.tasks._capo import Kind
from looplm_jax.data.tasks._capo_text import TEMPLATES, Attribute
from looplm_jax.errors import UserError

TASK = Capo(people=500)
SEEDS, EXPOSURES, PEOPLE = st.integers(0, 2**63), st.integers(0, 2**40), st.integers(0, 499)


def joined(entry):
    """Returns an entry as normal text."""
    return " ".join(entry).replace(" -", "")


def one_of(pool):
    return f"({'|'.join(map(joined, pool))})"


NAME = " ".join(map(one_of, pools.NAME_POOLS))
FIRST = re.compile(rf"\w+ {NAME} [a-z ]+ {one_of(pools.MONTHS)} (\d\d) (\d{{4}})")
LATER = [
    re.compile(rf"\w+ (he|she) [a-z ]+ {one_of(pool)}")
    for pool in (pools.CITIES, pools.UNIVERSITIES, pools.MAJORS, pools.COMPANIES, pools.CITIES)
]


def read_back(text):
    """Parses name, pronoun and attributes of a biography in order, by regular expressions that know no template."""
    first, *rest = text.removesuffix(".").split(". ")
    *name, month, day, year = FIRST.fullmatch(first).groups()
    told = [pattern.fullmatch(sentence).groups() for pattern, sentence in zip(LATER, rest, strict=True)]
    (pronoun,) = {who for who, _ in told}
    return " ".join(name), pronoun, [f"{month} {day} {year}", *(value for _, value in told)]


@given(seed=SEEDS, exposure=EXPOSURES, person=PEOPLE)
def test_every_biography_tells_the_facts_of_its_person(seed, exposure, person):
    biography, about = TASK.biography(seed, exposure, person), TASK.person(person)
    name, pronoun, values = read_back(biography.text)
    assert name == joined(about.name)
    assert pronoun == about.pronoun
    assert values == [joined(about.values[attribute]) for attribute in Attribute]
    assert len(biography.symbols) <= TASK.max_tokens


@given(seed=SEEDS, exposure=EXPOSURES, person=PEOPLE)
def test_what_counts_is_the_name_once_and_each_fact_once(seed, exposure, person):
    biography, about = TASK.biography(seed, exposure, person), TASK.person(person)
    symbols = np.array(biography.symbols)
    assert tuple(symbols[biography.kinds == Kind.NAME]) == about.name
    date, *others = (about.values[attribute] for attribute in Attribute if attribute is not Attribute.COMPANY_CITY)
    expected = (*date, about.pronoun, *(symbol for value in others for symbol in value))
    assert tuple(symbols[biography.kinds == Kind.VALUE]) == expected


def test_the_pools_have_the_printed_sizes():
    assert [len(pool) for pool in pools.NAME_POOLS] == [400, 400, 1000]
    assert [len(pool) for pool in pools.FACT_POOLS.values()] == [2, 12, 28, 200, 200, 300, 100, 263]
    assert pools.NAMES == 160_000_000
    assert pools.FACTS == 2 * (12 * 28 * 200) * 200 * 300 * 100 * 263
    assert round(math.log2(pools.FACTS), 2) == 47.59


@pytest.mark.parametrize("pool", [*pools.NAME_POOLS, *pools.FACT_POOLS.values()])
def test_the_entries_of_a_pool_are_different_words(pool):
    assert len(set(map(joined, pool))) == len(pool)
    assert len({len(entry) for entry in pool}) == 1


def test_each_attribute_has_fifty_templates_that_say_when_the_value_comes():
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates) == 50
        phrases = {" ".join(each.phrase) + " " for each in templates}
        assert not any(a != b and a.startswith(b) for a in phrases for b in phrases)


def test_no_word_of_a_template_is_a_symbol_of_a_pool():
    words = {word for templates in TEMPLATES.values() for each in templates for word in (each.opening, *each.phrase)}
    assert not words & set(pools.symbols_of([*pools.NAME_POOLS, *pools.FACT_POOLS.values()]))


@pytest.mark.parametrize(("people", "world"), [(1, 0), (500, 0), (20_000, 3)])
def test_nobody_shares_a_full_name(people, world):
    task = Capo(people=people, world=world)
    assert len({task.person(number).name for number in range(people)}) == people


def test_facts_are_uniform_and_each_company_has_one_seat():
    task = Capo(people=20_000)
    people = [task.person(number) for number in range(task.people)]
    seats = collections.defaultdict(set)
    for person in people:
        seats[person.values[Attribute.COMPANY]].add(person.values[Attribute.COMPANY_CITY])
    assert len(seats) == 263
    assert all(len(cities) == 1 for cities in seats.values())
    columns = [[person.pronoun for person in people], [person.values[Attribute.BIRTH_DATE][0] for person in people]]
    columns += [[person.values[each] for person in people] for each in list(Attribute)[1:5]]
    columns += [[person.name[place : place + 2] for person in people] for place in (0, 2, 4)]
    sizes = (2, 12, 200, 300, 100, 263, 400, 400, 1000)
    for column, size in zip(columns, sizes, strict=True):
        counts = np.array(list(collections.Counter(column).values()))
        statistic = ((counts - 20_000 / size) ** 2 / (20_000 / size)).sum()
        assert len(counts) == size
        assert abs(statistic - (size - 1)) < 5 * math.sqrt(2 * (size - 1))


def test_an_exposure_holds_everybody_once_in_another_order_and_other_words():
    def names(seed, exposure):
        texts = [TASK.tokenizer.decode(TASK.train_example(seed, 500 * exposure + place).tokens) for place in range(500)]
        return texts, [" ".join(text.split()[2:8]) for text in texts]

    everybody = {" ".join(TASK.person(number).name) for number in range(500)}
    runs = [names(seed, exposure) for seed, exposure in ((0, 0), (0, 1), (1, 0))]
    assert all(set(order) == everybody and len(order) == 500 for _, order in runs)
    assert len({tuple(order) for _, order in runs}) == 3
    assert len({text for texts, _ in runs for text in texts}) > 1490


def test_people_depend_on_the_world_and_on_nothing_else():
    assert TASK.person(7) == Capo(people=500, validation_draws=3).person(7)
    assert TASK.person(7) != Capo(people=500, world=1).person(7)
    again = Capo(people=500)
    assert TASK.biography(1, 2, 3).symbols == again.biography(1, 2, 3).symbols
    assert TASK.train_example(5, 77).tokens.tolist() == again.train_example(5, 77).tokens.tolist()


def test_everybody_is_asked_for_in_words_of_their_own_stream():
    task = Capo(people=50, validation_draws=2)
    told = [task.validation_biography(index) for index in range(task.validation_items)]
    assert len(told) == 100
    assert told[3].symbols != told[53].symbols
    assert read_back(told[3].text) == read_back(told[53].text)
    trained = {task.train_example(seed, index).tokens.tobytes() for seed in range(2) for index in range(2_000)}
    assert not trained & {task.validation_example(index).tokens.tobytes() for index in range(100)}


def test_every_token_but_the_first_is_a_target_and_the_mean_length_is_known():
    examples = [TASK.train_example(0, index) for index in range(4_000)]
    assert all(example.loss_mask.tolist() == [False] + [True] * (len(example.tokens) - 1) for example in examples[:50])
    lengths = [len(example.tokens) for example in examples]
    assert abs(np.mean(lengths) - TASK.mean_tokens) < 0.2
    assert max(lengths) <= TASK.max_tokens < 100


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("capo:people=0", "capo.people must be at least 1, not 0"),
        ("capo:people=160000001", "capo.people=160000001 is more than the 160000000 names that there are; lower it"),
        ("capo:validation_draws=-1", "capo.validation_draws must be at least 0, not -1"),
    ],
)
def test_bad_options_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        make_task(spec)
