"""Reachability in a directed graph (Ouro paper, B.5): does a path lead from one node to another?

    <bos> n3 > n7 ; n1 > n3 ; … ; ? n1 n7 <ans> yes        asks=path
    <bos> n3 > n7 ; n1 > n3 ; … ; ? n7 n1                  asks=root

A graph is `trees` that share no node, drawn alike: a path of `distance` edges from the root, and other nodes hung below
random nodes of it. A question goes from a node of a path to the node some edges further down, on this path or on
another tree's: is it reached? Or it names a node that lies some edges below a root: which of the roots reaches it?
Nothing but following that many edges tells. Edges come in random order, names of nodes are random. Training draws the
number of edges of each question in 1..`distance`, uniformly or the more often the `nearer`, and may ask several
`questions` about a graph; the test asks one, over `asked` edges. Only answers are targets; a sixteenth of all problems
of one question, by hash, is kept out of training.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from looplm_jax.data.documents import Example
from looplm_jax.data.tasks.base import Problems
from looplm_jax.data.tasks.draws import first_draw, generator, is_held_out
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer
from looplm_jax.errors import UserError


class Asks(enum.Enum):
    """What a question is about."""

    PATH = "path"  # whether a node is reached from another
    ROOT = "root"  # which root reaches a node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forest:
    """Edges of trees as pairs of nodes, and the nodes of each tree's path from its root."""

    edges: Sequence[tuple[int, int]]
    paths: Sequence[Sequence[int]]

    def written(self) -> str:
        """The edges."""
        return " ".join(f"n{source} > n{target} ;" for source, target in self.edges)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A graph and questions about it, written out."""

    graph: str
    questions: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reachability:
    """The task and its generator. Every problem is a pure function of (stream, seed, index).

    Attributes:
      nodes: of a graph.
      trees: that it falls into.
      distance: edges of the longest path asked for.
      asked: edges between the nodes that the test asks for; 0: `distance`.
      questions: about each graph, in training.
      asks: whether there is a path, or which root reaches a node.
      nearer: draw a length in training with a probability of one over it.
      validation_items: number of held-out problems.
    """

    nodes: int = 24
    trees: int = 2
    distance: int = 8
    asked: int = 0
    questions: int = 1
    asks: Asks = Asks.PATH
    nearer: bool = False
    validation_items: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("trees", 2), ("distance", 1), ("asked", 0), ("questions", 1), ("validation_items", 0)):
            if getattr(self, name) < least:
                raise UserError(f"reachability.{name} must be at least {least}, not {getattr(self, name)}")
        if self.asked > self.distance:
            raise UserError(f"reachability.asked={self.asked} is more than distance={self.distance}; lower it")
        if self.nodes < (least := self.trees * (self.distance + 1)):
            paths = "two paths" if self.trees == 2 else f"{self.trees} paths"
            raise UserError(
                f"reachability.nodes={self.nodes} has no room for {paths} of {self.distance} edges; "
                f"make it {least} or more"
            )

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """Marks, answers and names of nodes."""
        names = (f"n{node}" for node in range(self.nodes))
        return SymbolTokenizer(["<bos>", ">", ";", "?", "<ans>", "no", "yes", *names])

    @property
    def max_tokens(self) -> int:
        """Tokens of a problem: a forest has as many edges fewer than nodes as it has trees."""
        return 1 + 4 * (self.nodes - self.trees) + self.questions * (5 if self.asks is Asks.PATH else 3)

    @property
    def chance(self) -> float:
        """Accuracy of a guess: yes or no, or any root."""
        return 1 / 2 if self.asks is Asks.PATH else 1 / self.trees

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns problems `start` to `start + count` of the training stream of a seed."""
        return Problems.of(self.train_example(seed, index) for index in range(start, start + count))

    def train_example(self, seed: int, index: int) -> Example:
        """Problem `index` of the training stream of a seed; none of its questions is a held-out one."""

        def draw(attempt: int) -> _Problem:
            random = generator("reachability-train", seed, index, attempt)
            forest = self._forest(random)
            lengths = 1 + random.choice(self.distance, size=self.questions, p=self._shares())
            questions = [draw_question(random, forest, int(length), self.asks) for length in lengths]
            return _Problem(forest.written(), questions)

        return self._example(draw, held_out=False)

    def validation_example(self, index: int) -> Example:
        """Held-out problem `index`, of one question over `asked` edges."""

        def draw(attempt: int) -> _Problem:
            random = generator("reachability-validation", index, attempt)
            forest = self._forest(random)
            return _Problem(forest.written(), [draw_question(random, forest, self.asked or self.distance, self.asks)])

        return self._example(draw, held_out=True)

    def _forest(self, random: np.random.Generator) -> Forest:
        return draw_forest(random, nodes=self.nodes, trees=self.trees, distance=self.distance)

    def _shares(self) -> Float[np.ndarray, "distance"]:
        """Of questions by length, in training."""
        weights = 1 / np.arange(1.0, self.distance + 1) if self.nearer else np.ones(self.distance)
        return weights / weights.sum()

    def _example(self, draw: Callable[[int], _Problem], *, held_out: bool) -> Example:
        def accept(problem: _Problem) -> bool:
            return all(is_held_out(f"{problem.graph} {question}") is held_out for question in problem.questions)

        name = f"reachability:nodes={self.nodes},distance={self.distance}"
        problem = first_draw(draw, accept, name, "raise nodes")
        tokens = [self.tokenizer.bos_id, *self.tokenizer.encode(problem.graph)]
        mask = [False] * len(tokens)
        for question in problem.questions:
            asked = self.tokenizer.encode(question)
            tokens += asked
            mask += [False] * (len(asked) - 1) + [True]
        return Example.of(tokens, mask)


def draw_forest(random: np.random.Generator, *, nodes: int, trees: int, distance: int) -> Forest:
    """Trees with paths of `distance` edges, edges in random order."""
    names = random.permutation(nodes).tolist()
    on_paths = trees * (distance + 1)
    paths = [names[start : start + distance + 1] for start in range(0, on_paths, distance + 1)]
    members = [list(path) for path in paths]
    edges = [edge for path in paths for edge in itertools.pairwise(path)]
    for name in names[on_paths:]:
        tree = members[int(random.integers(trees))]
        edges.append((tree[int(random.integers(len(tree)))], name))
        tree.append(name)
    return Forest(edges=[edges[place] for place in random.permutation(len(edges))], paths=paths)


def draw_question(random: np.random.Generator, forest: Forest, length: int, asks: Asks) -> str:
    """A question over `length` edges, and its answer, which is the last symbol."""
    path, other = (forest.paths[place] for place in random.permutation(len(forest.paths))[:2])
    if asks is Asks.ROOT:
        return f"? n{path[length]} n{path[0]}"
    reached = bool(random.integers(2))
    place = int(random.integers(len(path) - length))
    goal = (path if reached else other)[place + length]
    return f"? n{path[place]} n{goal} <ans> {'yes' if reached else 'no'}"
