"""Stand-alone networks: one genotype stacked into a classifier (NAG paper, section 3.1).

The stack, with N = `layers`:

    stem -> N normal -> reduction -> N normal -> reduction -> N normal -> pool, dropout, linear
                                                     |-> auxiliary head (training only)
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
from models.ops import FactorizedReduce, ReLUConvNorm, drop_path, make_op


class CellBase(nn.Module):
    """Runs a cell's DAG on modules that subclasses build: a Cell those of one spec, a SupernetCell those of all.

    calibration["0"]: brings cell input 0 to C channels, and to the resolution of the other input.
    ops["3_seqconv3x3"]: the op of interior vertex 3.
    reduces["0_3"], reduces["0_output"]: halve cell input 0 for a vertex that works at half resolution.
    """

    def __init__(self, reduction: bool):
        super().__init__()
        self.reduction = reduction
        self.calibration, self.ops, self.reduces = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()

    def run(self, spec: CellSpec, inputs: tuple[Tensor, ...], keep_prob: float | Tensor | None) -> list[Tensor]:
        """States of the output vertex's predecessors, in ascending vertex order: each (B, C, H', W').

        inputs: the outputs of the cells before, one for each input vertex.
        keep_prob: drop-path keep probability in this cell, None = no drop path.
        """
        states = [
            self.call(self.calibration[str(v)], [inputs[v]]) if any(spec.matrix[v]) else None  # else it is not read
            for v in range(spec.space.num_inputs)
        ]
        for v in range(spec.space.num_inputs, spec.num_vertices - 1):
            op, stride = self.ops[f"{v}_{spec.ops[v]}"], vertex_stride(spec, v, self.reduction)
            keep = None if spec.ops[v] == "identity" else keep_prob
            states.append(self.call(op, self._predecessor_states(spec, states, v), stride, keep_prob=keep))
        return self._predecessor_states(spec, states, spec.num_vertices - 1)

    def call(
        self, module: nn.Module, inputs: list[Tensor], *stride: int, keep_prob: float | Tensor | None = None
    ) -> Tensor:
        """One of the modules on the sum of the inputs, and drop path if there is a keep probability."""
        x = module(reduce(add, inputs), *stride)  # sum() would add to 0 first
        return x if keep_prob is None else drop_path(x, keep_prob)

    def _predecessor_states(self, spec: CellSpec, states: list[Tensor], vertex: int) -> list[Tensor]:
        """What `vertex` reads, cell inputs halved where it works at half resolution."""
        halved = halved_inputs(spec, vertex, self.reduction)
        return [
            self.call(self.reduces[reduce_name(spec, p, vertex)], [states[p]]) if p in halved else states[p]
            for p in spec.predecessors(vertex)
        ]


def vertex_stride(spec: CellSpec, vertex: int, reduction: bool) -> int:
    """2 for an interior vertex of a reduction cell that reads cell inputs only, else 1."""
    return 2 if reduction and max(spec.predecessors(vertex)) < spec.space.num_inputs else 1


def halved_inputs(spec: CellSpec, vertex: int, reduction: bool) -> list[int]:
    """The cell inputs that pass a FactorizedReduce on their way to `vertex`.

    All that a vertex of a reduction cell reads, if it reads interior vertices too or is the output.
    """
    if not reduction or (vertex < spec.num_vertices - 1 and vertex_stride(spec, vertex, reduction) == 2):
        return []
    return [p for p in spec.predecessors(vertex) if p < spec.space.num_inputs]


def reduce_name(spec: CellSpec, source: int, vertex: int) -> str:
    """Key of the FactorizedReduce between a cell input and a vertex; the output's does not depend on its index."""
    return f"{source}_{vertex if vertex < spec.num_vertices - 1 else spec.space.output}"


class Cell(CellBase):
    """The cell of one spec: (B, c_prev_prev, H, W), (B, c_prev, H, W) -> (B, C * predecessors of output, H', W').

    channels: C, also of a reduction cell (already doubled).
    halve_first: input0 has twice the resolution of input1.
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
                self.calibration[str(v)] = calibrate(c_in, channels, halve)
        for v in range(spec.space.num_inputs, output + 1):
            if v < output:
                strided = vertex_stride(spec, v, reduction) == 2
                self.ops[f"{v}_{spec.ops[v]}"] = make_op(spec.ops[v], channels, strided)
            for p in halved_inputs(spec, v, reduction):
                self.reduces[reduce_name(spec, p, v)] = FactorizedReduce(channels, channels)

    def forward(self, s0: Tensor, s1: Tensor, keep_prob: float | Tensor | None = None) -> Tensor:
        return torch.cat(self.run(self.spec, (s0, s1), keep_prob), dim=1)


def calibrate(c_in: int, c_out: int, halve: bool, norm: type[nn.Module] = BatchNorm2d) -> nn.Module:
    """Bring a cell input to the cell's channel count, and to half the resolution with `halve`."""
    if halve:
        return nn.Sequential(nn.ReLU(), FactorizedReduce(c_in, c_out, norm))
    return ReLUConvNorm(c_in, c_out, norm) if c_in != c_out else nn.Identity()


