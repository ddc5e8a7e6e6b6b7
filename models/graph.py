"""Cells as tensors, and the small modules of which the networks that read and write them are made."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genotypes import NAG_SPACE, CellSpec, SearchSpace
from models.fast.cpu import Dropout


@dataclass(frozen=True, eq=False)
class CellBatch:
    """B cells, padded to V vertices.

    adj: (B, V, V), `adj[b, source, target]`, 0/1 for given cells, probabilities for generated ones.
    ops: (B, V, T) one-hot or softmax over the T tokens of the search space.
    num_nodes: (B,) long; rows and columns of a cell's absent vertices are zero in adj and ops.
    """

    adj: Tensor
    ops: Tensor
    num_nodes: Tensor

    @staticmethod
    def encode(
        cells: list[CellSpec],
        max_vertices: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "CellBatch":
        """Pad `cells`, all of one space, to `max_vertices` (default: the space's)."""
        if not cells:
            raise ValueError("there are no cells to encode")
        space = cells[0].space
        size = max_vertices or space.max_vertices
        largest = max(cell.num_vertices for cell in cells)
        if largest > size:
            raise ValueError(f"a cell has {largest} vertices, more than max_vertices = {size}")
        adj = np.zeros((len(cells), size, size), dtype=np.float32)
        ops = np.zeros((len(cells), size, len(space.tokens)), dtype=np.float32)
        for i, cell in enumerate(cells):
            v = cell.num_vertices
            adj[i, :v, :v] = cell.matrix
            ops[i, range(v), [space.token_id[op] for op in cell.ops]] = 1
        dtype = dtype or torch.get_default_dtype()
        return CellBatch(
            torch.from_numpy(adj).to(device, dtype),
            torch.from_numpy(ops).to(device, dtype),
            torch.tensor([cell.num_vertices for cell in cells], device=device),
        )

    @torch.no_grad()
    def decode(self, space: SearchSpace = NAG_SPACE) -> list[CellSpec]:
        """The cells that the hard decisions give (edge where adj > 0.5, most likely op), not pruned."""
        adj = (self.adj > 0.5).long().cpu().tolist()
        tokens = self.ops.argmax(-1).cpu().tolist()
        cells = []
        for matrix, ids, v in zip(adj, tokens, self.num_nodes.cpu().tolist(), strict=True):
            cells.append(CellSpec([row[:v] for row in matrix[:v]], [space.tokens[i] for i in ids[:v]], space))
        return cells

    def prune(self, space: SearchSpace = NAG_SPACE) -> tuple["CellBatch", Tensor]:
        """CellSpec.prune for hard cells: without the vertices on no path from an input to the output; and (B,) bool,
        whether there is one, of no more edges than the space allows.

        Vertices keep their places, and those that fall out leave rows and columns of zeros there. Where the wiring is
        fixed, all stay.
        """
        vertices = torch.arange(self.adj.shape[1], device=self.adj.device)
        is_input = (vertices < space.num_inputs).expand(len(self), -1)  # (B, V)
        is_output = self.ops[..., space.token_id[space.output]] > 0
        reached, needed = is_input, is_output
        adj = self.adj  # the edges that something is passed on by
        if space.none_op is not None:
            adj = adj * (self.ops[..., space.token_id[space.none_op]] == 0)[:, None]
        for _ in range(space.num_inputs, len(vertices)):  # one edge farther each time
            reached = reached | ((reached[:, None].to(adj.dtype) @ adj).squeeze(1) > 0)
            needed = needed | ((adj @ needed[:, :, None].to(adj.dtype)).squeeze(2) > 0)
        if space.wiring is not None:
            return self, (reached & is_output).any(1)
        keep = (is_input | is_output | (reached & needed)).to(self.adj.dtype)
        pruned = CellBatch(self.adj * keep[:, :, None] * keep[:, None], self.ops * keep[:, :, None], self.num_nodes)
        valid = (reached & is_output).any(1)
        return pruned, valid if space.max_edges is None else valid & (pruned.adj.sum((1, 2)) <= space.max_edges)

    def computed(self, space: SearchSpace = NAG_SPACE) -> "CellBatch":
        """What hard cells compute, where some ops are none_op or skip_op; elsewhere the cells as they are.

        A vertex of none_op, and what is then on no path from an input to the output, falls out; a vertex of skip_op
        gives way to edges from all that it reads to all that read it, which may be there several times. Vertices keep
        their places, and those that fall out leave rows and columns of zeros there.
        """
        if space.none_op is None and space.skip_op is None:
            return self
        adj, ops, size = self.adj, self.ops, self.adj.shape[1]

        def without(dropped: Tensor) -> tuple[Tensor, Tensor]:  # (B, V) of 0 and 1
            keep = 1 - dropped
            return adj * keep[:, :, None] * keep[:, None], ops * keep[..., None]

        if space.none_op is not None:
            adj, ops = without(ops[..., space.token_id[space.none_op]])
        if space.skip_op is not None:
            skips = ops[..., space.token_id[space.skip_op]]
            for v in range(space.num_inputs, size - 1):
                adj = adj + skips[:, v, None, None] * adj[:, :, v, None] * adj[:, None, v]
            adj, ops = without(skips)
        inputs = (torch.arange(size, device=adj.device) < space.num_inputs).expand(len(self), -1)
        output = ops[..., space.token_id[space.output]] > 0
        reached, needed = inputs, output
        for _ in range(size):  # one edge farther each time
            reached = reached | ((reached[:, None].to(adj.dtype) @ adj).squeeze(1) > 0)
            needed = needed | ((adj @ needed[:, :, None].to(adj.dtype)).squeeze(2) > 0)
        adj, ops = without(1 - (inputs | output | (reached & needed)).to(adj.dtype))
        return CellBatch(adj, ops, self.num_nodes)

    def close_up(self) -> "CellBatch":
        """Pruned cells with the vertices that are left in front, in their order, and num_nodes counting these only.

        Pruning a batch leaves rows and columns of zeros where vertices fell out; `encode` of a pruned CellSpec has none
        between the others.
        """
        present = self.ops.any(-1)  # (B, V)
        order = present.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # (B, V)
        rows = order[:, :, None]
        adj = self.adj.gather(1, rows.expand_as(self.adj)).gather(2, order[:, None].expand_as(self.adj))
        return CellBatch(adj, self.ops.gather(1, rows.expand_as(self.ops)), present.sum(1))

    def straight_through(self) -> "CellBatch":
        """The hard decisions (0/1 edges, one-hot tokens) with the gradients of the soft values."""
        hard_adj = (self.adj > 0.5).to(self.adj.dtype)
        present = self.ops.any(-1, keepdim=True)  # (B, V, 1)
        hard_ops = torch.zeros_like(self.ops).scatter(2, self.ops.argmax(-1, keepdim=True), 1) * present
        return CellBatch(
            hard_adj + (self.adj - self.adj.detach()),  # the bracket is exactly 0
            hard_ops + (self.ops - self.ops.detach()),
            self.num_nodes,
        )

    def pad(self, max_vertices: int) -> "CellBatch":
        """The cells with vertices without op and edges behind the others, max_vertices in all (at least V)."""
        more = max_vertices - self.adj.shape[1]
        return CellBatch(F.pad(self.adj, (0, more, 0, more)), F.pad(self.ops, (0, 0, 0, more)), self.num_nodes)

    @staticmethod
    def cat(batches: Sequence["CellBatch"]) -> "CellBatch":
        """The cells of all batches in one, of which V must be the same."""
        return CellBatch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("adj", "ops", "num_nodes")))

    def detach(self) -> "CellBatch":
        return CellBatch(self.adj.detach(), self.ops.detach(), self.num_nodes)

    def to(self, device: torch.device | str) -> "CellBatch":
        return CellBatch(self.adj.to(device), self.ops.to(device), self.num_nodes.to(device))

    def __getitem__(self, index: Tensor | slice) -> "CellBatch":
        """The cells at `index`: a tensor of positions, a boolean mask or a slice."""
        return CellBatch(self.adj[index], self.ops[index], self.num_nodes[index])

    def __len__(self) -> int:
        return len(self.num_nodes)


