"""The generator: against the reference's outputs, against slow obvious forms of itself, and what must hold for any."""

from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from generation.from_reference import reference_name
from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.discriminator import Discriminator
from models.fast.sampling import CLOSE, margin
from models.generator import CellGenerator, Generator, forcing_noise
from models.graph import GraphState, MessagePassing, neighbours
from plumbing.checkpoint_files import save_checkpoint

GOLDEN = Path(__file__).parent / "data" / "gan_outputs.npz"
TOY_SPACE = SearchSpace("toy", cells=("cell",), inputs=("input",), ops=("conv3x3", "maxpool"), max_vertices=7)
SIZES = {"latent_dim": 5, "vertex_size": 12, "graph_size": 6, "label_sizes": (4, 4), "num_classes": (3, 2)}

ADDITIONS = {"chain_cells": True, "autoregressive_edges": True, "temperature": 1.0}  # what the paper does not have


def golden(kind):
    """The reference's arrays of one kind ("single" or "multi") as tensors, and a generator with its weights."""
    with np.load(GOLDEN) as file:
        data = {key.removeprefix(f"{kind}/"): torch.from_numpy(file[key]) for key in file if key.startswith(kind)}
    classes = (3,) * data["labels"].shape[1]
    generator = Generator(5, 12, 6, num_classes=classes, label_sizes=(4,) * len(classes)).double().eval()
    generator.load_state_dict({k: data[f"generator/{reference_name(k)}"] for k in generator.state_dict()})
    assert len(generator.state_dict()) == sum(key.startswith("generator/") for key in data)
    return data, generator


def varied_generator(seed=0, space=NAG_SPACE, **changes):
    """A small float64 generator in eval mode whose cells differ in size and edges (fresh ones are all alike)."""
    torch.manual_seed(seed)
    generator = Generator(**{**SIZES, **changes}, space=space).double().eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.mul_(4 if "add_" in name else 2)
        for cell in generator.cells.values():
            cell.add_vertex[2].bias[cell.output_token] = 1.0
    return generator


def inputs(batch, generator, seed=0):
    config, rng = generator.config, torch.Generator().manual_seed(seed)
    z = torch.randn(batch, config.latent_dim, generator=rng, dtype=torch.float64)
    labels = [torch.randint(0, n, (batch,), generator=rng) for n in config.num_classes]
    return z, torch.stack(labels, dim=1)


