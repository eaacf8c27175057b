"""Mano: arithmetic modulo a prime on expressions in prefix notation (Ouro paper 6.2, B.2).

A problem of length l is `<bos> <len_l> expression <ans> value`, where the expression has l operators and l + 1
operands: gen(0) is a uniformly drawn operand; gen(l) is a uniformly drawn operator followed by gen(left) and gen(l - 1
- left), with left uniform in 0..l-1. Training draws l uniformly from 1..L. The test uses l = L and scores exact match
of the value.

A hash of the expression divides the problems of length L permanently: one sixteenth is held out. Training redraws
held-out expressions and validation redraws all others, so no seed can put a validation problem into training.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from looplm_jax.data._examples import Example
from looplm_jax.data.tasks._base import Problems, draw_again, first_draw, generator, is_held_out
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError

# The order is that of the ids of tokens.
OPERATORS = ("+", "-", "*")


class Supervise(enum.Enum):
    """The tokens that are targets: all after bos, or only the value."""

    ALL = "all"
    ANSWER = "answer"


@dataclasses.dataclass(frozen=True)
class Expression:
    """An expression in prefix notation and its value."""

    symbols: tuple[str, ...]
    value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mano:
    """The Mano task and its generator. Every problem is a pure function of (stream, seed, index).

    Attributes:
      length: the largest number of operators, L, which the test uses.
      modulus: the modulus of all operations.
      supervise: the tokens that are targets.
      validation_items: the number of held-out problems.
    """

    length: int = 10
    modulus: int = 23
    supervise: Supervise = Supervise.ANSWER
    validation_items: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("modulus", 2), ("validation_items", 0)):
            if getattr(self, name) < least:
                raise UserError(f"mano.{name} must be at least {least}, not {getattr(self, name)}")

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """The vocabulary: `<bos>`, `<ans>`, `<len_1>` … `<len_L>`, the operators, and the numbers 0 … modulus - 1."""
        lengths = (f"<len_{length}>" for length in range(1, self.length + 1))
        return SymbolTokenizer(["<bos>", "<ans>", *lengths, *OPERATORS, *map(str, range(self.modulus))])

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a problem of length L: 2L + 1 for the expression and four more."""
        return 2 * self.length + 5

    @property
    def chance(self) -> float:
        """The accuracy of a uniform guess at the value."""
        return 1 / self.modulus

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns `count` training problems of a seed, with lengths uniform in 1..L and no held-out expression."""
        # The key has the range, so that every process draws the same block.
        random = generator("mano-problems", seed, start, count)
        lengths = random.integers(1, self.length + 1, size=count)

        def draw(places: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n W"]:
            return draw_expressions(random, lengths[places], self.modulus, 2 * self.length + 1)

        expressions = draw(np.arange(count))
        # Only expressions of length L can be held out.
        longest = np.flatnonzero(lengths == self.length)
        draw_again(expressions, draw, self._written, longest, self._name, "raise length or modulus")

        # Columns of a row: <bos>, <len_l>, the expression, <ans>, the value. <bos> is id 0 and <ans> is id 1.
        first_symbol = 2 + self.length  # after <bos>, <ans> and the lengths
        tokens = np.zeros((count, self.max_tokens), np.int32)
        tokens[:, 1], tokens[:, 2:-2] = 1 + lengths, first_symbol + expressions
        places, ends = np.arange(count), 2 * lengths + 3
        tokens[places, ends] = 1
        tokens[places, ends + 1] = first_symbol + len(OPERATORS) + values(expressions, self.modulus)

        # Each problem occupies the columns up to its value; the rest of the row is unused.
        columns = np.arange(self.max_tokens)
        first_target = ends + 1 if self.supervise is Supervise.ANSWER else np.ones_like(ends)
        return Problems.of_columns(tokens, columns >= first_target[:, None], columns <= ends[:, None] + 1)

    def train_example(self, seed: int, index: int) -> Example:
        """Returns training problem `index` of a seed: its length is uniform in 1..L, and it is never held out."""
        length = int(generator("train", seed, index).integers(1, self.length + 1))
        return self._example(length, self._draw("train", seed, index, length, held_out=False))

    def validation_example(self, index: int) -> Example:
        """Returns held-out problem `index`, of length L."""
        return self._example(self.length, self._draw("validation", 0, index, self.length, held_out=True))

    def _draw(self, stream: str, seed: int, index: int, length: int, *, held_out: bool) -> Expression:
        """Returns the first expression of the problem's draws that is on the requested side of the split."""

        def draw(attempt: int) -> Expression:
            return draw_expression(generator(stream, seed, index, attempt), length, self.modulus)

        return first_draw(
            draw, lambda drawn: self.is_held_out(drawn) is held_out, self._name, "raise length or modulus"
        )

    @property
    def _name(self) -> str:
        """The specification of the task, for error messages."""
        return f"mano:length={self.length},modulus={self.modulus}"

    def _written(self, expression: Int[np.ndarray, "W"]) -> str:
        """Returns an expression as text, which is hashed for the validation split."""
        return " ".join(map(self._symbols.__getitem__, expression.tolist()))

    @functools.cached_property
    def _symbols(self) -> list[str]:
        """The symbols of expressions, indexed by the numbers that `draw_expressions` uses."""
        return [*OPERATORS, *map(str, range(self.modulus))]

    def is_held_out(self, expression: Expression) -> bool:
        """Whether an expression is held out for validation. This does not depend on any seed."""
        at_full_length = len(expression.symbols) == 2 * self.length + 1
        return at_full_length and is_held_out(" ".join(expression.symbols))

    def _example(self, length: int, expression: Expression) -> Example:
        """Returns a problem as tokens, with the targets that `supervise` selects."""
        text = f"<bos> <len_{length}> {' '.join(expression.symbols)} <ans> {expression.value}"
        tokens = self.tokenizer.encode(text, special=True)
        everywhere = self.supervise is Supervise.ALL
        return Example.of(tokens, [False] + [everywhere] * (len(tokens) - 2) + [True])


