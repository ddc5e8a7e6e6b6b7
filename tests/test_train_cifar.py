"""train_cifar.py and build_nas_dataset/eval_archs.py, started as a user would, on a tiny folder of images."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_cifar
from build_nas_dataset import eval_archs
from build_nas_dataset.records import Record, write_records
from genotypes import GENOTYPES, load_genotype, read_genotypes
from models.network import genotype_cost
from utils import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
NAMES = ["NAG_ENSEMBLE_A", "NAG_ENSEMBLE_B", "NAG_ENSEMBLE_C"]
TINY = ["--dataset", "folder", "--layers", 1, "--channels", 4, "--batch_size", 8, "--device", "cpu", "--amp", "off"]


def make_images(folder: Path, classes: dict[str, int]) -> Path:
    """24 training and 10 test images a class; a class has noise of its own brightness."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 24), ("test", 10)):
        for name, brightness in classes.items():
            (folder / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.normal(brightness, 60, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


def start(*command) -> str:
    """Standard output of a script that must succeed."""
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    flags = [*TINY, "--data", images, "--epochs", 2, "--holdout", 8, "--arch", "NAG_ENSEMBLE_B"]
    return folder, start("train_cifar.py", *flags, "--output_dir", folder)


def refused(capsys, main, parse_args, argv: list) -> str:
    """The last line on stderr of a script that must end with status 2."""
    with pytest.raises(SystemExit) as error:
        main(parse_args(list(map(str, argv))))
    stderr = capsys.readouterr().err
    assert error.value.code == 2
    assert "Traceback" not in stderr
    return stderr.splitlines()[-1]


def train_refused(capsys, *argv) -> str:
    return refused(capsys, train_cifar.main, train_cifar.parse_args, [*TINY, *argv])


# ----------------------------------------------------------------------------------------------------- training


def test_a_run_leaves_its_result_and_a_line_for_every_epoch(run):
    folder, output = run
    result = json.loads((folder / "result.json").read_text())
    assert (result["params"], result["macs"]) == genotype_cost(GENOTYPES["NAG_ENSEMBLE_B"].prune(), 2, 1, 4)
    assert 0 <= result["test_accuracy"] <= 1
    assert 0 <= result["held_out_accuracy"] <= 1
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
    assert metrics[-1]["held_out_accuracy"] == result["held_out_accuracy"]
    assert str(folder / "result.json") in output


def test_test_images_are_used_once_after_the_last_epoch(run):
    folder, output = run
    assert len(re.findall("test error", output)) == 1
    assert "test" not in (folder / "metrics.jsonl").read_text()


def test_evaluate_gives_the_test_error_of_the_run(run, images, tmp_path):
    folder, output = run
    flags = [*TINY, "--data", images, "--output_dir", tmp_path / "evaluated"]
    evaluated = start("train_cifar.py", "--evaluate", folder / "checkpoint.pt", *flags)
    pattern = r"test error ([\d.]+) ?%"
    assert re.search(pattern, evaluated).group(1) == re.search(pattern, output).group(1)


def test_a_resumed_run_equals_one_that_never_stopped(run, images, tmp_path, monkeypatch):
    """Stopped in the second of two epochs, then gone on with."""
    whole, _ = run
    folder = tmp_path / "stopped"
    flags = [*TINY, "--data", images, "--epochs", "2", "--holdout", "8", "--arch", "NAG_ENSEMBLE_B"]
    train_epoch, epochs = train_cifar.train_epoch, []

    def stop_in_second_epoch(*args):
        epochs.append(args)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cifar, "train_epoch", stop_in_second_epoch)
        train_cifar.main(train_cifar.parse_args([*map(str, flags), "--output_dir", str(folder)]))
    assert load_checkpoint(folder, "cifar")["epoch"] == 1
    start("train_cifar.py", "--resume", folder)

    expected, resumed = load_checkpoint(whole, "cifar"), load_checkpoint(folder, "cifar")
    assert resumed["epoch"] == expected["epoch"] == 2
    for name, weights in expected["network"].items():
        assert torch.equal(resumed["network"][name], weights), name
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (folder, whole))
    assert ours["test_accuracy"] == theirs["test_accuracy"]
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_checkpoint_tells_what_is_needed_to_rebuild_the_network(run):
    state = load_checkpoint(run[0], "cifar")
    assert state["classes"] == ["dark", "light"]
    assert len(state["mean"]) == len(state["std"]) == 3
    assert set(state["genotype"]) == {"normal", "reduction"}


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--arch", "NAG_HIGH_ACCURACY"], "NAG_HIGH_ACC, NAG_ENSEMBLE_A"),
        (["--arch", "missing.json"], "missing.json"),
        (["--epochs", 0], "--epochs"),
        (["--keep_prob", 1.5], "--keep_prob"),
        (["--image_size", 16], "29 to 40"),
        (["--holdout", 48], "--holdout"),
        (["--batch_size", 100], "48 training images"),
    ],
)
def test_bad_flags_are_refused_by_name_and_nothing_is_written(capsys, images, tmp_path, flags, expected):
    line = train_refused(capsys, "--data", images, "--output_dir", tmp_path / "out", *flags)
    assert expected in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(capsys, images, tmp_path):
    line = train_refused(capsys, "--data", images, "--output_dir", tmp_path / "out", "--device", "cuda")
    assert "cuda is not available" in line
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_for_the_user(tmp_path):
    command = [sys.executable, "train_cifar.py", *TINY, "--arch", "NOTHING", "--output_dir", tmp_path / "out"]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_of_another_kind_is_refused(capsys, images, tmp_path, flag):
    save_checkpoint(tmp_path / "gan.pt", "gan", {})
    before = sorted(tmp_path.rglob("*"))
    assert "expected a cifar checkpoint" in train_refused(capsys, "--data", images, flag, tmp_path / "gan.pt")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("classes", [{"dark": 60, "bright": 180}, {"dark": 60, "light": 180, "medium": 120}])
