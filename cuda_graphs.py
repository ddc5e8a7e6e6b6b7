"""CUDA graphs: a training step as one launch in the place of the thousands that its small kernels need."""

import gc
from collections.abc import Callable
from dataclasses import fields, is_dataclass

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
            # thread_local: another thread may pin memory meanwhile
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.function(*self.inputs)
        for own, new in zip(tensors_of(self.inputs), tensors_of(inputs), strict=True):
            if own.shape != new.shape:
                raise ValueError(f"recorded with an input of shape {tuple(own.shape)}, got {tuple(new.shape)}")
            own.copy_(new)
        self.graph.replay()
        return self.outputs


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
