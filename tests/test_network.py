"""Networks and supernet against the reference's outputs (tests/data) and the published table."""

import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from build_nas_dataset.random_cells import random_pool
from genotypes import GENOTYPES, NAG_SPACE, CellSpec, Genotype
from models.cost import batch_cost, genotype_cost, network_cost
from models.graph import CellBatch
from models.network import (
    Cell,
    CifarConfig,
    CifarNetwork,
    ImageNetConfig,
    ImageNetNetwork,
    count_macs,
    count_parameters,
    drop_path_keep,
)
from models.ops import FactorizedReduce, drop_path
from models.supernet import Supernet

DATA = Path(__file__).parent / "data"
COUNTS = json.loads((DATA / "param_counts.json").read_text())
LOGITS = json.loads((DATA / "network_logits.json").read_text())


def fill(network):
    """The weights of the reference outputs: element k of each weight is sin(1 + 0.7 k) sqrt(2 / fan)."""
    network.double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias.zero_()
        for p in network.parameters():
            if p.ndim >= 2:
                k = torch.arange(p.numel(), dtype=torch.float64)
                p.copy_((torch.sin(1 + 0.7 * k) * math.sqrt(2 / p[0].numel())).view(p.shape))
    return network


def images(batch, size):
    k = torch.arange(batch * 3 * size * size, dtype=torch.float64)
    return torch.cos(0.3 + 0.11 * k).view(batch, 3, size, size)


def assert_close(outputs, entry, *names):
    for output, name in zip(outputs, names, strict=False):
        expected = torch.tensor(entry[name], dtype=torch.float64)
        assert (output - expected).abs().max() < 1e-8 * expected.abs().max(), name


@pytest.mark.parametrize("entry", LOGITS, ids=range(len(LOGITS)))
def test_cifar_network_and_supernet_equal_the_reference(entry):
    genotype = Genotype.from_dict(entry)
    network = fill(CifarNetwork(genotype, 10, 1, 4, keep_prob=1.0, drop_path_keep_prob=1.0))
    assert_close(network.eval()(images(2, 32)), entry, "cifar_eval_logits")
    names = "cifar_train_mode_logits", "cifar_train_mode_aux_logits"
    assert_close(network.train()(images(4, 32)), entry, *names)
    supernet = fill(Supernet(10, 1, 4, 10, keep_prob=1.0, drop_path_keep_prob=1.0))
    names = "supernet_train_mode_logits", "supernet_train_mode_aux_logits"
    assert_close(supernet.train()(images(4, 32), genotype.prune()), entry, *names)


@pytest.mark.parametrize("entry", LOGITS, ids=range(len(LOGITS)))
def test_imagenet_network_equals_the_reference(entry):
    network = fill(ImageNetNetwork(Genotype.from_dict(entry), 7, 1, 4))
    assert count_parameters(network) == entry["imagenet_params_classes7_layers1_channels4"]
    assert_close(network.eval()(images(1, 224)), entry, "imagenet_eval_logits")
    names = "imagenet_train_mode_logits", "imagenet_train_mode_aux_logits"
    assert_close(network.train()(images(2, 224)), entry, *names)


def test_parameter_counts_equal_the_reference():
    expected = [entry["params_cifar10_layers6_channels36"] for entry in COUNTS]
    genotypes = [Genotype.from_dict(entry) for entry in COUNTS]
    assert len(COUNTS) == 200
    assert [genotype_cost(genotype)[0] for genotype in genotypes] == expected
    with torch.device("meta"):
        assert [count_parameters(CifarNetwork(genotype)) for genotype in genotypes[:8]] == expected[:8]


@pytest.mark.parametrize(("genotypes", "classes", "layers", "channels", "size"), [(2, 10, 6, 36, 32), (6, 7, 1, 5, 30)])
def test_closed_form_cost_equals_counted_cost(genotypes, classes, layers, channels, size):
    for genotype in random_pool(genotypes, seed=3):
        with torch.device("meta"):
            network = CifarNetwork(genotype, classes, layers, channels, auxiliary=False)
        counted = count_parameters(network), count_macs(network, size)
        assert genotype_cost(genotype, classes, layers, channels, size) == counted


@pytest.mark.parametrize(("classes", "layers", "channels", "size"), [(1000, 4, 42, 224), (7, 1, 5, 197)])
def test_closed_form_cost_of_the_imagenet_network_equals_counted_cost(classes, layers, channels, size):
    for genotype in [*random_pool(3, seed=4), GENOTYPES["NAG_HIGH_ACC"]]:
        with torch.device("meta"):
            network = ImageNetNetwork(genotype, classes, layers, channels, auxiliary=False)
        found = network_cost(genotype, ImageNetConfig(classes, layers, channels), size)
        assert found == (count_parameters(network), count_macs(network, size))
        assert size != 224 or found == network_cost(genotype, network.config)  # 224 pixels by default


