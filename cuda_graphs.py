"""CUDA graphs: a training step, or a part of one, as one launch in the place of the many that its kernels need."""

import gc
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import cache, reduce

import torch
from torch import Tensor, nn

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
    """Modules of a network whose path is another in every step, so that no step can be recorded as a whole.

    Each has a graph for its forward pass and one for its backward pass, recorded when it is first called. It may draw
    from torch's default generator, and must leave no other trace. Those of one place share memory: a step calls one of
    them, once.
    """

    def __init__(self):
        self.stream = torch.cuda.Stream()
        self.places: dict[Hashable, Place] = {}
        self.parts: dict[Hashable, Part] = {}

    def __call__(
        self,
        place: Hashable,
        module: nn.Module,
        inputs: Sequence[Tensor],
        *args: Hashable,
        then: Callable[[Tensor], Tensor] = lambda y: y,
    ) -> Tensor:
        """then(module(sum of inputs, *args)), differentiable in inputs, of equal shapes, and the module's parameters.

        Outputs and gradients are overwritten by the next call in the same place. What `then` uses besides has to stay
        where it is; it is that of the first call with these arguments.
        Raises ValueError when inputs are of another shape than at the first call.
        """
        if (module, args) not in self.parts:
            self.parts[module, args] = self._record(place, module, inputs[0], args, then)
        part = self.parts[module, args]
        return Replay.apply(part, len(inputs), *inputs, *part.parameters)

    def _record(self, place: Hashable, module: nn.Module, example: Tensor, args: tuple, then: Callable) -> "Part":
        random_state = torch.cuda.get_rng_state()
        parameters = dict(module.named_parameters())
        # Leaves of this recording alone: autograd remembers of others on what stream they were used before.
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        # Without the cache of casts, which would let a recording use the cast of another time.
        kind = example.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        mixed = torch.autocast(kind, dtype, enabled=enabled, cache_enabled=False)
        exact = torch.autocast(kind, enabled=False)

        def forward(x: Tensor) -> Tensor:
            with mixed, torch.enable_grad():
                return then(torch.func.functional_call(module, leaves, (x, *args)))

        def backward(y: Tensor, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
            with exact:
                return torch.autograd.grad(y, (x, *leaves.values()), grad)

        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # as it is, for libraries to allocate what they keep
            x = torch.zeros_like(example, requires_grad=True)
            y = forward(x)
            backward(y, x, torch.zeros_like(y))
            if place not in self.places:
                own = (x.detach(), y.detach(), torch.zeros_like(y), torch.zeros_like(x))
                self.places[place] = Place(*own, torch.cuda.graph_pool_handle())
            del x, y
        torch.cuda.current_stream().wait_stream(self.stream)
        own = self.places[place]
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        x = own.x.detach().requires_grad_()
        with recording(graphs[0], self.stream, own.pool):
            y = forward(x)
            own.y.copy_(y.detach())
        with recording(graphs[1], self.stream, own.pool):
            grad_x, *grads = backward(y, x, own.grad_y)
            own.grad_x.copy_(grad_x)
            grads = [  # in the layout of the parameters: autograd copies others
                g if g.stride() == p.stride() else torch.empty_like(p).copy_(g)
                for g, p in zip(grads, leaves.values(), strict=True)
            ]
        torch.cuda.set_rng_state(random_state)
        return Part(own, *graphs, list(parameters.values()), grads)


@dataclass
class Place:
    """What the parts of a place share: input, output, the gradients of both, and a pool for all between."""

    x: Tensor
    y: Tensor
    grad_y: Tensor
    grad_x: Tensor
    pool: tuple[int, int]


@dataclass
class Part:
    """grads: of the parameters."""

    place: Place
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    parameters: list[Tensor]
    grads: list[Tensor]


class Replay(torch.autograd.Function):
    """See RecordedParts."""

    @staticmethod
    def forward(ctx, part: Part, count: int, *tensors: Tensor) -> Tensor:
        ctx.part, ctx.count = part, count
        first, *others = tensors[:count]
        if first.shape != part.place.x.shape:
            raise ValueError(f"recorded with shape {tuple(part.place.x.shape)}, got {tuple(first.shape)}")
        if others:
            torch.add(first, others[0], out=part.place.x)
            reduce(Tensor.add_, others[1:], part.place.x)
        else:
            part.place.x.copy_(first)
        part.forward.replay()
        return part.place.y.detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        part = ctx.part
        part.place.grad_y.copy_(grad)
        part.backward.replay()
        of_inputs = [part.place.grad_x.detach() for _ in range(ctx.count)]
        return None, None, *of_inputs, *(own.detach() for own in part.grads)


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