def test_images_of_other_classes_are_refused_by_evaluate(capsys, run, tmp_path, classes):
    other = make_images(tmp_path / "other", classes)
    flags = ["--data", other, "--evaluate", run[0] / "checkpoint.pt", "--output_dir", tmp_path / "out"]
    line = train_refused(capsys, *flags)
    assert "--data" in line
    assert "class" in line
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- eval_archs


def candidate_flags(images: Path, output_dir: Path, archs: Path) -> list:
    flags = ["--data", images, "--epochs", 1, "--holdout", 16, "--archs", archs, "--output_dir", output_dir]
    return [*TINY, *flags]


@pytest.fixture(scope="module")
def archs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archs") / "genotypes.json"
    entries = [{**GENOTYPES[name].to_dict(), "name": name, "accuracy": 0.3 + i / 10} for i, name in enumerate(NAMES)]
    path.write_text(json.dumps(entries))
    return path


def test_candidates_are_ranked_and_finished_ones_are_skipped(images, archs, tmp_path):
    folder = tmp_path / "run"
    flags = [*candidate_flags(images, folder, archs), "--num_archs", 2]
    start("-m", "build_nas_dataset.eval_archs", *flags)
    first = {result["name"]: result for result in json.loads((folder / "results.json").read_text())}
    assert set(first) == set(NAMES[:2])

    output = start("-m", "build_nas_dataset.eval_archs", "--resume", folder, "--num_archs", 0)
    assert "3 candidates, 2 of them done" in output
    results = json.loads((folder / "results.json").read_text())
    accuracies = [result["held_out_accuracy"] for result in results]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {result["name"] for result in results} == set(NAMES)
    for result in results:  # the finished ones as they were, to the second of their training
        assert first.get(result["name"], result) == result
    best = json.loads((folder / "best.json").read_text())
    assert best == results[0]
    assert load_genotype(str(folder / "best.json")) == GENOTYPES[best["name"]]
    assert [genotype for genotype, _ in read_genotypes(folder / "results.json")]


def test_every_candidate_is_trained_as_if_it_were_the_only_one(images, archs, tmp_path):
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(json.loads(archs.read_text())[1]))
    losses = []
    for name, path in (("all", archs), ("alone", alone)):
        argv = list(map(str, candidate_flags(images, tmp_path / name, path)))
        eval_archs.main(eval_archs.parse_args(argv))
        results = json.loads((tmp_path / name / "results.json").read_text())
        losses.append(next(result["training"]["loss"] for result in results if result["name"] == NAMES[1]))
    assert losses[0] == losses[1]


def test_a_nas_dataset_is_sampled_evenly_over_its_ranking(tmp_path):
    names = ["NAG_HIGH_ACC", *NAMES]
    records = [Record(i, GENOTYPES[name], (0.9, 0.1, 0.5, 0.3)[i], 1, 1) for i, name in enumerate(names)]
    write_records(tmp_path / "nasdata.jsonl", records, {})
    picked = [known["accuracy"] for _, known in eval_archs.read_candidates(str(tmp_path / "nasdata.jsonl"), 2)]
    assert picked == [0.1, 0.9]
    assert len(eval_archs.read_candidates(str(tmp_path / "nasdata.jsonl"), 0)) == 4


def test_isomorphic_candidates_are_trained_once(tmp_path):
    entries = [GENOTYPES["NAG_ENSEMBLE_B"].to_dict(), GENOTYPES["NAG_ENSEMBLE_B"].canonical().to_dict()]
    (tmp_path / "twice.json").write_text(json.dumps(entries))
    assert len(eval_archs.read_candidates(str(tmp_path / "twice.json"), 0)) == 1


def test_rank_correlations_compare_brief_training_with_supernet_and_params():
    rows = [(0.1, 0.2, 30), (0.2, 0.3, 20), (0.3, 0.4, 10), (0.4, None, 5)]
    results = [
        {"held_out_accuracy": brief, "training": {"params": params}} | ({"accuracy": supernet} if supernet else {})
        for brief, supernet, params in rows
    ]
    correlations = eval_archs.rank_correlations(results)
    assert correlations["supernet accuracy"]["tau"] == 1
    assert correlations["#params"]["tau"] == -1
    assert correlations["#params"]["n"] == 3
    assert eval_archs.rank_correlations(results[2:]) == {}


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--archs", "missing.json"], "missing.json"),
        (["--holdout", 0], "--holdout"),
        (["--num_archs", -1], "--num_archs"),
        (["--resume", "missing"], "missing"),
    ],
)
def test_eval_archs_refuses_bad_input(capsys, images, archs, tmp_path, flags, expected):
    argv = [*candidate_flags(images, tmp_path / "out", archs), *flags]
    assert expected in refused(capsys, eval_archs.main, eval_archs.parse_args, argv)
    assert not (tmp_path / "out").exists()
