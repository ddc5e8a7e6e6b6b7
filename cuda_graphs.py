"""CUDA graphs: a training step, or a part of one, as one launch in the place of the many that its kernels need."""

import gc
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce
from operator import add

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, in which libraries and optimizers allocate what they keep


class Recorded:
    """A function of tensors that is run as it is three times, then recorded, and from then on replayed.

    function(*inputs) -> outputs; both are tensors, None, and tuples, dicts and dataclasses of these.
    Every call has to do the same work on inputs of the same shapes, and what the function uses besides (weights, the
    state of an optimizer) has to stay where it is. It may change that, and draw from torch's default generator. The
    numbers are those of the function itself, up to the order of sums. Outputs are overwritten by the next call.
    """

    def __init__(self, function: Callable):
        self.function, self.calls = function, 0
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):  # autograd remembers streams; a recording is not on the default one
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.graph is None:
            gc.collect()  # the graphs of networks that are done with, if any
            self.inputs = map_tensors(torch.clone, inputs)
            self.graph = torch.cuda.CUDAGraph()
            with recording(self.graph, self.stream):
                self.outputs = self.function(*self.inputs)
        for own, new in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
            if own.shape != new.shape:
                raise ValueError(f"recorded with an input of shape {tuple(own.shape)}, got {tuple(new.shape)}")
            own.copy_(new)
        self.graph.replay()
        return self.outputs


class Branch:
    """Within a recording, work on a stream of its own, beside all that follows until it is joined.

    It starts after what has been recorded up to now. Where nothing is recorded, it is done in its turn.
    name: of no other branch of the same stream that is open. example: any tensor on the device.
    """

    def __init__(self, name: Hashable, example: Tensor):
        self.stream = None
        if example.is_cuda and torch.cuda.is_current_stream_capturing():
            self.main = torch.cuda.current_stream()
            self.stream = side_stream(self.main.stream_id, name)
            self.stream.wait_stream(self.main)

    def work(self, *inputs):
        """The context of the work. inputs: made outside of it, see map_tensors."""
        if self.stream is None:
            return nullcontext()
        for tensor in tensors_of(inputs):
            tensor.record_stream(self.stream)
        return torch.cuda.stream(self.stream)

    def join(self, *outputs) -> None:
        """outputs: of the work, see map_tensors."""
        if self.stream is not None:
            self.main.wait_stream(self.stream)
            for tensor in tensors_of(outputs):
                tensor.record_stream(self.main)


@cache
def side_stream(parent: int, name: Hashable) -> torch.cuda.Stream:
    """One for each stream and name: memory that is freed on a stream is taken again there only."""
    return torch.cuda.Stream()


class RecordedParts:
    """Functions of a network whose path is another in every step, so that no step can be recorded as a whole.

    Each has a graph for its forward pass and one for its backward pass, recorded when it is first called. It may draw
    from torch's default generator, and must leave no other trace. Those of one place share memory: a step calls one of
    them, once. See Tape, which calls them.

    gradients: whether there are backward passes. Else nothing but the outputs has to be kept.
    """

    def __init__(self, gradients: bool = True):
        self.gradients = gradients
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self.room: Tensor | None = None  # for the inputs of all parts, without gradients
        self.places: dict[Hashable, Place] = {}
        self.parts: dict[Hashable, Part] = {}
        self.called: list[Tensor] = []  # on the way back; of each the parameters, as one tensor that has the gradient

    def record(
        self,
        place: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        join: int,
    ) -> "Part":
        """See Tape.call."""
        random_state = torch.cuda.get_rng_state()
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
                self.places[place] = self._place(inputs[0].numel() * max(join, 1), x.detach(), y.detach())
            del x, y
        torch.cuda.current_stream().wait_stream(self.stream)
        own = self.places[place]
        x = own.x.as_strided(example.shape, example.stride()).requires_grad_(self.gradients)
        part = Part(own, x.detach(), join > 0, leaves, torch.cuda.CUDAGraph())
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
        """For outputs like y, and inputs like x of that many elements at most."""
        if self.gradients:
            pool = torch.cuda.graph_pool_handle()
            return Place(x.new_zeros(size), y, pool, x.new_zeros(size), torch.zeros_like(y))
        if self.room is None or self.room.dtype != x.dtype or self.room.numel() < size:
            self.room = x.new_zeros(size)
        return Place(self.room, y, self.pool)


