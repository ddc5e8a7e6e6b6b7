"""The CPU's own dropout, batch norm, depthwise convolution and pooling, against torch's."""

import copy
from collections import Counter

import pytest
import torch
from small_training import threads
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from genotypes import GENOTYPES, NAG_SPACE, CellSpec, Genotype
from models.fast import cpu
from models.fast.cpu import BatchNorm2d, Dropout, average_pool, depthwise_conv, fast_here, max_pool
from models.network import CifarNetwork, count_macs
from models.supernet import Supernet

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def images(size, channels=20, dtype=torch.float32, seed=0):
    x = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(seed))
    return x.to(dtype, memory_format=torch.channels_last).requires_grad_()


def torch_conv(x, weight, stride):
    return F.conv2d(x, weight, None, stride, weight.shape[-1] // 2, 1, len(weight))


def torch_average(x, stride):
    return F.avg_pool2d(x, 3, stride, padding=1, count_include_pad=False)


def torch_max(x, stride):
    return F.max_pool2d(x, 3, stride, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
def test_dropout_zeroes_its_share_and_scales_the_rest(p, dtype):
    x = torch.full((400, 500), 3.0, dtype=dtype, requires_grad=True)
    dropout = Dropout(p)
    torch.manual_seed(0)
    y = dropout(x)
    y.backward(torch.full_like(x, 7.0))
    kept = y != 0
    assert y.dtype == x.grad.dtype == dtype
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5e-3)  # standard deviation: at most 1.2e-3
    factor = torch.tensor(1 / (1 - p) if p < 1 else 0.0).to(dtype)
    torch.testing.assert_close(y, torch.where(kept, 3 * factor, 0))
    torch.testing.assert_close(x.grad, torch.where(kept, 7 * factor, 0))
    assert dropout.eval()(x) is x


@pytest.fixture
def two_threads():
    with threads(2):
        yield


def norms(channels, seed=0, **options):
    """Ours and torch's, with the same weights."""
    pair = BatchNorm2d(channels, **options), nn.BatchNorm2d(channels, **options)
    torch.manual_seed(seed)
    nn.init.normal_(pair[0].weight)
    nn.init.normal_(pair[0].bias)
    pair[1].load_state_dict(pair[0].state_dict())
    return pair


def by_rows(y):
    return "RowBatchNorm" in type(y.grad_fn).__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("channels", [6, 16, 20, 36, 40, 42])
def test_batch_norm_its_gradients_and_running_statistics_are_torchs(channels, tracked, dtype, two_threads):
    ours, theirs = norms(channels, track_running_stats=tracked)
    results = []
    for norm in (ours, theirs):
        x = images(8, channels)
        # Pixels that differ by where they are: those of a row have other means and variances.
        x = (x * torch.linspace(0.5, 2, 8) + torch.linspace(-3, 5, 8)).detach().to(dtype).requires_grad_()
        for _ in range(2):  # running statistics of two batches
            y = norm(x)
        assert by_rows(y) == (norm is ours and channels % 16 > 0)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)  # in contiguous layout
        grads = torch.autograd.grad(F.relu(y, inplace=True), (x, norm.weight, norm.bias), grad)
        results.append([y, *grads, *norm.buffers()])
    assert len(results[0]) == (7 if tracked else 4)
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride()
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(1, b.abs().max().item()))
    with torch.no_grad():  # as in scoring
        x = images(8, channels, dtype)
        torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mean", [0, 1, 30])
def test_bf16_gradients_of_batch_norm_are_as_exact_whatever_the_mean_of_the_next(mean, two_threads):
    norm, _ = norms(20)
    x = images(16, dtype=torch.bfloat16)
    grad = (torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) + mean).bfloat16()
    y = norm(x)
    assert by_rows(y)
    (given,) = torch.autograd.grad(y, x, grad)
    (exact,) = torch.autograd.grad(copy.deepcopy(norm).double()(x.double()), x, grad.double())
    assert (given.double() - exact).norm() < 0.005 * exact.norm()
    assert (given.double().sum((0, 2, 3)).abs() < 0.005 * given.double().abs().sum((0, 2, 3))).all()


