"""The operations of a cell. Every op is a module called as `op(x, stride)`, channels C -> C.

Stride is an argument of the call, not of the module, so that a supernet can use the same weights at both strides.
`norm` is the batch normalisation to build: networks keep running statistics, the supernet does not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.fast.cpu import BatchNorm2d, average_pool, depthwise_conv, max_pool


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
        even, odd = EverySecondPixel.apply(x)
        odd = F.pad(odd, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        return self.norm(torch.cat([self.conv0(even), self.conv1(odd)], dim=1))


class EverySecondPixel(torch.autograd.Function):
    """(B, C, H, W) -> the pixels of even rows and columns, those of odd ones: (B, C, ceil(H/2), ceil(W/2)), floor.

    Slices, but for the gradient: torch would make one of each, in contiguous layout, and add them up.
    """

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., ::2, ::2].clone(), x[..., 1::2, 1::2].clone()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        (x,) = inputs
        ctx.shape, ctx.channels_last = x.shape, x.is_contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx, even: Tensor, odd: Tensor) -> Tensor:
        layout = torch.channels_last if ctx.channels_last else torch.contiguous_format
        grad = torch.empty(ctx.shape, dtype=even.dtype, device=even.device, memory_format=layout).zero_()
        grad[..., ::2, ::2], grad[..., 1::2, 1::2] = even, odd
        return grad


class SeparableConv(nn.Module):
    """Two rounds of ReLU, depthwise k x k, pointwise 1x1, batch norm; the first depthwise takes the stride."""

    def __init__(self, channels: int, kernel: int, norm: type[nn.Module] = BatchNorm2d):
        super().__init__()
        self.depthwise, self.pointwise, self.norm = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            self.depthwise.append(
                nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
            )
            self.pointwise.append(nn.Conv2d(channels, channels, 1, bias=False))
            self.norm.append(norm(channels))

    def forward(self, x: Tensor, stride: int) -> Tensor:
        for i, (depthwise, pointwise, norm) in enumerate(zip(self.depthwise, self.pointwise, self.norm, strict=True)):
            x = F.relu(x, inplace=i > 0)  # what the first norm wrote is read here only
            x = norm(pointwise(depthwise_conv(x, depthwise.weight, stride)))
            stride = 1
        return x


class AvgPool(nn.Module):
    """3x3 average; the padding does not count."""

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return average_pool(x, stride)


class MaxPool(nn.Module):
    """3x3 maximum."""

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return max_pool(x, stride)


class Identity(nn.Module):
    """The input itself; with stride 2 a FactorizedReduce, which is built only when `strided`."""

    def __init__(self, channels: int, strided: bool, norm: type[nn.Module] = BatchNorm2d):
        super().__init__()
        self.reduce = FactorizedReduce(channels, channels, norm) if strided else None

    def forward(self, x: Tensor, stride: int) -> Tensor:
        return x if stride == 1 else self.reduce(x)


def make_op(name: str, channels: int, strided: bool, norm: type[nn.Module] = BatchNorm2d) -> nn.Module:
    """The module for an op of NAG_SPACE. strided: whether it may be called with stride 2."""
    match name:
        case "seqconv3x3":
            return SeparableConv(channels, 3, norm)
        case "seqconv5x5":
            return SeparableConv(channels, 5, norm)
        case "avgpool3x3":
            return AvgPool()
        case "maxpool3x3":
            return MaxPool()
        case "identity":
            return Identity(channels, strided, norm)
    raise ValueError(f"no module for op {name!r}")


class ReLUConvNorm(nn.Sequential):
    """ReLU, 1x1 convolution, batch norm: brings a cell input to the cell's channel count."""

    def __init__(self, c_in: int, c_out: int, norm: type[nn.Module] = BatchNorm2d):
        super().__init__(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out))


def drop_path(x: Tensor, keep_prob: float | Tensor) -> Tensor:
    """Zero whole samples of x (B, C, H, W) with probability 1 - keep_prob and rescale the others by 1 / keep_prob."""
    kept = torch.rand((len(x), 1, 1, 1), device=x.device) < keep_prob
    return x * (kept / keep_prob).to(x.dtype)