class LabelledCells(NamedTuple):
    """B genotypes and their labels: what a discriminator is called with.

    cells: one CellBatch of B cells for each cell of the space. labels: (B, K) long, one for each of K objectives.
    """

    cells: tuple[CellBatch, ...]
    labels: Tensor


class MessagePassing(nn.Module):
    """One round of messages along the edges and against them, then a GRU cell (NAG paper, section 3.2)."""

    def __init__(self, vertex_size: int, dropout: float):
        super().__init__()
        width = 2 * vertex_size
        self.dropout = Dropout(dropout)
        self.message = nn.Linear(width, width)  # of edge j -> i, to i, from [h_j, h_i]
        self.message_reversed = nn.Linear(width, width)  # of the same edge, to j, from [h_i, h_j]
        self.update = nn.GRUCell(width, vertex_size)

    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of the messages along and against the edges side by side (2D, 4D), and their biases (2, 2D)."""
        both = self.message, self.message_reversed
        return torch.cat([linear.weight for linear in both], dim=1), torch.stack([linear.bias for linear in both])

    def forward(self, states: Tensor, senders: Tensor, count: Tensor, weight: Tensor, biases: Tensor) -> Tensor:
        """states (B, V, D) -> new states (B, V, D).

        senders, count: what neighbours() gives for the cells. weight, biases: what weights() gives.
        The sum of a linear map is the linear map of the sum, so the map is applied once per vertex, not once per edge
        as in models/plain.py.
        """
        states = self.dropout(states)
        inputs = (senders @ states).view(-1, weight.shape[1])  # (B * V, 4D)
        messages = torch.addmm(count.flatten(0, 1) @ biases, inputs, weight.T)  # (B * V, 2D)
        return self.update(messages, states.flatten(0, 1)).view_as(states)


def neighbours(adj: Tensor) -> tuple[Tensor, Tensor]:
    """adj (B, V, V) of 0/1 -> a matrix that sums states along edges (B, 4V, V), and the numbers of edges (B, V, 2).

    The product of the matrix with the states (B, V, D) holds four sums for each vertex i: of h_j and of h_i over the
    edges j -> i into it, and of h_j and of h_i over the edges i -> j out of it. The numbers count both kinds of edges.
    """
    others = torch.stack([adj.mT, adj], dim=2)  # (B, V, 2, V)
    count = others.sum(-1)  # (B, V, 2)
    own = count[..., None] * torch.eye(adj.shape[1], dtype=adj.dtype, device=adj.device)[:, None]
    return torch.stack([others, own], dim=3).flatten(1, 3), count


class GraphState(nn.Module):
    """Vertex states (B, V, D) -> one unit-length graph state (B, S) (NAG paper, section 3.2).

    aggregation: "gsum", a sum in which every vertex has a learned gate, or "mean", without gates.
    """

    def __init__(self, vertex_size: int, graph_size: int, aggregation: str):
        super().__init__()
        if aggregation not in ("gsum", "mean"):
            raise ValueError(f"aggregation must be gsum or mean, got {aggregation!r}")
        self.value = nn.Linear(vertex_size, graph_size)
        self.gate = nn.Linear(vertex_size, 1) if aggregation == "gsum" else None

    def forward(self, states: Tensor, present: Tensor | None = None) -> Tensor:
        """states (B, V, D), present (B, V) bool: the vertices that count (default: all) -> (B, S)."""
        values = self.value(states)  # (B, V, S)
        if self.gate is not None:
            values = values * torch.sigmoid(self.gate(states))
        if present is not None:
            values = values * present[..., None]
        return F.normalize(values.sum(1), dim=-1)  # the mean points where the sum does


class LabelEmbedding(nn.Module):
    """Labels (B, K) long, one for each of K objectives -> (B, sum of sizes), every embedding of unit length."""

    def __init__(self, num_classes: tuple[int, ...], sizes: tuple[int, ...]):
        super().__init__()
        if len(num_classes) != len(sizes):
            raise ValueError(f"num_classes and label_sizes must be equally long, got {num_classes} and {sizes}")
        self.tables = nn.ModuleList(nn.Embedding(n, size) for n, size in zip(num_classes, sizes, strict=True))

    def forward(self, labels: Tensor) -> Tensor:
        columns = zip(self.tables, labels.unbind(1), strict=True)
        return torch.cat([F.normalize(table(label), dim=-1) for table, label in columns], dim=-1)
