"""--labels brief and mixed of build_nas_dataset: who is trained, what the records say, and going on after a stop."""

import json
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import report
from build_nas_dataset import build_nas_dataset, eval_archs
from build_nas_dataset.brief_labels import predict_rest, train_briefly
from build_nas_dataset.candidates import key_of, read_parts
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, read_header, read_records, write_records
from models.cost import genotype_cost
from models.predictor import known_mse
from plumbing.checkpoint_files import save_checkpoint
from plumbing.files import write_json
from plumbing.signals import signals
from tests.small_training import TORCHRUN, make_images, refused, start

BRIEF = "--layers 1 --channels 4 --batch_size 8 --amp off --epochs 1 --schedule_epochs 2 --auxiliary_weight 0"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


@pytest.fixture(scope="module")
def nasdata(tmp_path_factory):
    """Records as a supernet would leave them, with small cells, which are trained quickly."""
    path = tmp_path_factory.mktemp("nas") / "nasdata.jsonl"
    pool = random_pool(24, seed=1, max_vertices=5)
    records = [Record(i, g, 0.3 + i / 100, *genotype_cost(g)) for i, g in enumerate(pool)]
    header = {"classes": ["dark", "light"], "settings": {"epochs": 45}, "summary": {"accuracy_mean": 0.4}}
    write_records(path, records, {**header, "stand_alone": {"layers": 6}})
    return path


@pytest.fixture
def in_process(monkeypatch):
    """eval_archs.py within this process, which is quicker."""

    class Training:
        def __init__(self, command):
            assert command[1].endswith("eval_archs.py")
            eval_archs.main(eval_archs.parse_args(command[2:]))
            self.returncode = 0

        def poll(self):
            return self.returncode

    monkeypatch.setattr("build_nas_dataset.brief_labels.subprocess", SimpleNamespace(Popen=Training))


def flags_of(images, nasdata, output_dir, *more) -> list[str]:
    flags = ["--dataset", "folder", "--data", images, "--holdout", 16, "--device", "cpu", "--from", nasdata]
    flags += ["--brief_flags", BRIEF, "--output_dir", output_dir, *more]
    return list(map(str, flags))


def run(*flags) -> None:
    build_nas_dataset.main(build_nas_dataset.parse_args(list(flags)))


@pytest.mark.usefixtures("in_process")
def test_flags_that_eval_archs_does_not_take_are_refused_and_nothing_is_left(images, nasdata, tmp_path, capsys):
    flags = flags_of(images, nasdata, tmp_path / "run", "--labels", "brief", "--brief_cells", 2)
    flags[flags.index(BRIEF)] = "--layers many"
    with pytest.raises(SystemExit) as error:
        run(*flags)
    assert error.value.code == 2 and "argument --layers: expected a whole number" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("in_process")
def test_mixed_labels_say_where_they_are_from_and_more_cells_can_be_trained(
    images, nasdata, tmp_path, capsys, in_process
):
    old, folder = read_records(nasdata), tmp_path / "run"
    run(*flags_of(images, nasdata, folder, "--labels", "mixed", "--brief_cells", 6))
    path = folder / "nasdata.jsonl"
    first, header = read_records(path), read_header(path)
    assert [r.genotype for r in first] == [r.genotype for r in old]
    assert [r.columns["supernet_accuracy"] for r in first] == [r.accuracy for r in old]
    trained = [r for r in first if r.columns["source"] == "brief"]
    rest = [r for r in first if r.columns["source"] == "predictor"]
    assert (len(trained), len(rest)) == (6, 18)
    results = read_parts(folder / "brief" / "shard-0-of-1")
    measured = {r.id: results[key_of(r.genotype)]["held_out_accuracy"] for r in trained}
    assert {r.id: r.accuracy for r in trained} == pytest.approx(measured, abs=1e-6)
    assert all(r.columns["brief_accuracy"] == measured[r.id] for r in trained)
    assert not any("brief_accuracy" in r.columns for r in rest)
    assert min(measured.values()) <= min(r.accuracy for r in rest) <= max(measured.values())
    columns = header["columns"]
    brief = columns["brief_accuracy"]
    assert columns["accuracy"] == columns["accuracy"] | {"source": "mixed", "records": {"brief": 6, "predictor": 18}}
    assert columns["supernet_accuracy"]["settings"] == {"epochs": 45} and "settings" not in header
    assert (brief["source"], brief["classes"], brief["training_images"]) == ("brief", ["dark", "light"], 32)
    assert (brief["epochs"], brief["seeds"], brief["settings"]["channels"]) == (1, [1997], 4)
    assert len(brief["commits"]) == 1 and header["stand_alone"] == {"layers": 6}
    assert read_records(path, accuracy_column="supernet_accuracy")[3].accuracy == old[3].accuracy
    with pytest.raises(ValueError, match=f"line {rest[0].id + 2}: record {rest[0].id} has no brief_accuracy"):
        read_records(path, accuracy_column="brief_accuracy")
    capsys.readouterr()
    run(*flags_of(images, nasdata, folder, "--labels", "brief", "--brief_cells", 8))  # two more, and those alone
    assert "8 candidates, 6 of them done" in capsys.readouterr().out
    more = read_records(path)
    assert len(more) == 8 and measured.items() <= {r.id: r.columns["brief_accuracy"] for r in more}.items()
    assert all(r.columns["source"] == "brief" and r.accuracy == r.columns["brief_accuracy"] for r in more)
    line = refused(capsys, build_nas_dataset, flags_of(images, path, tmp_path / "again", "--labels", "brief"))
    assert f"--from: {path}: record {more[0].id} has a brief_accuracy already" in line


