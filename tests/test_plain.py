"""models/plain.py: the reference's outputs, and those of the fast networks, with what the robust recipe adds."""

import pytest
import torch
from test_discriminator import golden as golden_discriminator
from test_generator import golden as golden_generator

from benchmarks.plain_gan import plain_discriminator, plain_generator
from build_nas_dataset.random_cells import random_pool
from genotypes import NAG_SPACE, NASBENCH101, NASBENCH201
from models.discriminator import Discriminator
from models.generator import Generator
from models.graph import CellBatch
from models.plain import PlainDiscriminator, PlainGenerator

SIZES = {"latent_dim": 5, "vertex_size": 12, "graph_size": 6, "label_sizes": (4, 4), "num_classes": (3, 2)}
VARIANTS = {
    "paper": {},
    "drawn": {"temperature": 1.0},
    "mean": {"aggregation": "mean", "temperature": 1.0},
    "additions": {"chain_cells": True, "autoregressive_edges": True, "temperature": 1.0},
    "nasbench101": {"space": NASBENCH101},
    "nasbench201": {"space": NASBENCH201},
    "nasbench101 additions": {"space": NASBENCH101, "autoregressive_edges": True, "temperature": 1.0},
    "nasbench201 additions": {"space": NASBENCH201, "autoregressive_edges": True, "temperature": 1.0},
}


def generator_and_inputs(dtype, n=24, **changes):
    """A small generator without dropout, and z, labels, noise for n cells, which differ in float64.

    In float32 the weights are left small: larger ones amplify the rounding.
    """
    torch.manual_seed(0)
    generator = Generator(**SIZES, dropout=0.0, **changes).to(dtype)
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.mul_(1 if dtype == torch.float32 else 4 if "add_" in name else 2)
        for cell in generator.cells.values():
            cell.add_vertex[2].bias[cell.output_token] = 1.0
    z, noise = generator.draw_noise(n, torch.Generator().manual_seed(1))
    noise = None if noise is None else tuple(part.to(dtype) for part in noise)
    labels = torch.stack([torch.arange(n) % 3, torch.arange(n) % 2], dim=1)
    return generator, (z.to(dtype), labels, noise)


def assert_equal_cells(cells, others, atol):
    for a, b in zip(cells, others, strict=True):
        assert torch.equal(a.num_nodes, b.num_nodes)
        torch.testing.assert_close(a.adj, b.adj, rtol=0, atol=atol)
        torch.testing.assert_close(a.ops, b.ops, rtol=0, atol=atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"])
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_plain_growth_gives_the_same_cells(changes, dtype, atol):
    generator, inputs = generator_and_inputs(dtype, **changes)
    with torch.no_grad():
        cells = generator(*inputs)
        sizes = torch.cat([batch.num_nodes for batch in cells]).unique()
        varied = (sizes == 8).all() if generator.space is NASBENCH201 else len(sizes) > 3
        assert dtype == torch.float32 or varied
        assert_equal_cells(plain_generator(generator)(*inputs), cells, atol)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_plain_growth_and_scores_give_the_same_gradients(changes):
    generator, inputs = generator_and_inputs(torch.float64, **changes)
    torch.manual_seed(1)
    shared = {name: SIZES[name] for name in ("label_sizes", "num_classes")} | {"space": generator.space}
    discriminator = Discriminator(12, 6, gcn_dropout=0.0, mlp_dropout=0.0, **shared).double()
    outcomes = []
    for g, d in (
        (generator, discriminator),
        (plain_generator(generator), plain_discriminator(discriminator)),
    ):
        scores = d(g(*inputs), inputs[1])
        (scores - 1).square().mean().backward()
        grads = {name: p.grad for n in (g, d) for name, p in n.named_parameters() if p.grad is not None}
        outcomes.append({"scores": scores} | grads)
    assert len(outcomes[0]) > 30
    torch.testing.assert_close(outcomes[0], outcomes[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_plain_growth_gives_the_same_likelihoods(changes):
    generator, (z, labels, noise) = generator_and_inputs(torch.float64, **changes)
    plain = plain_generator(generator)
    pool = random_pool(len(z), seed=0, space=generator.space)
    cells = tuple(CellBatch.encode([g[name] for g in pool], dtype=torch.float64) for name in generator.space.cells)
    with torch.no_grad():
        own, likelihood = generator.draw(z, labels, noise)
        plain_own, plain_likelihood = plain.draw(z, labels, noise)
        assert_equal_cells(plain_own, own, 1e-12)
        torch.testing.assert_close(plain_likelihood, likelihood, rtol=1e-12, atol=1e-9)
        of_given = generator.log_likelihood(z, labels, cells)
        torch.testing.assert_close(plain.log_likelihood(z, labels, cells), of_given, rtol=1e-12, atol=1e-9)
        assert not torch.equal(of_given, likelihood)


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_the_plain_networks_give_the_outputs_of_the_reference(kind):
    data, fast = golden_generator(kind)
    _, fast_discriminator, cells = golden_discriminator(kind)
    generator = PlainGenerator(fast.config).double().eval()
    discriminator = PlainDiscriminator(fast_discriminator.config).double().eval()
    generator.load_state_dict(fast.state_dict())
    discriminator.load_state_dict(fast_discriminator.state_dict())
    with torch.no_grad():
        for name, batch in zip(NAG_SPACE.cells, generator(data["z"], data["labels"]), strict=True):
            assert torch.equal(batch.num_nodes, data[f"{name}_num_nodes"].squeeze(1))
            torch.testing.assert_close(batch.adj, data[f"{name}_edges"].mT, rtol=0, atol=1e-9)
            torch.testing.assert_close(batch.ops, data[f"{name}_ops"], rtol=0, atol=1e-9)
        torch.testing.assert_close(discriminator(cells, data["labels"]), data["scores"], rtol=0, atol=1e-9)
