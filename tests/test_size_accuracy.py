"""Accuracy at its size from gan.py to the report, with a column of the NAS dataset that is not its first accuracy."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import gan
import generate_archs
import report
from build_nas_dataset.objectives import Objective, labels_of, objectives_of
from build_nas_dataset.records import read_header, read_records, write_records
from generation.metrics import evaluate_cells
from generation.report.parts import Page
from genotypes import read_genotypes
from models.cost import genotype_cost
from models.predictor import Predictor
from plumbing.checkpoint_files import load_checkpoint
from plumbing.files import write_json
from tests.small_training import ROOT, refused

CLASSES = 4
SMALL = """
    --objectives size_accuracy --accuracy_column brief_accuracy --batch_size 48 --n_epochs 2 --pool_size 1000
    --g_emb_size 8 --latent_dim 8 --policy_gradient_cells 16 --eval_size 8 --device cpu
""".split()


@pytest.fixture(scope="module")
def nasdata(tmp_path_factory):
    """240 records of the shipped NAS dataset with another accuracy, which falls where the first one rises."""
    path = tmp_path_factory.mktemp("nas") / "nasdata.jsonl"
    records = read_records(ROOT / "data" / "nasdata.jsonl")[:240]
    records = [replace(r, columns={"brief_accuracy": round(0.9 - r.accuracy, 6)}) for r in records]
    write_records(path, records, {})
    return path


@pytest.fixture(scope="module")
def run_folder(nasdata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "gan"
    flags = [*SMALL, "--n_perf_classes", CLASSES, "--nasbench_data", nasdata, "--output_dir", folder]
    gan.main(gan.parse_args(list(map(str, flags))))
    return folder


def generate(*flags):
    generate_archs.main(generate_archs.parse_args(list(map(str, [*flags, "--device", "cpu"]))))


def test_a_generator_is_trained_on_the_classes_of_the_column_that_is_asked_for(run_folder, nasdata):
    state = load_checkpoint(run_folder / "generator.pt", "gan")
    assert state["args"]["accuracy_column"] == "brief_accuracy"
    expected = objectives_of(read_records(nasdata, accuracy_column="brief_accuracy"), {"size_accuracy": CLASSES})
    assert [Objective.from_dict(objective) for objective in state["objectives"]] == expected
    assert expected != objectives_of(read_records(nasdata), {"size_accuracy": CLASSES})
    logged = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= logged[-1]["controllability_size_accuracy"] <= 1 and "reward" in logged[-1]
    gan.main(gan.parse_args(["--resume", str(run_folder)]))


def test_the_highest_class_within_limits_is_written_best_first(run_folder, tmp_path, capsys):
    limits = ["--min_params", "1M", "--max_params", "3.5M"]
    generate("--checkpoint", run_folder, "--target_quantile", 1, *limits, "--num_archs", 5, "--output_dir", tmp_path)
    entries = [entry for _, entry in read_genotypes(tmp_path / "genotypes.json")]
    assert len(entries) == 5 and all(entry["labels"] == [CLASSES - 1] for entry in entries)
    assert all(1e6 <= genotype_cost(g).params <= 3.5e6 for g, _ in read_genotypes(tmp_path / "genotypes.json"))
    expected = [entry["predicted_unclipped"]["size_accuracy"] for entry in entries]
    assert expected == sorted(expected, reverse=True) and entries[0]["rank"] == 1
    assert json.loads((tmp_path / "best.json").read_text()) == entries[0]
    out = capsys.readouterr().out
    assert f"class {CLASSES - 1} (size_accuracy 0.8" in out and "by the accuracy at its size that the predictor" in out


def test_asked_and_obtained_are_compared_and_reported(run_folder, nasdata, tmp_path, capsys):
    generate("--checkpoint", run_folder, "--num_archs", 6, "--evaluate", "--include_real", "--output_dir", tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    for title in ("generated cells", "random cells"):
        entry = evaluation[title]["size_accuracy"]
        assert entry["by"] == "predictor" and np.sum(entry["asked_by_obtained"]) <= 6 * CLASSES
    assert "size_accuracy (predictor): controllability" in capsys.readouterr().out
    records = {record.id: record for record in read_records(nasdata, accuracy_column="brief_accuracy")}
    (at_size,) = objectives_of(list(records.values()), {"size_accuracy": CLASSES})
    labels = dict(zip(records, labels_of(list(records.values()), [at_size])[:, 0].tolist(), strict=True))
    values = dict(zip(records, at_size.values(list(records.values())).tolist(), strict=True))
    for label in range(CLASSES):
        entries = [entry for _, entry in read_genotypes(tmp_path / "genotypes.json") if entry["labels"] == [label]]
        real = [entry["id"] for entry in entries if entry["real"]]
        assert len(real) == 6 and {labels[i] for i in real} == {label}
        assert min(values[i] for i in real) >= sorted(v for i, v in values.items() if labels[i] == label)[-6]
        assert all(e["nas_dataset_accuracy"] == records[e["id"]].accuracy for e in entries if e["real"])
    page = tmp_path / "page.html"
    report.main(report.parse_args([str(run_folder), str(tmp_path), "--out", str(page)]))
    text = page.read_text()
    for expected in ("controllability of size_accuracy", "Calibration of the predictor, size_accuracy",
                     "place in the ranking by accuracy at its size"):  # fmt: skip
        assert expected in text, expected
    assert "could not be read whole" not in text and "cannot be drawn" not in text
    assert Page().dataset(nasdata, "brief_accuracy").column("accuracy")[0] == records[0].accuracy


def test_a_supernet_says_how_far_cells_of_a_class_stand_above_others_of_their_size(run_folder, nasdata):
    records = read_records(nasdata, accuracy_column="brief_accuracy")
    objectives = objectives_of(records, {"size_accuracy": CLASSES})

    class Scorer(SimpleNamespace):
        def __call__(self, genotypes):
            return np.linspace(0.4, 0.5, len(genotypes))

    cells = {(0,): [records[0].genotype, None], (3,): [records[1].genotype, records[2].genotype]}
    scorer = Scorer(ceiling=0.9, percentile80=0.5, classes=lambda genotypes: np.array([0, 3, 1]))
    scorer.values = lambda genotypes: np.array([0.1, 0.9, 0.3])
    predictor = Predictor.from_checkpoint(run_folder, "cpu")
    entry = evaluate_cells(cells, objectives, records, predictor, scorer)["size_accuracy"]
    assert (entry["by"], entry["ceiling"], entry["controllability"]) == ("supernet", 0.9, 0.5)
    assert entry["mean"] == pytest.approx([0.4, 0.475]) and entry["mean_place"] == pytest.approx([0.1, 0.6])


def test_what_does_not_go_with_it_is_refused(run_folder, nasdata, tmp_path, capsys):
    def refused_by_gan(*flags):
        return refused(capsys, gan, [*flags, "--output_dir", tmp_path / "none"])

    assert "expected one of accuracy and size_accuracy, got both" in refused_by_gan(
        "--objectives", "accuracy,size_accuracy"
    )
    line = refused_by_gan("--nasbench_data", nasdata, "--accuracy_column", "mixed_accuracy")
    assert f"--nasbench_data: {nasdata}, line 2: record 0 has no mixed_accuracy" in line
    cells = tmp_path / "truth.json"
    write_json(cells, [read_records(nasdata)[7].genotype.to_dict()])
    line = refused_by_gan("--nasbench_data", nasdata, "--held_out_cells", cells)
    assert f"--held_out_cells: record 7 of {nasdata} is cell 0 of {cells}" in line
    assert "no such file" in refused_by_gan("--nasbench_data", nasdata, "--held_out_cells", tmp_path / "x.json").lower()
    few = tmp_path / "few.jsonl"
    write_records(few, read_records(nasdata)[:90], read_header(nasdata))
    line = refused_by_gan("--nasbench_data", few, "--objectives", "size_accuracy")
    assert "size_accuracy needs more than 200 records to compare with, got 90" in line
    assert not (tmp_path / "none").exists()
    flags = ["--checkpoint", run_folder, "--output_dir", tmp_path / "none"]
    line = refused(capsys, generate_archs, [*flags, "--target_acc", 0.4])
    assert "--target_acc: the GAN was trained on size_accuracy only" in line
    line = refused(capsys, generate_archs, [*flags, "--perf_label", CLASSES])
    assert "expected 0 (lowest size_accuracy) to 3" in line
    other = tmp_path / "other.jsonl"
    write_records(other, [replace(r, columns={}) for r in read_records(nasdata)], read_header(nasdata))
    line = refused(capsys, generate_archs, [*flags, "--evaluate", "--nasbench_data", other])
    assert f"{other}, line 2: record 0 has no brief_accuracy" in line
    assert torch.is_tensor(load_checkpoint(run_folder, "gan")["predictor"]["error"])