@pytest.mark.usefixtures("in_process")
def test_shards_train_each_cell_once_and_the_last_merges_them(images, nasdata, tmp_path, capsys):
    flags = flags_of(images, nasdata, tmp_path / "shards", "--labels", "brief", "--brief_cells", 5)
    run(*flags, "--shard", "1/2")
    assert "2 of 5 genotypes are trained; the last shard merges them" in capsys.readouterr().out
    assert not (tmp_path / "shards" / "nasdata.jsonl").exists()
    assert "shard-1-of-2 is one of another number of shards than 3" in refused(
        capsys, build_nas_dataset, [*flags, "--shard", "0/3"]
    )
    run(*flags, "--shard", "0/2")
    run(*flags_of(images, nasdata, tmp_path / "whole", "--labels", "brief", "--brief_cells", 5))
    whole = read_records(tmp_path / "whole" / "nasdata.jsonl")
    assert read_records(tmp_path / "shards" / "nasdata.jsonl") == whole and len(whole) == 5
    trained = [set(read_parts(tmp_path / "shards" / "brief" / f"shard-{i}-of-2")) for i in range(2)]
    assert [len(keys) for keys in trained] == [3, 2] and not trained[0] & trained[1]


@pytest.mark.slow
def test_processes_of_torchrun_share_the_cells_and_write_what_one_does(images, nasdata, tmp_path):
    flags = flags_of(images, nasdata, tmp_path / "two", "--labels", "brief", "--brief_cells", 4)
    start(*TORCHRUN, "-m", "build_nas_dataset", *flags)
    run(*flags_of(images, nasdata, tmp_path / "one", "--labels", "brief", "--brief_cells", 4))
    found = [read_records(tmp_path / name / "nasdata.jsonl") for name in ("two", "one")]
    assert found[0] == found[1]
    assert (tmp_path / "two" / "brief" / "shard-0-of-1" / "checkpoint-1.pt").exists()


@pytest.mark.slow
def test_mixed_labels_without_records_train_a_supernet_first(images, tmp_path):
    line = "--dataset folder --layers 1 --channels 4 --batch_size 16 --holdout 24 --score_images 8 --score_batch_size 4"
    flags = [*line.split(), *"--pool_size 8 --epochs 1 --max_step 5 --device cpu --labels mixed".split()]
    run(*flags, "--data", str(images), "--brief_cells", "3", "--brief_flags", BRIEF, "--output_dir", str(tmp_path))
    by_supernet, mixed = read_records(tmp_path / "supernet" / "nasdata.jsonl"), read_records(tmp_path / "nasdata.jsonl")
    assert [r.columns["supernet_accuracy"] for r in mixed] == [r.accuracy for r in by_supernet]
    assert sum(r.columns["source"] == "brief" for r in mixed) == 3
    report.main(report.parse_args([str(tmp_path), "--out", str(tmp_path / "page.html")]))
    page = (tmp_path / "page.html").read_text()
    assert "8 cells, of accuracy" in page and "could not be read whole" not in page
    settings = read_header(tmp_path / "supernet" / "nasdata.jsonl")["settings"]
    assert not {"labels", "brief_cells", "records"} & settings.keys() and settings["pool_size"] == 8


def test_the_rest_gets_accuracies_in_the_predictors_order_spread_as_those_of_the_trained(monkeypatch):
    pool = random_pool(9, seed=2)
    records = [Record(i, g, 0.1 * i, 1, 1) for i, g in enumerate(pool)]
    expected, seen = np.array([0.0, 0.9, 0.2, 0.5, 0.4, 0.1, 0.8, 0.3, 0.6]), {}

    class Expecting:
        def quantiles(self, genotypes):
            return np.stack([np.zeros(9), expected], axis=1)

    def train(cells, quantiles, *rest):
        seen["quantiles"] = quantiles
        return Expecting(), [0.5, float("nan")]

    monkeypatch.setattr("build_nas_dataset.brief_labels.train_predictor", train)
    accuracies, taus = predict_rest(records, {1: 0.70, 4: 0.60, 6: 0.65}, seed=0)
    assert taus == {"supernet": 0.5}
    assert [accuracies[i] for i in (1, 4, 6)] == [0.70, 0.60, 0.65]
    rest = [0, 5, 2, 7, 3, 8]  # in the order that is expected; their places are 1/12, 3/12, ..., 11/12
    assert [accuracies[i] for i in rest] == pytest.approx(
        np.interp(np.arange(1, 12, 2) / 12, [0, 0.5, 1], [0.6, 0.65, 0.7])
    )
    supernet, brief = seen["quantiles"].T
    assert supernet.tolist() == pytest.approx((np.arange(9) + 0.5) / 9)
    assert brief[[1, 4, 6]].tolist() == pytest.approx([5 / 6, 1 / 6, 3 / 6]) and brief.isnan().sum() == 6