def test_cost_of_a_batch_is_that_of_its_genotypes():
    def cells_with_loose_vertices(cells):
        batch = CellBatch.encode(cells)
        return CellBatch(batch.adj * (torch.rand(batch.adj.shape) > 0.3), batch.ops, batch.num_nodes)

    torch.manual_seed(0)
    pool = random_pool(300, seed=4)
    cells = [cells_with_loose_vertices([genotype[name] for genotype in pool]) for name in NAG_SPACE.cells]
    genotypes = [Genotype(*specs) for specs in zip(*(batch.decode() for batch in cells), strict=True)]
    cost = batch_cost(*(batch.prune()[0] for batch in cells))
    assert sum(genotype.is_valid for genotype in genotypes) > 200
    for i, genotype in enumerate(genotypes):
        if genotype.is_valid:
            assert (cost.params[i], cost.macs[i]) == genotype_cost(genotype)


def test_published_parameter_counts():
    names = ("NAG_HIGH_ACC", "NAG_ENSEMBLE_A", "NAG_ENSEMBLE_B", "NAG_ENSEMBLE_C")
    with torch.device("meta"):
        counts = [count_parameters(CifarNetwork(GENOTYPES[name])) for name in names]
        assert counts == [4_274_326, 1_236_502, 1_086_022, 2_213_830]
        assert count_parameters(CifarNetwork(GENOTYPES["NAG_HIGH_ACC"], 100)) == 4_352_176
        imagenet = ImageNetNetwork(GENOTYPES["NAG_HIGH_ACC"])
        assert count_parameters(imagenet) == 4_971_763
        assert round(count_macs(imagenet, 224) / 1e6) == 520


