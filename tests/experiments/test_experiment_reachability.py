"""Reachability: the constructed transformer agrees with breadth-first search after the predicted number of loops."""

import functools
import json

import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.__main__ import main
from experiments.frame import Record, Scale
from experiments.reachability import REACHABILITY
from experiments.reachability_construction import (
    UNREACHED,
    Construction,
    distances,
    draw_digraph,
    initial_state,
    loops_needed,
    reachability_weights,
    reached_after,
    try_construction,
)
from looplm_jax.data.tasks import make_task

NODES, LOOPS = 6, 5
RELATIONS = hnp.arrays(bool, (NODES, NODES))


@functools.partial(jax.jit, static_argnames="loops")
def built(knowledge, context, *, loops=LOOPS):
    """Returns the pairs that the constructed weights find after 0, 1, … loops."""
    return reached_after(reachability_weights(knowledge), initial_state(context), loops=loops)


def found_after(knowledge, context):
    return np.asarray(built(knowledge, context | np.eye(NODES, dtype=bool)))


def closure(edges):
    """Warshall's algorithm."""
    reached = edges | np.eye(len(edges), dtype=bool)
    for middle in range(len(edges)):
        reached |= reached[:, middle, None] & reached[middle]
    return reached


@given(edges=RELATIONS)
def test_breadth_first_search_finds_the_closure_and_obeys_the_triangle_inequality(edges):
    lengths = distances(edges)
    assert np.array_equal(lengths != UNREACHED, closure(edges))
    assert np.array_equal(lengths == 1, edges & ~np.eye(NODES, dtype=bool))
    finite = np.where(lengths == UNREACHED, np.inf, lengths)
    assert np.all(finite <= (finite[:, :, None] + finite[None]).min(axis=1))


@given(knowledge=RELATIONS, context=RELATIONS)
def test_the_construction_is_the_closure_at_the_loops_of_the_theorem_and_stays_there(knowledge, context):
    lengths = distances(knowledge | context)
    found = found_after(knowledge, context)
    assert np.all(found[loops_needed(max(1, int(lengths.max()))) :] == (lengths != UNREACHED))


@given(knowledge=RELATIONS, context=RELATIONS)
def test_more_loops_find_more_and_none_finds_a_path_that_is_not_there(knowledge, context):
    found = found_after(knowledge, context)
    assert np.all(found[:-1] <= found[1:])
    assert np.all(found <= closure(knowledge | context))


@given(knowledge=RELATIONS, context=RELATIONS)
def test_after_k_loops_walks_of_at_most_2_to_the_k_minus_1_pieces_are_found(knowledge, context):
    """A piece is an edge, or two consecutive edges of the context."""
    in_a_row = np.any(context[:, :, None] & context[None], axis=1)
    pieces = distances(knowledge | context | in_a_row)
    for loops, found in enumerate(found_after(knowledge, context)[1:], 1):
        assert np.array_equal(found, (pieces != UNREACHED) & (pieces <= 2 ** (loops - 1)))


@given(edges=RELATIONS)
def test_distances_told_apart_double_with_each_loop_from_2_in_the_context_and_from_1_in_the_weights(edges):
    lengths, nothing = distances(edges), np.zeros_like(edges)
    from_weights, from_context = found_after(edges, nothing), found_after(nothing, edges)
    for loops in range(1, LOOPS + 1):
        near = lengths <= 2 ** (loops - 1), lengths <= 2**loops
        assert np.array_equal(from_weights[loops], (lengths != UNREACHED) & near[0])
        assert np.array_equal(from_context[loops], (lengths != UNREACHED) & near[1])


@pytest.mark.parametrize("length", range(1, NODES))
def test_one_loop_fewer_misses_the_end_of_a_path_in_the_weights(length):
    path = np.eye(NODES, k=1, dtype=bool) & (np.arange(NODES) < length)[:, None]
    found = found_after(path, np.zeros_like(path))[:, 0, length]
    assert not found[loops_needed(length) - 1]
    assert found[loops_needed(length)]


@pytest.mark.parametrize(("diameter", "loops"), [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (8, 4), (9, 5), (63, 7)])
def test_loops_of_the_theorem(diameter, loops):
    assert loops_needed(diameter) == loops


@given(seed=st.integers(0, 2**32), index=st.integers(0, 10**6), most_nodes=st.integers(2, 20))
def test_graphs_follow_from_their_seed_and_have_an_edge_and_no_loop(seed, index, most_nodes):
    edges = draw_digraph(seed, index, most_nodes=most_nodes)
    assert np.array_equal(edges, draw_digraph(seed, index, most_nodes=most_nodes))
    assert 2 <= len(edges) <= most_nodes
    assert edges.any()
    assert not edges.diagonal().any()


def test_graphs_are_of_all_sizes_and_diameters():
    graphs = [draw_digraph(0, index, most_nodes=40) for index in range(400)]
    assert {len(edges) for edges in graphs} == set(range(2, 41))
    diameters = {int(distances(edges).max()) for edges in graphs}
    assert set(range(1, 31)) <= diameters