def test_what_is_not_known_does_not_count_in_the_predictors_loss():
    nan = float("nan")
    predicted, truth = torch.tensor([[0.5, 0.1], [0.2, 0.9]]), torch.tensor([[0.3, nan], [0.2, 0.6]])
    assert known_mse(predicted, truth).item() == pytest.approx((0.04 / 2 + 0.09) / 2)
    assert known_mse(predicted, torch.full((2, 2), nan)).item() == 0
    predicted.requires_grad_(True)
    known_mse(predicted, truth).backward()
    assert predicted.grad[0, 1] == 0 and predicted.grad.isfinite().all()


def test_bad_input_is_refused_before_anything_is_trained(images, nasdata, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("build_nas_dataset.brief_labels.train_briefly", None)
    truth, other, out = tmp_path / "truth.json", tmp_path / "other.jsonl", tmp_path / "out"
    records = read_records(nasdata)
    write_json(truth, [records[11].genotype.to_dict()])
    write_records(other, records, {"classes": ["cat", "dog"]})

    def refused_with(*more, data=nasdata):
        return refused(capsys, build_nas_dataset, flags_of(images, data, out, *more))

    brief = ("--labels", "brief")
    line = refused_with(*brief, "--held_out_cells", truth, "--brief_cells", 4)
    assert f"--held_out_cells: record 11 of {nasdata} is cell 0 of {truth}, which is held out" in line
    assert "--brief_cells: expected at most the 24 genotypes that there are, got 25" in refused_with(
        *brief, "--brief_cells", 25
    )
    line = refused_with(*brief, "--brief_cells", 4, data=other)
    assert f"--data: class 0 of the images is dark, of {other} cat" in line
    assert "argument --from: expected with --labels brief or mixed" in refused_with()
    assert "argument --epochs: is of a supernet, and none is trained" in refused_with(*brief, "--epochs", 2)
    assert "argument --resume: expected without --labels" in refused_with(*brief, "--resume", tmp_path)
    assert f"--from: no such NAS dataset: {tmp_path / 'x'}" in refused_with(*brief, data=tmp_path / "x")
    line = refused_with(*brief, "--brief_cells", 3, "--shard", "0/4")
    assert "--shard: expected at most 3 shards, one for each of --brief_cells, got 4" in line
    shards = ["--labels", "mixed", "--data", str(images), "--dataset", "folder", "--shard", "0/2"]
    assert "argument --from: expected with several processes or --shard" in refused(capsys, build_nas_dataset, shards)
    assert not list(tmp_path.glob("out/**/*.jsonl")) and not (out / "brief").exists()


def test_shards_of_other_images_are_named(images, nasdata, tmp_path, capsys, monkeypatch):
    def train(flags, archs, folder):
        cells = json.loads(archs.read_text())
        training = {"loss": 1.0, "seconds": 1.0, "rounds": [{}]}
        results = [{**cell, "held_out_accuracy": 0.5 + i / 10, "training": training} for i, cell in enumerate(cells)]
        own = {"classes": ["dark", "light"], "training_images": 32, "held_out_checksum": folder.name.count("shard-1")}
        save_checkpoint(
            folder / "checkpoint.pt", "candidates", {"results": results, "args": {"epochs": 1, "seed": 1}, **own}
        )
        write_json(folder / "config.json", {"commit": "c"})

    monkeypatch.setattr("build_nas_dataset.brief_labels.train_briefly", train)
    flags = flags_of(images, nasdata, tmp_path / "run", "--labels", "brief", "--brief_cells", 4)
    run(*flags, "--shard", "0/2")
    line = refused(capsys, build_nas_dataset, [*flags, "--shard", "1/2"])
    folders = [tmp_path / "run" / "brief" / f"shard-{i}-of-2" for i in (0, 1)]
    assert f"--output_dir: {folders[1]} was trained with other images than {folders[0]}" in line
    assert not (tmp_path / "run" / "nasdata.jsonl").exists()


def test_a_signal_is_passed_on_to_the_training_which_ends_first(tmp_path, monkeypatch):
    told = []

    class Training:
        returncode = None

        def __init__(self, command):
            signals.stop = signal.SIGTERM  # as its handler does

        def poll(self):
            return self.returncode

        def terminate(self):
            told.append("terminate")
            self.returncode = 143

    monkeypatch.setattr("build_nas_dataset.brief_labels.subprocess", SimpleNamespace(Popen=Training))
    monkeypatch.setattr(signals, "stop", 0)
    with pytest.raises(SystemExit) as ended:
        train_briefly([], tmp_path / "cells.json", tmp_path)
    assert ended.value.code == 143 and told == ["terminate"]
