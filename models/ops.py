"""The operations of a cell (NAG paper, section 3.1): OPS says of each how it is built and what it costs.

A new op is one entry in OPS and one name in a search space of genotypes.py. Every op is a module that is called as
`op(x, stride)`, (B, C, H, W) -> (B, C, H / stride, W / stride) rounded up. The stride is an argument of the call, not
of the module, so that a supernet can use the same weights at both strides.

`norm` is the batch normalisation to build: networks keep running statistics, the supernet does not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genotypes import NAG_SPACE, SearchSpace
from models.fast.cpu import BatchNorm2d, DepthwiseConv2d, average_pool, even_and_odd_pixels, max_pool


class FactorizedReduce(nn.Module):
    """Halve the resolution, (B, c_in, H, W) -> (B, c_out, ceil(H/2), ceil(W/2)), without losing a pixel.

    Two stride-2 subsamplings, the second shifted by one pixel down and right, each through its own 1x1 convolution
    to half of the channels. No ReLU of its own.
    """

    def __init__(self, c_in: int, c_out: int, norm: type[nn.Module] = BatchNorm2d):
        super().__init__()
        self.conv0 = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.conv1 = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.norm = norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        # Convolutions of stride 2 crash on CPUs in the backward pass at fewer than 8 channels (oneDNN, torch 2.14).
        even, odd = even_and_odd_pixels(x)
        odd = F.pad(odd, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.norm(torch.cat([self.conv0(even), self.conv1(odd)], dim=1))


class SeparableConv(nn.Module):
    """Two rounds of ReLU, depthwise k x k, pointwise 1x1, batch norm; the first depthwise takes the stride."""

    def __init__(self, channels: int, kernel: int, norm: type[nn.Module] = BatchNorm2d):
        super().__init__()
        self.depthwise, self.pointwise, self.norm = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.depthwise.append(DepthwiseConv2d(channels, kernel))
            self.pointwise.append(nn.Conv2d(channels, channels, 1, bias=False))
            self.norm.append(norm(channels))

    def forward(self, x: Tensor, stride: int) -> Tensor:
        for i, (depthwise, pointwise, norm) in enumerate(zip(self.depthwise, self.pointwise, self.norm, strict=True)):
            x = F.relu(x, inplace=i > 0)  # what the first norm wrote is read here only
            x = norm(pointwise(depthwise(x, stride)))
            stride = 1
        return x


class AvgPool(nn.Module):
    """The average of 3x3 pixels; the padding does not count."""

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return average_pool(x, stride)


class MaxPool(nn.Module):
    """The maximum of 3x3 pixels."""

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return max_pool(x, stride)


class Identity(nn.Module):
    """The input itself; with stride 2 a FactorizedReduce, which is built only when `strided`."""

    def __init__(self, channels: int, strided: bool, norm: type[nn.Module] = BatchNorm2d):
        super().__init__()
        self.reduce = FactorizedReduce(channels, channels, norm) if strided else None

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return x if stride == 1 else self.reduce(x)


@dataclass(frozen=True)
class Op:
    """How an op is built, and what it costs.

    build: (channels, strided, norm) -> its module. strided: whether the module must accept stride 2.
    depthwise: weights of its depthwise convolutions for each channel.
    pointwise: how many 1x1 convolutions C -> C it has, each with a batch norm.
    strided_pointwise: how many of them it uses with stride 2; None: as many as with stride 1.

    At C channels it has depthwise * C + pointwise * (C * C + 2 * C) parameters, and takes
    depthwise * C + pointwise * C * C multiply-accumulates for each pixel of its output (see models/cost.py).
    """

    build: Callable[[int, bool, type[nn.Module]], nn.Module]
    depthwise: int = 0
    pointwise: int = 0
    strided_pointwise: int | None = None

    def pointwise_at(self, stride: int) -> int:
        """How many pointwise convolutions it uses when it is called with this stride, 1 or 2."""
        return self.pointwise if stride == 1 or self.strided_pointwise is None else self.strided_pointwise


OPS = {
    "seqconv3x3": Op(lambda channels, _, norm: SeparableConv(channels, 3, norm), depthwise=2 * 9, pointwise=2),
    "seqconv5x5": Op(lambda channels, _, norm: SeparableConv(channels, 5, norm), depthwise=2 * 25, pointwise=2),
    "avgpool3x3": Op(lambda *_: AvgPool()),
    "maxpool3x3": Op(lambda *_: MaxPool()),
    "identity": Op(Identity, strided_pointwise=1),
}


def make_op(name: str, channels: int, strided: bool, norm: type[nn.Module] = BatchNorm2d) -> nn.Module:
    """The module of an op. strided: whether it may be called with stride 2. Raises ValueError for unknown names."""
    if name not in OPS:
        raise ValueError(f"no module for op {name!r}")
    return OPS[name].build(channels, strided, norm)


def has_network(space: SearchSpace) -> bool:
    """Whether networks can be built of a space's genotypes: those of NAG, and others with its cells, inputs and ops."""
    return (space.cells, space.inputs) == (NAG_SPACE.cells, NAG_SPACE.inputs) and OPS.keys() >= set(space.ops)


def check_has_network(space: SearchSpace) -> None:
    """Raise ValueError for a space of whose genotypes no networks can be built."""
    if not has_network(space):
        raise ValueError(f"no network can be built of a genotype of the space {space.name}, only of one of NAG's")


class ReLUConvNorm(nn.Sequential):
    """ReLU, 1x1 convolution, batch norm: brings a cell input to the cell's channel count."""

    def __init__(self, c_in: int, c_out: int, norm: type[nn.Module] = BatchNorm2d):
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out))


def drop_path(x: Tensor, keep_prob: float | Tensor) -> Tensor:
    """Zero whole samples of x (B, C, H, W) with probability 1 - keep_prob and rescale the others by 1 / keep_prob."""
    kept = torch.rand((len(x), 1, 1, 1), device=x.device) < keep_prob
    return x * (kept / keep_prob).to(x.dtype)