def assert_same(cells, others, atol=1e-12):
    for a, b in zip(cells, others, strict=True):
        assert torch.equal(a.num_nodes, b.num_nodes)
        assert torch.equal(a.adj > 0.5, b.adj > 0.5)
        assert torch.equal(a.ops.argmax(-1), b.ops.argmax(-1))
        torch.testing.assert_close(a.adj, b.adj, rtol=0, atol=atol)
        torch.testing.assert_close(a.ops, b.ops, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------ the reference


@pytest.mark.parametrize("fixed_shape", [False, True])
@pytest.mark.parametrize("kind", ["single", "multi"])
def test_cells_are_those_of_the_reference(kind, fixed_shape):
    data, generator = golden(kind)
    generator.fixed_shape = fixed_shape
    with torch.no_grad():
        cells = generator(data["z"], data["labels"])
    for name, batch in zip(NAG_SPACE.cells, cells, strict=True):
        assert torch.equal(batch.num_nodes, data[f"{name}_num_nodes"].squeeze(1))
        torch.testing.assert_close(batch.adj, data[f"{name}_edges"].mT, rtol=0, atol=1e-9)
        torch.testing.assert_close(batch.ops, data[f"{name}_ops"], rtol=0, atol=1e-9)


# --------------------------------------------------------------------------------------- slow, obvious forms


def test_messages_are_those_of_a_loop_over_edges():
    torch.manual_seed(0)
    layer = MessagePassing(vertex_size=6, dropout=0.5).double().eval()
    states = torch.randn(3, 5, 6, dtype=torch.float64)
    adj = (torch.rand(3, 5, 5) < 0.5).double().triu(1)
    adj[0, :, 3] = adj[0, 3] = 0  # an isolated vertex passes the GRU, with a zero message
    expected = torch.empty_like(states)
    for b in range(3):
        messages = torch.zeros(5, 12, dtype=torch.float64)
        for j, i in adj[b].nonzero().tolist():
            messages[i] += layer.message(torch.cat([states[b, j], states[b, i]]))
            messages[j] += layer.message_reversed(torch.cat([states[b, i], states[b, j]]))
        expected[b] = layer.update(messages, states[b])
    torch.testing.assert_close(layer(states, *neighbours(adj), *layer.weights()), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", ["gsum", "mean"])
def test_graph_state_is_that_of_a_loop_over_vertices(aggregation):
    torch.manual_seed(0)
    graph_state = GraphState(6, 4, aggregation).double()
    states = torch.randn(2, 5, 6, dtype=torch.float64)
    for state, b in zip(graph_state(states, torch.arange(5) < torch.tensor([[5], [3]])), range(2), strict=True):
        values = []
        for vertex in states[b, : (5, 3)[b]]:
            gate = torch.sigmoid(graph_state.gate(vertex)) if aggregation == "gsum" else 1
            values.append(graph_state.value(vertex) * gate)
        total = sum(values) if aggregation == "gsum" else sum(values) / len(values)
        torch.testing.assert_close(state, total / total.norm(), rtol=0, atol=1e-12)


def test_edge_logit_is_the_mlp_of_the_concatenation():
    cell = varied_generator().cells["normal"]
    states = torch.randn(4, 3, 12, dtype=torch.float64)
    context = torch.randn(4, cell.add_edge[0].in_features - 12, dtype=torch.float64)
    joined = torch.cat([states, context[:, None].expand(-1, 3, -1)], dim=-1)
    expected = cell.add_edge(joined).squeeze(-1)
    torch.testing.assert_close(
        cell._edge_logits(states, context, torch.zeros(4, 3), None), expected, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("changes", [{}, {"aggregation": "mean"}, ADDITIONS], ids=["gsum", "mean", "additions"])
def test_a_batch_gives_the_cells_of_its_samples_one_by_one(changes):
    generator = varied_generator(**changes)
    z, labels = inputs(8, generator)
    _, noise = generator.draw_noise(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = generator(z, labels, noise)
        for i in range(8):
            one = slice(i, i + 1)
            own = None if noise is None else [part[one] for part in noise]
            assert_same([batch[one] for batch in together], generator(z[one], labels[one], own))


@pytest.mark.parametrize("changes", [{}, ADDITIONS], ids=["paper", "additions"])
def test_fixed_shape_gives_the_cells_and_gradients_of_compaction(changes):
    generator = varied_generator(**changes)
    z, labels = inputs(64, generator)
    _, noise = generator.draw_noise(64, torch.Generator().manual_seed(0))
    results = []
    for fixed_shape in (True, False):
        generator.fixed_shape = fixed_shape
        generator.zero_grad()
        cells = generator(z, labels, noise)
        sum((batch.adj.sin().sum() + batch.ops.sin().sum()) for batch in cells).backward()
        results.append((cells, [p.grad for p in generator.parameters() if p.grad is not None]))
    (cells, grads), (others, other_grads) = results
    assert len(torch.cat([batch.num_nodes for batch in cells]).unique()) > 5  # samples leave at all steps
    assert_same(cells, others)
    torch.testing.assert_close(grads, other_grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fixed_shape", [True, False])
@pytest.mark.parametrize("changes", [{}, ADDITIONS], ids=["paper", "additions"])
def test_cells_drawn_have_the_likelihood_and_gradients_of_the_same_cells_given(changes, fixed_shape):
    generator = varied_generator(**changes)
    generator.fixed_shape = fixed_shape
    z, labels = inputs(32, generator)
    _, noise = generator.draw_noise(32, torch.Generator().manual_seed(0), temperature=1.0)
    cells, drawn = generator.draw(z, labels, tuple(part.double() for part in noise))
    given = generator.log_likelihood(z, labels, tuple(batch.straight_through() for batch in cells))
    torch.testing.assert_close(drawn, given, rtol=1e-12, atol=1e-9)
    weight = torch.arange(32.0).double()
    grads = []
    for likelihood in (drawn, given):
        generator.zero_grad()
        (weight * likelihood).sum().backward()
        grads.append([p.grad for p in generator.parameters()])
    assert all(grad.abs().max() > 1e-6 for grad in grads[0])
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e6, 1e30])
def test_growth_is_forced_to_the_given_cells_however_large_the_logits(scale):
    z, labels = inputs(32, varied_generator())
    given = varied_generator(seed=1, **ADDITIONS)
    _, noise = given.draw_noise(32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells = tuple(batch.straight_through() for batch in given(z, labels, tuple(part.double() for part in noise)))
        generator = varied_generator(**ADDITIONS).float()
        for cell in generator.cells.values():
            cell.add_vertex[2].weight.mul_(scale)
            cell.add_edge[2].weight.mul_(scale)
        cells = tuple(type(batch)(batch.adj.float(), batch.ops.float(), batch.num_nodes) for batch in cells)
        grown, likelihood = generator.draw(z.float(), labels, forcing_noise(cells))
        again = generator.log_likelihood(z.float(), labels, cells)
    for batch, forced in zip(grown, cells, strict=True):
        assert torch.equal(batch.adj, forced.adj) and torch.equal(batch.ops, forced.ops)
    assert torch.equal(likelihood, again) and likelihood.isfinite().all()
    assert likelihood.min() < -scale  # cells of another generator: some of their decisions are unlikely


def test_a_reduction_cell_sees_the_normal_cell_only_when_chained():
    """Swapped between samples, normal cells leave the likelihood of the reduction cells as it was, unless chained."""
    for chained in (False, True):
        generator = varied_generator(chain_cells=chained)
        z, labels = inputs(16, generator)
        z, labels = z[:1].expand(16, -1), labels[:1].expand(16, -1)
        _, noise = generator.draw_noise(16, torch.Generator().manual_seed(0), temperature=1.0)
        with torch.no_grad():
            cells = [c.straight_through() for c in generator(z, labels, tuple(part.double() for part in noise))]
            other = [c[torch.arange(16).roll(1)] for c in cells]
            (a, b, c, d) = (
                generator.log_likelihood(z, labels, pair) for pair in product(*zip(cells, other, strict=True))
            )
        # a: (own, own), b: (own, other), c: (other, own), d: (other, other)
        assert torch.allclose(a - b, c - d, rtol=0, atol=1e-9) != chained


def test_fixed_shape_depends_on_no_value():
    """Tensors of the meta device have shapes but no values: anything that reads one raises."""
    with torch.device("meta"):
        generator = Generator(**SIZES, **ADDITIONS)
        z, labels = torch.randn(4, 5), torch.zeros(4, 2, dtype=torch.long)
        noise = [torch.randn(4, 10, 18)] * 2
    generator.fixed_shape = True
    cells = generator(z, labels, noise)
    sum(batch.adj.sum() + batch.ops.sum() for batch in cells).backward()
    assert cells[0].adj.shape == (4, 10, 10)
    generator.fixed_shape = False
    with pytest.raises(RuntimeError, match="meta"):
        generator(z, labels)


# ---------------------------------------------------------------------------------------- what a cell is


def test_a_cell_depends_on_its_own_noise_and_labels_only():
    generator = varied_generator()
    z, labels = inputs(4, generator)
    z.requires_grad_()
    cells = generator(z, labels)
    for batch in cells:
        edges, tokens = batch.adj[1].sin().sum(), batch.ops[1].sin().sum()
        for value in (edges, tokens):
            (grad,) = torch.autograd.grad(value, z, retain_graph=True)
            assert (grad[1] != 0).any() and (grad[[0, 2, 3]] == 0).all()
    others = labels.clone()
    others[[0, 2, 3]] = 1 - others[[0, 2, 3]].clamp(max=1)
    assert_same([batch[1:2] for batch in cells], [batch[1:2] for batch in generator(z, others)])
    others = labels.clone()
    others[1, 0] = (labels[1, 0] + 1) % 3
    for batch, changed in zip(cells, generator(z, others), strict=True):
        assert not torch.allclose(batch.adj[1], changed.adj[1])


@pytest.mark.parametrize("space", [NAG_SPACE, TOY_SPACE], ids=lambda space: space.name)
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_cells_are_well_formed(space, train):
    generator = varied_generator(space=space).train(train)
    cells = generator(*inputs(64, generator))
    assert len(cells) == len(space.cells)
    ids, tokens, n = space.token_id, len(space.tokens), space.num_inputs
    for batch in cells:
        size = space.max_vertices
        assert batch.adj.shape == (64, size, size) and batch.ops.shape == (64, size, tokens)
        assert batch.num_nodes.dtype == torch.long and len(batch.num_nodes.unique()) > 1
        absent = torch.arange(size) >= batch.num_nodes[:, None]
        assert (batch.ops[absent] == 0).all() and (batch.adj[absent] == 0).all() and (batch.adj.mT[absent] == 0).all()
        assert (batch.adj == batch.adj.triu(1)).all() and (batch.adj[:, :, :n] == 0).all()
        one_hot = F.one_hot(torch.tensor([ids[name] for name in space.inputs]), tokens)
        assert (batch.ops[:, :n] == one_hot).all()
        input_columns = batch.ops[:, n:, [ids[name] for name in space.inputs]]
        assert (input_columns == 0).all()
        torch.testing.assert_close(batch.ops.sum(-1), (~absent).double())
        full = batch.num_nodes == size
        assert full.any() and (batch.ops[full, -1] == F.one_hot(torch.tensor(ids["output"]), tokens)).all()
        for spec, num_nodes in zip(batch.decode(space), batch.num_nodes.tolist(), strict=True):  # validated
            assert spec.num_vertices == num_nodes


def test_growth_stops_at_max_vertices():
    for size in (3, 6):
        generator = varied_generator(max_vertices=size)
        cells = generator(*inputs(16, generator))
        assert cells[0].adj.shape == (16, size, size) and max(cells[0].num_nodes) == size
    for size in (2, 11):
        with pytest.raises(ValueError, match="max_vertices must be 3 to 10"):
            Generator(max_vertices=size)


@pytest.mark.parametrize("aggregation", ["gsum", "mean"])
@pytest.mark.parametrize("space", [NAG_SPACE, TOY_SPACE], ids=lambda space: space.name)
def test_gradient_reaches_every_parameter_through_the_discriminator(space, aggregation):
    generator = varied_generator(space=space, aggregation=aggregation).train()
    shared = {"num_classes": (3, 2), "label_sizes": (4, 4), "aggregation": aggregation, "space": space}
    discriminator = Discriminator(12, 8, **shared).double().train()
    z, labels = inputs(64, generator)
    (discriminator(generator(z, labels), labels) - 1).square().mean().backward()
    for name, parameter in [*generator.named_parameters(), *discriminator.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


# ------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("changes", [{}, ADDITIONS], ids=["paper", "additions"])
def test_samples_are_reproducible_and_independent_of_batch_size(changes):
    generator = varied_generator(**changes).float().train()
    samples = generator.sample((2, 1), n=40, seed=3)
    assert generator.training and next(generator.parameters()).dtype == torch.float32
    assert len(samples) == 40 and len(set(samples)) > 5
    assert samples == generator.sample((2, 1), n=40, seed=3, batch_size=7)
    assert samples != generator.sample((2, 1), n=40, seed=4)
    assert samples != generator.sample((0, 1), n=40, seed=3)
    assert generator.sample((2, 1), n=0, seed=3) == []


def test_samples_are_the_pruned_cells_of_eval_mode():
    generator = varied_generator()
    samples = generator.sample((2, 1), n=40, seed=3)
    z = torch.randn(40, 5, generator=torch.Generator().manual_seed(3)).double()
    cells = generator(z, torch.tensor([[2, 1]] * 40))
    assert any(sample is None for sample in samples) and any(sample is not None for sample in samples)
    for sample, normal, reduction in zip(samples, *(batch.decode() for batch in cells), strict=True):
        if sample is None:
            assert not (normal.is_valid and reduction.is_valid)
        else:
            assert (sample.normal, sample.reduction) == (normal.prune(), reduction.prune())


def test_samples_follow_the_space():
    samples = varied_generator(space=TOY_SPACE).sample((0, 0), n=20, seed=0)
    assert {len(sample.cells) for sample in samples if sample is not None} == {1}
    assert {sample.space for sample in samples if sample is not None} == {TOY_SPACE}


@pytest.mark.parametrize(
    "labels, message",
    [
        ((3, 0), "label 0 must be 0 to 2, got 3"),
        ((0, -1), "label 1 must be 0 to 1, got -1"),
        ((0,), "expected 2 labels"),
    ],
)
def test_impossible_labels_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        varied_generator().sample(labels, n=1, seed=0)


def test_a_checkpoint_gives_back_the_generator(tmp_path):
    generator = varied_generator(max_vertices=8, aggregation="mean").float()
    state = {"generator": generator.state_dict(), "generator_config": asdict(generator.config)}
    save_checkpoint(tmp_path / "checkpoint.pt", "gan", state)
    loaded = Generator.from_checkpoint(tmp_path / "checkpoint.pt")
    assert loaded.config == generator.config and not loaded.training
    assert loaded.sample((1, 0), n=10, seed=0) == generator.sample((1, 0), n=10, seed=0)
    with pytest.raises(ValueError, match="no such checkpoint"):
        Generator.from_checkpoint(tmp_path / "other.pt")


def grown(generator, labels, z, noise):
    """The pruned genotypes of one growth in float64, without `sample`."""
    asked = torch.tensor([labels]).expand(len(z), -1)
    with torch.no_grad():
        cells = generator.double()(z.double(), asked, None if noise is None else tuple(part.double() for part in noise))
    return [Genotype(*specs).prune() for specs in zip(*(batch.decode() for batch in cells), strict=True)]


@pytest.mark.parametrize("changes", [{}, ADDITIONS], ids=["paper", "additions"])
def test_decisions_are_those_of_float64(changes, monkeypatch):
    """Growing in float32 first must not show, however inexact it is, where close decisions are looked at again."""
    generator = varied_generator(**changes)
    exact = grown(generator, (2, 1), *generator.draw_noise(200, torch.Generator().manual_seed(5)))
    errors = torch.Generator().manual_seed(0)

    def inexact(own):
        def logits_with_errors(*args, **kwargs):
            logits = own(*args, **kwargs)
            error = 0.02 * (2 * torch.rand(logits.shape, generator=errors) - 1)
            return logits + error if logits.dtype == torch.float32 else logits

        return logits_with_errors

    for name in ("_token_logits", "_edge_logits"):
        monkeypatch.setattr(CellGenerator, name, inexact(getattr(CellGenerator, name)))
    generator.float()
    for close, found in ((0.0, False), (0.1, True)):  # a decision that two errors change is closer than 4 x 0.02
        monkeypatch.setattr("models.fast.sampling.CLOSE", close)
        assert (generator.sample((2, 1), n=200, seed=5, batch_size=64) == exact) == found


def test_float32_is_closer_than_what_is_looked_at_again():
    generator = varied_generator(**ADDITIONS)
    z, labels = inputs(200, generator)
    _, noise = generator.draw_noise(200, torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = generator(z, labels, tuple(part.double() for part in noise))
        cells = generator.float()(z.float(), labels, noise)
    for a, b in zip(exact, cells, strict=True):
        same = (a.num_nodes == b.num_nodes) & ((a.adj > 0.5) == (b.adj > 0.5)).all(2).all(1)
        assert same.float().mean() > 0.9
        assert (margin(a) - margin(b))[same].abs().max() < CLOSE / 4


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0}], ids=["rounded", "drawn"])
def test_samples_are_drawn_at_the_temperature_asked_for(changes):
    """The noise of temperature 1, of which test_gan.py has the distribution, times the temperature."""
    generator = varied_generator(**changes)
    z, noise = generator.draw_noise(40, torch.Generator().manual_seed(3), temperature=1.0)
    expected = {t: grown(generator, (2, 1), z, [t * part for part in noise]) for t in (0.0, 0.5, 1.0, 2.0)}
    for temperature, genotypes in expected.items():
        assert generator.sample((2, 1), n=40, seed=3, temperature=temperature) == genotypes
        assert sum(genotypes == others for others in expected.values()) == 1
    assert generator.sample((2, 1), n=40, seed=3) == expected[changes.get("temperature", 0.0)]


def test_close_decisions_are_found():
    generator = varied_generator(temperature=1.0)
    z, labels = inputs(32, generator)
    _, noise = generator.draw_noise(32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        cells = generator(z, labels, noise)
    for batch in cells:
        for b, found in enumerate(margin(batch).tolist()):
            distances = [abs(p.logit().item()) for p in batch.adj[b].flatten() if p > 0]
            for row in batch.ops[b, : batch.num_nodes[b]]:
                first, second = row.sort(descending=True).values[:2]
                distances.append((first.log() - second.log()).item())
            assert found == pytest.approx(min(distances))
