"""Random directed graphs of all diameters, and the distances in them by breadth-first search."""

import enum

import numpy as np
from jaxtyping import Bool, Int

from looplm_jax.data.tasks.draws import generator

UNREACHED = -1


class Family(enum.Enum):
    """What a graph is drawn as."""

    SPARSE = "sparse"  # every edge with the same probability, 0.5 to 4 edges a node
    TREE = "tree"  # every node below one of the last few
    PATH = "path"  # a path through all nodes, and up to three edges more


def draw_digraph(seed: int, index: int, *, most_nodes: int) -> Bool[np.ndarray, "n n"]:
    """Graph `index` of a seed: of 2..`most_nodes` nodes, any family, at least one edge, none from a node to itself.

    Returns: whether an edge leads from a node (row) to another (column).
    """
    random = generator("digraph", seed, index)
    family = list(Family)[int(random.integers(len(Family)))]
    nodes = int(random.integers(2, most_nodes + 1))
    while not (edges := _draw(random, family, nodes)).any():
        pass
    names = random.permutation(nodes)
    return edges[np.ix_(names, names)]


def distances(edges: Bool[np.ndarray, "n n"]) -> Int[np.ndarray, "n n"]:
    """Edges of the shortest path from each node to each, `UNREACHED` where there is none."""
    follows = [np.flatnonzero(row).tolist() for row in edges]
    return np.array([_distances_from(start, follows) for start in range(len(edges))])


def _draw(random: np.random.Generator, family: Family, nodes: int) -> Bool[np.ndarray, "n n"]:
    match family:
        case Family.SPARSE:
            edges = random.random((nodes, nodes)) < random.uniform(0.5, 4) / nodes
        case Family.TREE:
            edges, window = np.zeros((nodes, nodes), bool), int(random.integers(1, nodes + 1))
            for node in range(1, nodes):
                edges[random.integers(max(0, node - window), node), node] = True
        case Family.PATH:
            edges = np.eye(nodes, k=1, dtype=bool)
            chords = int(random.integers(4))
            edges[random.integers(nodes, size=chords), random.integers(nodes, size=chords)] = True
    np.fill_diagonal(edges, val=False)
    return edges


def _distances_from(start: int, follows: list[list[int]]) -> list[int]:
    found = [UNREACHED] * len(follows)
    found[start], front = 0, [start]
    for node in front:  # grows as it is walked
        for following in follows[node]:
            if found[following] == UNREACHED:
                found[following] = found[node] + 1
                front.append(following)
    return found
