"""Stand-alone networks: one genotype stacked into a classifier (NAG paper, section 3.1).

With N = `layers`, a network is

    stem -> N normal -> reduction -> N normal -> reduction -> N normal -> pool, dropout, linear
                                                     |-> auxiliary head (training only)

Read `CellBase.run` for what a cell computes, `Stack.run` for what is done with the cells, and `Network` for how the
parts are put together. models/ops.py has the operations, models/supernet.py the network with shared weights.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from genotypes import CellSpec, Genotype
from models.fast.cpu import BatchNorm2d
from models.ops import FactorizedReduce, ReLUConvNorm, check_has_network, drop_path, make_op


class CellBase(nn.Module):
    """What a cell computes (NAG paper, section 3.1), by modules that its subclasses build.

    A `Cell` has the modules of one spec, a `SupernetCell` those of every cell of the space.

    reduction: whether the cell halves the resolution.
    calibration["0"]: brings cell input 0 to C channels, and to the resolution of the other input.
    ops["3_seqconv3x3"]: the op of interior vertex 3.
    reduces["0_3"], reduces["0_output"]: halve cell input 0 for a vertex that works at half resolution.
    """

    def __init__(self, reduction: bool):
        super().__init__()
        self.reduction = reduction
        self.calibration, self.ops, self.reduces = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    def run(self, spec: CellSpec, inputs: tuple[Tensor, ...], keep_prob: float | Tensor | None) -> list[Tensor]:
        """The states that the output vertex reads, in ascending order of vertices: each (B, C, H', W').

        spec: a pruned cell. inputs: the outputs of the cells before, one for each input vertex.
        keep_prob: the keep probability of drop path in this cell; None: no drop path.
        """
        output = spec.num_vertices - 1
        states = [self.calibrate(v, x) if any(spec.matrix[v]) else None for v, x in enumerate(inputs)]  # None: unread
        for v in range(len(inputs), output):
            states.append(self.state(spec, v, self.read(spec, v, states), keep_prob))
        return self.read(spec, output, states)

    def calibrate(self, source: int, x: Tensor) -> Tensor:
        """Cell input `source` (B, c_in, H, W) with the cell's C channels."""
        return self.calibration[str(source)](x)

    def halve(self, name: str, x: Tensor) -> Tensor:
        """A calibrated cell input at half the resolution. name: of the module in `reduces`, see reduce_name."""
        return self.reduces[name](x)

    def read(self, spec: CellSpec, vertex: int, states: list[Tensor]) -> list[Tensor]:
        """The states of a vertex's predecessors, cell inputs halved where the vertex works at half resolution."""
        halved = halved_inputs(spec, vertex, self.reduction)
        return [
            self.halve(reduce_name(spec, p, vertex), states[p]) if p in halved else states[p]
            for p in spec.predecessors(vertex)
        ]

    def state(self, spec: CellSpec, vertex: int, inputs: list[Tensor], keep_prob: float | Tensor | None) -> Tensor:
        """The state of an interior vertex: its op on the sum of its inputs, then drop path, which spares identities."""
        op, stride = self.ops[f"{vertex}_{spec.ops[vertex]}"], vertex_stride(spec, vertex, self.reduction)
        x = op(reduce(add, inputs), stride)  # sum() would add to 0 first
        return x if keep_prob is None or spec.ops[vertex] == "identity" else drop_path(x, keep_prob)


def vertex_stride(spec: CellSpec, vertex: int, reduction: bool) -> int:
    """2 for an interior vertex of a reduction cell that reads cell inputs only, else 1."""
    return 2 if reduction and max(spec.predecessors(vertex)) < spec.space.num_inputs else 1


