"""Cells and genotypes: validation, pruning, canonical form, files."""

import json
from dataclasses import asdict, replace
from itertools import combinations, product

import networkx as nx
import numpy as np
import pytest

from build_nas_dataset.random_cells import random_cell, random_pool
from genotypes import (
    GENOTYPES,
    NAG_SPACE,
    NASBENCH101,
    NASBENCH201,
    SPACES,
    CellSpec,
    Genotype,
    SearchSpace,
    find_space,
    from_nasbench201,
    load_genotype,
    read_genotypes,
    to_nasbench201,
)

OPS = ["input0", "input1", "identity", "output"]


def as_graph(cell):
    graph = nx.DiGraph()
    graph.add_nodes_from((v, {"op": op}) for v, op in enumerate(cell.ops))
    graph.add_edges_from(zip(*np.nonzero(cell.matrix), strict=True))
    return graph


def isomorphic(a, b):
    return nx.is_isomorphic(as_graph(a), as_graph(b), node_match=lambda x, y: x["op"] == y["op"])


def relabelled(cell, rng):
    """The same cell with its interior vertices in another random topological order."""
    graph, order = as_graph(cell), [0, 1]
    rest = set(range(2, cell.num_vertices - 1))
    while rest:
        ready = [v for v in sorted(rest) if not rest & set(graph.predecessors(v))]
        order.append(int(rng.choice(ready)))
        rest.remove(order[-1])
    order.append(cell.num_vertices - 1)
    return CellSpec([[cell.matrix[s][d] for d in order] for s in order], [cell.ops[v] for v in order])


def valid_cells(n, seed, max_vertices=10):
    rng, cells = np.random.default_rng(seed), []
    while len(cells) < n:
        cell = random_cell(rng, max_vertices=max_vertices).prune()
        cells += [] if cell is None else [cell]
    return cells


def test_canonical_form_is_invariant_under_1000_relabellings():
    rng = np.random.default_rng(0)
    for cell in valid_cells(100, seed=1):
        for _ in range(10):
            other = relabelled(cell, rng)
            assert other.canonical() == cell.canonical() == cell.canonical().canonical()


def test_canonical_forms_are_equal_exactly_for_isomorphic_cells():
    cells, agreed = valid_cells(120, seed=2, max_vertices=5), [0, 0]
    for i, a in enumerate(cells):
        for b in cells[:i]:
            same = isomorphic(a, b)
            assert (a.canonical() == b.canonical()) == same
            agreed[same] += 1
    assert min(agreed) > 30  # both answers occurred


def test_canonical_form_of_look_alikes():
    """Cells that colour refinement alone cannot tell apart, or has to search for."""
    matrix = [[0] * 10 for _ in range(10)]
    for v in range(2, 9):
        matrix[0][v] = matrix[v][9] = 1
    parallel = CellSpec(matrix, ["input0", "input1", *["identity"] * 7, "output"])
    assert parallel.canonical() == relabelled(parallel, np.random.default_rng(0)).canonical()
    two_pairs = [[0] * 8 for _ in range(8)]
    crossed = [[0] * 8 for _ in range(8)]
    for m, edges in ((two_pairs, [(2, 4), (3, 5)]), (crossed, [(2, 5), (3, 4)])):
        for src, dst in [(0, 2), (0, 3), *edges, (4, 7), (5, 7), (1, 6), (6, 7)]:
            m[src][dst] = 1
    ops = ["input0", "input1", *["identity"] * 5, "output"]
    assert CellSpec(two_pairs, ops).canonical() == CellSpec(crossed, ops).canonical()
    forms = set()
    for first in combinations(range(2, 6), 2):  # four vertices, two of which feed vertex 6, the others vertex 7
        matrix = [[0] * 9 for _ in range(9)]
        for v in range(2, 6):
            matrix[0][v] = matrix[v][6 if v in first else 7] = 1
        matrix[6][8] = matrix[7][8] = 1
        forms.add(CellSpec(matrix, ["input0", "input1", *["identity"] * 6, "output"]).canonical())
    assert len(forms) == 1


