"""Random directed graphs of all diameters, and their distances by breadth-first search."""

import enum

import numpy as np
from jaxtyping import Bool, Int

from looplm_jax.data.tasks._base import generator

UNREACHED = -1


class Family(enum.Enum):
    """The distribution from which a graph is drawn."""

    SPARSE = "sparse"  # every edge with the same probability, 0.5 to 4 edges per node
    TREE = "tree"  # every node below one of the last few nodes
    PATH = "path"  # a path through all nodes, and up to three more edges


def draw_digraph(seed: int, index: int, *, most_nodes: int) -> Bool[np.ndarray, "n n"]:
    """Returns graph `index` of a seed, of any family, with 2..`most_nodes` nodes, at least one edge and no self-loops.

    Returns: whether an edge leads from a node (row) to another (column).
    """
    random = generator("digraph", seed, index)
    # All families are equally likely.
    family = list(Family)[int(random.integers(len(Family)))]
    nodes = int(random.integers(2, most_nodes + 1))

    while not (edges := _draw(random, family, nodes)).any():
        pass
    # Otherwise the numbers of the nodes would reveal the order in which a tree or path was built.
    names = random.permutation(nodes)
    return edges[np.ix_(names, names)]


def distances(edges: Bool[np.ndarray, "n n"]) -> Int[np.ndarray, "n n"]:
    """Returns the number of edges on the shortest path between all nodes, `UNREACHED` if there is none."""
    follows = [np.flatnonzero(row).tolist() for row in edges]
    return np.array([_distances_from(start, follows) for start in range(len(edges))])


def _draw(random: np.random.Generator, family: Family, nodes: int) -> Bool[np.ndarray, "n n"]:
    """Draws the edges of a graph, whose nodes are in the order of construction."""
    match family:
        case Family.SPARSE:
            edges = random.random((nodes, nodes)) < random.uniform(0.5, 4) / nodes
        case Family.TREE:
            edges, window = np.zeros((nodes, nodes), bool), int(random.integers(1, nodes + 1))
            for node in range(1, nodes):
                # A small window makes deep trees, a large one shallow trees.
                edges[random.integers(max(0, node - window), node), node] = True
        case Family.PATH:
            edges = np.eye(nodes, k=1, dtype=bool)
            chords = int(random.integers(4))
            edges[random.integers(nodes, size=chords), random.integers(nodes, size=chords)] = True

    np.fill_diagonal(edges, val=False)
    return edges


def _distances_from(start: int, follows: list[list[int]]) -> list[int]:
    """Returns the distances from one node by breadth-first search."""
    found = [UNREACHED] * len(follows)
    found[start], front = 0, [start]
    for node in front:  # grows during the iteration
        for following in follows[node]:
            if found[following] == UNREACHED:
                found[following] = found[node] + 1
                front.append(following)
    return found
