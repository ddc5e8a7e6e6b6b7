"""Depthwise convolution and pooling that are fast on CPUs too, in channels_last layout.

torch's own kernels compute the same and are used everywhere else (other devices, layouts and precisions). On a CPU
three of them are many times slower than their work: the weight gradient of a depthwise convolution with a kernel wider
than 3, max pooling, and average pooling of channel counts that do not fill the vector registers. benchmarks/NOTES.md
has the times.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def fast_here(x: Tensor) -> bool:
    """Whether to compute on x by what is fast on this CPU. Exported networks, which run elsewhere, keep torch's ops.

    Not float32 under autocast, which would turn pooling, written as a convolution, into bf16.
    """
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")))
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_exporting()
    )


def depthwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """F.conv2d of x (B, C, H, W) with a k x k kernel a channel (C, 1, k, k), padded by k // 2."""
    kernel = weight.shape[-1]
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64:  # as F.conv2d would
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and kernel > 3 and x.shape[-1] >= kernel and fast_here(x) and weight.dtype == x.dtype:
        return DepthwiseConv.apply(x, weight, stride)
    return F.conv2d(x, weight, None, stride, kernel // 2, 1, len(weight))


class DepthwiseConv(torch.autograd.Function):
    """The weight gradient column by column of the kernel: the middle three in one call, the others one by one.

    Its gradients can be differentiated again: backward is made of functions that can.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: int) -> Tensor:
        return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, len(weight))

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, ctx.stride = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        stride, half = ctx.stride, weight.shape[-1] // 2
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            if stride == 1:  # the convolution of the gradient with the kernel turned round
                grad_x = F.conv2d(grad, weight.flip(2, 3), None, 1, half, 1, len(weight))
            else:
                grad_x = convolution_backward(grad, x, weight, stride, (half, half), [True, False, False])[0]
        if ctx.needs_input_grad[1]:
            columns = [weight_gradient(grad, x, weight[..., half - 1 : half + 2], stride, (half, 1))]
            width = x.shape[-1]
            for offset in range(2, half + 1):  # columns from the middle one; they read the padding at one end
                first, count = math.ceil(offset / stride), (width - 1 - offset) // stride + 1
                left = grad[..., first:], x[..., first * stride - offset : width - offset]
                right = grad[..., :count], x[..., offset:]
                for (part, of), where in ((left, 0), (right, len(columns) + 1)):
                    columns.insert(where, weight_gradient(part, of, weight[..., :1], stride, (half, 0)))
            grad_weight = torch.cat(columns, dim=-1)
        return grad_x, grad_weight, None


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int]) -> Tensor:
    grad, x = (part.contiguous(memory_format=torch.channels_last) for part in (grad, x))
    return convolution_backward(grad, x, weight, stride, padding, [False, True, False])[1]


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], mask):
    groups = len(weight)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride, stride], padding, [1, 1], False, [0, 0], groups, mask
    )


def average_pool(x: Tensor, stride: int) -> Tensor:
    """3x3, the padding does not count."""
    if not fast_here(x):
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
    ones = x.new_ones(x.shape[1], 1, 3, 3)
    sums, count = (F.conv2d(of, ones, None, stride, 1, 1, len(ones)) for of in (x, torch.ones_like(x[:1])))
    return sums / count  # 9, fewer at the borders


def max_pool(x: Tensor, stride: int) -> Tensor:
    """3x3."""
    if not fast_here(x):
        return F.max_pool2d(x, 3, stride, padding=1)
    if stride == 1 and not (torch.is_grad_enabled() and x.requires_grad):  # rows, then columns
        for dim in (2, 3):
            size = x.shape[dim]
            if size > 1:
                pairs = torch.maximum(x.narrow(dim, 0, size - 1), x.narrow(dim, 1, size - 1))
                inner = torch.maximum(pairs.narrow(dim, 0, size - 2), pairs.narrow(dim, 1, size - 2))
                x = torch.cat([pairs.narrow(dim, 0, 1), inner, pairs.narrow(dim, size - 2, 1)], dim)
        return x
    return F.max_pool2d(x.float(), 3, stride, padding=1).to(x.dtype)  # in bf16, twice as slow as with both casts
