"""Reachability in a directed graph (Ouro paper, B.5): does a path lead from one node to another?

    <bos> n3 > n7 ; n1 > n3 ; … ; ? n1 n7 <ans> yes

A graph is two trees that share no node, drawn alike: a path of `distance` edges, and other nodes hung below random
nodes of it. The question asks for the end of the path that begins at its first node, or for the end of the other
tree's path: nothing but following `distance` edges tells them apart. Edges come in random order, names of nodes are
random. Training draws the distance uniformly in 1..`distance`; the test is at `distance`. Only the answer is a
target; a sixteenth of all problems, by hash, is kept out of training.
"""

import dataclasses
import functools
import itertools

import numpy as np

from looplm_jax.data.documents import Example
from looplm_jax.data.tasks.draws import first_draw, generator, is_held_out
from looplm_jax.data.tokenizers.symbols import SymbolTokenizer
from looplm_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Edges as pairs of nodes, from where to where it is asked, and whether there is a path."""

    edges: tuple[tuple[int, int], ...]
    start: int
    goal: int
    reachable: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reachability:
    """The task and its generator. Every problem is a pure function of (stream, seed, index)."""

    nodes: int = 24
    distance: int = 8
    validation_items: int = 1024

    def __post_init__(self) -> None:
        for name, least in (("distance", 1), ("validation_items", 0)):
            if getattr(self, name) < least:
                raise UserError(f"reachability.{name} must be at least {least}, not {getattr(self, name)}")
        if self.nodes < 2 * (self.distance + 1):
            raise UserError(
                f"reachability.nodes={self.nodes} has no room for two paths of {self.distance} edges; "
                f"make it {2 * (self.distance + 1)} or more"
            )

    @functools.cached_property
    def tokenizer(self) -> SymbolTokenizer:
        """Marks, answers and names of nodes."""
        names = (f"n{node}" for node in range(self.nodes))
        return SymbolTokenizer(["<bos>", ">", ";", "?", "<ans>", "no", "yes", *names])

    @property
    def max_tokens(self) -> int:
        """Tokens of a problem: a forest of two trees has two edges fewer than nodes."""
        return 1 + 4 * (self.nodes - 2) + 5

    @property
    def chance(self) -> float:
        """Accuracy of a guess."""
        return 1 / 2

    def train_example(self, seed: int, index: int) -> Example:
        """Problem `index` of the training stream of a seed, never a held-out one."""
        distance = int(generator("reachability-train", seed, index).integers(1, self.distance + 1))
        return self._problem("reachability-train", seed, index, distance, held_out=False)

    def validation_example(self, index: int) -> Example:
        """Held-out problem `index`, at the full distance."""
        return self._problem("reachability-validation", 0, index, self.distance, held_out=True)

    def _problem(self, stream: str, seed: int, index: int, distance: int, *, held_out: bool) -> Example:
        def draw(attempt: int) -> str:
            random = generator(stream, seed, index, attempt)
            return _written(draw_question(random, nodes=self.nodes, distance=distance))

        def accept(problem: str) -> bool:
            return is_held_out(problem) is held_out

        name = f"reachability:nodes={self.nodes},distance={self.distance}"
        tokens = self.tokenizer.encode(first_draw(draw, accept, name, "raise nodes"))
        return Example.of(tokens, [False] * (len(tokens) - 1) + [True])


def draw_question(random: np.random.Generator, *, nodes: int, distance: int) -> Question:
    """Two trees with paths of `distance` edges, and a question about the first one's root."""
    names = random.permutation(nodes).tolist()
    paths = names[: distance + 1], names[distance + 1 : 2 * (distance + 1)]
    trees = [list(path) for path in paths]
    edges = [edge for path in paths for edge in itertools.pairwise(path)]
    for name in names[2 * (distance + 1) :]:
        tree = trees[int(random.integers(2))]
        edges.append((tree[int(random.integers(len(tree)))], name))
        tree.append(name)
    reachable = bool(random.integers(2))
    return Question(
        edges=tuple(edges[place] for place in random.permutation(len(edges))),
        start=paths[0][0],
        goal=paths[0 if reachable else 1][-1],
        reachable=reachable,
    )


def _written(question: Question) -> str:
    edges = " ".join(f"n{source} > n{target} ;" for source, target in question.edges)
    answer = "yes" if question.reachable else "no"
    return f"<bos> {edges} ? n{question.start} n{question.goal} <ans> {answer}"