def test_cell_with_an_unused_input_builds_a_network_that_learns():
    cell = CellSpec([[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1], [0] * 4], ["input0", "input1", "seqconv3x3", "output"])
    network = CifarNetwork(Genotype(cell, cell), 3, 1, 4)
    logits, auxiliary = network(torch.randn(4, 3, 32, 32))
    (logits.sum() + auxiliary.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"backend": "aot_eager"}, marks=pytest.mark.slow),
        pytest.param({"options": {"fallback_random": True}}, marks=pytest.mark.slow),  # inductor drops other paths else
    ],
)
def test_equal_cells_are_compiled_once_and_train_as_without(options):
    """The cells of a stage have other inputs in its first two; eleven graphs for those of three stages."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    images, found = torch.randn(2, 3, 32, 32).double().to(memory_format=torch.channels_last), []
    for compiled in (False, True):
        torch.manual_seed(0)
        network = CifarNetwork(GENOTYPES["NAG_ENSEMBLE_C"], layers=4, channels=4, drop_path_keep_prob=0.9)
        network.double().to(memory_format=torch.channels_last)
        if compiled:
            network.compile_cells(fullgraph=True, **options)
        for _ in range(2):
            torch.manual_seed(1)
            outputs = network(images, torch.tensor(0.5).double())
        sum(output.square().sum() for output in outputs).backward()
        found.append([*outputs, *(p.grad for p in network.parameters())])
        network.eval()(images)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 11


def test_invalid_genotype_is_refused():
    cell = CellSpec([[0] * 3] * 3, ["input0", "input1", "output"])
    with pytest.raises(ValueError, match="not valid"):
        CifarNetwork(Genotype(cell, cell))


def test_drop_path_grows_with_depth_and_progress():
    assert drop_path_keep(1.0, 3, 20, 0.5) is None
    assert drop_path_keep(0.8, 19, 20, 1.0) == pytest.approx(0.8)
    assert drop_path_keep(0.8, 9, 20, 0.5) == pytest.approx(0.95)


def test_drop_path_zeroes_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.rand(2000, 3, 2, 2) + 1
    ratio = drop_path(x, 0.25) / x
    assert ratio.unique().tolist() == [0, 4]
    assert ratio.flatten(1).std(1).max() == 0
    assert ratio.mean() == pytest.approx(1, abs=0.2)  # five standard errors


@pytest.mark.parametrize("reduction", [False, True])
@pytest.mark.parametrize(("op", "exempt"), [("identity", True), ("maxpool3x3", False), ("seqconv3x3", False)])
def test_drop_path_leaves_identities_alone(op, exempt, reduction):
    """Of stride 1 and 2: vertex 2 reads inputs, vertex 3 reads vertex 2."""
    rows = [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0] * 5]
    torch.manual_seed(0)
    cell = Cell(CellSpec(rows, ["input0", "input1", op, op, "output"]), 4, 4, 4, reduction, False)
    inputs = torch.randn(2, 16, 4, 8, 8)
    assert cell(*inputs, 0.5).equal(cell(*inputs, None)) == exempt


def small_network(keep_prob=1.0, drop_path_keep_prob=1.0):
    return CifarNetwork(GENOTYPES["NAG_ENSEMBLE_B"], 10, 1, 16, keep_prob, drop_path_keep_prob)


def small_supernet(keep_prob=1.0, drop_path_keep_prob=1.0):
    return Supernet(10, 1, 16, 5, keep_prob, drop_path_keep_prob)


@pytest.mark.parametrize("build", [small_network, small_supernet])
def test_the_classifier_drops_what_it_is_told_to(build):
    """100 samples of ones in the place of the pooled features."""
    model, seen = build(keep_prob=0.75), []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.dropout.register_forward_pre_hook(lambda module, args: (torch.ones(100, model.classifier.in_features),))
    genotype = [GENOTYPES["NAG_ENSEMBLE_B"].prune()] if build is small_supernet else []
    model(torch.randn(2, 3, 32, 32), *genotype)
    assert seen[0].unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert seen[0].bool().float().mean() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize("build", [small_network, small_supernet])
def test_drop_path_starts_from_nothing_and_ends_at_its_keep_probability(build, monkeypatch):
    """5 cells, the last of which keeps 0.5 at the end of the training; in eval mode, all keep all."""
    model, kept = build(drop_path_keep_prob=0.5), []
    genotype = [GENOTYPES["NAG_ENSEMBLE_B"].prune()] if build is small_supernet else []
    for cell in model.cells:
        cell.register_forward_pre_hook(lambda module, args: kept.append(args[-1]))
    x = torch.randn(2, 3, 32, 32)
    for progress in (0.0, 0.5, 1.0):
        model(x, *genotype, progress=progress)
        assert kept == pytest.approx([1 - 0.5 * (layer + 1) / 5 * progress for layer in range(5)])
        kept.clear()
    model.eval()(x, *genotype)
    assert kept == [None] * 5


@pytest.mark.parametrize("build", [small_network, small_supernet])
def test_weights_are_kaiming_normal_at_the_start(build):
    """Deviation sqrt(2 / fan-in), of inputs a kernel reads; weights beyond 3 deviations tell it from uniform."""
    torch.manual_seed(0)
    beyond = total = 0
    for name, weight in build().named_parameters():
        if weight.ndim >= 2:
            scaled = weight.detach() * math.sqrt(weight[0].numel() / 2)
            assert scaled.std() == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel())), name
            beyond, total = beyond + (scaled.abs() > 3).sum().item(), total + weight.numel()
        elif name in ("classifier.bias", "auxiliary.9.bias"):
            assert not weight.any()
    assert beyond / total == pytest.approx(0.0027, abs=0.0005)


def test_no_genotype_is_smaller_or_larger_than_the_extreme_ones():
    """The range that is named when a limit cannot be kept."""
    from generation.targets import extreme_genotypes

    genotypes = random_pool(300, seed=0) + random_pool(300, seed=0, max_vertices=5)  # the smallest are among the latter
    for network, k in product((CifarConfig(), ImageNetConfig()), (0, 1)):
        bounds = [network_cost(genotype, network)[k] for genotype in extreme_genotypes(NAG_SPACE.max_vertices)]
        values = [network_cost(genotype, network)[k] for genotype in genotypes]
        assert min(bounds) <= min(values) and max(values) <= max(bounds)
        assert min(values) < 2 * min(bounds)  # and the bounds are not far off


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("size", [(6, 6), (5, 4), (1, 1)], ids=str)
def test_halving_the_resolution_and_its_gradients_are_those_of_slices(size, layout):
    module = FactorizedReduce(4, 6).to(memory_format=layout)
    x = torch.randn(3, 4, *size).to(memory_format=layout).requires_grad_()
    shifted = torch.nn.functional.pad(x, (0, 1, 0, 1))[..., 1:, 1:]
    halves = [module.conv0(x[..., ::2, ::2]), module.conv1(shifted[..., ::2, ::2])]
    found = []
    for y in (module(x), module.norm(torch.cat(halves, dim=1))):
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        found.append([y, first, *torch.autograd.grad(first.square().sum(), x)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert torch.autograd.grad(module(x).sum(), x)[0].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("kind", [CifarNetwork, ImageNetNetwork])
@pytest.mark.parametrize("name", ["NAG_HIGH_ACC", "NAG_ENSEMBLE_A", "NAG_ENSEMBLE_C"])
def test_macs_counted_by_hooks_on_modules_are_those_of_count_macs(kind, name):
    """Programs that count MACs see a network through hooks on its nn.Conv2d and nn.Linear modules."""
    torch.manual_seed(0)
    network, size = kind(GENOTYPES[name], layers=1, channels=8).eval(), 32 if kind is CifarNetwork else 64
    found = []

    def count(module, arguments, output):
        weights = module.weight[0].numel()  # multiply-accumulates for each number of the output
        found.append(weights * output.numel())

    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    macs = sum(found)  # before count_macs, in whose copy of the network the hooks count too
    assert macs == count_macs(network, size) == counter.get_total_flops() // 2
    if kind is CifarNetwork:
        assert macs == genotype_cost(GENOTYPES[name], layers=1, channels=8)[1]