# One expression at a time


def draw_expression(generator: np.random.Generator, length: int, modulus: int) -> Expression:
    """Returns gen(length) of the paper: an expression with `length` operators, and its value."""
    choices = _Choices(
        operators=iter(generator.integers(len(OPERATORS), size=length).tolist()),
        operands=iter(generator.integers(modulus, size=length + 1).tolist()),
        splits=iter(generator.random(length).tolist()),
    )
    return _expression(length, choices, modulus)


@dataclasses.dataclass(frozen=True)
class _Choices:
    """Random choices, drawn in bulk ahead of time, because separate draws would dominate the cost."""

    operators: Iterator[int]
    operands: Iterator[int]
    splits: Iterator[float]


def _expression(length: int, choices: _Choices, modulus: int) -> Expression:
    """Builds an expression from the choices, recursively."""
    if length == 0:
        operand = next(choices.operands)
        return Expression((str(operand),), operand)
    operator = OPERATORS[next(choices.operators)]
    # Uniform in 0..length-1.
    left_length = int(next(choices.splits) * length)
    left = _expression(left_length, choices, modulus)
    right = _expression(length - 1 - left_length, choices, modulus)
    value = _apply(operator, left.value, right.value) % modulus
    return Expression((operator, *left.symbols, *right.symbols), value)


def _apply(operator: str, left: int, right: int) -> int:
    """Returns the result of an operator before reduction by the modulus."""
    # Python's % gives a result in 0..modulus - 1 for negative numbers too.
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


# Many expressions at once


def draw_expressions(
    random: np.random.Generator, lengths: Int[np.ndarray, "N"], modulus: int, width: int
) -> Int[np.ndarray, "N width"]:
    """Returns gen(length) of the paper for each of N lengths, vectorized over problems.

    Args:
      random: the source of randomness.
      lengths: the number of operators of each expression.
      modulus: the number of distinct operands.
      width: columns of the result, at least `2 * max(lengths) + 1`.

    Returns:
      Expressions in prefix notation: an operator is its index, operand n is n + 3, and -1 is padding after the end.
    """
    # More choices are drawn than any problem needs, so that all problems use the same arrays.
    count = len(lengths)
    rows = np.arange(count)
    operators = random.integers(len(OPERATORS), size=(width, count))
    operands = random.integers(modulus, size=(width, count)) + len(OPERATORS)
    splits = random.random((width, count))

    # The stack of each problem holds the lengths of the subexpressions that are still to be generated, next one on top.
    stack = np.zeros((count, width + 1), np.int64)
    stack[:, 1], top = lengths, np.ones(count, np.int64)  # index 0 marks an empty stack
    symbols = np.full((width, count), -1)

    for place in range(width):
        length = stack[rows, top]
        is_operator = length > 0
        symbols[place] = np.where(is_operator, operators[place], np.where(top > 0, operands[place], -1))

        # An operator replaces its own length by those of its right and left operands; an operand is popped.
        left = (splits[place] * length).astype(np.int64)
        stack[rows, top] = np.where(is_operator, length - 1 - left, 0)
        top = np.maximum(top + np.where(is_operator, 1, -1), 0)
        stack[rows, top] = np.where(is_operator, left, stack[rows, top])

    return np.ascontiguousarray(symbols.T)


def values(expressions: Int[np.ndarray, "N W"], modulus: int) -> Int[np.ndarray, "N"]:
    """Returns the values of expressions in the encoding of `draw_expressions`.

    Each expression is evaluated from right to left with a stack, vectorized over problems.
    """
    count, width = expressions.shape
    rows = np.arange(count)
    stack, size = np.zeros((count, width + 2), np.int64), np.zeros(count, np.int64)

    for symbol in expressions.T[::-1]:
        is_operator = (symbol >= 0) & (symbol < len(OPERATORS))
        left, right = stack[rows, size - 1], stack[rows, size - 2]
        # From right to left, the left operand is pushed last and is on top of the stack.
        result = np.where(symbol == 0, left + right, np.where(symbol == 1, left - right, left * right)) % modulus
        size = size + np.where(is_operator, -1, symbol >= 0)
        # An operator or operand writes the top of the stack; padding rewrites it unchanged.
        written = np.where(is_operator, result, np.where(symbol >= 0, symbol - len(OPERATORS), stack[rows, size - 1]))
        stack[rows, size - 1] = written

    return stack[:, 0]
