"""p-hop induction (Sanford et al., arXiv 2402.09268; Saunshi et al., arXiv 2502.17416).

With `find_1(v, i) = max({0} ∪ {j <= i : v[j-1] = v[i]})` and positions counted from 1, the answer to a sequence v of
n symbols is `v[find_p(v, n)]`, where find_p applies find_1 p times: look up where the last symbol stood before, take
what followed, look that up, and so on. The problem is `v[1] … v[n] answer`, and only the answer is a target.

`chain`: p pairs of neighbouring symbols are laid out among fillers at random places; fillers are uniform among those
that do not break a hop, so each hop moves, and there are always p of them. `uniform`: symbols are independent. A
sequence that ends in two equal symbols is then degenerate, as every hop stays where it is, which one induction head
answers; so is one whose hops end before p (no symbol before, answered by `<none>`).

With `fewest`, a curriculum that small models need: training draws p uniform in fewest..hops, each problem begins with
`<hops_p>`, and the test is at p = hops.
"""

import dataclasses
import enum
import functools
from collections.abc import Sequence

import numpy as np

from looplm_jax.data.documents import Example
from looplm_jax.data.tasks.draws import first_draw, generator, is_held_out
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer
from looplm_jax.errors import UserError

NONE = "<none>"


class Sequences(enum.Enum):
    """How sequences are drawn."""

    CHAIN = "chain"
    UNIFORM = "uniform"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PHop:
    """The task and its generator. Every problem is a pure function of (stream, seed, index)."""

    hops: int = 16
    fewest: int = 0  # of training; 0: always `hops`, unsaid
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
        """`<none>`, the symbols of the alphabet and, where it varies, the number of hops."""
        numbers = range(1, self.hops + 1) if self.fewest else ()
        return SymbolTokenizer([NONE, *(f"s{symbol}" for symbol in range(self.alphabet)), *map(_said, numbers)])

    @property
    def max_tokens(self) -> int:
        """Tokens of a problem."""
        return self.length + 1 + bool(self.fewest)

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess at the symbol."""
        return 1 / self.alphabet

    def train_example(self, seed: int, index: int) -> Example:
        """Problem `index` of the training stream of a seed, never a held-out one."""
        hops = self.hops
        if self.fewest:
            hops = int(generator("phop-hops", seed, index).integers(self.fewest, self.hops + 1))
        return self._problem("phop-train", seed, index, hops, held_out=False)

    def validation_example(self, index: int) -> Example:
        """Held-out problem `index`, of `hops` hops."""
        return self._problem("phop-validation", 0, index, self.hops, held_out=True)

    def _problem(self, stream: str, seed: int, index: int, hops: int, *, held_out: bool) -> Example:
        def draw(attempt: int) -> list[int]:
            random = generator(stream, seed, index, attempt)
            if self.sequences is Sequences.UNIFORM:
                return random.integers(self.alphabet, size=self.length).tolist()
            return draw_chain(random, hops=hops, length=self.length, alphabet=self.alphabet)

        def accept(drawn: list[int]) -> bool:
            return is_held_out(" ".join(map(str, drawn))) is held_out

        sequence = first_draw(draw, accept, f"phop:length={self.length}", "raise length")
        place = find(sequence, len(sequence), hops)
        answer = 0 if place == 0 else 1 + sequence[place - 1]
        said = self.tokenizer.encode(_said(hops)) if self.fewest else []
        question = [*said, *(1 + symbol for symbol in sequence)]
        return Example.of([*question, answer], [False] * len(question) + [True])


def _said(hops: int) -> str:
    return f"<hops_{hops}>"


def find(sequence: Sequence[int], start: int, hops: int) -> int:
    """find_p of the paper, from position `start`; positions count from 1, and 0 says that there is none."""
    place = start
    for _ in range(hops):
        if place == 0:
            return 0
        places = (j for j in range(place, 1, -1) if sequence[j - 2] == sequence[place - 1])
        place = next(places, 0)
    return place


def draw_chain(random: np.random.Generator, *, hops: int, length: int, alphabet: int) -> list[int]:
    """A sequence whose `hops` hops from the end all move.

    From the end: the last symbol; then, for each hop, fillers that are not the symbol looked up, and the pair of that
    symbol and another one, which is looked up next; at last fillers of any kind.
    """
    symbols = [int(random.integers(alphabet))]
    for _ in range(hops):
        symbols.append((symbols[-1] + int(random.integers(1, alphabet))) % alphabet)
    fillers = length - 1 - 2 * hops
    # Where the pairs stand among fillers and pairs, every choice alike.
    pairs = np.sort(random.permutation(fillers + hops)[:hops])
    gaps = np.diff(pairs, prepend=-1) - 1
    backwards = [symbols[0]]
    for gap, sought, found in zip(gaps, symbols[:-1], symbols[1:], strict=True):
        backwards += ((sought + random.integers(1, alphabet, size=gap)) % alphabet).tolist()
        backwards += [found, sought]
    backwards += random.integers(alphabet, size=length - len(backwards)).tolist()
    return backwards[::-1]
