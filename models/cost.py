"""#params and MACs of the CIFAR or the ImageNet network in closed form, for one genotype or for a batch of them.

A cell's cost depends on few numbers, its CellCounts; OPS in models/ops.py says what each op adds to them. They are
counted in one genotype by CellCounts.of, in a batch by CellCounts.of_batch; all that follows is the same for both.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace
from models.graph import CellBatch
from models.network import CifarConfig, ImageNetConfig, NetworkConfig, halved_inputs, is_reduction, vertex_stride
from models.ops import OPS, check_has_network


def genotype_cost(
    genotype: Genotype,
    num_classes: int = CifarConfig.num_classes,
    layers: int = CifarConfig.layers,
    channels: int = CifarConfig.channels,
    image_size: int = 32,
) -> tuple[int, int]:
    """(#params, MACs) of CifarNetwork for one genotype, its auxiliary head left out. image_size: in pixels.

    The numbers equal those of count_parameters and count_macs, but no network is built, so that they come thousands of
    times sooner, for whole pools and hard limits.
    Raises ValueError when the genotype is not valid, or of a space without networks.
    """
    return network_cost(genotype, CifarConfig(num_classes, layers, channels), image_size)


def network_cost(genotype: Genotype, config: NetworkConfig, image_size: int | None = None) -> "Cost":
    """(#params, MACs) of one genotype in CifarNetwork or ImageNetNetwork, as in genotype_cost.

    config: a CifarConfig or an ImageNetConfig, which says which network it is. image_size: in pixels; None: 32 and 224.
    """
    check_has_network(genotype.space)
    pruned = genotype.prune()
    if pruned is None:
        raise ValueError("the genotype is not valid: a cell has no path from an input to the output")
    normal, reduction = CellCounts.of(pruned.normal, False), CellCounts.of(pruned.reduction, True)
    return stack_cost(normal, reduction, config, image_size or (224 if isinstance(config, ImageNetConfig) else 32))


def batch_cost(normal: CellBatch, reduction: CellBatch, space: SearchSpace = NAG_SPACE) -> "Cost":
    """genotype_cost of B valid genotypes at once: (B,) long tensors of #params and of MACs, at the default sizes.

    normal, reduction: their cells, hard and pruned (see CellBatch.prune).
    """
    counts = CellCounts.of_batch(normal, False, space), CellCounts.of_batch(reduction, True, space)
    return stack_cost(*counts, CifarConfig(), image_size=32)


class Cost(NamedTuple):
    """#params and MACs: numbers, or (B,) tensors for a batch."""

    params: int | Tensor
    macs: int | Tensor

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.params + other.params, self.macs + other.macs)


def stem_cost(config: NetworkConfig, image_size: int) -> tuple[Cost, int, int]:
    """The cost of a network's stem, and the channels and the size in pixels of the map s1 that it gives."""
    if not isinstance(config, ImageNetConfig):
        width = 3 * config.channels
        return Cost(27 * width + 2 * width, 27 * width * image_size**2), width, image_size
    width, cost, c_in, size = config.channels, Cost(0, 0), 3, image_size
    for c_out in (width // 2, width, width):  # three convolutions 3x3 with stride 2, a batch norm after each
        size, weights = (size + 1) // 2, 9 * c_in * c_out
        cost += Cost(weights + 2 * c_out, weights * size**2)
        c_in = c_out
    return cost, width, size


def stack_cost(normal: "CellCounts", reduced: "CellCounts", config: NetworkConfig, image_size: int) -> Cost:
    """The cost of a CifarNetwork or ImageNetNetwork from the counts of its normal and its reduction cell."""
    (cost, width, size), channels = stem_cost(config, image_size), config.channels
    c_prev_prev, c_prev, halve_first = width, width, isinstance(config, ImageNetConfig)
    for layer in range(3 * config.layers + 2):
        reduction = is_reduction(layer, config.layers)
        channels = channels * 2 if reduction else channels
        cell = reduced if reduction else normal
        cost += cell.cost(c_prev_prev, c_prev, channels, reduction, halve_first, size)
        size = (size + 1) // 2 if reduction else size
        c_prev_prev, c_prev, halve_first = c_prev, channels * cell.outputs, reduction
    return cost + Cost((c_prev + 1) * config.num_classes, c_prev * config.num_classes)  # of the classifier


class CellCounts(NamedTuple):
    """The numbers that decide what a cell costs, or (B,) tensors of them for a batch of cells.

    reads: whether anything reads cell input 0, and cell input 1.
    depthwise: weights of the ops' depthwise convolutions for each channel.
    pointwise: 1x1 convolutions C -> C with a batch norm, in ops and FactorizedReduce modules; two C -> C/2 are one.
    outputs: states that the output concatenates.
    """

    reads: tuple[bool, ...] | tuple[Tensor, ...]
    depthwise: int | Tensor
    pointwise: int | Tensor
    outputs: int | Tensor

    @staticmethod
    def of(spec: CellSpec, reduction: bool) -> "CellCounts":
        """The counts of one pruned cell. reduction: whether it is a reduction cell."""
        inputs, output = spec.space.num_inputs, spec.num_vertices - 1
        ops = [(OPS[spec.ops[v]], vertex_stride(spec, v, reduction)) for v in range(inputs, output)]
        reduces = sum(len(halved_inputs(spec, v, reduction)) for v in range(inputs, output + 1))
        return CellCounts(
            reads=tuple(any(row) for row in spec.matrix[:inputs]),
            depthwise=sum(op.depthwise for op, _ in ops),
            pointwise=sum(op.pointwise_at(stride) for op, stride in ops) + reduces,
            outputs=len(spec.predecessors(output)),
        )

    @staticmethod
    def of_batch(cells: CellBatch, reduction: bool, space: SearchSpace = NAG_SPACE) -> "CellCounts":
        """The counts of B reduction or B normal cells, hard and pruned (see CellBatch.prune): (B,) tensors."""
        inputs, adj = space.num_inputs, cells.adj.long()
        chosen = {name: cells.ops[..., i].long() for name, i in space.token_id.items()}  # (B, V) of 0 and 1 each
        strided = reduces = torch.zeros_like(adj[:, 0])  # (B, V)
        if reduction:
            from_inputs, from_interior = adj[:, :inputs].sum(1), adj[:, inputs:].sum(1)
            strided = sum(chosen[name] for name in space.ops) * (from_interior == 0)
            reduces = (1 - strided) * from_inputs
        depthwise = sum(OPS[name].depthwise * chosen[name] for name in space.ops)
        at_strides = [sum(OPS[name].pointwise_at(stride) * chosen[name] for name in space.ops) for stride in (1, 2)]
        return CellCounts(
            reads=tuple((adj[:, i] > 0).any(-1) for i in range(inputs)),
            depthwise=depthwise.sum(1),
            pointwise=torch.where(strided > 0, at_strides[1], at_strides[0]).sum(1) + reduces.sum(1),
            outputs=(adj * chosen[space.output][:, None]).sum((1, 2)),
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
        """The cost of one `Cell`, see there for the arguments. size: of its second input, size x size pixels."""
        pixels = ((size + 1) // 2 if reduction else size) ** 2
        params = self.depthwise * channels + self.pointwise * (channels**2 + 2 * channels)
        macs = (self.depthwise * channels + self.pointwise * channels**2) * pixels
        for c_in, read, halve in zip((c_prev_prev, c_prev), self.reads, (halve_first, False), strict=True):
            brought = read & ((c_in != channels) | halve)  # to C channels, by a pointwise convolution
            params = params + brought * (c_in * channels + 2 * channels)
            macs = macs + brought * c_in * channels * size**2
        return Cost(params, macs)
