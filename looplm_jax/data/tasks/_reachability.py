"""Reachability in a directed graph (Ouro paper, B.5): is there a path from one node to another?

    <bos> n3 > n7 ; n1 > n3 ; … ; ? n1 n7 <ans> yes        asks=path
    <bos> n3 > n7 ; n1 > n3 ; … ; ? n7 n1                  asks=root

A graph consists of `trees` disjoint trees with the same distribution: a path of `distance` edges from the root, and
further nodes attached below random nodes. A question takes one of two forms. It names a node of a path and the node
some edges further down, on this path or on that of another tree, and asks whether the second is reachable. Or it names
a node some edges below a root, and asks which of the roots reaches it. Following that many edges is the only way to
tell. Edges are in random order and nodes have random names.

Training draws the number of edges of each question from 1..`distance`, uniformly or, with `nearer`, with a preference
for short ones, and may ask several `questions` about a graph. The test asks one question over `asked` edges. Only
answers are targets. One sixteenth of all problems with one question, selected by hash, is held out of training.
"""

import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from looplm_jax.data._examples import Example
from looplm_jax.data.tasks._base import Problems, first_draw, generator, is_held_out
from looplm_jax.data.tokenizers._symbols import SymbolTokenizer
from looplm_jax.errors import UserError


class Asks(enum.Enum):
    """The form of a question."""

    PATH = "path"  # whether a node is reachable from another
    ROOT = "root"  # which root reaches a node


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forest:
    """The edges of several trees as pairs of nodes, and the nodes of each tree's main path, from its root."""

    edges: Sequence[tuple[int, int]]
    paths: Sequence[Sequence[int]]

    def written(self) -> str:
        """Returns the edges as text."""
        return " ".join(f"n{source} > n{target} ;" for source, target in self.edges)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """A graph and questions about it, as text."""

    graph: str
    questions: Sequence[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reachability:
    """The reachability task and its generator. Every problem is a pure function of (stream, seed, index).

    Attributes:
      nodes: the number of nodes of a graph.
      trees: the number of trees of a graph.
      distance: the number of edges of the longest path that a question may require.
      asked: the number of edges between the two nodes of a test question; 0 for `distance`.
      questions: the number of questions about each graph in training.
      asks: the form of questions.
      nearer: in training, draw each number of edges with a probability proportional to its inverse.
      validation_items: the number of held-out problems.
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
        # Every tree has a path of `distance` edges.
        if self.nodes < (least := self.trees * (self.distance + 1)):
            paths = "two paths" if self.trees == 2 else f"{self.trees} paths"
            raise UserError(
                f"reachability.nodes={self.nodes} has no room for {paths} of {self.distance} edges; "
                f"make it {least} or more"
            )

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """The vocabulary: marks, answers and names of nodes."""
        names = (f"n{node}" for node in range(self.nodes))
        return SymbolTokenizer(["<bos>", ">", ";", "?", "<ans>", "no", "yes", *names])

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a problem. A forest has `nodes - trees` edges of four tokens each."""
        # A question with its answer: `? a b <ans> yes`, or `? b root`.
        return 1 + 4 * (self.nodes - self.trees) + self.questions * (5 if self.asks is Asks.PATH else 3)

    @property
    def chance(self) -> float:
        """The accuracy of a uniform guess: between yes and no, or among the roots."""
        return 1 / 2 if self.asks is Asks.PATH else 1 / self.trees

    def train_problems(self, seed: int, start: int, count: int) -> Problems:
        """Returns problems `start` to `start + count` of the training stream of a seed."""
        return Problems.of(self.train_example(seed, index) for index in range(start, start + count))

    def train_example(self, seed: int, index: int) -> Example:
        """Returns problem `index` of the training stream of a seed. None of its questions is a held-out one."""

        def draw(attempt: int) -> _Problem:
            # Each attempt has a key of its own, so that a rejected problem does not influence others.
            random = generator("reachability-train", seed, index, attempt)
            forest = self._forest(random)
            lengths = 1 + random.choice(self.distance, size=self.questions, p=self._shares())
            questions = [draw_question(random, forest, int(length), self.asks) for length in lengths]
            return _Problem(forest.written(), questions)

        return self._example(draw, held_out=False)

    def validation_example(self, index: int) -> Example:
        """Returns held-out problem `index`, with one question over `asked` edges."""

        def draw(attempt: int) -> _Problem:
            random = generator("reachability-validation", index, attempt)
            forest = self._forest(random)
            return _Problem(forest.written(), [draw_question(random, forest, self.asked or self.distance, self.asks)])

        return self._example(draw, held_out=True)

    def _forest(self, random: np.random.Generator) -> Forest:
        """Returns a random graph of the configured size."""
        return draw_forest(random, nodes=self.nodes, trees=self.trees, distance=self.distance)

    def _shares(self) -> Float[np.ndarray, "distance"]:
        """Returns the probability of each question length, 1 to `distance`, in training."""
        # Short paths are a curriculum: long ones are composed of them.
        weights = 1 / np.arange(1.0, self.distance + 1) if self.nearer else np.ones(self.distance)
        return weights / weights.sum()

    def _example(self, draw: Callable[[int], _Problem], *, held_out: bool) -> Example:
        """Returns the first problem on the requested side of the split as tokens, with the answers as targets."""

        def accept(problem: _Problem) -> bool:
            return all(is_held_out(f"{problem.graph} {question}") is held_out for question in problem.questions)

        name = f"reachability:nodes={self.nodes},distance={self.distance}"
        problem = first_draw(draw, accept, name, "raise nodes")

        tokens = [self.tokenizer.bos_id, *self.tokenizer.encode(problem.graph)]
        mask = [False] * len(tokens)
        for question in problem.questions:
            # The answer is the last token of a question.
            asked = self.tokenizer.encode(question)
            tokens += asked
            mask += [False] * (len(asked) - 1) + [True]

        return Example.of(tokens, mask)


# Random graphs and questions


def draw_forest(random: np.random.Generator, *, nodes: int, trees: int, distance: int) -> Forest:
    """Returns a forest whose trees have main paths of `distance` edges, with its edges in random order."""
    names = random.permutation(nodes).tolist()

    on_paths = trees * (distance + 1)
    paths = [names[start : start + distance + 1] for start in range(0, on_paths, distance + 1)]
    members = [list(path) for path in paths]
    edges = [edge for path in paths for edge in itertools.pairwise(path)]

    # The remaining nodes are attached below a random node of a random tree.
    for name in names[on_paths:]:
        tree = members[int(random.integers(trees))]
        edges.append((tree[int(random.integers(len(tree)))], name))
        tree.append(name)

    return Forest(edges=[edges[place] for place in random.permutation(len(edges))], paths=paths)


def draw_question(random: np.random.Generator, forest: Forest, length: int, asks: Asks) -> str:
    """Returns a question over `length` edges with its answer, which is the last symbol."""
    # A negative question asks about the path of another tree, at the same depth, so that depth does not give it away.
    path, other = (forest.paths[place] for place in random.permutation(len(forest.paths))[:2])
    if asks is Asks.ROOT:
        return f"? n{path[length]} n{path[0]}"
    reached = bool(random.integers(2))
    # The start is uniform over the nodes that have a node `length` edges further down.
    place = int(random.integers(len(path) - length))
    goal = (path if reached else other)[place + length]
    return f"? n{path[place]} n{goal} <ans> {'yes' if reached else 'no'}"
