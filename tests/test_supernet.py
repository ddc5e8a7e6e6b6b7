"""The supernet: size, sharing, scoring, and an independent forward pass of a small cell."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.scoring import score
from genotypes import CellSpec, Genotype
from models.supernet import Supernet


def test_published_supernet_has_the_published_size():
    with torch.device("meta"):
        net = Supernet(10, layers=3, channels=20, max_vertices=10)
    assert sum(p.numel() for p in net.parameters()) == 2_138_208


def test_scoring_writes_nothing_and_repeats():
    net = Supernet(layers=1, channels=4).eval()
    assert not any(b is not None for m in net.modules() if isinstance(m, nn.BatchNorm2d) for b in m.buffers())
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 10) for _ in range(2)]
    pool = random_pool(6, seed=0)
    first = [score(net, genotype, batches).item() for genotype in pool]
    assert first == [score(net, genotype, batches).item() for genotype in reversed(pool)][::-1]
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None for p in net.parameters())
    hits = sum((net(x, pool[0])[0].argmax(1) == y).sum().item() for x, y in batches)
    assert first[0] == pytest.approx(hits / 32)


def norm(x, module):
    """Batch statistics, by hand."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, unbiased=False)
    return (x - mean) / (var + 1e-5).sqrt() * module.weight.view(1, -1, 1, 1) + module.bias.view(1, -1, 1, 1)


def halve(x, m):
    shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
    return norm(
        torch.cat([F.conv2d(x, m.conv0.weight, stride=2), F.conv2d(shifted, m.conv1.weight, stride=2)], 1), m.norm
    )


def separable(x, m, stride):
    for i in range(2):
        k = m.depthwise[i].weight.shape[-1]
        x = F.conv2d(F.relu(x), m.depthwise[i].weight, stride=stride, padding=k // 2, groups=x.shape[1])
        x, stride = norm(F.conv2d(x, m.pointwise[i].weight), m.norm[i]), 1
    return x


def test_forward_equals_one_written_out_by_hand():
    """2 = seqconv3x3(in0 + in1), 3 = maxpool(in0 + 2), output = in1, 2, 3."""
    rows = [[0, 0, 1, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0] * 5]
    cell = CellSpec(rows, ["input0", "input1", "seqconv3x3", "maxpool3x3", "output"])
    torch.manual_seed(0)
    net = Supernet(layers=1, channels=4, drop_path_keep_prob=1.0).double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    s0 = s1 = norm(F.conv2d(x, net.stem[0].weight, padding=1), net.stem[1])
    for c in net.cells:
        inputs = []
        for s, m in ((s0, c.calibration["0"]), (s1, c.calibration["1"])):
            if isinstance(m, nn.Identity):
                inputs.append(s)
            elif hasattr(m[1], "conv0"):
                inputs.append(halve(F.relu(s), m[1]))
            else:
                inputs.append(norm(F.conv2d(F.relu(s), m[1].weight), m[2]))
        a, b = inputs
        v2 = separable(a + b, c.ops["2_seqconv3x3"], 2 if c.reduction else 1)
        a3 = halve(a, c.reduces["0_3"]) if c.reduction else a
        v3 = F.max_pool2d(a3 + v2, 3, 1, 1)
        last = halve(b, c.reduces["1_output"]) if c.reduction else b
        out = sum(F.conv2d(F.relu(s), c.final[v]) for v, s in ((1, last), (2, v2), (3, v3)))
        s0, s1 = s1, norm(out, c.final_norm)
    expected = F.linear(s1.mean((2, 3)), net.classifier.weight, net.classifier.bias)
    assert torch.allclose(net.eval()(x, Genotype(cell, cell))[0], expected, rtol=1e-10, atol=1e-10)


def test_training_one_genotype_leaves_other_weights_without_gradient():
    genotype = random_pool(3, seed=4)[0]
    net = Supernet(layers=1, channels=4)
    logits, auxiliary = net(torch.randn(4, 3, 32, 32), genotype)
    (logits.square().sum() + auxiliary.square().sum()).backward()
    for cell in net.cells:
        spec = genotype.reduction if cell.reduction else genotype.normal
        used = {f"{v}_{op}" for v, op in enumerate(spec.ops)}
        for name, op in cell.ops.items():
            assert name in used or all(p.grad is None for p in op.parameters())
        for v, weight in enumerate(cell.final):
            assert (weight.grad is not None) == (v in spec.predecessors(spec.num_vertices - 1))
