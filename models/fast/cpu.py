"""Layers that compute what torch's compute, up to rounding, in less time on a CPU with tensors in channels_last layout.

Why they exist: on a CPU some of torch's kernels take many times as long as their work needs. These are batch norm by
several threads; the weight gradient of a depthwise convolution with a kernel wider than 3, and in bf16 both gradients
of one with stride 2; max pooling; average pooling of channel counts that do not fill the vector registers; and the
gradients of slices and of concatenations, which come in a layout that the next layer is slow on.
docs/speed_notes.md has the times. Where these forms do not apply (`fast_here`), torch's own kernels are used; a reader
of the networks can take each of these layers for torch's of the same name.
"""

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CACHE_LINE = 16  # float32 numbers that a line of a CPU's cache holds


def fast_here(x: Tensor) -> bool:
    """Whether layers compute on x in the forms that are fast on a CPU.

    They do on tensors in channels_last layout, in bf16 and in float32. They do not on float32 under autocast, which
    would turn pooling, written as a convolution, into bf16; nor in exported networks, which run elsewhere.
    """
    return (
        x.device.type == "cpu"
        and (x.dtype == torch.bfloat16 or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")))
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.compiler.is_exporting()
    )


class Dropout(nn.Dropout):
    """nn.Dropout. On a CPU it draws uniform numbers, in a quarter of the time, and drops other elements than torch."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p in (0, 1) or x.device.type != "cpu":
            return super().forward(x)
        kept = 1 - self.p
        return x * torch.rand_like(x, dtype=torch.float32).lt_(kept).div_(kept).to(x.dtype)


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, on a CPU by rows of several pixels' channels where that is faster.

    torch's threads each add up their pixels in a row of a common buffer, one number for each channel. Where the length
    of a row is no multiple of a cache line, two threads write to the line between theirs: at 20 channels two threads
    are slower than one. A row for several pixels is such a multiple.
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
    """Batch norm of x (B, C, H, W) by torch's kernels, applied to rows of `pixels` times C numbers.

    x, weight (C,), bias (C,) -> x normalised, and the mean and the biased variance of the batch, (C,) each.
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
    """A view of x (B, C, H, W), in channels_last layout, as (B * H * W / pixels, pixels * C)."""
    return x.permute(0, 2, 3, 1).view(-1, pixels * x.shape[1])


def scale_and_shift(x: Tensor, scale: Tensor, shift: Tensor, pixels: int) -> Tensor:
    """scale * x + shift, of x (B, C, H, W) and vectors (C,), computed in float32 for bf16 too.

    It is computed as a batch norm of mean 0 and variance 1.
    """
    y = torch.empty_like(x)
    scale, shift, none = scale.repeat(pixels), shift.repeat(pixels), scale.new_empty(0)
    running = torch.zeros_like(scale), torch.ones_like(scale)
    out = as_rows(y, pixels), none, none  # so that y is no view, whose changes in place autograd would refuse
    torch.native_batch_norm(as_rows(x, pixels), scale, shift, *running, False, 0.0, 0.0, out=out)
    return y


class DepthwiseConv2d(nn.Conv2d):
    """nn.Conv2d with one k x k kernel for each channel, padded by k // 2, whose stride is an argument of the call.

    It is called as a module, so that hooks on nn.Conv2d, by which programs count multiply-accumulates, see it.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)

    def forward(self, x: Tensor, stride: int = 1) -> Tensor:
        return depthwise_conv(x, self.weight, stride)


def depthwise_conv(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """F.conv2d of x (B, C, H, W) with one k x k kernel for each channel, weight (C, 1, k, k), padded by k // 2."""
    kernel = weight.shape[-1]
    if torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.dtype != torch.float64:  # as F.conv2d would
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
    if torch.is_grad_enabled() and x.shape[-1] >= kernel > 1 and fast_here(x) and weight.dtype == x.dtype:
        return DepthwiseConv.apply(x, weight, stride)
    return F.conv2d(x, weight, None, stride, kernel // 2, 1, len(weight))


class DepthwiseConv(torch.autograd.Function):
    """A depthwise convolution whose gradients are computed in parts that torch's kernels are fast on.

    The weight gradient is computed column by column of the kernel: the middle three in one call, the others one by
    one. The input gradient is a convolution, except in float32 at larger strides, where torch's own is fast.
    Both can be differentiated again, as backward is made of functions that can.
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
    """The gradient of the weight of a depthwise convolution of x, from that of its output."""
    grad, x = (part.contiguous(memory_format=torch.channels_last) for part in (grad, x))
    return convolution_backward(grad, x, weight, stride, padding, [False, True, False])[1]


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], mask):
    """torch's gradients of a depthwise convolution: of x, weight and bias, those that `mask` asks for."""
    groups = len(weight)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride, stride], padding, [1, 1], False, [0, 0], groups, mask
    )


def average_pool(x: Tensor, stride: int) -> Tensor:
    """F.avg_pool2d over 3x3 pixels, padded by 1 pixel that does not count, of x (B, C, H, W).

    On CUDA it is computed as a convolution too: in channels_last layout, torch's kernel takes four times as long, and
    in torch 2.11 gives wrong gradients (https://github.com/pytorch/pytorch/issues/188344). Compiled code has a kernel
    of its own.
    """
    on_cuda = x.is_cuda and x.is_contiguous(memory_format=torch.channels_last) and not torch.compiler.is_compiling()
    if not on_cuda and not fast_here(x):
        return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)
    ones = x.new_ones(x.shape[1], 1, 3, 3)
    with torch.autocast(x.device.type, enabled=False):
        sums, count = (depthwise_conv(of, ones, stride) for of in (x, torch.ones_like(x[:1])))
    return sums / count  # 9, fewer at the borders


def max_pool(x: Tensor, stride: int) -> Tensor:
    """F.max_pool2d over 3x3 pixels, padded by 1, of x (B, C, H, W)."""
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


def even_and_odd_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """x[..., ::2, ::2] and x[..., 1::2, 1::2] of x (B, C, H, W): (B, C, ceil(H/2), ceil(W/2)) and the same, floor."""
    return EverySecondPixel.apply(x)


class EverySecondPixel(torch.autograd.Function):
    """The two slices of even_and_odd_pixels, whose gradients are written into one tensor in the layout of x.

    torch would make a tensor of zeros for each slice, in contiguous layout, and add them up.
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


def relu_conv_of_concatenation(states: Sequence[Tensor], slices: Sequence[Tensor]) -> Tensor:
    """A 1x1 convolution of the ReLU of concatenated states (B, C, H, W), whose kernel is concatenated of slices.

    slices: one for each state, (c_out, C, 1, 1) each. -> (B, c_out, H, W).
    """
    if fast_here(states[0]):  # slice by slice, without the strided gradients of cat: in bf16 twice as fast
        return reduce(add, (F.conv2d(F.relu(x), weight) for x, weight in zip(states, slices, strict=True)))
    return F.conv2d(F.relu(torch.cat(states, dim=1), inplace=True), torch.cat(slices, dim=1))  # cat copies
