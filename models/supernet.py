"""The one-shot model: all cells at once, weights shared by vertex position (NAG paper, section 3.3)."""

from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cuda_graphs import RecordedParts
from genotypes import NAG_SPACE, CellSpec, Genotype
from models.cpu import BatchNorm2d, fast_here
from models.network import AuxiliaryHead, CellBase, Stack, calibrate, drop_path_keep, init_weights, is_reduction
from models.ops import FactorizedReduce, Identity, drop_path, make_op

# Batch statistics in every batch norm, in training and in scoring: cells share weights, so running statistics would
# be a mixture over cells that fits none of them; and scoring leaves no trace in the model.
BatchNorm = partial(BatchNorm2d, track_running_stats=False)


class SupernetCell(CellBase):
    """Weights for every cell of the space. Every cell ends in ReLU, 1x1 convolution, batch norm: C channels out."""

    def __init__(
        self,
        c_prev_prev: int,
        c_prev: int,
        channels: int,
        reduction: bool,
        halve_first: bool,
        max_vertices: int,
    ):
        super().__init__(reduction)
        self.calibration["0"] = calibrate(c_prev_prev, channels, halve_first, BatchNorm)
        self.calibration["1"] = calibrate(c_prev, channels, False, BatchNorm)
        vertices = range(NAG_SPACE.num_inputs, max_vertices - 1)
        for v in vertices:
            for op in NAG_SPACE.ops:
                self.ops[f"{v}_{op}"] = make_op(op, channels, reduction, BatchNorm)
        if reduction:
            for source in range(NAG_SPACE.num_inputs):
                for v in (*vertices, NAG_SPACE.output):
                    self.reduces[f"{source}_{v}"] = FactorizedReduce(channels, channels, BatchNorm)
        # Slice v of the final convolution reads vertex v; a cell uses those of its output's predecessors.
        self.final = nn.ParameterList(torch.empty(channels, channels, 1, 1) for _ in range(max_vertices - 1))
        self.final_norm = BatchNorm(channels)
        self.parts: RecordedParts | None = None  # see Supernet.record_parts
        self.vertices: dict[nn.Module, tuple[int, str]] = {}  # the cell and vertex of its ops, then

    def call(
        self, module: nn.Module, inputs: list[Tensor], *stride: int, keep_prob: float | Tensor | None = None
    ) -> Tensor:
        """As CellBase.call; in training replayed, if parts are recorded, except what has no kernels of its own."""
        recorded = self.parts is not None and self.training and torch.is_grad_enabled()
        if not recorded or isinstance(module, nn.Identity) or (isinstance(module, Identity) and stride == (1,)):
            return super().call(module, inputs, *stride, keep_prob=keep_prob)
        place = self.vertices.get(module, module), stride  # a step calls one of the ops of a vertex
        if keep_prob is None:
            return self.parts(place, module, inputs, *stride)
        return self.parts(place, module, inputs, *stride, then=partial(drop_path, keep_prob=keep_prob))

    def forward(self, spec: CellSpec, s0: Tensor, s1: Tensor, keep_prob: float | Tensor | None) -> Tensor:
        """(B, c_prev_prev, H, W), (B, c_prev, H, W) -> (B, C, H', W') along the path of `spec`."""
        states = self.run(spec, (s0, s1), keep_prob)
        slices = [self.final[v] for v in spec.predecessors(spec.num_vertices - 1)]
        if fast_here(states[0]):  # slice by slice, without the strided gradients of cat: in bf16 twice as fast
            x = reduce(add, (F.conv2d(F.relu(x), weight) for x, weight in zip(states, slices, strict=True)))
        else:
            x = F.conv2d(F.relu(torch.cat(states, dim=1), inplace=True), torch.cat(slices, dim=1))  # cat copies
        return self.final_norm(x)


class Supernet(Stack):
    """Stem, 3N + 2 shared cells, auxiliary head, classifier. Same macro layout as CifarNetwork."""

    def __init__(
        self,
        num_classes: int = 10,
        layers: int = 3,
        channels: int = 20,
        max_vertices: int = 10,
        keep_prob: float = 1.0,
        drop_path_keep_prob: float = 0.9,
        auxiliary: bool = True,
    ):
        super().__init__()
        self.config = {
            "num_classes": num_classes,
            "layers": layers,
            "channels": channels,
            "max_vertices": max_vertices,
            "keep_prob": keep_prob,
            "drop_path_keep_prob": drop_path_keep_prob,
            "auxiliary": auxiliary,
        }
        self.drop_path_keep_prob, self.layers = drop_path_keep_prob, layers
        self.recorded_keep: Tensor | None = None  # keep probabilities, where recordings read them
        self.auxiliary_layer = 2 * layers + 1
        c_prev_prev = c_prev = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, c_prev, 3, padding=1, bias=False), BatchNorm(c_prev))
        self.cells = nn.ModuleList()
        halve_first = False
        for layer in range(3 * layers + 2):
            reduction = is_reduction(layer, layers)
            channels = channels * 2 if reduction else channels
            self.cells.append(SupernetCell(c_prev_prev, c_prev, channels, reduction, halve_first, max_vertices))
            c_prev_prev, c_prev, halve_first = c_prev, channels, reduction
            if layer == self.auxiliary_layer:
                self.auxiliary = AuxiliaryHead(channels, num_classes, 3, BatchNorm) if auxiliary else None
        self.dropout = nn.Dropout(1 - keep_prob)
        self.classifier = nn.Linear(c_prev, num_classes)
        init_weights(self)
        for cell in self.cells:
            for weight in cell.final:
                nn.init.kaiming_normal_(weight)

    def forward(
        self, images: Tensor, genotype: Genotype, progress: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, S, S) -> logits (B, classes) along the genotype's path, and the auxiliary head's in training.

        genotype: pruned, at most `max_vertices` vertices a cell. progress: as in Network.forward.
        """
        s = self.stem(images)
        cells = [partial(cell, genotype.reduction if cell.reduction else genotype.normal) for cell in self.cells]
        return self.run(cells, s, s, progress)

    def record_parts(self) -> None:
        """From now on, replay the modules of the cells as CUDA graphs in training, see RecordedParts.

        Images have to be of the same shape in every step. The gradients of a step are lost with the next forward pass,
        and have to be gone (zero_grad) by the next backward pass.
        """
        parts = RecordedParts()
        for i, cell in enumerate(self.cells):
            cell.parts, cell.vertices = parts, {op: (i, name.split("_")[0]) for name, op in cell.ops.items()}
        self.recorded_keep = self.classifier.weight.new_empty(len(self.cells))

    def keep_probs(self, progress: float | Tensor) -> list[float | Tensor | None]:
        if self.recorded_keep is None or self.drop_path_keep_prob == 1:
            return super().keep_probs(progress)
        cells = len(self.cells)
        layers = torch.arange(cells, device=self.recorded_keep.device)
        self.recorded_keep.copy_(drop_path_keep(self.drop_path_keep_prob, layers, cells, progress))
        return list(self.recorded_keep)
