"""`record_parts(supernet)` makes a finished supernet replay what its cells do as CUDA graphs, with the same numbers.

Why it exists: a step of the supernet consists of some thousand small kernels, which a GPU is done with sooner than the
host can launch them. A CUDA graph launches many at once, but every step goes along another genotype's path, so that
none can be recorded as a whole. Its parts can: each op has a graph of its own, recorded when it is first called, and a
step replays those on its path.

RecordedParts holds the graphs. A Tape calls them in a forward pass and goes back over the calls for the gradients.
Replay makes one function for autograd of a cell, since many take longer. RecordedCell and RecordedSupernet, at the
end, are the supernet's own classes with the calls of modules replaced.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genotypes import CellSpec
from models.fast.cuda_graphs import recording
from models.network import CellBase, drop_path_keep, vertex_stride
from models.ops import Identity, drop_path
from models.supernet import Supernet, SupernetCell


class RecordedParts:
    """Functions, each with a graph of its forward and one of its backward pass, recorded when it is first called.

    They may draw from torch's default generator, and must leave no other trace. Functions in the same place share
    memory: a step calls only one of them, once.

    gradients: whether there are backward passes. Without them, nothing but the outputs is kept.
    """

    def __init__(self, gradients: bool = True):
        self.gradients = gradients
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.places: dict[Hashable, Place] = {}
        self.parts: dict[Hashable, Part] = {}
        self.scratch: dict[torch.dtype, Tensor] = {}  # for what is read in one replay only
        self.called: list[Tensor] = []  # `Part.flat` of the parts with parameters that a backward pass came by

    def record(
        self,
        place: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        max_joined: int,
    ) -> "Part":
        """Record a function; the arguments are those of Tape.call."""
        random_state, join = torch.cuda.get_rng_state(), max_joined > 0
        example = torch.cat(inputs, dim=1) if join else inputs[0]
        # Leaves of this recording alone: autograd remembers of others on what stream they were used before.
        leaves = [(torch.empty_like(p) if join else p.detach()).requires_grad_(self.gradients) for p in parameters]
        # Without the cache of casts, which would let a recording use the cast of another time.
        kind = example.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        mixed = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)
        exact = torch.autocast(kind, enabled=False)

        def forward(x: Tensor) -> Tensor:
            with mixed, torch.set_grad_enabled(self.gradients):
                return function(x, *leaves)

        def backward(y: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            with exact:
                return torch.autograd.grad(y, (x, *leaves), grad)

        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # as it is, for libraries to allocate what they keep
            x = torch.zeros_like(example).requires_grad_(self.gradients)
            y = forward(x)
            if self.gradients:
                backward(y, x, torch.zeros_like(y))
            if place not in self.places:
                self.places[place] = self._place(inputs[0].numel() * max(max_joined, 1), x.detach(), y.detach())
            del x, y
        torch.cuda.current_stream().wait_stream(self.stream)

        own = self.places[place]
        x = own.x.as_strided(example.shape, example.stride()).requires_grad_(self.gradients)
        part = Part(own, x.detach(), join, leaves, torch.cuda.CUDAGraph())
        with recording(part.forward_graph, self.stream, own.pool):
            y = forward(x)
            own.y.copy_(y.detach())
        if self.gradients:
            part.grad_x = own.grad_x.as_strided(x.shape, x.stride())
            part.flat, part.grads = flat_like(leaves) if leaves else (None, [])
            part.backward_graph = torch.cuda.CUDAGraph()
            with recording(part.backward_graph, self.stream, own.pool):
                grad_x, *grads = backward(y, x, own.grad_y)
                part.grad_x.copy_(torch.where(x > 0, grad_x, 0) if join else grad_x)
                if leaves:
                    torch._foreach_copy_(part.grads, grads)
        torch.cuda.set_rng_state(random_state)
        return part

    def _place(self, size: int, x: Tensor, y: Tensor) -> "Place":
        """Memory for a place whose outputs are like y, and whose inputs are like x with `size` elements at most."""
        if not self.gradients:
            return Place(self._scratch(size, x), y, self.pool)
        grad_y = self._scratch(y.numel(), y).as_strided(y.shape, y.stride())
        return Place(x.new_zeros(size), y, torch.cuda.graph_pool_handle(), x.new_zeros(size), grad_y)

    def _scratch(self, size: int, like: Tensor) -> Tensor:
        if like.dtype not in self.scratch or self.scratch[like.dtype].numel() < size:
            self.scratch[like.dtype] = like.new_zeros(size)
        return self.scratch[like.dtype]


@dataclass
class Place:
    """The memory that the parts in one place share, since a step calls one of them only.

    x, grad_x: the input and its gradient, as vectors. y: the output. grad_y: the gradient of y, in scratch memory,
    since it is read at once. pool: the graphs' memory for the rest. Without gradients x is scratch memory too.
    """

    x: Tensor
    y: Tensor
    pool: tuple[int, int]
    grad_x: Tensor | None = None
    grad_y: Tensor | None = None


@dataclass
class Part:
    """A recorded function.

    x, grad_x: its input and the gradient, views of the memory of the place. join: whether x is the concatenation of
    the inputs that it is called with, not their sum. leaves: the tensors that are read as the parameters; with `join`
    copies of them. grads: the gradients of the leaves. flat: a vector that stands for all parameters, whose gradient
    is the memory of the grads, so that clipping them takes one kernel.
    """

    place: Place
    x: Tensor
    join: bool
    leaves: list[Tensor]
    forward_graph: torch.cuda.CUDAGraph
    backward_graph: torch.cuda.CUDAGraph | None = None
    grad_x: Tensor | None = None
    grads: list[Tensor] | None = None
    flat: Tensor | None = None

    def forward(self, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
        """Replay the forward pass. The output is overwritten by the next call in the same place."""
        if self.join:
            write_joined(inputs, self.x)
            torch._foreach_copy_(self.leaves, parameters)
        else:
            write_sum(inputs, self.x)
        self.forward_graph.replay()
        return self.place.y.detach()

    def backward(self, grads: Sequence[Tensor], count: int, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the output, to be added up -> those of the `count` inputs. Those of the parameters are set."""
        write_sum(grads, self.place.grad_y)
        self.backward_graph.replay()
        for parameter, grad in zip(parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.grad_x.chunk(count, dim=1) if self.join else [self.grad_x] * count


def flat_like(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A vector with a gradient, and views of the memory of that gradient that have the shapes of the tensors."""
    gradient = tensors[0].new_zeros(sum(tensor.numel() for tensor in tensors))
    views, start = [], 0
    for tensor in tensors:
        views.append(gradient.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    flat = gradient.detach()
    flat.grad = gradient
    return flat, views


def write_sum(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Write the sum of tensors into `out`. Raises ValueError when the shapes differ."""
    first, *others = tensors
    check_shape(first, out)
    if others:
        torch.add(first, others[0], out=out)
        reduce(Tensor.add_, others[1:], out)
    else:
        out.copy_(first)


def write_joined(tensors: Sequence[Tensor], out: Tensor) -> None:
    """Write the ReLU of tensors (B, C, H, W), concatenated in dimension 1, into `out`.

    On CUDA this takes half the time of a concatenation and a ReLU. Raises ValueError when the shapes differ.
    """
    for tensor, part in zip(tensors, out.chunk(len(tensors), dim=1), strict=True):
        check_shape(tensor, part)
        torch.clamp_min(tensor, 0, out=part)


def check_shape(tensor: Tensor, own: Tensor) -> None:
    """Raise ValueError when a tensor has another shape than the one that was recorded."""
    if tensor.shape != own.shape:
        raise ValueError(f"recorded with shape {tuple(own.shape)}, got {tuple(tensor.shape)}")


class Tape:
    """The calls of parts, and the sums, of one forward pass in their order: all that a backward pass needs."""

    def __init__(self, parts: RecordedParts):
        self.parts = parts
        self.entries: list[tuple[Part | None, Sequence[Tensor], Tensor, Sequence[Tensor]]] = []

    def call(
        self,
        key: Hashable,
        place: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        max_joined: int = 0,
    ) -> Tensor:
        """function(x, *parameters), replayed; x is the sum of the inputs, or the concatenation of their ReLU.

        The result is overwritten by the next call in the same place. Calls with one key must have the same function,
        shapes, precision and, where inputs are added up, parameters. What else it reads has to stay where it is.
        max_joined: how many inputs are concatenated in this place at most; 0: they are added up.
        Raises ValueError when an input has another shape than at the first call.
        """
        parts = self.parts.parts
        if key not in parts:
            parts[key] = self.parts.record(place, function, inputs, parameters, max_joined)
        output = parts[key].forward(inputs, parameters)
        self.entries.append((parts[key], inputs, output, parameters))
        return output

    def add(self, inputs: Sequence[Tensor]) -> Tensor:
        """The sum of the inputs."""
        if len(inputs) == 1:
            return inputs[0]
        output = reduce(add, inputs)
        self.entries.append((None, inputs, output, ()))
        return output

    def backward(self, output: Tensor, grad: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of the inputs from that of the output; None for an input that nothing reads.

        output, inputs: tensors that were given to `call` and `add` or came from there, the same objects.
        """
        found: dict[int, list[Tensor]] = defaultdict(list, {id(output): [grad]})
        for part, read, made, parameters in reversed(self.entries):
            own = found.pop(id(made), None)
            if own is None:  # nothing reads it
                continue
            if part is None:
                grads = [reduce(add, own)] * len(read)
            else:
                grads = part.backward(own, len(read), parameters)
                if parameters:
                    self.parts.called.append(part.flat)
            for tensor, grad in zip(read, grads, strict=True):
                found[id(tensor)].append(grad)
        return [reduce(add, found[id(tensor)]) if id(tensor) in found else None for tensor in inputs]


class Replay(torch.autograd.Function):
    """One function for autograd, made of run(tape, *inputs) -> a tensor, which calls the tape only.

    It is differentiable in the inputs, of which one at least has to require a gradient. The parameters then get their
    gradients too, set and not accumulated. All that comes out is overwritten by the next calls of the same parts.
    """

    @staticmethod
    def forward(ctx, run: Callable[..., Tensor], parts: RecordedParts, *inputs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.tape, ctx.inputs = Tape(parts), [tensor.detach() for tensor in inputs]  # each an object of its own
        ctx.output = run(ctx.tape, *ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nothing reads the output: the parameters get no gradients either, not zeros
            return None, None, *(None for _ in ctx.inputs)
        return None, None, *ctx.tape.backward(ctx.output, grad, ctx.inputs)


class TapedCell:
    """A SupernetCell in one forward pass: the cell's own walk over its vertices, with calls of a tape for modules."""

    run, read = CellBase.run, CellBase.read

    def __init__(self, cell: "RecordedCell", tape: Tape):
        self.cell, self.tape, self.reduction = cell, tape, cell.reduction

    def calibrate(self, source: int, x: Tensor) -> Tensor:
        module = self.cell.calibration[str(source)]
        return x if isinstance(module, nn.Identity) else self._replay(module, [x])

    def halve(self, name: str, x: Tensor) -> Tensor:
        return self._replay(self.cell.reduces[name], [x])

    def state(self, spec: CellSpec, vertex: int, inputs: list[Tensor], keep_prob: Tensor | None) -> Tensor:
        op, stride = self.cell.ops[f"{vertex}_{spec.ops[vertex]}"], vertex_stride(spec, vertex, self.reduction)
        if isinstance(op, Identity):
            return self.tape.add(inputs) if stride == 1 else self._replay(op, inputs, stride)
        return self._replay(op, inputs, stride, keep_prob=keep_prob)

    def join(self, spec: CellSpec, states: list[Tensor]) -> Tensor:
        cell, norm = self.cell, self.cell.final_norm
        slices = [cell.final[v] for v in spec.predecessors(spec.num_vertices - 1)]

        def function(x: Tensor, *parameters: Tensor) -> Tensor:  # x: ReLU of the states, concatenated
            *slices, weight, bias = parameters
            x = F.conv2d(x, torch.cat(slices, dim=1))
            return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

        read = [*slices, norm.weight, norm.bias]
        return self.tape.call((cell, len(slices)), cell, function, states, read, len(cell.final))

    def _replay(self, module: nn.Module, inputs: list[Tensor], *stride: int, keep_prob: Tensor | None = None) -> Tensor:
        """A module on the sum of the inputs, and drop path if there is a keep probability."""
        place, parameters = self.cell.recorded[module]

        def function(x: Tensor, *leaves: Tensor) -> Tensor:
            x = torch.func.functional_call(module, dict(zip(parameters, leaves, strict=True)), (x, *stride))
            return x if keep_prob is None else drop_path(x, keep_prob)

        return self.tape.call((module, stride), (place, stride), function, inputs, list(parameters.values()))


class RecordedCell(SupernetCell):
    """A SupernetCell that is replayed in training steps and in scorings. Made by record_parts from a finished one."""

    def record(self, parts: dict[tuple[bool, bool], RecordedParts], layer: int) -> None:
        """parts: by whether in train mode and whether with gradients. layer: the cell's number in the supernet."""
        self.parts = parts  # below: a step calls one of the ops of a vertex, so these are in the same place
        places = {op: (layer, name.split("_")[0]) for name, op in self.ops.items()}
        modules = *self.calibration.values(), *self.ops.values(), *self.reduces.values()
        self.recorded = {module: (places.get(module, module), dict(module.named_parameters())) for module in modules}

    def forward(self, spec: CellSpec, s0: Tensor, s1: Tensor, keep_prob: Tensor | None) -> Tensor:
        parts = self.parts.get((self.training, torch.is_grad_enabled()))
        if parts is None:
            return super().forward(spec, s0, s1, keep_prob)

        def replay(tape: Tape, *inputs: Tensor) -> Tensor:
            cell = TapedCell(self, tape)
            return cell.join(spec, cell.run(spec, inputs, keep_prob))

        return Replay.apply(replay, parts, s0, s1) if parts.gradients else replay(Tape(parts), s0, s1)


class RecordedSupernet(Supernet):
    """A Supernet whose cells are replayed. Made by record_parts from a finished one."""

    def record(self) -> None:
        """Make the cells RecordedCells. keep: the keep probabilities of drop path, where recordings read them."""
        self.parts = {(True, True): RecordedParts(), (False, False): RecordedParts(gradients=False)}
        self.others = [p for name, p in self.named_parameters() if not name.startswith("cells.")]
        self.keep = self.classifier.weight.new_empty(len(self.cells))
        for layer, cell in enumerate(self.cells):
            cell.__class__ = RecordedCell
            cell.record(self.parts, layer)

    def forward(self, *args, **kwargs) -> tuple[Tensor, Tensor | None]:
        for parts in self.parts.values():
            parts.called.clear()
        return super().forward(*args, **kwargs)

    def keep_probs(self, progress: float | Tensor) -> list[Tensor | None]:
        if self.drop_path_keep_prob == 1:
            return super().keep_probs(progress)
        layers = torch.arange(len(self.keep), dtype=self.keep.dtype, device=self.keep.device)
        self.keep.copy_(drop_path_keep(self.drop_path_keep_prob, layers, len(self.keep), progress))
        return list(self.keep)


def record_parts(supernet: Supernet) -> None:
    """From now on, replay what the cells of a supernet do as CUDA graphs, in training steps and in scorings.

    The supernet, on its device already, becomes a RecordedSupernet with the same weights, to be used as before.
    All training steps must have images of one shape and one precision; so must all scorings, and be in inference mode
    or not as the first one was. The gradients of a step are lost with the next forward pass, and have to be gone
    (zero_grad) by the next backward pass. To clip them, use parameters_to_clip.
    """
    supernet.__class__ = RecordedSupernet  # as torch.nn.utils.parametrize does
    supernet.record()


def parameters_to_clip(supernet: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
    """The tensors whose gradients are all gradients of the last backward pass, for torch.nn.utils.clip_grad_norm_.

    parameters: list(supernet.parameters()), found once, since it takes milliseconds. It is the result, but for a
    recorded supernet, where one tensor stands for all parameters of a recorded part that was called.
    """
    if not isinstance(supernet, RecordedSupernet):
        return parameters
    return [*(flat for parts in supernet.parts.values() for flat in parts.called), *supernet.others]