class AuxiliaryHead(nn.Sequential):
    """Second classifier on the map after the last reduction cell; takes maps that pool to 2x2 only."""

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
    """Kaiming normal for every weight with two or more dimensions, zero biases of linear layers."""
    for child in module.modules():
        if isinstance(child, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(child.weight)
            if child.bias is not None:
                nn.init.zeros_(child.bias)


def drop_path_keep(keep_prob: float, layer: int, num_layers: int, progress: float | Tensor) -> float | Tensor | None:
    """Keep probability in cell `layer` of `num_layers`: drop path grows with depth and with training progress."""
    return None if keep_prob == 1 else 1 - (1 - keep_prob) * (layer + 1) / num_layers * progress


def is_reduction(layer: int, layers: int) -> bool:
    """Whether cell `layer` of a 3N + 2 stack (N = layers) is a reduction cell."""
    return layer in (layers, 2 * layers + 1)


class Stack(nn.Module):
    """Cells, an auxiliary head and a classifier, which subclasses build."""

    def run(
        self, cells: Sequence[Callable[..., Tensor]], s0: Tensor, s1: Tensor, progress: float | Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """From what the stem gives to logits (B, classes) and, in train mode, the auxiliary head's.

        cells: called with the outputs of the two before and the drop-path keep probability.
        """
        auxiliary = None
        keep_probs = self.keep_probs(progress) if self.training else [None] * len(cells)
        for layer, (cell, keep_prob) in enumerate(zip(cells, keep_probs, strict=True)):
            s0, s1 = s1, cell(s0, s1, keep_prob)
            if layer == self.auxiliary_layer and self.training and self.auxiliary is not None:
                auxiliary = self.auxiliary(s1)
        return self.classifier(self.dropout(s1.mean((2, 3)))), auxiliary

    def keep_probs(self, progress: float | Tensor) -> list[float | Tensor | None]:
        """Of drop path in each cell, see drop_path_keep."""
        cells = len(self.cells)
        return [drop_path_keep(self.drop_path_keep_prob, layer, cells, progress) for layer in range(cells)]


@dataclass(frozen=True)
class NetworkConfig:
    """The settings of a stand-alone network, which go into its checkpoints as they are.

    num_classes: of the images. layers: normal cells per stack, N. channels: C of the first stack; doubled by each
    reduction cell. keep_prob: of the classifier's dropout. drop_path_keep_prob: of drop path in the last cell at the
    end of training. auxiliary: whether there is an auxiliary head.
    """

    num_classes: int
    layers: int
    channels: int
    keep_prob: float
    drop_path_keep_prob: float
    auxiliary: bool = True


class Network(Stack):
    """The stack of one genotype's cells over a stem, which subclasses build: `stem(images) -> (s0, s1)`.

    stem_channels: of s0 and s1. halve_first: whether s0 has twice the resolution of s1. pool_stride: of the auxiliary
    head's pooling.
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

        progress: (step + 1) / steps of the run, in (0, 1]: strength of drop path. A tensor avoids recompilation.
        """
        as_they_are = self.compiled and not self.training
        cells = [cell.forward for cell in self.cells] if as_they_are else self.cells
        return self.run(cells, *self.stem(images), progress)

    def compile_cells(self, **options) -> None:
        """torch.compile the cells, which are nearly all of the work, for training. options: of torch.compile.

        One by one, which takes a fraction of the time that the whole network does: cells of one spec, stage and kind
        of inputs share what is compiled.
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
    """For small images (32x32). The keywords are the fields of CifarConfig."""

    auxiliary_sizes = 29, 40  # pixels: the images whose maps pool to 2x2 in the auxiliary head

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
    """For 224x224 images. The keywords are the fields of ImageNetConfig."""

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
    """Number of parameters, auxiliary head left out."""
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("auxiliary."))


def count_macs(network: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of one image through a network in eval mode, convolutions and linear layers.

    Of a copy on torch.device("meta"), where nothing is computed and every op is torch's own (see models/cpu.py).
    """
    dtype = next(network.parameters()).dtype
    images = torch.empty(1, 3, image_size, image_size, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(network).to("meta").eval()(images)
    return counter.get_total_flops() // 2
