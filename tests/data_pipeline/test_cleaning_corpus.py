"""Cleaning of a real corpus: the source of the standard library, with planted items and altered copies."""

import json
import multiprocessing
import random
from collections.abc import Iterator

import numpy as np
import pytest
from cleaning_cases import evaluation

from looplm_jax.corpus import NearDuplicates
from looplm_jax.corpus._words import words
from looplm_jax.data import collect_stdlib

N = 13
DOCUMENTS = 200


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> list[str]:
    path = tmp_path_factory.mktemp("corpus") / "stdlib.jsonl"
    collect_stdlib(path)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return random.Random(0).sample([text[:20_000] for text in texts if len(text) > 2000], DOCUMENTS)


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def _shouted(passage: str) -> str:
    return ", ".join(passage.upper().split(" "))


def test_planted_items_are_found_and_nothing_else(corpus, tmp_path):
    """Half of the items are in the corpus unchanged; the others have other words and are planted in a changed form."""
    draw = random.Random(1)
    passages = []
    for text in draw.sample(corpus, 20):
        found = words(text)
        start = draw.randrange(len(found) - 40)
        passages.append(" ".join(found[start : start + 40]))
    foreign = [" ".join(f"foreign{i}word{j}" for j in range(draw.randint(8, 40))) for i in range(20)]
    texts = list(corpus)
    for item, place in zip(foreign, draw.sample(range(DOCUMENTS), 20)):
        middle = len(texts[place]) // 2
        texts[place] = f"{texts[place][:middle]} {_shouted(item)}! {texts[place][middle:]}"
    ngrams = evaluation(tmp_path, *passages, *foreign)
    flagged = {number for number, text in enumerate(texts) if ngrams.overlap(text)}
    wanted = [f" {' '.join(run)} " for item in passages + foreign for run in _ngrams(item, min(N, len(item.split())))]
    plain = [f" {' '.join(words(text))} " for text in texts]
    dirty = {number for number, text in enumerate(plain) if any(run in text for run in wanted)}
    right = len(flagged & dirty)
    print(
        f"documents with an item: {len(dirty)}; precision {right / len(flagged):.3f}, recall {right / len(dirty):.3f}"
    )
    assert flagged == dirty


def _altered(text: str, share: float, draw: random.Random) -> str:
    """Returns the text with some of its words replaced."""
    return " ".join(f"new{draw.random()}" if draw.random() < share else word for word in words(text))


def _pairs(corpus: list[str]) -> Iterator[tuple[str, str, float]]:
    """Yields texts, altered copies and their Jaccard similarities."""
    draw = random.Random(2)
    for number, text in enumerate(corpus):
        altered = _altered(text, (number % 20) / 200, draw)
        one, other = _ngrams(text, 5), _ngrams(altered, 5)
        yield text, altered, len(one & other) / len(one | other)


def test_pairs_of_known_similarity(corpus):
    settings = NearDuplicates(0.8)
    outcomes = []
    for text, altered, similarity in _pairs(corpus):
        rows = np.stack([settings.signature(text), settings.signature(altered)])
        outcomes.append((similarity, bool(settings.drop(rows).dropped)))
    for least in np.arange(0.3, 1.01, 0.1):
        inside = [dropped for similarity, dropped in outcomes if least <= similarity < least + 0.1]
        print(f"similarity from {least:.1f}: {sum(inside)} of {len(inside)} dropped")
    alike = [similarity >= 0.8 for similarity, _ in outcomes]
    dropped = [drop for _, drop in outcomes]
    right = sum(one and other for one, other in zip(alike, dropped))
    print(f"threshold 0.8: precision {right / sum(dropped):.3f}, recall {right / sum(alike):.3f}")
    assert all(drop for similarity, drop in outcomes if similarity >= 0.9)
    assert not any(drop for similarity, drop in outcomes if similarity < 0.65)
    assert right / sum(dropped) > 0.85
    assert right / sum(alike) > 0.85


def test_the_number_of_workers_is_no_difference(corpus):
    settings = NearDuplicates(0.8)
    texts = corpus[:20]
    here = [settings.signature(text).tobytes() for text in texts]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        there = [signature.tobytes() for signature in pool.map(settings.signature, texts)]
    assert there == here