def halved_inputs(spec: CellSpec, vertex: int, reduction: bool) -> list[int]:
    """The cell inputs that pass a FactorizedReduce on their way to `vertex` of a cell.

    These are all that a vertex of a reduction cell reads, where it reads interior vertices too or is the output.
    """
    if not reduction or (vertex < spec.num_vertices - 1 and vertex_stride(spec, vertex, reduction) == 2):
        return []
    return [p for p in spec.predecessors(vertex) if p < spec.space.num_inputs]


def reduce_name(spec: CellSpec, source: int, vertex: int) -> str:
    """The key in `CellBase.reduces` of the module between a cell input and a vertex.

    Where the vertex is the output, the key is the same in cells of all sizes, so that a supernet shares its weights.
    """
    return f"{source}_{vertex if vertex < spec.num_vertices - 1 else spec.space.output}"


class Cell(CellBase):
    """The cell of one genotype (NAG paper, section 3.1), whose output concatenates what its output vertex reads.

    spec: pruned. c_prev_prev, c_prev: channels of input0 and input1, the outputs of the two cells before.
    channels: C of the cell's own states; of a reduction cell too, where it is doubled already.
    halve_first: whether input0 has twice the resolution of input1, which the calibration then halves.
    """

    def __init__(
        self, spec: CellSpec, c_prev_prev: int, c_prev: int, channels: int, reduction: bool, halve_first: bool
    ):
        super().__init__(reduction)
        self.spec = spec
        output = spec.num_vertices - 1
        self.out_channels = channels * len(spec.predecessors(output))
        for v, (c_in, halve) in enumerate(((c_prev_prev, halve_first), (c_prev, False))):
            if any(spec.matrix[v]):
                self.calibration[str(v)] = make_calibration(c_in, channels, halve)
        for v in range(spec.space.num_inputs, output + 1):
            if v < output:
                strided = vertex_stride(spec, v, reduction) == 2
                self.ops[f"{v}_{spec.ops[v]}"] = make_op(spec.ops[v], channels, strided)
            for p in halved_inputs(spec, v, reduction):
                self.reduces[reduce_name(spec, p, v)] = FactorizedReduce(channels, channels)

    def forward(self, s0: Tensor, s1: Tensor, keep_prob: float | Tensor | None = None) -> Tensor:
        """(B, c_prev_prev, H, W), (B, c_prev, H, W) -> (B, C * states that the output reads, H', W')."""
        return torch.cat(self.run(self.spec, (s0, s1), keep_prob), dim=1)


def make_calibration(c_in: int, c_out: int, halve: bool, norm: type[nn.Module] = BatchNorm2d) -> nn.Module:
    """The module that brings a cell input to the cell's number of channels, and with `halve` to half the resolution."""
    if halve:
        return nn.Sequential(nn.ReLU(), FactorizedReduce(c_in, c_out, norm))
    return ReLUConvNorm(c_in, c_out, norm) if c_in != c_out else nn.Identity()