def test_pruning_keeps_the_vertices_on_a_path_and_all_inputs():
    rng = np.random.default_rng(3)
    for _ in range(300):
        cell = random_cell(rng)
        graph, output = as_graph(cell), cell.num_vertices - 1
        on_path = {v for i in (0, 1) for path in nx.all_simple_paths(graph, i, output) for v in path}
        pruned = cell.prune()
        assert (pruned is not None) == bool(on_path) == cell.is_valid
        if pruned is not None:
            keep = sorted(on_path | {0, 1})
            assert pruned.ops == tuple(cell.ops[v] for v in keep)
            assert pruned.matrix == tuple(tuple(cell.matrix[s][d] for d in keep) for s in keep)
            assert pruned.prune() == pruned


def test_an_unused_input_survives_pruning():
    cell = CellSpec([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0] * 4], OPS)
    assert cell.prune().ops == tuple(OPS)


@pytest.mark.parametrize("limit", [None, 4, 3, 2])
def test_a_cell_has_at_most_max_edges_after_pruning(limit):
    space = SearchSpace("limited", ("cell",), ("input",), ("conv",), max_vertices=5, max_edges=limit)
    matrix = [[0] * 5 for _ in range(5)]
    for src, dst in [(0, 1), (1, 4), (0, 4), (0, 2), (2, 3)]:  # the last two lead nowhere
        matrix[src][dst] = 1
    cell = CellSpec(matrix, ["input", "conv", "conv", "conv", "output"], space)
    assert cell.is_valid == (limit != 2)
    assert (cell.prune() is None) == (cell.canonical() is None) == (limit == 2)
    assert limit == 2 or cell.prune() == CellSpec([[0, 1, 1], [0, 0, 1], [0] * 3], ["input", "conv", "output"], space)


@pytest.mark.parametrize(
    ("matrix", "ops", "reason"),
    [
        ([[0, 0, 2, 0]] + [[0] * 4] * 3, OPS, "only 0 and 1"),
        ([[0, 0, 1]] * 4, OPS, "square"),
        ([[0] * 4, [0] * 4, [0, 1, 0, 0], [0] * 4], OPS, "upper triangular"),
        ([[0, 1, 0, 0]] + [[0] * 4] * 3, OPS, "between two inputs"),
        ([[0] * 4] * 4, OPS[:3], "4 vertices"),
        ([[0] * 4] * 4, ["input1", "input0", "identity", "output"], "start with"),
        ([[0] * 4] * 4, ["input0", "input1", "conv7x7", "output"], "unknown op"),
        ([[0] * 2] * 2, ["input0", "output"], "3 to 10 vertices"),
        (None, OPS, "nested list"),
    ],
)
def test_what_is_not_a_cell_is_refused_with_the_reason(matrix, ops, reason):
    with pytest.raises(ValueError, match=reason):
        CellSpec(matrix, ops)


def test_published_cells_are_pruned_and_valid():
    assert all(genotype.prune() == genotype for genotype in GENOTYPES.values())


