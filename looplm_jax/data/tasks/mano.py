"""Mano: arithmetic modulo a prime on expressions in prefix order (Ouro paper 6.2, B.2).

A problem of length l is `<bos> <len_l> expression <ans> value`, where the expression holds l operators and l + 1
operands: gen(0) is an operand, uniform; gen(l) is an operator, uniform, and then gen(left) gen(l - 1 - left) with left
uniform in 0..l-1. Training draws l uniform in 1..L; the test is at l = L, exact match of the value.

Problems of length L are divided once and for all by the hash of the expression: a sixteenth of them is held out.
Training redraws an expression that is held out, validation one that is not, so no seed lets a validation problem into
training.
"""

import dataclasses
import enum
import functools
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from looplm_jax.data.documents import Example
from looplm_jax.data.tasks.base import Problems
from looplm_jax.data.tasks.draws import draw_again, first_draw, generator, is_held_out
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer
from looplm_jax.errors import UserError

OPERATORS = ("+", "-", "*")


class Supervise(enum.Enum):
    """Which tokens are targets: every one after bos, or the value only."""

    ALL = "all"
    ANSWER = "answer"


@dataclasses.dataclass(frozen=True)
class Expression:
    """An expression in prefix order and its value."""

    symbols: tuple[str, ...]
    value: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mano:
    """The task and its generator. Every problem is a pure function of (stream, seed, index)."""

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
        """`<bos>`, `<ans>`, `<len_1>` … `<len_L>`, the operators, and the numbers 0 … modulus - 1."""
        lengths = (f"<len_{length}>" for length in range(1, self.length + 1))
        return SymbolTokenizer(["<bos>", "<ans>", *lengths, *OPERATORS, *map(str, range(self.modulus))])

    @property
    def max_tokens(self) -> int:
        """Tokens of a problem of length L: 2L + 1 of the expression and four more."""
        return 2 * self.length + 5

    @property
    def chance(self) -> float:
        """Accuracy of a uniform guess at the value."""
        return 1 / self.modulus

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns training problems of a seed: lengths uniform in 1..L, no expression held out."""
        random = generator("mano-problems", seed, start, count)
        lengths = random.integers(1, self.length + 1, size=count)

        def draw(places: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n W"]:
            return draw_expressions(random, lengths[places], self.modulus, 2 * self.length + 1)

        expressions = draw(np.arange(count))
        longest = np.flatnonzero(lengths == self.length)
        draw_again(expressions, draw, self._written, longest, self._name, "raise length or modulus")

        first_symbol = 2 + self.length  # behind <bos>, <ans> and the lengths
        tokens = np.zeros((count, self.max_tokens), np.int32)
        tokens[:, 1], tokens[:, 2:-2] = 1 + lengths, first_symbol + expressions
        places, ends = np.arange(count), 2 * lengths + 3
        tokens[places, ends] = 1
        tokens[places, ends + 1] = first_symbol + len(OPERATORS) + values(expressions, self.modulus)
        columns = np.arange(self.max_tokens)
        first_target = ends + 1 if self.supervise is Supervise.ANSWER else np.ones_like(ends)
        return Problems.of_columns(tokens, columns >= first_target[:, None], columns <= ends[:, None] + 1)

    def train_example(self, seed: int, index: int) -> Example:
        """Problem `index` of the training stream of a seed: length uniform in 1..L, never a held-out one."""
        length = int(generator("train", seed, index).integers(1, self.length + 1))
        return self._example(length, self._draw("train", seed, index, length, held_out=False))

    def validation_example(self, index: int) -> Example:
        """Held-out problem `index`, of length L."""
        return self._example(self.length, self._draw("validation", 0, index, self.length, held_out=True))

    def _draw(self, stream: str, seed: int, index: int, length: int, *, held_out: bool) -> Expression:
        """The first expression of its own sequence of draws that is on the asked side of the split."""

        def draw(attempt: int) -> Expression:
            return draw_expression(generator(stream, seed, index, attempt), length, self.modulus)

        return first_draw(
            draw, lambda drawn: self.is_held_out(drawn) is held_out, self._name, "raise length or modulus"
        )

    @property
    def _name(self) -> str:
        return f"mano:length={self.length},modulus={self.modulus}"

    def _written(self, expression: Int[np.ndarray, "W"]) -> str:
        return " ".join(map(self._symbols.__getitem__, expression.tolist()))

    @functools.cached_property
    def _symbols(self) -> list[str]:
        """The symbols of expressions by the numbers that `draw_expressions` gives them."""
        return [*OPERATORS, *map(str, range(self.modulus))]

    def is_held_out(self, expression: Expression) -> bool:
        """Whether the expression belongs to validation, whatever the seed."""
        at_full_length = len(expression.symbols) == 2 * self.length + 1
        return at_full_length and is_held_out(" ".join(expression.symbols))

    def _example(self, length: int, expression: Expression) -> Example:
        text = f"<bos> <len_{length}> {' '.join(expression.symbols)} <ans> {expression.value}"
        tokens = self.tokenizer.encode(text, special=True)
        everywhere = self.supervise is Supervise.ALL
        return Example.of(tokens, [False] + [everywhere] * (len(tokens) - 2) + [True])


def draw_expression(generator: np.random.Generator, length: int, modulus: int) -> Expression:
    """gen(length) of the paper: an expression of `length` operators, and its value."""
    choices = _Choices(
        operators=iter(generator.integers(len(OPERATORS), size=length).tolist()),
        operands=iter(generator.integers(modulus, size=length + 1).tolist()),
        splits=iter(generator.random(length).tolist()),
    )
    return _expression(length, choices, modulus)


@dataclasses.dataclass(frozen=True)
class _Choices:
    """Random choices drawn ahead, in bulk; one at a time they would take most of the time."""

    operators: Iterator[int]
    operands: Iterator[int]
    splits: Iterator[float]


def _expression(length: int, choices: _Choices, modulus: int) -> Expression:
    if length == 0:
        operand = next(choices.operands)
        return Expression((str(operand),), operand)
    operator = OPERATORS[next(choices.operators)]
    left_length = int(next(choices.splits) * length)
    left = _expression(left_length, choices, modulus)
    right = _expression(length - 1 - left_length, choices, modulus)
    value = _apply(operator, left.value, right.value) % modulus
    return Expression((operator, *left.symbols, *right.symbols), value)


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def draw_expressions(
    random: np.random.Generator, lengths: Int[np.ndarray, "N"], modulus: int, width: int
) -> Int[np.ndarray, "N width"]:
    """Returns gen(length) of the paper for each length, in prefix order: an operator by its number, an operand n as
    n + 3, and -1 behind the end.

    The stack of each problem holds the lengths of the expressions to come, the next one on top.
    """
    count = len(lengths)
    rows = np.arange(count)
    operators = random.integers(len(OPERATORS), size=(width, count))
    operands = random.integers(modulus, size=(width, count)) + len(OPERATORS)
    splits = random.random((width, count))
    stack = np.zeros((count, width + 1), np.int64)
    stack[:, 1], top = lengths, np.ones(count, np.int64)  # the lowest place stands for the end
    symbols = np.full((width, count), -1)
    for place in range(width):
        length = stack[rows, top]
        is_operator = length > 0
        symbols[place] = np.where(is_operator, operators[place], np.where(top > 0, operands[place], -1))
        left = (splits[place] * length).astype(np.int64)
        stack[rows, top] = np.where(is_operator, length - 1 - left, 0)
        top = np.maximum(top + np.where(is_operator, 1, -1), 0)
        stack[rows, top] = np.where(is_operator, left, stack[rows, top])
    return np.ascontiguousarray(symbols.T)


def values(expressions: Int[np.ndarray, "N W"], modulus: int) -> Int[np.ndarray, "N"]:
    """Returns the values of expressions as `draw_expressions` gives them, read from the right with a stack for each."""
    count, width = expressions.shape
    rows = np.arange(count)
    stack, size = np.zeros((count, width + 2), np.int64), np.zeros(count, np.int64)
    for symbol in expressions.T[::-1]:
        is_operator = (symbol >= 0) & (symbol < len(OPERATORS))
        left, right = stack[rows, size - 1], stack[rows, size - 2]
        result = np.where(symbol == 0, left + right, np.where(symbol == 1, left - right, left * right)) % modulus
        size = size + np.where(is_operator, -1, symbol >= 0)
        written = np.where(is_operator, result, np.where(symbol >= 0, symbol - len(OPERATORS), stack[rows, size - 1]))
        stack[rows, size - 1] = written
    return stack[:, 0]
