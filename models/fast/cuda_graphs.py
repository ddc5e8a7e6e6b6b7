"""CUDA graphs: a training step, or a part of one, as one launch in the place of the many that its kernels need.

Why it exists: the networks here are small, and a GPU is done with a kernel sooner than the host can launch the next.
`Recorded` replays a whole step with one launch. Steps that differ, as those of a supernet, are replayed in parts: see
models/fast/replay.py. `Branch` lets two parts of a recording run beside each other.
"""

import gc
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3  # calls before the recording, in which libraries and optimizers allocate what they keep


def can_record(device: torch.device) -> bool:
    """Whether steps on a device can be recorded as CUDA graphs."""
    return device.type == "cuda"


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

    The work starts after what has been recorded up to now. Where nothing is recorded, it is done in its turn.
    name: one that no other open branch of the same stream has. example: any tensor on the device.

        branch = Branch("critic", x)
        with branch.work(x):
            y = critic(x)
        z = other(x)
        branch.join(y)
    """

    def __init__(self, name: Hashable, example: Tensor):
        self.stream = None
        if example.is_cuda and torch.cuda.is_current_stream_capturing():
            self.main = torch.cuda.current_stream()
            self.stream = side_stream(self.main.stream_id, name)
            self.stream.wait_stream(self.main)

    def work(self, *inputs):
        """The context that the work is done in. inputs: what it reads that was made outside, as in map_tensors."""
        if self.stream is None:
            return nullcontext()
        for tensor in tensors_of(inputs):
            tensor.record_stream(self.stream)
        return torch.cuda.stream(self.stream)

    def join(self, *outputs) -> None:
        """Wait for the work. outputs: what it made that is read from now on, as in map_tensors."""
        if self.stream is not None:
            self.main.wait_stream(self.stream)
            for tensor in tensors_of(outputs):
                tensor.record_stream(self.main)


@cache
def side_stream(parent: int, name: Hashable) -> torch.cuda.Stream:
    """The stream for a branch, one for each stream and name: memory freed on a stream is taken again there only."""
    return torch.cuda.Stream()


def side_by_side(*calls: tuple) -> list:
    """The results of calls (function, *inputs) that do not wait for each other, in their order.

    Within a recording they work beside each other, all but the first on streams of their own; elsewhere they are done
    in turn. Inputs and results are tensors, None, and tuples, dicts and dataclasses of these.
    """
    global open_calls
    example, open_calls = tensors_of(calls[0][1:])[0], open_calls + 1
    branches = [Branch((open_calls, i), example) for i in range(1, len(calls))]
    (function, *inputs), *others = calls
    results = [function(*inputs)]
    for branch, (function, *inputs) in zip(branches, others, strict=True):
        with branch.work(*inputs):
            results.append(function(*inputs))
    for branch, result in zip(branches, results[1:], strict=True):
        branch.join(result)
    open_calls -= 1
    return results


open_calls = 0  # calls of side_by_side that are within one another: each level has streams of its own


def recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: tuple[int, int] | None = None):
    """The context in which a graph is recorded on a stream, with memory of a pool that graphs may share."""
    # thread_local: another thread may pin memory meanwhile
    return torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local")


def map_tensors(function: Callable[[Tensor], Tensor], value):
    """A value with every tensor in it replaced by function(tensor).

    value: a tensor, None, or tuples, dicts and dataclasses of these. Raises TypeError for others.
    """
    match value:
        case None:
            return None
        case Tensor():
            return function(value)
        case dict():
            return {key: map_tensors(function, part) for key, part in value.items()}
        case tuple() if hasattr(value, "_fields"):  # a NamedTuple
            return type(value)(*(map_tensors(function, part) for part in value))
        case tuple():
            return tuple(map_tensors(function, part) for part in value)
    if is_dataclass(value):
        return type(value)(*(map_tensors(function, getattr(value, field.name)) for field in fields(value)))
    raise TypeError(f"expected tensors, and tuples, dicts and dataclasses of tensors, got {type(value).__name__}")


def tensors_of(value) -> list[Tensor]:
    """The tensors in a value (see map_tensors), in their order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found
