"""generate_archs.py within this process: the class that is drawn, draws, limits, ranking and evaluation."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_objectives import objective

import generate_archs
from build_nas_dataset.objectives import objectives_of
from build_nas_dataset.random_cells import RandomCells, random_pool
from build_nas_dataset.records import Record, read_records
from generate_archs import Limits
from generation.listing import add_ranks
from generation.metrics import evaluate_cells
from genotypes import GENOTYPES, Genotype
from models.cost import genotype_cost, network_cost
from models.network import CifarNetwork, ImageNetConfig, ImageNetNetwork, count_macs, count_parameters
from models.predictor import PredictorConfig
from utils import derive_seed

SHIPPED = Path(__file__).parent.parent / "data" / "generator.pt"
OBJECTIVES = [objective("accuracy", 0.4, 0.6, minimum=0.1, maximum=0.9)]


def parse(*flags):
    return generate_archs.parse_args(list(map(str, flags)))


@pytest.mark.parametrize(
    ("quantile", "label"), [(0, 0), (0.3, 0), (0.34, 1), (0.5, 1), (0.6, 1), (0.7, 2), (0.9, 2), (1, 2)]
)
def test_a_quantile_asks_for_the_third_that_it_is_in(quantile, label):
    assert generate_archs.wanted_labels(parse("--target_quantile", quantile), OBJECTIVES) == [(label,)]


def test_random_cells_are_those_of_the_baseline_whatever_the_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(generate_archs, "read_nas_dataset", lambda *args: None)
    flags = ["--random", "--num_archs", 12, "--perf_label", 2, "--seed", 3, "--device", "cpu"]
    generate_archs.main(parse("--checkpoint", SHIPPED, *flags, "--output_dir", tmp_path))
    entries = json.loads((tmp_path / "genotypes.json").read_text())
    expected = RandomCells().sample((2,), 12, derive_seed(3, 2))
    assert {Genotype.from_dict(entry).canonical() for entry in entries} == {g.canonical() for g in expected}
    assert all(entry["random"] and entry["labels"] == [2] for entry in entries)


# ------------------------------------------------------------------------------------------------ draws and limits


def test_limits_are_on_the_network_of_the_flags():
    genotype, of_network = GENOTYPES["NAG_ENSEMBLE_A"], ["--layers", 2, "--channels", 8, "--num_classes", 100]
    with torch.device("meta"):
        network = CifarNetwork(genotype, 100, 2, 8)
    counts = {"params": count_parameters(network), "macs": count_macs(network, 32)}
    for name, n in counts.items():
        for flags, kept in (
            ([f"--max_{name}", n], True),
            ([f"--max_{name}", n - 1], False),
            ([f"--min_{name}", n], True),
            ([f"--min_{name}", n + 1], False),
        ):
            assert Limits(parse(*of_network, *flags), 10).keep(genotype) == kept, flags
    (entry,) = generate_archs.merge([genotype], (0,), None, Limits(parse(*of_network), 10))
    assert {name: entry[name] for name in counts} == counts


def test_classes_of_the_nas_dataset_are_left_out_only_where_limits_are_on_its_network():
    objectives, flags = [objective("params", 500_000)], ["--max_params", 300_000]
    assert [Limits(parse(*flags), 10).allow((c,), objectives) for c in (0, 1)] == [True, False]
    for other in (["--channels", 30], ["--layers", 5], ["--num_classes", 11]):
        assert all(Limits(parse(*flags, *other), 10).allow((c,), objectives) for c in (0, 1))


def test_limits_are_on_the_imagenet_network_where_it_is_asked_for():
    genotype, flags = GENOTYPES["NAG_HIGH_ACC"], ["--limits_for", "imagenet"]
    args = parse(*flags)
    assert (args.num_classes, args.layers, args.channels) == (1000, 4, 42)
    assert parse(*flags, "--channels", 20).layers == 4 and parse("--layers", 3).num_classes == 10
    with torch.device("meta"):
        network = ImageNetNetwork(genotype, auxiliary=False)
    macs = count_macs(network, 224)
    assert [Limits(parse(*flags, "--max_macs", n), 10).keep(genotype) for n in (macs, macs - 1)] == [True, False]
    (entry,) = generate_archs.merge([genotype], (0,), None, Limits(args, 10))
    assert (entry["params"], entry["macs"]) == (count_parameters(network), macs)
    assert Limits(parse(*flags, "--max_params", "3.5M"), 10).allow((1,), [objective("params", 4 * 10**6)])


def test_real_cells_are_offered_and_the_best_of_the_highest_class_is_named(tmp_path, capsys):
    flags = ["--num_archs", 6, "--include_real", "--limits_for", "imagenet", "--max_macs", "600M", "--device", "cpu"]
    generate_archs.main(parse("--checkpoint", SHIPPED, *flags, "--output_dir", tmp_path))
    lines = (tmp_path / "genotypes.json").read_text().splitlines()
    entries = json.loads("\n".join(lines))
    assert [json.loads(line.rstrip(",")) for line in lines[1:-1]] == entries  # one a line
    records = {record.id: record for record in read_records(SHIPPED.with_name("nasdata.jsonl"))}
    (accuracy,) = objectives_of(list(records.values()), {"accuracy": 3})
    assert len(entries) == 36 and [entry["index"] for entry in entries] == list(range(36))
    for entry in entries:
        genotype = Genotype.from_dict(entry)
        assert (entry["params"], entry["macs"]) == network_cost(genotype, ImageNetConfig()) and entry["macs"] <= 6e8
        if entry["real"]:
            record = records[entry["id"]]
            assert record.genotype == genotype and record.accuracy == entry["nas_dataset_accuracy"]
            assert entry["labels"] == [accuracy.class_of(record.accuracy)] and not entry["novel"]
    for label in range(3):
        own = [entry for entry in entries if entry["labels"] == [label]]
        assert sum(entry["real"] for entry in own) == 6
        assert [e["rank"] for e in own] == sorted(e["rank"] for e in own)
    by_rank = sorted(entries, key=lambda entry: entry["rank"])
    expected = [entry["predicted_unclipped"]["accuracy"] for entry in by_rank]
    assert expected == sorted(expected, reverse=True) and by_rank[0]["rank"] == 1
    best = json.loads((tmp_path / "best.json").read_text())
    assert best == next(entry for entry in entries if entry["labels"] == [2])
    out = capsys.readouterr().out
    assert f"train_imagenet.py --arch {tmp_path / 'best.json'}\n" in out and "36 candidates" in out
    assert out.count("6 real ones beside them") == 3 and "  real   no  accuracy" in out


def test_equal_cells_share_a_rank_and_without_accuracy_there_is_none():
    entries = [{"predicted_unclipped": {"accuracy": q}} for q in (0.3, 1.2, 1.1, 0.3)]
    add_ranks(entries)
    assert [entry["rank"] for entry in entries] == [3, 1, 2, 3]
    entries = [{"predicted_unclipped": {"accuracy": q}, "supernet_accuracy": -q} for q in (0.3, 1.2)]
    add_ranks(entries)
    assert [entry["rank"] for entry in entries] == [1, 2]
    entries = [{"predicted_unclipped": {"params": 0.5}}]
    add_ranks(entries)
    assert "rank" not in entries[0]


class Source:
    """Draws one more of `cells` each time, and invalid ones else; keeps what it is asked for."""

    def __init__(self, cells):
        self.cells, self.asked = iter(cells), []

    def sample(self, labels, n, seed, temperature=None):
        self.asked.append((labels, n, seed, temperature))
        return [next(self.cells), *[None] * (n - 1)]


def test_cells_are_drawn_as_asked_until_enough_are_within_the_limits():
    """Of 4 different ones, one twice, one is too large: the fifth batch brings the third that is kept."""
    pool = sorted(random_pool(40, seed=2), key=lambda genotype: genotype_cost(genotype)[0])
    small, large = pool[:3], pool[-1]
    args = parse("--num_archs", 3, "--temperature", 0.5, "--max_params", genotype_cost(small[-1])[0])
    source = Source([small[0], large, small[0].canonical(), small[1], small[2], pool[5]])
    drawn = generate_archs.draw(source, (1,), args, Limits(args, 10))
    labels, sizes, seeds, temperatures = zip(*source.asked, strict=True)
    assert labels == ((1,),) * 5 and temperatures == (0.5,) * 5
    assert len(set(seeds)) == 5 and seeds[0] == derive_seed(args.seed, 1)
    assert len(drawn) == sum(sizes) and sizes[0] == 3
    entries = generate_archs.merge(drawn, (1,), {small[1].canonical()}, Limits(args, 10))
    assert [Genotype.from_dict(entry) for entry in entries] == small
    assert [entry["count"] for entry in entries] == [2, 1, 1]
    assert [entry["novel"] for entry in entries] == [True, False, True]
    assert [(entry["params"], entry["macs"]) for entry in entries] == [genotype_cost(genotype) for genotype in small]


def test_draws_end_at_their_maximum():
    args = parse("--num_archs", 3, "--max_draws", 300, "--max_params", "1M")
    source = Source([None] * 9)
    assert generate_archs.draw(source, (1,), args, Limits(args, 10)) == [None] * 300
    assert [n for _, n, *_ in source.asked] == [3, 256, 41]


# ------------------------------------------------------------------------------------------ ranking and evaluation


def predictor_of(quantiles: dict):
    """Expects these quantiles, of every objective."""
    found = lambda genotypes: np.array([[quantiles[g], quantiles[g]] for g in genotypes])  # noqa: E731
    return SimpleNamespace(quantiles=found, config=PredictorConfig(2))


def test_the_supernet_ranks_before_the_predictor_and_the_best_cell_is_first():
    pool = random_pool(4, seed=1)
    found = dict(zip(pool, [0.2, 0.9, 0.1, 0.5], strict=True))
    entries = [genotype.to_dict() for genotype in pool]
    predictor = predictor_of({genotype: 1 - accuracy for genotype, accuracy in found.items()})
    generate_archs.rank(entries, predictor, OBJECTIVES * 2, lambda genotypes: np.array([found[g] for g in genotypes]))
    assert [entry["supernet_accuracy"] for entry in entries] == [0.9, 0.5, 0.2, 0.1]
    assert [Genotype.from_dict(entry) for entry in entries] == [pool[i] for i in (1, 3, 0, 2)]
    assert [entry["predicted_quantiles"]["accuracy"] for entry in entries] == pytest.approx([0.1, 0.5, 0.8, 0.9])


def test_evaluation_of_cells_that_are_the_real_ones_but_for_three():
    """Of two classes of accuracy and of #params, cells are real that are low in both or high in both.

    The predictor takes one of the high ones for low. Asked for low accuracy and many #params, the source draws a cell
    of few and an invalid one; there are no real ones to compare these with.
    """
    pool = sorted(random_pool(12, seed=3), key=lambda genotype: genotype_cost(genotype)[0])
    low, high = pool[:4], pool[-4:]
    costs = {genotype: genotype_cost(genotype) for genotype in pool}
    records = [Record(i, genotype, 0.2, *costs[genotype]) for i, genotype in enumerate(low)]
    records += [Record(i, genotype, 0.8, *costs[genotype]) for i, genotype in enumerate(high, 4)]
    objectives = [
        objective("accuracy", 0.5, minimum=0.2, maximum=0.8),
        objective("params", costs[pool[6]][0], minimum=costs[low[0]][0], maximum=10**7),
    ]
    predictor = predictor_of(dict.fromkeys(low, 0.1) | dict.fromkeys(high, 0.9) | {high[0]: 0.2})
    drawn = {(0, 0): low, (1, 1): high, (0, 1): [low[0], None]}
    result = evaluate_cells(drawn, objectives, records, predictor, None)
    assert result["accuracy"]["controllability"] == pytest.approx(8 / 10)
    assert result["accuracy"]["asked_by_obtained"] == [[5, 0], [1, 3]]
    assert result["params"]["controllability"] == pytest.approx(8 / 10)
    assert result["params"]["asked_by_obtained"] == [[4, 0], [1, 4]]
    assert result["all"]["controllability"] == pytest.approx(7 / 10)
    assert result["distance"] == pytest.approx({"vertices": 0, "ops": 0, "density": 0})
    assert (result["drawn"], result["validity"], result["novelty"], result["new"]) == (10, 0.9, 0, 0)
    swapped = evaluate_cells({(0, 0): high, (1, 1): low}, objectives, records, predictor, None)
    assert all(value > 0.05 for value in swapped["distance"].values())
    assert swapped["all"]["controllability"] == 0
