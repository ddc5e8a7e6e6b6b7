"""The predictor: blind to the order of vertices and to padding, able to count, and back from a checkpoint."""

from dataclasses import asdict
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from build_nas_dataset.random_cells import random_genotype, random_pool
from build_nas_dataset.records import Record
from generation.training import TrainingData
from genotypes import NAG_SPACE, NASBENCH201, Genotype, from_nasbench201
from models.cost import genotype_cost
from models.graph import CellBatch
from models.predictor import Predictor, split_records, train_predictor
from plumbing.checkpoint_files import save_checkpoint

POOL = random_pool(40, seed=3)


def encode(genotypes, size=10, dtype=None):
    return tuple(CellBatch.encode([g[name] for g in genotypes], size, dtype) for name in ("normal", "reduction"))


@pytest.fixture
def predictor():
    torch.manual_seed(0)
    return Predictor(2, vertex_size=16).requires_grad_(False)


def test_quantiles_are_those_of_a_loop_over_vertices_and_edges(predictor):
    """Of each vertex with its own state, the sum over the vertices before it, and that over the ones after it."""
    predictor.double()
    for genotype, quantiles in zip(POOL[:8], predictor(encode(POOL[:8], dtype=torch.float64)), strict=True):
        features = []
        for cell, encoder in zip(genotype.cells, predictor.encoders.values(), strict=True):
            states = [encoder.tokens.weight[:, NAG_SPACE.token_id[op]] for op in cell.ops]
            for layer in encoder.layers:
                before, after = ([torch.zeros_like(state) for state in states] for _ in range(2))
                for src, row in enumerate(cell.matrix):
                    for dst, edge in enumerate(row):
                        if edge:
                            before[dst] = before[dst] + states[src]
                            after[src] = after[src] + states[dst]
                messages = map(torch.cat, zip(states, before, after, strict=True))
                states = [s + F.leaky_relu(layer(m), 0.2) for s, m in zip(states, messages, strict=True)]
            features += [sum(states) / 10, states[-1]]
        torch.testing.assert_close(quantiles, predictor.head(torch.cat(features)), rtol=0, atol=1e-12)


def test_isomorphic_genotypes_get_the_same_quantiles(predictor):
    canonical = [genotype.canonical() for genotype in POOL]
    assert canonical != POOL  # some vertices have moved
    np.testing.assert_allclose(predictor.quantiles(POOL), predictor.quantiles(canonical), atol=1e-6)
    assert np.ptp(predictor.quantiles(POOL), axis=0).min() > 1e-3


def test_strings_that_compute_the_same_get_the_same_quantile():
    """nor_conv_3x3 of the input: on the edge 0>1 with skip_connect on 1>3, or on the edge 0>3."""
    torch.manual_seed(0)
    strings = (
        "nor_conv_3x3~0|+|none~0|none~1|+|none~0|skip_connect~1|none~2",
        "none~0|+|none~0|none~1|+|nor_conv_3x3~0|none~1|none~2",
    )
    genotypes = [from_nasbench201(f"|{text}|") for text in strings]
    written = Predictor(1, space=NASBENCH201)
    computed = Predictor(1, space=NASBENCH201, reads_function=True)
    computed.load_state_dict(written.state_dict())
    assert np.ptp(written.quantiles(genotypes)) > 1e-4
    first, second = computed.quantiles(genotypes)
    assert first == pytest.approx(second, abs=1e-6)


def test_padding_does_not_count(predictor):
    small = [g for g in POOL if max(cell.num_vertices for cell in g.cells) <= 8]
    assert len(small) > 3
    torch.testing.assert_close(predictor(encode(small, 8)), predictor(encode(small, 10)))


def test_it_learns_to_count_parameters():
    """1,000 genotypes, trained on 900 of them: the order by the number of separable convolutions."""
    pool = random_pool(1000, seed=4)
    convs = torch.tensor([[sum(op.startswith("seqconv") for cell in g.cells for op in cell.ops) / 14] for g in pool])
    cells = encode(pool)
    torch.manual_seed(0)
    predictor = Predictor(1, vertex_size=16)
    optimizer = torch.optim.Adam(predictor.parameters(), 3e-3)
    for _ in range(30):
        for index in torch.randperm(900).split(90):
            optimizer.zero_grad()
            (predictor(tuple(batch[index] for batch in cells)) - convs[index]).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        error = predictor(tuple(batch[900:] for batch in cells)) - convs[900:]
    assert error.std() < 0.25 * convs[900:].std()


