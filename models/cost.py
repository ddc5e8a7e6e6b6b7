"""#params and MACs of the CIFAR network in closed form, for one genotype or for a batch of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace
from models.graph import CellBatch
from models.network import halved_inputs, is_reduction, vertex_stride


def genotype_cost(
    genotype: Genotype, num_classes: int = 10, layers: int = 6, channels: int = 36, image_size: int = 32
) -> tuple[int, int]:
    """(#params, MACs) of CifarNetwork, in closed form.

    Equal to count_parameters and count_macs, and thousands of times faster: for scoring pools and hard limits.
    Raises ValueError when the genotype is not valid.
    """
    pruned = genotype.prune()
    if pruned is None:
        raise ValueError("the genotype is not valid: a cell has no path from an input to the output")
    counts = CellCounts.of(pruned.normal, reduction=False), CellCounts.of(pruned.reduction, reduction=True)
    return stack_cost(*counts, num_classes, layers, channels, image_size)


def batch_cost(normal: CellBatch, reduction: CellBatch) -> "Cost":
    """genotype_cost of B valid genotypes, from their pruned hard cells (CellBatch.prune): (B,) long each."""
    return stack_cost(CellCounts.of_batch(normal, reduction=False), CellCounts.of_batch(reduction, reduction=True))


def stack_cost(
    normal: "CellCounts",
    reduced: "CellCounts",
    num_classes: int = 10,
    layers: int = 6,
    channels: int = 36,
    image_size: int = 32,
) -> "Cost":
    """Cost of CifarNetwork, from what counts of its cells."""
    width, size = 3 * channels, image_size
    cost = Cost(27 * width + 2 * width, 27 * width * size**2)
    c_prev_prev, c_prev, halve_first = width, width, False
    for layer in range(3 * layers + 2):
        reduction = is_reduction(layer, layers)
        channels = channels * 2 if reduction else channels
        cell = reduced if reduction else normal
        cost += cell.cost(c_prev_prev, c_prev, channels, reduction, halve_first, size)
        size = (size + 1) // 2 if reduction else size
        c_prev_prev, c_prev, halve_first = c_prev, channels * cell.outputs, reduction
    return cost + Cost((c_prev + 1) * num_classes, c_prev * num_classes)


class Cost(NamedTuple):
    params: int | Tensor
    macs: int | Tensor

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.params + other.params, self.macs + other.macs)


class CellCounts(NamedTuple):
    """What of a cell decides its cost: numbers, or (B,) tensors for a batch of cells.

    reads: of each cell input, whether anything does. reduces: FactorizedReduce modules, those of strided identities
    included. convs3, convs5: separable convolutions. outputs: states that the output concatenates.
    """

    reads: tuple[bool, ...] | tuple[Tensor, ...]
    reduces: int | Tensor
    convs3: int | Tensor
    convs5: int | Tensor
    outputs: int | Tensor

    @staticmethod
    def of(spec: CellSpec, reduction: bool) -> "CellCounts":
        """Of a pruned cell."""
        inputs = spec.space.num_inputs
        strided = [op == "identity" and vertex_stride(spec, v, reduction) == 2 for v, op in enumerate(spec.ops)]
        halved = [len(halved_inputs(spec, v, reduction)) for v in range(inputs, spec.num_vertices)]
        return CellCounts(
            tuple(any(row) for row in spec.matrix[:inputs]),
            sum(strided) + sum(halved),
            spec.ops.count("seqconv3x3"),
            spec.ops.count("seqconv5x5"),
            len(spec.predecessors(spec.num_vertices - 1)),
        )

    @staticmethod
    def of_batch(cells: CellBatch, reduction: bool, space: SearchSpace = NAG_SPACE) -> "CellCounts":
        """The same of pruned hard cells, see CellBatch.prune."""
        inputs, adj = space.num_inputs, cells.adj.long()
        ops = {name: cells.ops[..., i].long() for name, i in space.token_id.items()}  # (B, V) of 0/1 each
        reduces = torch.zeros_like(cells.num_nodes)
        if reduction:
            from_inputs, from_interior = adj[:, :inputs].sum(1), adj[:, inputs:].sum(1)  # (B, V)
            interior = sum(ops[name] for name in space.ops)
            strided = interior * (from_interior == 0)
            reduces = (strided * ops["identity"] + (1 - strided) * from_inputs).sum(1)
        return CellCounts(
            tuple((adj[:, i] > 0).any(-1) for i in range(inputs)),
            reduces,
            ops["seqconv3x3"].sum(1),
            ops["seqconv5x5"].sum(1),
            (adj * ops[space.output][:, None]).sum((1, 2)),
        )

    def cost(
        self,
        c_prev_prev: int | Tensor,
        c_prev: int | Tensor,
        channels: int,
        reduction: bool,
        halve_first: bool,
        size: int,
    ) -> Cost:
        """Of one Cell whose second input has size x size pixels."""
        pixels = ((size + 1) // 2 if reduction else size) ** 2
        depthwise = 2 * channels * (9 * self.convs3 + 25 * self.convs5)
        pointwise = 2 * (self.convs3 + self.convs5) + self.reduces  # each with a batch norm
        params = depthwise + pointwise * (channels**2 + 2 * channels)
        macs = (depthwise + pointwise * channels**2) * pixels
        for c_in, read, halve in zip((c_prev_prev, c_prev), self.reads, (halve_first, False), strict=True):
            brought = read & ((c_in != channels) | halve)  # to C channels, by a pointwise convolution
            params = params + brought * (c_in * channels + 2 * channels)
            macs = macs + brought * c_in * channels * size**2
        return Cost(params, macs)
