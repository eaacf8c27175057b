"""Addition of n numbers (Saunshi et al., arXiv 2502.17416).

A problem is `<end> 3 1 5 + 1 2 0 + 0 4 5 + 8 2 4 = 1 3 0 4 <end>`: operands of `digits` digits with leading zeros,
their sum without leading zeros, and an end mark. Training draws n uniformly from the powers of two up to `longest`. The
test uses n = `terms`, which may be a number that training never uses; it is scored by exact match of all tokens after
the equals sign. One sixteenth of all problems, selected by hash, is held out of training.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int

from looplm_jax.data._examples import Example
from looplm_jax.data.tasks._base import Problems, draw_again, first_draw, generator, is_held_out
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError

END = "<end>"
_SIGNS = 11, 12  # ids of "+" and "="; a digit is one more than its value
_WRITTEN = np.frombuffer(b" 0123456789+=", np.uint8)  # ids as characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Addition:
    """The addition task and its generator. Every problem is a pure function of (stream, seed, index).

    Attributes:
      longest: the largest number of operands in training, a power of two.
      terms: the number of operands in the test.
      digits: the number of digits of an operand, 1 to 9.
      validation_items: the number of held-out problems.
    """

    longest: int = 32
    terms: int = 32
    digits: int = 3
    validation_items: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("longest", 2), ("terms", 1), ("digits", 1), ("validation_items", 0)):
            if getattr(self, name) < least:
                raise UserError(f"addition.{name} must be at least {least}, not {getattr(self, name)}")
        # A power of two has a single bit.
        if self.longest & (self.longest - 1):
            raise UserError(f"addition.longest must be a power of two, not {self.longest}")
        if self.digits > 9:
            raise UserError(f"addition.digits must be at most 9, not {self.digits}")

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """The vocabulary: the end mark, the ten digits and the two signs."""
        return SymbolTokenizer([END, *map(str, range(10)), "+", "="])

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of operands that a training problem may have: 2, 4, 8, … `longest`."""
        return tuple(2**power for power in range(1, self.longest.bit_length()))

    @property
    def max_tokens(self) -> int:
        """The number of tokens of the longest problem: digits and signs of all operands, the sum, and the two marks."""
        return self._columns(max(self.longest, self.terms))

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns `count` training problems of a seed.

        None is held out; the numbers of operands are uniform over `counts`.
        """
        # The key has the range, so that every process draws the same block.
        random = generator("addition-problems", seed, start, count)
        terms = random.choice(self.counts, size=count)
        shape = count, self._columns(self.longest)
        tokens, used, targets = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)

        # Problems with the same number of operands have the same number of columns, so each group is drawn at once.
        for adds in self.counts:
            places = np.flatnonzero(terms == adds)
            question, answer = self._sums(random, len(places), adds)
            width, end = question.shape[1], question.shape[1] + answer.shape[1]
            tokens[places, :width], tokens[places, width:end] = question, answer
            used[places, :width] = True
            # Leading zeros of the sum are dropped. The last digit and the mark always stay, also if the sum is 0.
            used[places, width:end] = np.logical_or.accumulate(answer > 1, axis=1)
            used[places, end - 2 : end] = True
            targets[places, width:end] = True

        return Problems.of_columns(tokens, targets, used)

    def train_example(self, seed: int, index: int) -> Example:
        """Returns problem `index` of the training stream of a seed. It is never a held-out one."""
        count = int(generator("addition-train", seed, index).choice(self.counts))
        return self._example(self._draw("addition-train", seed, index, count, held_out=False))

    def validation_example(self, index: int) -> Example:
        """Returns held-out problem `index`, which adds `terms` numbers."""
        return self._example(self._draw("addition-validation", 0, index, self.terms, held_out=True))

    def _columns(self, terms: int) -> int:
        """Returns the number of columns for a problem of `terms` numbers, with leading zeros in the sum."""
        return terms * (self.digits + 1) + len(str(terms * (10**self.digits - 1))) + 2

    def _sums(
        self, random: np.random.Generator, count: int, terms: int
    ) -> tuple[Int[np.ndarray, "N Q"], Int[np.ndarray, "N A"]]:
        """Draws `count` problems that add `terms` numbers each.

        Returns:
          Token ids of the questions, up to the equals sign, and of the answers, with leading zeros and the end mark.
        """

        def draw(places: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n Q"]:
            # Each number is followed by a plus sign, or by the equals sign after the last one.
            numbers = random.integers(10**self.digits, size=(len(places), terms))
            written = np.full((len(places), terms, self.digits + 1), _SIGNS[0])
            written[..., :-1] = 1 + _digits(numbers, self.digits)
            written[:, -1, -1] = _SIGNS[1]
            end = np.zeros((len(places), 1), written.dtype)
            return np.concatenate([end, written.reshape(len(places), -1)], axis=1)

        def written(question: Int[np.ndarray, "Q"]) -> str:
            return _WRITTEN[question[1:-1]].tobytes().decode()

        every = np.arange(count)
        questions = draw(every)
        draw_again(questions, draw, written, every, f"addition:digits={self.digits}", "raise digits")

        digits = questions[:, 1:].reshape(count, terms, self.digits + 1)[..., :-1] - 1
        # The sum of each digit's column, weighted by its power of ten, avoids parsing the numbers again.
        sums = (digits.sum(axis=1) * 10 ** np.arange(self.digits - 1, -1, -1)).sum(axis=1)
        answers = 1 + _digits(sums, len(str(terms * (10**self.digits - 1))))
        return questions, np.pad(answers, [(0, 0), (0, 1)])

    def _draw(self, stream: str, seed: int, index: int, count: int, *, held_out: bool) -> tuple[int, ...]:
        """Returns the operands of one problem on the requested side of the validation split."""

        def draw(attempt: int) -> tuple[int, ...]:
            return tuple(generator(stream, seed, index, attempt).integers(10**self.digits, size=count).tolist())

        def accept(numbers: tuple[int, ...]) -> bool:
            return is_held_out(self._written(numbers)) is held_out

        return first_draw(draw, accept, f"addition:digits={self.digits}", "raise digits")

    def _written(self, numbers: tuple[int, ...]) -> str:
        """Returns the question as text, which is hashed for the validation split."""
        return "+".join(f"{number:0{self.digits}d}" for number in numbers)

    def _example(self, numbers: tuple[int, ...]) -> Example:
        """Returns the problem as tokens. The sum and the end mark are the targets."""
        # `str` writes the sum without leading zeros.
        question, answer = [END, *self._written(numbers), "="], [*str(sum(numbers)), END]
        tokens = self.tokenizer.encode(" ".join(question + answer), special=True)
        return Example.of(tokens, [False] * len(question) + [True] * len(answer))


def _digits(numbers: Int[np.ndarray, "*N"], count: int) -> Int[np.ndarray, "*N count"]:
    """Returns the last `count` decimal digits of each number, the most significant first."""
    return numbers[..., None] // 10 ** np.arange(count - 1, -1, -1) % 10
