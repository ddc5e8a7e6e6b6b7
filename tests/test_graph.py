"""CellBatch: padded tensors and back."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from genotypes import GENOTYPES, NAG_SPACE, NASBENCH101, NASBENCH201, CellSpec, SearchSpace
from models.graph import CellBatch

TOY_SPACE = SearchSpace("toy", cells=("cell",), inputs=("input",), ops=("conv3x3", "maxpool"), max_vertices=7)
LIMITED_SPACE = dataclasses.replace(TOY_SPACE, name="limited", max_edges=6)


SKIPPING_SPACE = dataclasses.replace(TOY_SPACE, name="skipping", ops=("conv3x3", "none"), none_op="none")


def random_cell(rng, space):
    size = rng.randint(space.min_vertices, space.max_vertices)
    matrix = [[int(s < t and t >= space.num_inputs and rng.random() < 0.5) for t in range(size)] for s in range(size)]
    interior = [rng.choice(space.ops) for _ in range(size - space.num_inputs - 1)]
    return CellSpec(space.wiring or matrix, [*space.inputs, *interior, space.output], space)


@pytest.mark.parametrize("space", [NAG_SPACE, TOY_SPACE, NASBENCH201], ids=lambda space: space.name)
def test_decoding_inverts_encoding(space):
    rng = random.Random(0)
    cells = [random_cell(rng, space) for _ in range(200)]
    batch = CellBatch.encode(cells)
    assert len(batch) == 200 and batch.num_nodes.dtype == torch.long and batch.adj.dtype == torch.float32
    assert batch.decode(space) == cells
    soft = CellBatch(0.2 + 0.6 * batch.adj, batch.ops * 0.5 + 0.01, batch.num_nodes)
    assert soft.decode(space) == cells


@pytest.mark.parametrize(
    "space", [NAG_SPACE, TOY_SPACE, LIMITED_SPACE, SKIPPING_SPACE, NASBENCH101], ids=lambda space: space.name
)
def test_pruning_a_batch_is_pruning_its_cells(space):
    rng = random.Random(1)
    cells = [random_cell(rng, space) for _ in range(400)]
    pruned, valid = CellBatch.encode(cells).prune(space)
    assert valid.tolist() == [cell.is_valid for cell in cells] and 0 < valid.sum() < 400
    assert any(cell.prune() not in (None, cell) for cell in cells)
    if space is LIMITED_SPACE:  # from the limit to the one above it, and before pruning more than that
        edges = pruned.adj.sum((1, 2))
        assert valid[edges == 6].any() and not valid[edges > 6].any() and (edges == 7).any()
        assert valid[torch.tensor([cell.num_edges > 6 for cell in cells])].any()
    expected = CellBatch.encode([cell.prune() for cell in cells if cell.is_valid], space.max_vertices)
    kept = pruned[valid]
    assert kept.adj.sum() == expected.adj.sum() and not torch.equal(kept.adj, expected.adj)  # kept their places
    closed = kept.close_up()
    for name in ("adj", "ops", "num_nodes"):
        assert torch.equal(getattr(closed, name), getattr(expected, name))


def test_pruning_a_batch_of_fixed_wiring_leaves_its_cells_and_tells_which_have_a_path():
    rng = random.Random(1)
    cells = [random_cell(rng, NASBENCH201) for _ in range(400)]
    batch = CellBatch.encode(cells)
    pruned, valid = batch.prune(NASBENCH201)
    assert pruned.decode(NASBENCH201) == cells
    assert valid.tolist() == [cell.is_valid for cell in cells] and 0 < valid.sum() < 400


def test_tensors_hold_edges_tokens_and_zeros_beyond_the_cell():
    cell = GENOTYPES["NAG_FEW_PARAMS"].normal  # 5 vertices
    batch = CellBatch.encode([cell, cell], dtype=torch.float64)
    assert batch.adj.shape == (2, 10, 10) and batch.ops.shape == (2, 10, 8) and batch.adj.dtype == torch.float64
    assert batch.adj[1].nonzero().tolist() == [[0, 2], [0, 3], [0, 4], [1, 2], [2, 3], [3, 4]]
    assert batch.ops[1, :5].argmax(-1).tolist() == [NAG_SPACE.token_id[op] for op in cell.ops]
    assert (batch.ops[:, :5].sum(-1) == 1).all() and (batch.ops[:, 5:] == 0).all()


def test_padding_is_to_max_vertices():
    cell = GENOTYPES["NAG_HIGH_ACC"].normal  # 9 vertices
    assert CellBatch.encode([cell], max_vertices=9).adj.shape == (1, 9, 9)
    with pytest.raises(ValueError, match="a cell has 9 vertices, more than max_vertices = 8"):
        CellBatch.encode([cell], max_vertices=8)
    with pytest.raises(ValueError, match="no cells"):
        CellBatch.encode([])


def test_indexing_takes_cells():
    rng = random.Random(0)
    cells = [random_cell(rng, NAG_SPACE) for _ in range(6)]
    batch = CellBatch.encode(cells)
    assert batch[torch.tensor([4, 1, 1])].decode() == [cells[4], cells[1], cells[1]]
    assert batch[torch.tensor([True, False, False, True, False, False])].decode() == [cells[0], cells[3]]
    assert batch[2:4].decode() == cells[2:4]


def test_moving_keeps_shapes():
    batch = CellBatch.encode([GENOTYPES["NAG_FEW_PARAMS"].normal]).to("meta")
    assert (batch.adj.device.type, batch.ops.device.type, batch.num_nodes.device.type) == ("meta",) * 3


def test_straight_through_has_hard_values_and_soft_gradients():
    adj = torch.tensor([[[0.0, 0.2, 0.9], [0, 0, 0.6], [0, 0, 0]]]).requires_grad_()
    ops = torch.tensor([[[0.1, 0.9], [0.7, 0.3], [0.0, 0.0]]]).requires_grad_()
    hard = CellBatch(adj, ops, torch.tensor([2])).straight_through()
    assert hard.adj.tolist() == [[[0, 0, 1], [0, 0, 1], [0, 0, 0]]]
    assert hard.ops.tolist() == [[[0, 1], [1, 0], [0, 0]]]
    (hard.adj.sum() + hard.ops.sum()).backward()
    assert torch.equal(adj.grad, torch.ones_like(adj))
    assert torch.equal(ops.grad, torch.ones_like(ops))


def computed_slowly(cell: CellSpec) -> tuple[np.ndarray, list[bool]]:
    """How often each vertex reads each other one, once none and skip_connect are gone; and which vertices are left."""
    size, paths = cell.num_vertices, np.array(cell.matrix)
    gone = [op in ("none", "skip_connect") for op in cell.ops]
    for v in range(size):
        if gone[v]:
            through = np.outer(paths[:, v], paths[v]) if cell.ops[v] == "skip_connect" else 0
            paths = paths + through
            paths[v], paths[:, v] = 0, 0
    from_input = np.linalg.matrix_power(np.eye(size, dtype=int) + paths, size)[0] > 0
    to_output = np.linalg.matrix_power(np.eye(size, dtype=int) + paths, size)[:, -1] > 0
    left = [v in (0, size - 1) or bool(from_input[v] and to_output[v] and not gone[v]) for v in range(size)]
    return paths * np.outer(left, left), left


def test_what_a_batch_computes_has_neither_none_nor_skip_connect():
    rng = random.Random(0)
    cells = [random_cell(rng, NASBENCH201) for _ in range(300)]
    written = CellBatch.encode(cells)
    computed = written.computed(NASBENCH201)
    for i, cell in enumerate(cells):
        adj, left = computed_slowly(cell)
        assert computed.adj[i].tolist() == adj.tolist()
        assert torch.equal(computed.ops[i], written.ops[i] * torch.tensor(left)[:, None])
    again = computed.computed(NASBENCH201)
    assert torch.equal(again.adj, computed.adj) and torch.equal(again.ops, computed.ops)


def test_cells_of_other_spaces_compute_what_is_written():
    rng = random.Random(0)
    cells = CellBatch.encode([random_cell(rng, NAG_SPACE) for _ in range(3)])
    assert cells.computed(NAG_SPACE) is cells