class AuxiliaryHead(nn.Sequential):
    """A second classifier in training, on the map (B, C, H, W) after the last reduction cell -> logits (B, classes).

    It takes maps that pool to 2x2 only: see `auxiliary_sizes` of the networks.
    """

    def __init__(self, channels: int, num_classes: int, pool_stride: int, norm: type[nn.Module] = BatchNorm2d):
        super().__init__(
            nn.ReLU(),  # not in place: the next cell reads the same tensor (the reference rectifies it)
            nn.AvgPool2d(5, pool_stride),
            nn.Conv2d(channels, 128, 1, bias=False),
            norm(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            norm(768),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


def init_weights(module: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers from Kaiming's normal; set biases of linear layers to zero."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def drop_path_keep(keep_prob: float, layer: int, num_layers: int, progress: float | Tensor) -> float | Tensor | None:
    """The keep probability of drop path in cell `layer` (0 is the first) of `num_layers`; None: no drop path.

    A path is dropped with probability 1 - keep_prob in the last cell at the end of the schedule. That grows linearly
    with the depth of the cell and with `progress`, the share of the schedule that is done, from 0 to 1.
    """
    return None if keep_prob == 1 else 1 - (1 - keep_prob) * (layer + 1) / num_layers * progress


def is_reduction(layer: int, layers: int) -> bool:
    """Whether cell `layer` of a 3N + 2 stack (N = layers) is a reduction cell."""
    return layer in (layers, 2 * layers + 1)


class Stack(nn.Module):
    """The way from a stem to logits through a stack of cells (NAG paper, section 3.1), which its subclasses build.

    They set cells, auxiliary (or None), auxiliary_layer (the cell that it reads), dropout, classifier and
    drop_path_keep_prob.
    """

    def run(
        self, cells: Sequence[Callable[..., Tensor]], s0: Tensor, s1: Tensor, progress: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """From s0 and s1, which the stem gives, to logits (B, classes) and, in train mode, the auxiliary head's.

        cells: each is called with the outputs of the two before it and the keep probability of drop path.
        progress: the share of the schedule that is done, 0 to 1, see drop_path_keep.
        """
        auxiliary = None
        keep_probs = self.keep_probs(progress) if self.training else [None] * len(cells)
        for layer, (cell, keep_prob) in enumerate(zip(cells, keep_probs, strict=True)):
            s0, s1 = s1, cell(s0, s1, keep_prob)
            if layer == self.auxiliary_layer and self.training and self.auxiliary is not None:
                auxiliary = self.auxiliary(s1)
        return self.classifier(self.dropout(s1.mean((2, 3)))), auxiliary

    def keep_probs(self, progress: float | Tensor) -> list[float | Tensor | None]:
        """The keep probability of drop path in each cell, see drop_path_keep."""
        cells = len(self.cells)
        return [drop_path_keep(self.drop_path_keep_prob, layer, cells, progress) for layer in range(cells)]


@dataclass(frozen=True)
class NetworkConfig:
    """The settings of a stand-alone network, which go into its checkpoints as they are.

    num_classes: classes of the images. layers: N, the normal cells per stack. channels: C of the first stack, which
    each reduction cell doubles. keep_prob: the keep probability of the dropout before the classifier.
    drop_path_keep_prob: that of drop path in the last cell at the end of the schedule. auxiliary: whether there is an
    auxiliary head.
    """

    num_classes: int
    layers: int
    channels: int
    keep_prob: float
    drop_path_keep_prob: float
    auxiliary: bool = True


class Network(Stack):
    """The stack of one genotype's cells over a stem, which subclasses build: `stem(images) -> (s0, s1)`.

    stem_channels: channels of s0 and s1. halve_first: whether s0 has twice the resolution of s1. pool_stride: stride
    of the pooling in the auxiliary head.
    Raises ValueError when the genotype is not valid, or of a space without networks.
    """

    def __init__(
        self,
        genotype: Genotype,
        config: NetworkConfig,
        stem_channels: tuple[int, int],
        halve_first: bool,
        pool_stride: int,
    ):
        super().__init__()
        check_has_network(genotype.space)
        pruned = genotype.prune()
        if pruned is None:
            raise ValueError("the genotype is not valid: a cell has no path from an input to the output")
        self.genotype, self.config, self.drop_path_keep_prob = pruned, config, config.drop_path_keep_prob
        self.auxiliary_layer = 2 * config.layers + 1
        self.cells = nn.ModuleList()
        (c_prev_prev, c_prev), channels = stem_channels, config.channels
        for layer in range(3 * config.layers + 2):
            reduction = is_reduction(layer, config.layers)
            channels = channels * 2 if reduction else channels
            spec = pruned.reduction if reduction else pruned.normal
            cell = Cell(spec, c_prev_prev, c_prev, channels, reduction, halve_first)
            self.cells.append(cell)
            c_prev_prev, c_prev, halve_first = c_prev, cell.out_channels, reduction
            if layer == self.auxiliary_layer:
                self.auxiliary = AuxiliaryHead(c_prev, config.num_classes, pool_stride) if config.auxiliary else None
        self.dropout = nn.Dropout(1 - config.keep_prob)
        self.classifier = nn.Linear(c_prev, config.num_classes)
        self.compiled = False  # see compile_cells

    def forward(self, images: Tensor, progress: float | Tensor = 1.0) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, S, S) -> logits (B, classes) and, in train mode, the auxiliary head's.

        progress: the share of the schedule that is done, (step + 1) / its steps, by which drop path grows. A tensor, in
            the place of a float, does not compile the cells anew when it changes.
        """
        as_they_are = self.compiled and not self.training
        cells = [cell.forward for cell in self.cells] if as_they_are else self.cells
        return self.run(cells, *self.stem(images), progress)

    def compile_cells(self, **options) -> None:
        """From now on, train with cells compiled by torch.compile, whose options are given.

        The cells are nearly all of the work. They are compiled one by one, which takes a fraction of the time that the
        whole network does: cells of one spec, stage and kind of inputs share what is compiled.
        """
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, 2 * len(self.cells))  # of one function: Cell.forward
        for cell in self.cells:
            cell.compile(dynamic=False, **options)
        self.compiled = True


@dataclass(frozen=True)
class CifarConfig(NetworkConfig):
    """The published settings for CIFAR-10 (NAG paper, section 4.2)."""

    num_classes: int = 10
    layers: int = 6
    channels: int = 36
    keep_prob: float = 0.6
    drop_path_keep_prob: float = 0.8


class CifarNetwork(Network):
    """The network for small images, as the 32x32 of CIFAR. The keywords are the fields of CifarConfig.

    auxiliary_sizes: the smallest and the largest images, in pixels, whose maps pool to 2x2 in the auxiliary head.
    """

    auxiliary_sizes = 29, 40

    def __init__(self, genotype: Genotype, *args, **kwargs):
        config = CifarConfig(*args, **kwargs)
        width = 3 * config.channels
        super().__init__(genotype, config, (width, width), halve_first=False, pool_stride=3)
        self.stem0 = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), BatchNorm2d(width))
        init_weights(self)

    def stem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        s = self.stem0(images)
        return s, s


@dataclass(frozen=True)
class ImageNetConfig(NetworkConfig):
    """The published settings for ImageNet (NAG paper, section 4.3), with the 42 channels that give its #params."""

    num_classes: int = 1000
    layers: int = 4
    channels: int = 42
    keep_prob: float = 1.0
    drop_path_keep_prob: float = 1.0


class ImageNetNetwork(Network):
    """The network for images of 224x224. The keywords are the fields of ImageNetConfig.

    auxiliary_sizes: as in CifarNetwork.
    """

    auxiliary_sizes = 193, 256

    def __init__(self, genotype: Genotype, *args, **kwargs):
        config = ImageNetConfig(*args, **kwargs)
        channels = config.channels
        super().__init__(genotype, config, (channels, channels), halve_first=True, pool_stride=2)
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, channels // 2, 3, stride=2, padding=1, bias=False),
            BatchNorm2d(channels // 2),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1, bias=False),
            BatchNorm2d(channels),
        )
        self.stem1 = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False), BatchNorm2d(channels)
        )
        init_weights(self)

    def stem(self, images: Tensor) -> tuple[Tensor, Tensor]:
        s0 = self.stem0(images)
        return s0, self.stem1(s0)


def count_parameters(network: nn.Module) -> int:
    """The number of parameters of a network, its auxiliary head left out."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary."))


def count_macs(network: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image through a network in eval mode: convolutions and linear layers.

    They are counted by torch in a copy on torch.device("meta"), where nothing is computed.
    """
    dtype = next(network.parameters()).dtype
    images = torch.empty(1, 3, image_size, image_size, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).to("meta").eval()(images)
    return counter.get_total_flops() // 2
