"""The discriminator: against the reference's scores and a slow obvious form, and what must hold for any cells."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from genotypes import GENOTYPES, NAG_SPACE, CellSpec, SearchSpace
from models.discriminator import CellEncoder, Discriminator, DiscriminatorConfig
from models.fast.cpu import Dropout
from models.graph import CellBatch

GOLDEN = Path(__file__).parent / "data" / "gan_outputs.npz"

# Parameter names: ours -> the reference's.
REFERENCE_NAMES = {
    "encoders.normal": "conv_discriminator",
    "encoders.reduction": "reduc_discriminator",
    "tokens.": "NodeEmb.embedding.",
    "convs.": "NodeEmb.gcns.",
    "graph_state.value": "GraphEmb.f_m",
    "graph_state.gate": "GraphEmb.g_m",
    "score.1.": "GetAcc.lin_layers.0.",
    "score.4.": "GetAcc.lin_layers.1.",
    "score.7.": "GetAcc.lin_layers.2.",
    "score.9.": "GetAcc.lin_layers.3.",
    "labels.tables.1": "param_label_embedding",
}


def golden(kind):
    """The reference's arrays of one kind ("single" or "multi") as tensors, and a discriminator with its weights."""
    with np.load(GOLDEN) as file:
        data = {key.removeprefix(f"{kind}/"): torch.from_numpy(file[key]) for key in file if key.startswith(kind)}
    classes = (3,) * data["labels"].shape[1]
    discriminator = Discriminator(12, 16, num_classes=classes, label_sizes=(4,) * len(classes)).double().eval()
    names = REFERENCE_NAMES | {"labels.tables.0": f"{'perf_' if kind == 'multi' else ''}label_embedding"}
    state = {}
    for name in discriminator.state_dict():
        reference = name
        for ours, theirs in names.items():
            reference = reference.replace(ours, theirs)
        weight = data[f"discriminator/{reference}"]
        state[name] = weight.T if ".convs." in name else weight  # theirs is (in, out)
    discriminator.load_state_dict(state)
    assert len(state) == sum(key.startswith("discriminator/") for key in data)
    cells = tuple(
        CellBatch(data[f"{name}_edges"].mT, data[f"{name}_ops"], data[f"{name}_num_nodes"].squeeze(1))
        for name in NAG_SPACE.cells
    )
    return data, discriminator, cells


def published_cells(max_vertices=None):
    """The published genotypes as one CellBatch a cell, float64: cells of 4 to 9 vertices."""
    genotypes = list(GENOTYPES.values())
    return tuple(
        CellBatch.encode([genotype[name] for genotype in genotypes], max_vertices, torch.float64)
        for name in NAG_SPACE.cells
    )


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_scores_are_those_of_the_reference(kind):
    data, discriminator, cells = golden(kind)
    with torch.no_grad():
        scores = discriminator(cells, data["labels"])
    torch.testing.assert_close(scores, data["scores"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("aggregation", ["gsum", "mean"])
def test_encoding_is_that_of_a_loop_over_unpadded_cells(aggregation):
    torch.manual_seed(0)
    encoder = CellEncoder(8, DiscriminatorConfig(12, 6, aggregation=aggregation)).double().eval()
    for batch in published_cells():
        for state, adj, ops, v in zip(encoder(batch), batch.adj, batch.ops, batch.num_nodes.tolist(), strict=True):
            neighbours = [{i} | {j for j in range(v) if adj[i, j] or adj[j, i]} for i in range(v)]
            states = [encoder.tokens(ops[i]) for i in range(v)]
            for layer, conv in enumerate(encoder.convs):
                terms = [
                    [conv(states[j]) / (len(neighbours[i]) * len(neighbours[j])) ** 0.5 for j in neighbours[i]]
                    for i in range(v)
                ]
                states = [sum(t) if layer == 2 else F.leaky_relu(sum(t), 0.2) for t in terms]
            states = torch.stack([s / s.norm() for s in states])
            value = encoder.graph_state.value(states)
            if aggregation == "gsum":
                value = value * torch.sigmoid(encoder.graph_state.gate(states))
            torch.testing.assert_close(state, value.mean(0) / value.mean(0).norm(), rtol=0, atol=1e-12)


def test_a_score_depends_on_neither_padding_nor_the_rest_of_the_batch():
    torch.manual_seed(0)
    discriminator = Discriminator(12, 6).double().eval()
    labels = torch.tensor([[0], [1], [2], [0], [1]])
    scores = discriminator(published_cells(), labels)
    assert scores.shape == (5, 1)
    torch.testing.assert_close(discriminator(published_cells(max_vertices=9), labels), scores, rtol=0, atol=1e-12)
    for i in range(5):
        alone = tuple(batch[i : i + 1] for batch in published_cells())
        torch.testing.assert_close(discriminator(alone, labels[i : i + 1]), scores[i : i + 1], rtol=0, atol=1e-12)


def test_a_score_depends_on_every_cell_and_label():
    torch.manual_seed(0)
    discriminator = Discriminator(12, 6, num_classes=(3, 2), label_sizes=(4, 3)).double().eval()
    (normal, reduction), labels = published_cells(), torch.zeros(5, 2, dtype=torch.long)
    scores = discriminator((normal, reduction), labels)
    assert not torch.allclose(discriminator((normal[[1, 0, 2, 3, 4]], reduction), labels)[:2], scores[:2])
    assert not torch.allclose(discriminator((normal, reduction[[2, 1, 0, 3, 4]]), labels)[0], scores[0])
    for objective in range(2):
        others = labels.clone()
        others[:, objective] = 1
        assert not torch.isclose(discriminator((normal, reduction), others), scores).any()


def test_dropout_is_before_every_graph_convolution_and_every_linear_layer_but_the_last():
    torch.manual_seed(0)
    discriminator = Discriminator(12, 6, gcn_dropout=0.3, mlp_dropout=0.6).double().train()
    seen = []

    def record(module, inputs, output):
        dropped = (output == 0) & (inputs[0] != 0)
        torch.testing.assert_close(output, (inputs[0] / (1 - module.p)).where(~dropped, 0))
        seen.append((module.p, inputs[0].shape[-1]))
        assert dropped.any()

    for module in discriminator.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(record)
    labels = torch.zeros(5, 1, dtype=torch.long)
    scores = [discriminator(published_cells(), labels) for _ in range(2)]
    assert seen == 2 * ([(0.3, 12)] * 3 * 2 + [(0.6, 22), (0.6, 11), (0.6, 5)])  # 22: two graph states and a label
    assert not torch.isclose(*scores).any()


def test_gradient_reaches_every_parameter():
    torch.manual_seed(0)
    discriminator = Discriminator(40, 16, num_classes=(3, 2), label_sizes=(4, 3)).double().train()
    discriminator(published_cells(), torch.zeros(5, 2, dtype=torch.long)).sum().backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_it_works_in_a_space_of_one_cell_and_one_input():
    space = SearchSpace("toy", cells=("cell",), inputs=("input",), ops=("conv",), max_vertices=5)
    cells = [CellSpec([[0, 1, 0], [0, 0, 1], [0, 0, 0]], ["input", "conv", "output"], space)] * 2
    discriminator = Discriminator(12, 6, mlp_layers=2, num_classes=(2,), label_sizes=(4,), space=space)
    assert discriminator((CellBatch.encode(cells),), torch.tensor([[0], [1]])).shape == (2, 1)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="aggregation must be gsum or mean, got 'max'"):
        Discriminator(aggregation="max")
    with pytest.raises(ValueError, match="equally long"):
        Discriminator(num_classes=(3, 3))