def test_gradients_of_batch_norm_can_be_differentiated_again(two_threads):
    x, seconds = images(8), []
    for norm in norms(20):
        y = norm(x)
        assert by_rows(y) == isinstance(norm, BatchNorm2d)
        variables = (x, norm.weight, norm.bias)
        first = torch.autograd.grad(y.sin().sum(), variables, create_graph=True)
        seconds.append(torch.autograd.grad(sum(part.square().sum() for part in first), variables))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_batch_norm_is_left_to_torch_where_rows_do_not_fit_or_do_not_help(two_threads):
    norm, x = BatchNorm2d(20), images(8)
    assert by_rows(norm(x))
    assert not by_rows(norm(images(7)))  # 147 pixels, not a multiple of four
    assert not by_rows(norm(x.contiguous())) and not by_rows(norm.double()(x.double()))
    assert not by_rows(norm.float().eval()(x))
    assert BatchNorm2d(20)(x[:0]).shape == (0, 20, 8, 8)
    assert BatchNorm2d(20, affine=False, momentum=None)(x).shape == x.shape
    with threads(1):
        assert not by_rows(norm.train()(x))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_depthwise_convolution_and_its_gradients_are_torchs(size, kernel, stride, dtype):
    x, weight = images(size, dtype=dtype), torch.randn(20, 1, kernel, kernel).to(dtype).requires_grad_()
    ours = depthwise_conv(x, weight, stride)
    assert torch.equal(ours, torch_conv(x, weight, stride))
    if size >= kernel:
        assert "DepthwiseConv" in type(ours.grad_fn).__name__
    grad = torch.randn_like(ours)
    theirs = torch_conv(x.float(), weight.float(), stride)  # whose gradients round once, at the end
    gradients = torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad.float())
    for a, b in zip(*gradients, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else 0.01 * b.abs().max().item()
        torch.testing.assert_close(a, b, rtol=0.01 if dtype == torch.bfloat16 else 1e-4, atol=tolerance)


@pytest.mark.parametrize("wanted", [(False, True), (True, False)], ids=str)
def test_gradients_that_are_not_wanted_are_not_computed(wanted, monkeypatch):
    calls = []
    original = cpu.weight_gradient
    monkeypatch.setattr(cpu, "weight_gradient", lambda *args: calls.append(1) or original(*args))
    x = images(8).detach().requires_grad_(wanted[0])
    weight = torch.randn(20, 1, 5, 5, requires_grad=wanted[1])
    y = depthwise_conv(x, weight, 1)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert len(calls) == (3 if wanted[1] else 0)
    forward = 2 * y.numel() * 25
    flops = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0)
    assert flops == (forward if wanted[0] else 0)
    with torch.no_grad():
        assert depthwise_conv(x, weight, 1).grad_fn is None


def test_gradients_can_be_differentiated_again():
    x = images(8)
    weight = torch.randn(20, 1, 5, 5, requires_grad=True)
    seconds = []
    for conv in (depthwise_conv, torch_conv):
        y = conv(x, weight, 1).sin().sum()
        first = torch.autograd.grad(y, (x, weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight)))
    for a, b in zip(*seconds, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def test_under_autocast_the_depthwise_convolution_is_torchs_too():
    x, weight = images(8), torch.randn(20, 1, 5, 5, requires_grad=True)
    grads = []
    for conv in (depthwise_conv, torch_conv):
        with torch.autocast("cpu", torch.bfloat16):
            y = conv(x, weight, 1)
        assert y.dtype == torch.bfloat16
        grads.append((y, *torch.autograd.grad(y.float().sin().sum(), (x, weight))))
    for a, b in zip(*grads, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * b.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 16])
def test_pools_and_their_gradients_are_torchs(size, stride, dtype):
    x = images(size, dtype=dtype)
    for ours, theirs, exact in ((max_pool, torch_max, True), (average_pool, torch_average, False)):
        rtol = 0 if exact else 0.01 if dtype == torch.bfloat16 else 1e-6
        with torch.no_grad():  # max_pool has a form of its own for that
            torch.testing.assert_close(ours(x, stride), theirs(x, stride), rtol=rtol, atol=rtol)
        a = ours(x, stride)
        assert a.dtype == dtype and a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a, theirs(x, stride), rtol=rtol, atol=rtol)
        grad = torch.randn_like(a)
        (given,) = torch.autograd.grad(a, x, grad)
        (expected,) = torch.autograd.grad(theirs(x.float(), stride), x, grad.float())  # which rounds once, at the end
        torch.testing.assert_close(given, expected, rtol=rtol, atol=4 * rtol)


