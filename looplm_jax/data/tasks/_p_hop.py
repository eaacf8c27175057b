"""p-hop induction (Sanford et al., arXiv 2402.09268; Saunshi et al., arXiv 2502.17416).

Let `find_1(v, i) = max({0} ∪ {j <= i : v[j-1] = v[i]})`, with positions counted from 1. The answer to a sequence v of n
symbols is `v[find_p(v, n)]`, where find_p applies find_1 p times: find the previous occurrence of the last symbol, take
the symbol that followed it, find the previous occurrence of that one, and so on. The problem is `v[1] … v[n] answer`,
and only the answer is a target.

Sequences are drawn in one of two ways:

`chain`: p pairs of adjacent symbols are placed at random among fillers. Fillers are uniform among the symbols that do
not break a hop, so every hop moves, and there are always p of them.

`uniform`: symbols are independent. A sequence that ends in two equal symbols is then degenerate: every hop stays where
it is, so one induction head answers it. So is a sequence whose hops end before p because a symbol has no earlier
occurrence; its answer is `<none>`.

With `fewest`, training follows a curriculum that small models need: p is uniform in fewest..hops, each problem begins
with `<hops_p>`, and the test uses p = hops.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Integer

from looplm_jax.data._examples import Example
from looplm_jax.data.tasks._base import Problems, draw_again, first_draw, generator, is_held_out
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError

NONE = "<none>"


class Sequences(enum.Enum):
    """The distribution of sequences; see the module docstring."""

    CHAIN = "chain"
    UNIFORM = "uniform"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PHop:
    """The p-hop task and its generator. Every problem is a pure function of (stream, seed, index).

    Attributes:
      hops: the number of hops, p, in the test.
      fewest: the smallest number of hops in training; 0 for always `hops`, without the token `<hops_p>`.
      length: the number of symbols, n.
      alphabet: the number of distinct symbols.
      sequences: the distribution of sequences.
      validation_items: the number of held-out problems.
    """

    hops: int = 16
    fewest: int = 0  # in training; 0 for always `hops`
    length: int = 256
    alphabet: int = 4
    sequences: Sequences = Sequences.CHAIN
    validation_items: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("hops", 1), ("alphabet", 2), ("validation_items", 0)):
            if getattr(self, name) < least:
                raise UserError(f"phop.{name} must be at least {least}, not {getattr(self, name)}")
        if not 0 <= self.fewest <= self.hops:
            raise UserError(f"phop.fewest must be from 1 to hops={self.hops}, or 0, not {self.fewest}")
        if self.length < 2 * self.hops + 1:
            raise UserError(
                f"phop.length={self.length} has no room for {self.hops} hops; make it {2 * self.hops + 1} or more"
            )

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """The vocabulary: `<none>`, the symbols of the alphabet and, if it varies, the number of hops."""
        numbers = range(1, self.hops + 1) if self.fewest else ()
        return SymbolTokenizer([NONE, *(f"s{symbol}" for symbol in range(self.alphabet)), *map(_said, numbers)])

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a problem."""
        return self.length + 1 + bool(self.fewest)

    @property
    def chance(self) -> float:
        """The accuracy of a uniform guess at the symbol."""
        return 1 / self.alphabet

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns `count` training problems of a seed, none of which is held out."""
        random = generator("phop-problems", seed, start, count)
        hops = random.integers(self.fewest or self.hops, self.hops + 1, size=count)
        tokens = np.zeros((count, self.max_tokens), np.int32)
        if self.fewest:
            tokens[:, 0] = self.alphabet + hops  # after <none> and the symbols

        for number in np.unique(hops):
            places = np.flatnonzero(hops == number)
            tokens[places, -self.length - 1 :] = self._answered(random, len(places), int(number))

        is_answer = np.broadcast_to(np.arange(self.max_tokens) == self.max_tokens - 1, tokens.shape)
        return Problems.of_columns(tokens, is_answer, np.ones_like(is_answer))

    def train_example(self, seed: int, index: int) -> Example:
        """Returns problem `index` of the training stream of a seed. It is never a held-out one."""
        hops = self.hops
        if self.fewest:
            hops = int(generator("phop-hops", seed, index).integers(self.fewest, self.hops + 1))
        return self._problem("phop-train", seed, index, hops, held_out=False)

    def validation_example(self, index: int) -> Example:
        """Returns held-out problem `index`, with `hops` hops."""
        return self._problem("phop-validation", 0, index, self.hops, held_out=True)

    def _answered(self, random: np.random.Generator, count: int, hops: int) -> Integer[np.ndarray, "N row"]:
        """Returns the token ids of `count` sequences, none of which is held out, each followed by its answer."""

        def draw(places: Integer[np.ndarray, "n"]) -> Integer[np.ndarray, "n row"]:
            if self.sequences is Sequences.CHAIN:
                return 1 + draw_chains(random, len(places), hops=hops, length=self.length, alphabet=self.alphabet)
            sequences = random.integers(self.alphabet, size=(len(places), self.length))
            found = find_all(sequences, hops)
            # Position 0 means that a hop has no target; the answer is then `<none>`, which is id 0.
            answers = np.where(found > 0, 1 + sequences[np.arange(len(places)), found - 1], 0)
            return np.column_stack([1 + sequences, answers])

        every = np.arange(count)
        problems = draw(every)
        draw_again(
            problems, draw, lambda row: _written(row[:-1] - 1), every, f"phop:length={self.length}", "raise length"
        )
        return problems

    def _problem(self, stream: str, seed: int, index: int, hops: int, *, held_out: bool) -> Example:
        """Returns one problem on the requested side of the validation split."""

        def draw(attempt: int) -> list[int]:
            random = generator(stream, seed, index, attempt)
            if self.sequences is Sequences.UNIFORM:
                return random.integers(self.alphabet, size=self.length).tolist()
            return draw_chain(random, hops=hops, length=self.length, alphabet=self.alphabet)

        def accept(drawn: list[int]) -> bool:
            return is_held_out(_written(np.array(drawn))) is held_out

        sequence = first_draw(draw, accept, f"phop:length={self.length}", "raise length")
        place = find(sequence, len(sequence), hops)
        answer = 0 if place == 0 else 1 + sequence[place - 1]

        said = self.tokenizer.encode(_said(hops)) if self.fewest else []
        question = [*said, *(1 + symbol for symbol in sequence)]
        return Example.of([*question, answer], [False] * len(question) + [True])


def _said(hops: int) -> str:
    """Returns the token for a number of hops."""
    return f"<hops_{hops}>"


def _written(sequence: Integer[np.ndarray, "length"]) -> str:
    """Returns a sequence as numbers separated by spaces, which is hashed for the validation split."""
    if sequence.max() > 9:
        return " ".join(map(str, sequence.tolist()))
    # Fast path for one-digit symbols; it gives the same text as the general case.
    characters = np.full(2 * len(sequence) - 1, ord(" "), np.uint8)
    characters[::2] = ord("0") + sequence
    return characters.tobytes().decode()


# One sequence at a time


def find(sequence: Sequence[int], start: int, hops: int) -> int:
    """Returns find_p of the paper from position `start`.

    Positions count from 1; 0 means that there is no such position.
    """
    place = start
    for _ in range(hops):
        if place == 0:
            return 0
        # Positions count from 1 and indices from 0: the symbol before position j is `sequence[j - 2]`.
        places = (j for j in range(place, 1, -1) if sequence[j - 2] == sequence[place - 1])
        place = next(places, 0)
    return place


def draw_chain(random: np.random.Generator, *, hops: int, length: int, alphabet: int) -> list[int]:
    """Returns a sequence whose last `hops` hops all move.

    The sequence is built from its end: the last symbol; then, for each hop, fillers that differ from the sought symbol,
    and the pair of the sought symbol and the symbol that follows it, which is sought next; finally, arbitrary fillers.
    """
    symbols = [int(random.integers(alphabet))]
    for _ in range(hops):
        symbols.append((symbols[-1] + int(random.integers(1, alphabet))) % alphabet)

    fillers = length - 1 - 2 * hops
    # The positions of the pairs among fillers and pairs, uniform over all choices.
    pairs = np.sort(random.permutation(fillers + hops)[:hops])
    gaps = np.diff(pairs, prepend=-1) - 1

    backwards = [symbols[0]]
    for gap, sought, found in zip(gaps, symbols[:-1], symbols[1:], strict=True):
        backwards += ((sought + random.integers(1, alphabet, size=gap)) % alphabet).tolist()
        backwards += [found, sought]
    backwards += random.integers(alphabet, size=length - len(backwards)).tolist()

    return backwards[::-1]


# Many sequences at once


def find_all(sequences: Integer[np.ndarray, "N length"], hops: int) -> Integer[np.ndarray, "N"]:
    """Returns `find(sequence, length, hops)` for each of N sequences."""
    count, length = sequences.shape
    rows, places = np.arange(count), np.full(count, length)

    for _ in range(hops):
        sought = sequences[rows, places - 1]
        is_before = np.arange(1, length) < places[:, None]
        same = (sequences[:, :-1] == sought[:, None]) & is_before
        # The last match is the first one in reverse order.
        last = length - 1 - same[:, ::-1].argmax(axis=1)
        places = np.where(same.any(axis=1), last + 1, 0)

    return places


def draw_chains(
    random: np.random.Generator, count: int, *, hops: int, length: int, alphabet: int
) -> Integer[np.ndarray, "{count} {length}+1"]:
    """Returns `count` sequences with the distribution of `draw_chain`, each followed by its answer, vectorized."""
    # The smallest integer type that holds the sum of two symbols.
    kind = np.min_scalar_type(2 * alphabet)
    items = length - 1 - hops  # one item per filler and one per pair

    first = random.integers(alphabet, size=(count, 1))
    moves = random.integers(1, alphabet, size=(count, hops))
    symbols = (np.cumsum(np.concatenate([first, moves], axis=1), axis=1) % alphabet).astype(kind)

    # A uniform random subset of `hops` items becomes pairs.
    pairs = np.argpartition(random.random((count, items)), hops - 1, axis=1)[:, :hops]
    pairs.sort(axis=1)

    others = random.integers(1, alphabet, size=(count, items), dtype=kind)
    behind = np.arange(items) > pairs[:, -1:]  # after the last hop, fillers may be any symbol
    others[behind] = random.integers(alphabet, size=int(behind.sum()), dtype=kind)

    # The number of pairs before an item determines its distance from the end and the symbol that is sought there.
    is_pair = np.zeros((count, items), bool)
    np.put_along_axis(is_pair, pairs, values=True, axis=1)
    before = np.cumsum(is_pair, axis=1) - is_pair
    row = np.arange(count)[:, None]
    fillers = (symbols[row, before] + others) % kind.type(alphabet)

    # Fillers are written first, at the position of every item; pairs then overwrite their two positions.
    backwards = np.empty((count, length), kind)
    backwards[:, 0] = symbols[:, 0]
    backwards[row, 1 + np.arange(items) + before] = fillers
    places = 1 + pairs + np.arange(hops)
    backwards[row, places], backwards[row, places + 1] = symbols[:, 1:], symbols[:, :-1]

    return np.column_stack([backwards[:, ::-1], symbols[:, -1]])
