"""CUDA graphs for a network whose path is another in every step: of its parts, called one after the other.

No step can be recorded as a whole, then, but the functions that it is made of can: RecordedParts has them, a Tape calls
them in a forward pass and goes back over the calls, and Replay makes of it all one function for autograd, which takes
longer for many.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
from torch import Tensor

from models.fast.cuda_graphs import recording


class RecordedParts:
    """Functions with a graph for the forward and one for the backward pass, recorded when they are first called.

    They may draw from torch's default generator, and must leave no other trace. Those of one place share memory: a step
    calls one of them, once.

    gradients: whether there are backward passes. Else nothing but the outputs is kept.
    """

    def __init__(self, gradients: bool = True):
        self.gradients = gradients
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.places: dict[Hashable, Place] = {}
        self.parts: dict[Hashable, Part] = {}
        self.scratch: dict[torch.dtype, Tensor] = {}  # for what is read in one replay only
        self.called: list[Tensor] = []  # on the way back: `Part.flat` of those that have parameters

    def record(
        self,
        place: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        max_joined: int,
    ) -> "Part":
        """See Tape.call."""
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
        """For outputs like y, and inputs like x of `size` elements at most."""
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
    """What the parts of a place share.

    x, grad_x: of the input, as vectors. grad_y: of the output y, in scratch memory, since it is read at once. pool: of
    memory for all between. Without gradients x is scratch memory too.
    """

    x: Tensor
    y: Tensor
    pool: tuple[int, int]
    grad_x: Tensor | None = None
    grad_y: Tensor | None = None


@dataclass
class Part:
    """A recorded function.

    x, grad_x: in the memory of the place. join: whether x is joined of the inputs, not their sum. leaves: what is read
    as the parameters, copies of them with `join`.
    grads: of the leaves. flat: a vector in the place of all parameters, whose gradient has the grads in its memory.
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
        if self.join:
            write_joined(inputs, self.x)
            torch._foreach_copy_(self.leaves, parameters)
        else:
            write_sum(inputs, self.x)
        self.forward_graph.replay()
        return self.place.y.detach()

    def backward(self, grads: Sequence[Tensor], count: int, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients of the output, to be added up -> of the `count` inputs; the parameters get theirs."""
        write_sum(grads, self.place.grad_y)
        self.backward_graph.replay()
        for parameter, grad in zip(parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.grad_x.chunk(count, dim=1) if self.join else [self.grad_x] * count


def flat_like(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A vector with a gradient, and tensors like the given ones in the memory of that gradient."""
    gradient = tensors[0].new_zeros(sum(tensor.numel() for tensor in tensors))
    views, start = [], 0
    for tensor in tensors:
        views.append(gradient.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    flat = gradient.detach()
    flat.grad = gradient
    return flat, views


def write_sum(tensors: Sequence[Tensor], out: Tensor) -> None:
    first, *others = tensors
    check_shape(first, out)
    if others:
        torch.add(first, others[0], out=out)
        reduce(Tensor.add_, others[1:], out)
    else:
        out.copy_(first)


def write_joined(tensors: Sequence[Tensor], out: Tensor) -> None:
    """ReLU of tensors (B, C, H, W), concatenated in dimension 1. On CUDA twice as fast as the two in turn."""
    for tensor, part in zip(tensors, out.chunk(len(tensors), dim=1), strict=True):
        check_shape(tensor, part)
        torch.clamp_min(tensor, 0, out=part)


def check_shape(tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ValueError(f"recorded with shape {tuple(own.shape)}, got {tuple(tensor.shape)}")


class Tape:
    """What the parts, and sums, of a forward pass did, in their order."""

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
        """function(sum of the inputs, *parameters), or of the concatenation of their ReLU where inputs are joined.

        The result is overwritten by the next call in the same place. Calls with one key have the same function, shapes,
        precision and, where none are joined, parameters. What the function uses besides has to stay where it is.
        max_joined: how many inputs may be joined in the same place; 0: they are added up.
        Raises ValueError when an input is of another shape than at the first call.
        """
        parts = self.parts.parts
        if key not in parts:
            parts[key] = self.parts.record(place, function, inputs, parameters, max_joined)
        output = parts[key].forward(inputs, parameters)
        self.entries.append((parts[key], inputs, output, parameters))
        return output

    def add(self, inputs: Sequence[Tensor]) -> Tensor:
        """Their sum."""
        if len(inputs) == 1:
            return inputs[0]
        output = reduce(add, inputs)
        self.entries.append((None, inputs, output, ()))
        return output

    def backward(self, output: Tensor, grad: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradient of the output -> of the inputs: objects that were given to `call` and `add`, or came from there."""
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
    """run(tape, *inputs) -> a tensor, by calls of the tape alone.

    Differentiable in the inputs, of which one at least has to require a gradient; then the parameters get theirs too,
    which are set and not accumulated. Output and gradients are overwritten by the next calls of the same parts.
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