def test_equal_values_share_the_gradient_of_a_maximum_as_in_torch():
    x = torch.zeros(1, 4, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    a, b = (torch.autograd.grad(pool(x, 1).sum(), x)[0] for pool in (max_pool, torch_max))
    assert torch.equal(a, b)


def test_other_layouts_and_precisions_are_left_to_torch():
    x = images(8)
    assert fast_here(x) and not fast_here(x.double()) and not fast_here(x.contiguous())
    assert not fast_here(torch.empty_like(x, device="meta"))
    double, weight = x.double(), torch.randn(20, 1, 5, 5, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert average_pool(x, 1).dtype == torch_average(x, 1).dtype == torch.float32
        assert depthwise_conv(double, weight, 1).dtype == torch_conv(double, weight, 1).dtype == torch.float64


@needs_cuda
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_on_cuda(dtype, stride, compiled, amp):
    exact = images(8).detach().to(dtype).double().contiguous().requires_grad_()
    x = exact.detach().to("cuda", dtype, memory_format=torch.channels_last).requires_grad_()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for ours, theirs in ((average_pool, torch_average), (max_pool, torch_max)):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = (torch.compile(ours, dynamic=False) if compiled else ours)(x, stride)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        expected = theirs(exact, stride)
        torch.testing.assert_close(y.cpu().double(), expected, **tolerance)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (grad,) = torch.autograd.grad((y * weights.to("cuda", dtype)).sum(), x)
        (of_expected,) = torch.autograd.grad((expected * weights).sum(), exact)
        torch.testing.assert_close(grad.cpu().double(), of_expected, **tolerance)


def test_exported_networks_have_torchs_pooling_whatever_the_layout():
    network = CifarNetwork(GENOTYPES["NAG_FEW_PARAMS"], layers=1, channels=8, auxiliary=False).eval()  # average pools
    counts = []
    for layout in (torch.contiguous_format, torch.channels_last):
        example = (torch.randn(2, 3, 16, 16).to(memory_format=layout),)
        graph = torch.export.export(network.to(memory_format=layout), example).graph
        counts.append(Counter(str(node.target) for node in graph.nodes if "pool" in str(node.target)))
    assert counts[0] == counts[1] and sum(counts[0].values()) > 0


def test_macs_do_not_depend_on_the_layout():
    network = CifarNetwork(GENOTYPES["NAG_FEW_PARAMS"], layers=1, channels=8)  # has average pools
    macs = count_macs(network, 32)
    assert count_macs(network.to(memory_format=torch.channels_last), 32) == macs
    assert network.training and next(network.parameters()).device.type == "cpu"


@pytest.mark.parametrize("seed", range(2))
def test_the_supernet_gives_the_outputs_and_gradients_of_torchs_kernels(seed, monkeypatch, two_threads):
    """In channels_last against contiguous, where torch's own kernels are used. In float64, where hardly any ReLU or
    maximum is decided otherwise by rounding.
    """
    monkeypatch.setattr(cpu, "fast_here", lambda x: x.is_contiguous(memory_format=torch.channels_last))
    assert max(supernet_errors(seed, "cpu")) < 1e-4


@needs_cuda
@pytest.mark.parametrize("seed", range(3))
def test_the_supernet_gives_the_outputs_and_gradients_of_a_cpu_on_cuda(seed):
    assert max(supernet_errors(seed, "cuda", drop_path_keep_prob=1)) < 1e-4


def supernet_errors(seed: int, device: str, **settings) -> list[float]:
    """Of outputs and gradients, relative: on the device in channels_last layout, from contiguous on the CPU.

    Along every edge and op.
    """
    torch.manual_seed(seed)
    size = len(NAG_SPACE.ops) + 3
    rows = [[int(j > max(i, 1)) for j in range(size)] for i in range(size)]  # every edge
    cell = CellSpec(rows, [*NAG_SPACE.inputs, *NAG_SPACE.ops, NAG_SPACE.output])
    supernet, genotype = Supernet(layers=1, channels=8, **settings).double(), Genotype(cell, cell)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    results = []
    for where, layout in (("cpu", torch.contiguous_format), (device, torch.channels_last)):
        network = copy.deepcopy(supernet).to(where, memory_format=layout)
        torch.manual_seed(1)  # drop path
        logits, auxiliary = network(x.to(where, memory_format=layout), genotype)
        (logits.sin().sum() + auxiliary.sin().sum()).backward()
        found = [logits, auxiliary, *(p.grad for p in network.parameters() if p.grad is not None)]
        results.append([tensor.cpu() for tensor in found])
    assert len(results[0]) == len(results[1]) > 50
    return [((a - b).norm() / (b.norm() + 1e-4)).item() for a, b in zip(*results, strict=True)]
