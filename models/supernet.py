"""The one-shot model: all cells at once, weights shared by vertex position (NAG paper, section 3.3)."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genotypes import NAG_SPACE, CellSpec, Genotype
from models.fast.cpu import BatchNorm2d, fast_here
from models.fast.replay import RecordedParts, Replay, Tape
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
        # What follows is of use when parts are recorded, see Supernet.record_parts.
        self.parts: dict[tuple[bool, bool], RecordedParts] = {}  # by whether in training and with gradients
        self.recorded: dict[nn.Module, tuple[Hashable, dict[str, nn.Parameter]]] = {}  # place and parameters
        self.tape: Tape | None = None  # while they are replayed

    def forward(self, spec: CellSpec, s0: Tensor, s1: Tensor, keep_prob: float | Tensor | None) -> Tensor:
        """(B, c_prev_prev, H, W), (B, c_prev, H, W) -> (B, C, H', W') along the path of `spec`."""
        parts = self.parts.get((self.training, torch.is_grad_enabled()))
        if parts is None:
            return self._join(spec, self.run(spec, (s0, s1), keep_prob))
        replay = partial(self._replay, spec, keep_prob)
        return Replay.apply(replay, parts, s0, s1) if parts.gradients else replay(Tape(parts), s0, s1)

    def _replay(self, spec: CellSpec, keep_prob: float | Tensor | None, tape: Tape, s0: Tensor, s1: Tensor) -> Tensor:
        self.tape = tape
        try:
            return self._join(spec, self.run(spec, (s0, s1), keep_prob))
        finally:
            self.tape = None

    def call(
        self, module: nn.Module, inputs: list[Tensor], *stride: int, keep_prob: float | Tensor | None = None
    ) -> Tensor:
        if self.tape is None:
            return super().call(module, inputs, *stride, keep_prob=keep_prob)
        if isinstance(module, nn.Identity) or (isinstance(module, Identity) and stride == (1,)):  # nothing to record
            return self.tape.add(inputs)
        place, parameters = self.recorded[module]

        def function(x: Tensor, *leaves: Tensor) -> Tensor:
            x = torch.func.functional_call(module, dict(zip(parameters, leaves, strict=True)), (x, *stride))
            return x if keep_prob is None else drop_path(x, keep_prob)

        return self.tape.call((module, stride), (place, stride), function, inputs, list(parameters.values()))

    def _join(self, spec: CellSpec, states: list[Tensor]) -> Tensor:
        """What the output vertex makes of the states that it reads."""
        slices = [self.final[v] for v in spec.predecessors(spec.num_vertices - 1)]
        if self.tape is not None:
            parameters = [*slices, self.final_norm.weight, self.final_norm.bias]
            return self.tape.call((self, len(slices)), self, self._join_recorded, states, parameters, len(self.final))
        if fast_here(states[0]):  # slice by slice, without the strided gradients of cat: in bf16 twice as fast
            x = reduce(add, (F.conv2d(F.relu(x), weight) for x, weight in zip(states, slices, strict=True)))
        else:
            x = F.conv2d(F.relu(torch.cat(states, dim=1), inplace=True), torch.cat(slices, dim=1))  # cat copies
        return self.final_norm(x)

    def _join_recorded(self, x: Tensor, *parameters: Tensor) -> Tensor:
        *slices, weight, bias = parameters
        x = F.conv2d(x, torch.cat(slices, dim=1))
        return torch.func.functional_call(self.final_norm, {"weight": weight, "bias": bias}, (x,))


@dataclass(frozen=True)
class SupernetConfig:
    """The settings of a supernet, as published, which go into its files as they are; see NetworkConfig.

    max_vertices: of the largest cell that it has weights for.
    """

    num_classes: int = 10
    layers: int = 3
    channels: int = 20
    max_vertices: int = 10
    keep_prob: float = 1.0
    drop_path_keep_prob: float = 0.9
    auxiliary: bool = True


class Supernet(Stack):
    """Stem, 3N + 2 shared cells, auxiliary head, classifier. Same macro layout as CifarNetwork.

    The keywords are the fields of SupernetConfig.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = config = SupernetConfig(*args, **kwargs)
        self.drop_path_keep_prob = config.drop_path_keep_prob
        self.parts: dict[tuple[bool, bool], RecordedParts] = {}  # as in the cells
        self.recorded_keep: Tensor | None = None  # keep probabilities, where recordings read them
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
        """images (B, 3, S, S) -> logits (B, classes) along the genotype's path, and the auxiliary head's in training.

        genotype: pruned, at most `max_vertices` vertices a cell. progress: as in Network.forward.
        """
        for parts in self.parts.values():
            parts.called.clear()
        s = self.stem(images)
        cells = [partial(cell, genotype.reduction if cell.reduction else genotype.normal) for cell in self.cells]
        return self.run(cells, s, s, progress)

    def record_parts(self) -> None:
        """From now on, replay what the cells do as CUDA graphs, in training and in scoring; see RecordedParts.

        Every step has to have images of the same shape, and the same precision; so has every scoring, and be in
        inference mode or not as the first one was. The gradients of a step are lost with the next forward pass, and
        have to be gone (zero_grad) by the next backward pass.
        """
        self.parts = {(True, True): RecordedParts(), (False, False): RecordedParts(gradients=False)}
        for i, cell in enumerate(self.cells):
            cell.parts, places = self.parts, {op: (i, name.split("_")[0]) for name, op in cell.ops.items()}
            for module in (*cell.calibration.values(), *cell.ops.values(), *cell.reduces.values()):
                # A step calls one of the ops of a vertex.
                cell.recorded[module] = places.get(module, module), dict(module.named_parameters())
        self.recorded_keep = self.classifier.weight.new_empty(len(self.cells))

    def recorded_parameters(self) -> list[Tensor]:
        """With the gradients of a backward pass: those of every part that it called, as one tensor each."""
        return [flat for parts in self.parts.values() for flat in parts.called]

    def other_parameters(self) -> list[nn.Parameter]:
        """All that are not in recorded parts in a training step."""
        return [p for name, p in self.named_parameters() if not (self.parts and name.startswith("cells."))]

    def keep_probs(self, progress: float | Tensor) -> list[float | Tensor | None]:
        if self.recorded_keep is None or self.drop_path_keep_prob == 1:
            return super().keep_probs(progress)
        cells = len(self.cells)
        layers = torch.arange(cells, dtype=self.recorded_keep.dtype, device=self.recorded_keep.device)
        self.recorded_keep.copy_(drop_path_keep(self.drop_path_keep_prob, layers, cells, progress))
        return list(self.recorded_keep)