def test_the_construction_is_exact_where_it_should_be_and_only_there():
    result = try_construction(Construction(graphs=60, most_nodes=10))
    graphs = {int(diameter): count for diameter, count in result["diameters"].items()}
    assert sum(graphs.values()) == sum(result["nodes"].values()) == 60
    for name, later in (("half the edges in the weights", 0), ("all in the weights", 0), ("all in the context", -1)):
        for diameter, count in graphs.items():
            exact = result["exact"][name][str(diameter)]
            assert exact[loops_needed(diameter) + later :] == [count] * (len(exact) - loops_needed(diameter) - later)
    assert all(
        result["exact"]["all in the weights"][str(diameter)][loops_needed(diameter) - 1] == 0 for diameter in graphs
    )
    for broken in ("half, scores as printed", "half, without self-loops"):
        assert sum(counts[-1] for counts in result["exact"][broken].values()) < 30


@pytest.mark.slow
def test_reachability_runs_at_smoke_scale_and_again_does_nothing(capsys, tmp_path):
    arguments = ["reachability", "--root", str(tmp_path)]
    assert main(arguments) == 0
    folder = tmp_path / "reachability" / "smoke"
    built_cell, trained = json.loads((folder / "results.json").read_text())["records"]
    assert sum(built_cell["result"]["diameters"].values()) == 50
    assert list(trained["result"]["accuracy"]) == ["1 edge", "2 edges, never trained"]
    assert len(trained["result"]["accuracy"]["1 edge"]) == 4
    report = (folder / "report.md").read_text()
    assert "exact on 50 of 50 graphs" in report
    assert "| any root |" in report
    assert {"construction.png", "curves.png", "distances.png", "loops_1x2.png"} <= {p.name for p in folder.iterdir()}
    assert main(arguments) == 0
    assert "cell 1 of 2, construction: finished before" in capsys.readouterr().err


def record(shape, accuracy):
    result = {"shape": shape, "accuracy": accuracy, "curve": [[1, 2.0], [2, 1.0]], "parameters": 10}
    return Record(cell="d3-", settings={}, result=result, seconds=1.0, versions={})


def test_a_report_takes_the_trained_depth_of_each_shape_and_the_spread_of_its_seeds():
    records = [
        record("1⊗1", {"1 edge": [0.5, 0.4], "2 edges": [0.5, 0.3]}),
        record("1⊗2", {"1 edge": [0.5, 1.0, 0.9, 0.8], "2 edges": [0.5, 0.6, 0.9, 0.7]}),
        record("1⊗2", {"1 edge": [0.5, 0.8, 0.9, 0.8], "2 edges": [0.5, 0.8, 0.9, 0.7]}),
    ]
    report = REACHABILITY.report(records)
    shapes, depths = report.tables
    assert shapes.rows[0] == ["1⊗1", "10", "1", "50.0 (50.0 to 50.0)", "50.0 (50.0 to 50.0)"]
    assert shapes.rows[1] == ["1⊗2", "10", "2", "90.0 (80.0 to 100.0)", "70.0 (60.0 to 80.0)"]
    assert depths.rows[depths.marked] == ["2", "90.0", "70.0"]
    assert report.findings == [
        "1⊗1 on average over 1 seed: 1 edge: 50.0 %; 2 edges: 50.0 %.",
        "1⊗2 on average over 2 seeds: 1 edge: 90.0 %; 2 edges: 70.0 %.",
        "1⊗2, the first loop after which 90 % are right: 1 edge: 2; 2 edges: 3.",
    ]


def test_a_report_orders_diameters_by_number_and_joins_those_that_need_equally_many_loops():
    result = try_construction(Construction(graphs=60, most_nodes=10))
    read = json.loads(json.dumps(result, sort_keys=True))
    table = REACHABILITY.report([Record(cell="construction", settings={}, result=read, seconds=1.0, versions={})])
    rows = table.tables[1].rows
    assert [row[0] for row in rows] == ["1", "2", "3 to 4", "5 to 8", "9"]
    assert [row[2] for row in rows] == ["1", "2", "3", "4", "5"]
    assert all(row[3 + int(row[2])] == "100.0" for row in rows)


@pytest.mark.parametrize("scale", Scale)
def test_every_scale_asks_for_all_trained_distances_and_one_more_and_problems_fit_a_row(scale):
    _, *trained = REACHABILITY.cells(scale)
    for cell in trained:
        *near, further = (make_task(spec) for spec in cell.settings["tests"].values())
        task = make_task(cell.settings["task"])
        assert [test.asked for test in near] == list(range(1, task.distance + 1))
        assert further.distance == task.distance + 1
        assert {test.tokenizer.vocab_size for test in (*near, further)} == {task.tokenizer.vocab_size}
        assert all(test.max_tokens < cell.settings["sequence_length"] for test in (task, *near, further))