def test_genotypes_survive_json(tmp_path):
    pool = random_pool(20, seed=4)
    path = tmp_path / "archs.json"
    path.write_text(json.dumps([{**genotype.to_dict(), "accuracy": 0.5} for genotype in pool]))
    assert [genotype for genotype, _ in read_genotypes(path)] == pool
    assert read_genotypes(path)[0][1]["accuracy"] == 0.5
    assert load_genotype(f"{path}:7") == pool[7]
    for name, reason in (
        ("NAG_BEST", "NAG_HIGH_ACC"),
        (str(path), "holds 20 genotypes"),
        (f"{path}:20", "0 to 19"),
        ("missing.json", "no such genotype file"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_genotype(name)


def test_a_pool_has_no_duplicates_and_is_fixed_by_its_seed():
    pool = random_pool(400, seed=5)
    assert len({genotype.canonical() for genotype in pool}) == 400
    assert all(genotype.prune() == genotype for genotype in pool)
    assert pool == random_pool(400, seed=5) != random_pool(400, seed=6)
    assert sum(genotype.normal.ops == genotype.reduction.ops for genotype in pool) < 100  # drawn independently


def test_vertex_counts_are_drawn_with_the_published_weights():
    rng = np.random.default_rng(7)
    sizes = np.bincount([random_cell(rng).num_vertices for _ in range(4000)], minlength=11)[3:]
    weights = np.array([1, 8, 16, 32, 64, 128, 256, 512])
    assert np.abs(sizes / 4000 - weights / weights.sum()).max() < 0.03


def test_genotype_needs_every_cell_of_its_space():
    with pytest.raises(ValueError, match="2 cells"):
        Genotype(GENOTYPES["NAG_HIGH_ACC"].normal)
    with pytest.raises(ValueError, match="no reduction cell"):
        Genotype.from_dict({"normal": GENOTYPES["NAG_HIGH_ACC"].normal.to_dict()})
    assert NAG_SPACE.tokens[:4] == ("output", "input0", "input1", "seqconv3x3")


# ------------------------------------------------------------------------------------------------ tabular benchmarks


def cells_of_nasbench101(vertices):
    """Every cell of NAS-Bench-101 with that many vertices, all of them on a path from input to output."""
    pairs = list(combinations(range(vertices), 2))
    for bits in product((0, 1), repeat=len(pairs)):
        matrix = np.zeros((vertices, vertices), dtype=int)
        matrix[tuple(zip(*pairs, strict=True))] = bits
        interior = vertices - 2
        for i, ops in enumerate(product(NASBENCH101.ops, repeat=interior)):
            cell = CellSpec(matrix.tolist(), ["input", *ops, "output"], NASBENCH101)
            if i == 0 and ((pruned := cell.prune()) is None or pruned.num_vertices < vertices):
                break  # whatever the ops
            yield cell


@pytest.mark.parametrize(("most", "number"), [(2, 1), (3, 7), (4, 91), pytest.param(5, 2532, marks=pytest.mark.slow)])
def test_nasbench101_has_as_many_small_cells_as_published(most, number):
    assert len({cell.canonical() for v in range(2, most + 1) for cell in cells_of_nasbench101(v)}) == number


def test_nasbench101_has_at_most_nine_edges():
    full = [[int(dst > src) for dst in range(5)] for src in range(5)]  # 10 edges
    ops = ["input", *["maxpool3x3"] * 3, "output"]
    assert not CellSpec(full, ops, NASBENCH101).is_valid
    full[0][4] = 0
    assert CellSpec(full, ops, NASBENCH101).prune().num_edges == 9


def nasbench201(*ops):
    return Genotype(CellSpec(NASBENCH201.wiring, ["input", *ops, "output"], NASBENCH201), space=NASBENCH201)


def computed(genotype, rng_seed=0):
    """What a cell of NAS-Bench-201 computes, node by node as its paper says; every op is a random nonlinear map of its
    own, which gives 0 for what is not there: an oracle that knows nothing of terms."""
    rng = np.random.default_rng(rng_seed)
    maps = {op: rng.normal(size=(4, 4)) for op in NASBENCH201.ops}
    ops, nodes = iter(genotype["cell"].ops[1:]), [rng.normal(size=4)]
    for node in (1, 2, 3):
        total = np.zeros(4)
        for source in range(node):
            op, value = next(ops), nodes[source]
            if op == "skip_connect":
                total = total + value
            elif op != "none" and value.any():
                total = total + np.sin(maps[op] @ value + 1)
        nodes.append(total)
    return tuple(nodes[-1].round(6) + 0.0)


def test_nasbench201_has_4930_functions():
    forms, missing, values = set(), 0, {}
    for i, ops in enumerate(product(NASBENCH201.ops, repeat=6)):
        form = nasbench201(*ops)["cell"].canonical()
        forms.add(form)
        missing += form is None
        if i % 8 == 0:
            value = computed(nasbench201(*ops))
            assert values.setdefault(value, form) == form  # equal values, equal forms
    assert (len(forms), missing) == (4930, 341)
    assert len(values) == len(set(values.values()))  # equal forms, equal values


def test_a_cell_of_fixed_wiring_keeps_all_vertices_and_takes_no_other_wiring():
    cell = nasbench201("none", "none", "nor_conv_3x3", "skip_connect", "none", "avg_pool_3x3")["cell"]
    assert cell.prune() == cell and cell.is_valid
    assert cell.canonical() == (("input",),) and hash(cell.canonical()) is not None
    assert not nasbench201("none", *["skip_connect"] * 2, "none", "skip_connect", "none")["cell"].is_valid
    other = [list(row) for row in NASBENCH201.wiring]
    other[0][7] = 1
    with pytest.raises(ValueError, match="wiring of the space nasbench201"):
        CellSpec(other, cell.ops, NASBENCH201)
    with pytest.raises(ValueError, match="8 to 8 vertices"):
        CellSpec([[0, 1], [0, 0]], ["input", "output"], NASBENCH201)


def test_nasbench201_strings_are_read_and_written():
    text = "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|skip_connect~1|none~2|"
    genotype = from_nasbench201(text)
    first, second = "avg_pool_3x3 nor_conv_1x1 skip_connect", "nor_conv_1x1 skip_connect none"
    assert genotype["cell"].ops == ("input", *first.split(), *second.split(), "output")
    assert to_nasbench201(genotype) == text
    for wrong in ("", "none", text[:-9], text.replace("connect~1", "connect~0", 1), text + "+|none~0|"):
        with pytest.raises(ValueError, match="expected an architecture"):
            from_nasbench201(wrong)
    with pytest.raises(ValueError, match="max_pool_3x3"):
        from_nasbench201(text.replace("avg", "max"))


def test_genotypes_of_all_spaces_say_which_space_they_are_of(tmp_path):
    for space in SPACES.values():
        genotype = random_pool(1, seed=1, space=space)[0]
        assert Genotype.from_dict(genotype.to_dict()) == Genotype.from_dict(genotype.to_dict(), space) == genotype
        path = tmp_path / "genotypes.json"
        path.write_text(json.dumps(genotype.to_dict()))
        assert load_genotype(str(path)) == genotype
        assert SearchSpace(**asdict(space)) == space == find_space(space.name)
    with pytest.raises(ValueError, match="is of the space nasbench101, expected one of nasbench201"):
        Genotype.from_dict(random_pool(1, 1, NASBENCH101)[0].to_dict(), NASBENCH201)
    with pytest.raises(ValueError, match="unknown search space 'darts'; known: nag, nasbench101, nasbench201"):
        Genotype.from_dict({"space": "darts", "cell": {}})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ops": ()}, "an op at least"),
        ({"ops": ("none", "none")}, "a name twice"),
        ({"ops": ("none", "input")}, "a name twice"),
        ({"none_op": "zero"}, "must be among its ops"),
        ({"max_vertices": 1}, "1 inputs and max_vertices = 1"),
        ({"max_vertices": 9}, "8 rows, its cells have 9 vertices"),
        ({"max_edges": 0}, "max_edges = 0"),
        ({"max_edges": 5}, "more than max_edges"),
        ({"wiring": ((0, 0),) * 8}, "square"),
        ({"wiring": ((0,) * 8,) * 8}, "no path"),
    ],
)
def test_a_space_whose_limits_contradict_each_other_is_refused(change, reason):
    with pytest.raises(ValueError, match=reason):
        replace(NASBENCH201, **change)
