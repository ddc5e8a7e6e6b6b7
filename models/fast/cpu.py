"""Batch norm, depthwise convolution and pooling that are fast on CPUs too, in channels_last layout; and dropout.

torch's own kernels compute the same and are used everywhere else (other devices, layouts and precisions). On a CPU
some are many times slower than their work: batch norm by several threads; the weight gradient of a depthwise
convolution with a kernel wider than 3, and in bf16 both gradients of one with stride 2; max pooling; average pooling
of channel counts that do not fill the vector registers. benchmarks/NOTES.md has the times.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE_LINE = 16  # float32 numbers


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


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU from uniform numbers, in a quarter of the time. Other elements are dropped then."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        kept = 1 - self.p
        return x * torch.rand_like(x, dtype=torch.float32).lt_(kept).div_(kept).to(x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, on a CPU for rows of several pixels' channels where that is faster.

    torch's threads each add up their pixels in a row of a common buffer. Where a row is no multiple of a cache line
    long, two threads write to the line between theirs: at 20 channels two threads are slower than one.
    """

    def forward(self, x: Tensor) -> Tensor:
        pixels = CACHE_LINE // math.gcd(CACHE_LINE, x.shape[1])  # that fill cache lines
        if (
            torch.compiler.is_compiling()  # which makes kernels of its own
            or pixels == 1
            or x.numel() == 0
            or (x.numel() // x.shape[1]) % pixels
            or self.weight is None
            or self.momentum is None
            or (self.track_running_stats and not self.training)
            or torch.get_num_threads() == 1
            or not fast_here(x)
        ):
            return super().forward(x)
        y, mean, variance = RowBatchNorm.apply(x, self.weight, self.bias, pixels, self.eps)
        if self.track_running_stats:
            n = x.numel() // x.shape[1]
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return y


class RowBatchNorm(torch.autograd.Function):
    """(B, C, H, W), weight and bias (C,) -> the same normalised, the mean and the (biased) variance of the batch (C,).

    By torch's kernels for rows of `pixels` times C numbers.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, pixels: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        rows = as_rows(x, pixels)
        unused = weight.new_zeros(2, rows.shape[1])  # running statistics, which make those of bf16 float32
        means, variances = (part.view(pixels, -1) for part in torch.batch_norm_update_stats(rows, *unused, 0.0))
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        scale = weight * (variance + eps).rsqrt()
        return scale_and_shift(x, scale, bias - scale * mean, pixels), mean, variance

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        x, weight, _, ctx.pixels, ctx.eps = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.save_for_backward(x, weight, mean, variance)

    @staticmethod
    def backward(ctx, grad: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance = ctx.saved_tensors
        norm_backward, pixels, eps = torch.ops.aten.native_batch_norm_backward, ctx.pixels, ctx.eps
        inv_std = (variance + eps).rsqrt()
        if torch.is_grad_enabled():  # to be differentiated again, which torch's can
            return *norm_backward(grad, x, weight, None, None, mean, inv_std, True, eps, [True] * 3), None, None
        grad = grad.contiguous(memory_format=torch.channels_last)
        rows, grad_rows = as_rows(x, pixels), as_rows(grad, pixels)
        running = mean.repeat(pixels), variance.repeat(pixels)  # as if given, so that only sums are computed
        sums = norm_backward(grad_rows, rows, None, *running, None, None, False, eps, [False, True, True])[1:]
        grad_weight, grad_bias = (part.view(pixels, -1).sum(0) for part in sums)
        # Of x: scale * (grad - mean of grad - normalised x * mean of grad * normalised x), both parts centred, so that
        # in bf16 none is rounded that the other takes off again.
        n = x.numel() // len(weight)
        scale = weight * inv_std
        of_x = -scale * inv_std * grad_weight / n
        grad_x = scale_and_shift(grad, scale, -scale * grad_bias / n, pixels)
        grad_x += scale_and_shift(x, of_x, -of_x * mean, pixels)
        return grad_x, grad_weight, grad_bias, None, None


def as_rows(x: Tensor, pixels: int) -> Tensor:
    """(B, C, H, W) in channels_last layout -> (B * H * W / pixels, pixels * C), the same memory."""
    return x.permute(0, 2, 3, 1).view(-1, pixels * x.shape[1])


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, pixels: int) -> Tensor:
    """scale * x + shift for every channel, in float32 also for bf16: a batch norm of mean 0 and variance 1."""
    y = torch.empty_like(x)
    scale, shift, none = scale.repeat(pixels), shift.repeat(pixels), scale.new_empty(0)
    running = torch.zeros_like(scale), torch.ones_like(scale)
    out = as_rows(y, pixels), none, none  # so that y is no view, whose changes in place autograd would refuse
    torch.native_batch_norm(as_rows(x, pixels), scale, shift, *running, False, 0.0, 0.0, out=out)
    return y


def depthwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """F.conv2d of x (B, C, H, W) with a k x k kernel a channel (C, 1, k, k), padded by k // 2."""
    kernel = weight.shape[-1]
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64:  # as F.conv2d would
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and x.shape[-1] >= kernel > 1 and fast_here(x) and weight.dtype == x.dtype:
        return DepthwiseConv.apply(x, weight, stride)
    return F.conv2d(x, weight, None, stride, kernel // 2, 1, len(weight))


class DepthwiseConv(torch.autograd.Function):
    """The weight gradient column by column of the kernel: the middle three in one call, the others one by one.

    The input gradient by a convolution, except in float32 at larger strides, where torch's is fast.
    Both can be differentiated again: backward is made of functions that can.
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
        if stride > 1 and x.dtype == torch.bfloat16:  # oneDNN is slow there: as stride 1, with zeros between
            spread = torch.zeros_like(x)
            spread[..., ::stride, ::stride] = grad
            grad, stride = spread, 1
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
    """3x3, the padding does not count.

    On CUDA as a convolution too: in channels_last layout, torch's kernel takes four times as long, and in torch 2.11
    gives wrong gradients (https://github.com/pytorch/pytorch/issues/188344). Compiled code has a kernel of its own.
    """
    on_cuda = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling()
    if not on_cuda and not fast_here(x):
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
    ones = x.new_ones(x.shape[1], 1, 3, 3)
    with torch.autocast(x.device.type, enabled=False):
        sums, count = (depthwise_conv(of, ones, stride) for of in (x, torch.ones_like(x[:1])))
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