def test_a_checkpoint_gives_back_the_predictor(predictor, tmp_path):
    state = {"predictor": predictor.state_dict(), "predictor_config": asdict(predictor.config)}
    save_checkpoint(tmp_path / "checkpoint.pt", "gan", state)
    loaded = Predictor.from_checkpoint(tmp_path / "checkpoint.pt")
    assert np.array_equal(loaded.quantiles(POOL), predictor.quantiles(POOL))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_predictor_of_an_older_version_is_refused_by_name(predictor, tmp_path):
    weights = predictor.state_dict()
    del weights["error"]
    state = {"predictor": weights, "predictor_config": asdict(predictor.config)}
    save_checkpoint(tmp_path / "old.pt", "gan", state)
    with pytest.raises(ValueError, match=r"old\.pt is of another version"):
        Predictor.from_checkpoint(tmp_path / "old.pt")


def test_the_predictor_is_measured_on_records_it_was_not_trained_on(monkeypatch):
    pool, trained_on = random_pool(50, seed=6), set()
    rng = np.random.default_rng(0)
    records = [Record(i, g, rng.random(), *genotype_cost(g)) for i, g in enumerate(pool)]
    data = TrainingData(records, {"accuracy": 2, "params": 2}, 10, torch.device("cpu"))

    class Spy(Predictor):
        def forward(self, cells):
            if any(parameter.requires_grad for parameter in self.parameters()):
                trained_on.update(Genotype(*specs) for specs in zip(*(batch.decode() for batch in cells), strict=True))
            return super().forward(cells)

    monkeypatch.setattr("models.predictor.Predictor", Spy)
    canonical = [genotype.canonical() for genotype in pool]
    predictor, taus = train_predictor(data.cells, data.quantiles, canonical, 16, seed=3)
    held_out = [i for i, genotype in enumerate(pool) if genotype not in trained_on]
    assert len(held_out) == 5
    predicted, truth = predictor.quantiles([pool[i] for i in held_out]), data.quantiles[held_out].numpy()
    np.testing.assert_allclose(predictor.error, ((predicted - truth) ** 2).mean(0) ** 0.5, rtol=1e-5)
    for k in range(2):
        signs = [
            np.sign((predicted[i] - predicted[j]) * (truth[i] - truth[j]))[k] for i, j in combinations(range(5), 2)
        ]
        assert taus[k] == pytest.approx(np.mean(signs))


def test_records_of_a_genotype_held_out_are_not_trained_on():
    rng = np.random.default_rng(1)
    drawn = [random_genotype(rng, NASBENCH201).canonical() for _ in range(330)]
    canonical = [genotype for genotype in drawn if genotype is not None][:300]
    different = len(set(canonical))
    assert different < 250
    held_out, train = split_records(canonical, seed=3)
    measured = {canonical[i] for i in held_out}
    assert len(held_out) == len(measured) == different // 10
    assert sorted(train) == [i for i in range(300) if canonical[i] not in measured]
    assert all(canonical.index(canonical[i]) == i for i in held_out)


def test_different_genotypes_are_held_out_at_random():
    held_out, train = split_records([genotype.canonical() for genotype in POOL], seed=3)
    assert held_out + train == torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()
    assert len(held_out) == 4


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (1, 1, 1, 96), (2, 40, 40, 2)])
def test_two_genotypes_at_least_measure_the_predictor_and_two_train_it(counts):
    canonical = [POOL[k].canonical() for k, n in enumerate(counts) for _ in range(n)]
    for seed in range(20):
        for part in split_records(canonical, seed):
            assert len({canonical[i] for i in part}) >= 2
    with pytest.raises(ValueError, match="3 different genotypes in the NAS dataset, at least 4"):
        split_records([genotype for genotype in canonical if genotype != canonical[-1]], 0)