@dataclass
class Place:
    """What the parts of a place share: input, as a vector, output, a pool for all between, the gradients of both."""

    x: Tensor
    y: Tensor
    pool: tuple[int, int]
    grad_x: Tensor | None = None
    grad_y: Tensor | None = None


@dataclass
class Part:
    """A recorded function.

    x, grad_x: in the memory of the place. leaves: what is read in the place of parameters, with `join` copies.
    grads: of the leaves. flat: a vector in the place of the parameters, with the grads as its gradient.
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
    flat = tensors[0].new_zeros(sum(t.numel() for t in tensors))
    views, start = [], 0
    for tensor in tensors:
        views.append(flat.as_strided(tensor.shape, tensor.stride(), start))
        start += tensor.numel()
    vector = flat.detach()
    vector.grad = flat
    return vector, views


def write_sum(tensors: Sequence[Tensor], out: Tensor) -> None:
    first, *others = tensors
    if first.shape != out.shape:
        raise ValueError(f"recorded with shape {tuple(out.shape)}, got {tuple(first.shape)}")
    if others:
        torch.add(first, others[0], out=out)
        reduce(Tensor.add_, others[1:], out)
    else:
        out.copy_(first)


def write_joined(tensors: Sequence[Tensor], out: Tensor) -> None:
    """ReLU of tensors (B, C, ...), concatenated in dimension 1. In channels_last layout faster than torch.cat."""
    for tensor, part in zip(tensors, out.chunk(len(tensors), dim=1), strict=True):
        torch.clamp_min(tensor, 0, out=part)


class Tape:
    """What the parts, and sums, of a forward pass did, in their order. autograd takes longer for the way back."""

    def __init__(self, parts: RecordedParts):
        self.parts = parts
        self.entries: list[tuple[Part | None, Sequence[Tensor], Tensor, Sequence[Tensor]]] = []

    def call(
        self,
        key: Hashable,
        place: Hashable,
        function: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor] = (),
        join: int = 0,
    ) -> Tensor:
        """function(sum of the inputs, *parameters), or where up to `join` are joined, of concatenated ReLUs of them.

        It is overwritten by the next call in the same place. Calls with one key have the same function and shapes, and
        the same parameters too, but with `join` others of the same shapes. What the function uses besides has to stay
        where it is.
        Raises ValueError when an input is of another shape than at the first call.
        """
        parts = self.parts.parts
        if key not in parts:
            parts[key] = self.parts.record(place, function, inputs, parameters, join)
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
    """run(tape, *inputs) -> a tensor, by calls of the tape alone. Differentiable in the inputs and the parameters.

    Output and gradients are overwritten by the next calls of the same parts.
    """

    @staticmethod
    def forward(ctx, run: Callable[..., Tensor], parts: RecordedParts, *inputs: Tensor) -> Tensor:
        ctx.tape, ctx.inputs = Tape(parts), [tensor.detach() for tensor in inputs]  # each an object of its own
        ctx.output = run(ctx.tape, *ctx.inputs)
        return ctx.output.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.tape.backward(ctx.output, grad, ctx.inputs)


def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None):
    """The context in which a graph is recorded."""
    # thread_local: another thread may pin memory meanwhile
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def map_tensors(function: Callable[[Tensor], Tensor], value):
    """value with every tensor in it replaced by function(tensor)."""
    match value:
        case None:
            return None
        case Tensor():
            return function(value)
        case dict():
            return {key: map_tensors(function, part) for key, part in value.items()}
        case tuple():
            return tuple(map_tensors(function, part) for part in value)
    if is_dataclass(value):
        return type(value)(*(map_tensors(function, getattr(value, field.name)) for field in fields(value)))
    raise TypeError(f"expected tensors, and tuples, dicts and dataclasses of tensors, got {type(value).__name__}")


def tensors_of(value) -> list[Tensor]:
    """The tensors in value, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found
