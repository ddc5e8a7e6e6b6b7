"""The supernet, or one-shot model: all cells of the space at once, with shared weights (NAG paper, section 3.3).

Weights are shared by position: interior vertex v of every cell of a layer has the same weights for an op. A forward
pass goes along the path of one genotype, which is all that it computes.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from genotypes import NAG_SPACE, CellSpec, Genotype
from models.fast.cpu import BatchNorm2d, relu_conv_of_concatenation
from models.network import AuxiliaryHead, CellBase, Stack, init_weights, is_reduction, make_calibration
from models.ops import FactorizedReduce, make_op

# Batch statistics in every batch norm, in training and in scoring: cells share weights, so running statistics would
# be a mixture over cells that fits none of them; and scoring leaves no trace in the model.
BatchNorm = partial(BatchNorm2d, track_running_stats=False)


class SupernetCell(CellBase):
    """The weights for every cell of the space at one layer (NAG paper, section 3.3).

    Cells concatenate different numbers of states. So that all have C channels for output, each ends in ReLU, a 1x1
    convolution whose kernel is put together of one slice for each state, and batch norm.
    The arguments are those of `Cell`; max_vertices: those of the largest cell that there are weights for.
    """

    def __init__(
        self, c_prev_prev: int, c_prev: int, channels: int, reduction: bool, halve_first: bool, max_vertices: int
    ):
        super().__init__(reduction)
        self.calibration["0"] = make_calibration(c_prev_prev, channels, halve_first, BatchNorm)
        self.calibration["1"] = make_calibration(c_prev, channels, False, BatchNorm)
        vertices = range(NAG_SPACE.num_inputs, max_vertices - 1)
        for v in vertices:
            for op in NAG_SPACE.ops:
                self.ops[f"{v}_{op}"] = make_op(op, channels, reduction, BatchNorm)
        if reduction:
            for source in range(NAG_SPACE.num_inputs):
                for v in (*vertices, NAG_SPACE.output):
                    self.reduces[f"{source}_{v}"] = FactorizedReduce(channels, channels, BatchNorm)
        # Slice v of the final convolution reads the state of vertex v.
        self.final = nn.ParameterList(torch.empty(channels, channels, 1, 1) for _ in range(max_vertices - 1))
        self.final_norm = BatchNorm(channels)

    def forward(self, spec: CellSpec, s0: Tensor, s1: Tensor, keep_prob: float | Tensor | None) -> Tensor:
        """(B, c_prev_prev, H, W), (B, c_prev, H, W) -> (B, C, H', W') along the path of `spec`."""
        return self.join(spec, self.run(spec, (s0, s1), keep_prob))

    def join(self, spec: CellSpec, states: list[Tensor]) -> Tensor:
        """The cell's output (B, C, H', W') from the states that the output vertex reads."""
        slices = [self.final[v] for v in spec.predecessors(spec.num_vertices - 1)]
        return self.final_norm(relu_conv_of_concatenation(states, slices))


@dataclass(frozen=True)
class SupernetConfig:
    """The published settings of a supernet, which go into its files as they are.

    num_classes, layers, channels, keep_prob, drop_path_keep_prob, auxiliary: as in NetworkConfig.
    max_vertices: those of the largest cell that it has weights for.
    """

    num_classes: int = 10
    layers: int = 3
    channels: int = 20
    max_vertices: int = NAG_SPACE.max_vertices
    keep_prob: float = 1.0
    drop_path_keep_prob: float = 0.9
    auxiliary: bool = True


class Supernet(Stack):
    """Stem, 3N + 2 shared cells, auxiliary head and classifier, laid out as CifarNetwork (NAG paper, section 3.3).

    The keywords are the fields of SupernetConfig.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = config = SupernetConfig(*args, **kwargs)
        self.drop_path_keep_prob = config.drop_path_keep_prob
        self.auxiliary_layer = 2 * config.layers + 1
        channels = config.channels
        c_prev_prev = c_prev = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, c_prev, 3, padding=1, bias=False), BatchNorm(c_prev))
        self.cells = nn.ModuleList()
        halve_first = False
        for layer in range(3 * config.layers + 2):
            reduction = is_reduction(layer, config.layers)
            channels = channels * 2 if reduction else channels
            self.cells.append(SupernetCell(c_prev_prev, c_prev, channels, reduction, halve_first, config.max_vertices))
            c_prev_prev, c_prev, halve_first = c_prev, channels, reduction
            if layer == self.auxiliary_layer:
                head = AuxiliaryHead(channels, config.num_classes, 3, BatchNorm) if config.auxiliary else None
                self.auxiliary = head
        self.dropout = nn.Dropout(1 - config.keep_prob)
        self.classifier = nn.Linear(c_prev, config.num_classes)
        init_weights(self)
        for cell in self.cells:
            for weight in cell.final:
                nn.init.kaiming_normal_(weight)

    def forward(
        self, images: Tensor, genotype: Genotype, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, S, S) -> logits (B, classes) along the genotype's path; in train mode the auxiliary head's too.

        genotype: pruned, of at most `max_vertices` vertices a cell. progress: as in Network.forward.
        """
        s = self.stem(images)
        cells = [partial(cell, genotype.reduction if cell.reduction else genotype.normal) for cell in self.cells]
        return self.run(cells, s, s, progress)
