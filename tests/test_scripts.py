"""Every script as a user starts it, on small inputs made here."""

import argparse
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import as_by_torchrun

import generate_archs
from benchmarks import sampling_seeds
from build_nas_dataset import build_nas_dataset
from build_nas_dataset.flags import settle_training_amp
from build_nas_dataset.objectives import Objective
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, read_records, write_records
from build_nas_dataset.supernet_training import train_epoch
from generation.metrics import evaluate_cells
from genotypes import NAG_SPACE, Genotype
from models.cost import genotype_cost
from models.generator import Generator
from models.predictor import Predictor, PredictorConfig
from models.supernet import Supernet
from plumbing.start import prepare
from tests import starting
from utils import settle_amp

ROOT = Path(__file__).parent.parent
SMALL_GAN = "--batch_size 8 --latent_dim 8 --g_emb_size 16 --d_emb_size 16 --g_hidden_size 8 --eval_size 12".split()
ROBUST_FLAGS = "--adversarial_weight 1 --n_epochs 2 --pool_size 1000".split()
SMALL_SUPERNET = """
    --dataset folder --layers 1 --channels 4 --batch_size 16 --holdout 24 --score_images 8 --score_batch_size 4
    --pool_size 6 --scorings 2
""".split()


def start(*command, ok=True):
    """Start a script or module as a user does, in a process of its own. Returns as run does."""
    status, out, err = starting.start(*command)
    assert status == (0 if ok else 2), err
    assert ok or "Traceback" not in err
    return out if ok else err.strip().splitlines()[-1]


def run(*command, ok=True):
    """Run a script or module in this process, which is quicker. Returns stdout; if not ok, the last line on stderr."""
    words = list(map(str, command))
    name = words[1] if words[0] == "-m" else words[0]
    module = importlib.import_module({"build_nas_dataset": "build_nas_dataset.build_nas_dataset"}.get(name, name[:-3]))
    arguments, out, err, status = words[2 if words[0] == "-m" else 1 :], io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err), patch.object(sys, "argv", [name, *arguments]):
        try:
            module.main(module.parse_args(arguments))
        except SystemExit as error:
            status = error.code
    assert status == (0 if ok else 2), err.getvalue()
    return out.getvalue() if ok else err.getvalue().strip().splitlines()[-1]


@pytest.fixture(scope="module")
def nasdata(tmp_path_factory):
    path = tmp_path_factory.mktemp("nas") / "nasdata.jsonl"
    pool = random_pool(24, seed=1)
    write_records(path, [Record(i, g, 0.2 + 0.01 * i, *genotype_cost(g)) for i, g in enumerate(pool)], {})
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, n in (("train", 40), ("test", 10)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def gan(nasdata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gan")
    start("gan.py", "--nasbench_data", nasdata, *SMALL_GAN, *"--recipe paper --n_epochs 2 --output_dir".split(), folder)
    return folder


@pytest.fixture(scope="module")
def robust(nasdata, tmp_path_factory):
    """A GAN of two objectives by the robust recipe, the discriminator and policy gradient included."""
    folder = tmp_path_factory.mktemp("robust")
    start("gan_multiobj.py", "--nasbench_data", nasdata, *SMALL_GAN, *ROBUST_FLAGS, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def odd(gan, supernet, nasdata, tmp_path_factory):
    """Files that a script must refuse, or take for what they are."""
    folder = tmp_path_factory.mktemp("odd")
    files = {"FLAT": folder / "flat.jsonl", "OLD": folder / "old.pt", "PARAMS": folder / "params.pt"}
    records = [Record(r.id, r.genotype, 0.5, r.params, r.macs) for r in read_records(nasdata)]
    write_records(files["FLAT"], records, {})
    state = torch.load(gan / "generator.pt", weights_only=True)
    state["generator"].popitem()
    torch.save(state, files["OLD"])
    state = torch.load(gan / "generator.pt", weights_only=True)
    state["objectives"][0]["name"] = "params"
    torch.save(state, files["PARAMS"])
    state = torch.load(gan / "checkpoint.pt", weights_only=True)
    state["predictor"].popitem()
    torch.save(state, folder / "run.pt")
    state = torch.load(supernet / "supernet.pt", weights_only=True)
    smaller = Supernet(**{**state["supernet_config"], "max_vertices": 5})
    torch.save(
        {**state, "supernet": smaller.state_dict(), "supernet_config": asdict(smaller.config)}, folder / "smaller.pt"
    )
    state = torch.load(supernet / "checkpoint.pt", weights_only=True)
    state["supernet"].popitem()
    torch.save(state, folder / "lacking.pt")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "long.json").write_text("9" * 9999)
    files |= {"SMALLER": folder / "smaller.pt", "LACKING": folder / "lacking.pt"}
    return files | {"DEEP": folder / "deep.json", "LONG": folder / "long.json", "RUN": folder / "run.pt"}


@pytest.fixture(scope="module")
def supernet(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("supernet")
    common = ["-m", "build_nas_dataset", "--data", images, *SMALL_SUPERNET, "--output_dir"]
    assert "tau to the previous scoring" in start(*common, folder, "--epochs", 2)
    return folder


def weights(path, name):
    return torch.load(path, weights_only=True)[name]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_gan_resumed_equals_gan_never_stopped(gan, nasdata, tmp_path):
    run(
        "gan.py", "--nasbench_data", nasdata, *SMALL_GAN, "--recipe", "paper", "--n_epochs", 1, "--output_dir", tmp_path
    )
    run("gan.py", "--resume", tmp_path, "--n_epochs", 2)
    for name in ("generator", "discriminator"):
        assert equal(weights(gan / "checkpoint.pt", name), weights(tmp_path / "checkpoint.pt", name))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert json.loads((gan / "config.json").read_text())["args"]["batch_size"] == 8
    samples = json.loads((gan / "samples" / "epoch-0002.json").read_text())
    assert all(sample["labels"][0] in range(3) and Genotype.from_dict(sample).is_valid for sample in samples)


def test_a_run_is_not_written_over(gan, nasdata):
    before = (gan / "checkpoint.pt").read_bytes()
    flags = ["--nasbench_data", nasdata, *SMALL_GAN, "--output_dir", gan]
    assert f"{gan} holds another run (checkpoint.pt)" in (line := run("gan.py", *flags, ok=False))
    assert f"--resume {gan}" in line
    assert (gan / "checkpoint.pt").read_bytes() == before


def test_a_shipped_generator_is_not_written_over(gan, nasdata, tmp_path):
    shutil.copy(gan / "generator.pt", tmp_path)
    flags = ["--nasbench_data", nasdata, *SMALL_GAN, "--output_dir", tmp_path]
    assert "another run (generator.pt); choose another folder" in run("gan.py", *flags, ok=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "generator.pt"]
    (tmp_path / "generator.pt").rename(tmp_path / "genotypes.json")  # nor are generated cells
    assert "another run (genotypes.json)" in run("gan.py", *flags, ok=False)


def test_a_run_that_diverges_says_so_and_saves_nothing(nasdata, tmp_path):
    flags = ["--nasbench_data", nasdata, *SMALL_GAN, *ROBUST_FLAGS, "--lr", 1e30, "--output_dir", tmp_path]
    assert "training diverged" in run("gan.py", *flags, ok=False)
    assert not list(tmp_path.glob("*.pt"))


def test_generated_genotypes_are_valid_distinct_and_exactly_counted(gan, tmp_path):
    out = start("generate_archs.py", "--checkpoint", gan, "--num_archs", 40, "--output_dir", tmp_path)
    assert "class 2" in out
    assert "validity" in out
    from genotypes import read_genotypes

    entries = read_genotypes(tmp_path / "genotypes.json")
    for label in range(3):
        canonical = [genotype.canonical() for genotype, entry in entries if entry["labels"] == [label]]
        assert len(set(canonical)) == len(canonical)
        assert None not in canonical
    assert all((entry["params"], entry["macs"]) == genotype_cost(genotype) for genotype, entry in entries)
    assert len(Generator.from_checkpoint(gan / "checkpoint.pt").sample((1,), 5, seed=0)) == 5
    assert json.loads((tmp_path / "config.json").read_text())["args"]["num_archs"] == 40
    before = (tmp_path / "genotypes.json").read_bytes()
    again = ["generate_archs.py", "--checkpoint", gan, "--num_archs", 5, "--output_dir", tmp_path]
    assert "holds another run" in run(*again, ok=False)
    assert (tmp_path / "genotypes.json").read_bytes() == before


def test_targets_choose_the_class_by_the_boundaries_of_the_checkpoint(gan, tmp_path):
    for flags, label in ((["--target_acc", 0.42], 2), (["--target_quantile", 0.5], 1), (["--perf_label", 0], 0)):
        out = run("generate_archs.py", "--checkpoint", gan, *flags, "--output_dir", tmp_path / str(label))
        assert f"class {label} " in out
        assert out.count("class ") == 1
    assert "0.2000 to 0.4300" in run("generate_archs.py", "--checkpoint", gan, "--target_acc", 0.9, ok=False)


def test_robust_recipe_repeats_itself(robust, nasdata, tmp_path):
    run("gan_multiobj.py", "--nasbench_data", nasdata, *SMALL_GAN, *ROBUST_FLAGS, "--output_dir", tmp_path)
    for name in ("generator", "discriminator", "predictor"):
        assert equal(weights(robust / "checkpoint.pt", name), weights(tmp_path / "checkpoint.pt", name))
    state = torch.load(robust / "checkpoint.pt", weights_only=True)
    assert [objective["name"] for objective in state["objectives"]] == ["accuracy", "params"]
    lines = [json.loads(line) for line in (robust / "metrics.jsonl").read_text().splitlines()]
    assert {"nll"} <= set(lines[0]) and {"nll", "reward", "d_loss", "g_loss"} <= set(lines[1])
    assert not {"reward", "d_loss"} & set(lines[0])  # the warm-up


def test_a_finished_multi_objective_run_can_be_resumed(robust, tmp_path):
    shutil.copytree(robust, tmp_path / "run")
    run("gan_multiobj.py", "--resume", tmp_path / "run")
    assert equal(weights(robust / "generator.pt", "generator"), weights(tmp_path / "run" / "generator.pt", "generator"))


def test_cells_are_ranked_by_all_that_is_expected_but_a_quantile_is_shown_within_0_and_1():
    class Expecting:
        config = PredictorConfig(1)

        def quantiles(self, genotypes):
            return torch.tensor([[-0.1], [1.1], [1.3]])

    entries = [{**genotype.to_dict(), "number": i} for i, genotype in enumerate(random_pool(3, seed=1))]
    generate_archs.rank(entries, Expecting(), [Objective("accuracy", (), (), 0, 1)], None)
    assert [entry["number"] for entry in entries] == [2, 1, 0]
    assert [entry["predicted_quantiles"]["accuracy"] for entry in entries] == [1, 1, 0]
    assert [entry["predicted_unclipped"]["accuracy"] for entry in entries] == pytest.approx([1.3, 1.1, -0.1])


def test_limits_are_kept_exactly(robust, tmp_path):
    flags = ["--checkpoint", robust, "--perf_label", 1, "--params_label", 0, "--num_archs", 6]
    limits = ["--min_params", "0.3M", "--max_params", "2500000", "--max_macs", "400M", "--top", 3]
    out = start("generate_archs_multiobj.py", *flags, *limits, "--output_dir", tmp_path)
    found = int(re.search(r"(\d+) distinct within the limits, 3 kept", out).group(1))
    assert found >= 6  # the first 6 were ranked
    from genotypes import read_genotypes

    entries = read_genotypes(tmp_path / "genotypes.json")
    assert len(entries) == 3
    for genotype, entry in entries:
        params, macs = genotype_cost(genotype)
        assert 300_000 <= params <= 2_500_000 and macs <= 400_000_000
        assert entry["labels"] == [1, 0]
    ranks = [entry["predicted_quantiles"]["accuracy"] for _, entry in entries]
    assert ranks == sorted(ranks, reverse=True)


def test_classes_without_a_cell_within_the_limits_are_left_out(robust, tmp_path):
    boundaries = weights(robust / "generator.pt", "objectives")[1]["boundaries"]
    flags = ["--num_archs", 2, "--max_draws", 50, "--max_params", int(boundaries[0]) - 1, "--output_dir", tmp_path]
    output = run("generate_archs_multiobj.py", "--checkpoint", robust / "generator.pt", *flags)
    assert output.count("is left out: not within the limits") == 2 * 3  # of 3 x 3
    labels = {tuple(entry["labels"]) for entry in json.loads((tmp_path / "genotypes.json").read_text())}
    assert labels and all(label == 0 for _, label in labels)


def test_a_supernet_of_smaller_cells_ranks_what_is_small_enough(robust, odd, images, tmp_path):
    flags = ["--supernet", odd["SMALLER"], "--data", images, "--max_params", "0.4M", "--perf_label", 0]
    flags += ["--params_label", 0, "--num_archs", 1, "--random", "--output_dir", tmp_path]
    run("generate_archs_multiobj.py", "--checkpoint", robust, *flags)
    (entry,) = json.loads((tmp_path / "genotypes.json").read_text())
    assert 0 <= entry["supernet_accuracy"] <= 1


def test_lines_are_printed_at_once_into_files_too(tmp_path, monkeypatch):
    with open(tmp_path / "out", "w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        print("before")
        assert not (tmp_path / "out").read_text()
        prepare(argparse.Namespace(device="cpu", output_dir=None, tf32=False, seed=0))
        print("after")
        assert (tmp_path / "out").read_text() == "before\nafter\n"


def test_evaluation_counts_every_cell_drawn(robust, supernet, images, nasdata, tmp_path):
    common = ["generate_archs_multiobj.py", "--checkpoint", robust, "--num_archs", 4, "--evaluate"]
    by_supernet = ["--supernet", supernet / "supernet.pt", "--data", images]
    for name, flags in (("a", []), ("b", by_supernet)):
        out = run(*common, *flags, "--output_dir", tmp_path / name)
        assert "random cells" in out
        if not flags:
            random = run(*common, "--random", "--output_dir", tmp_path / "random")
            assert "random cells, sampling seed 1997: 36 drawn" in random and "generated cells" not in random
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert evaluation.pop("sampling_seeds") == [1997] and "generated cells, sampling seed 1997: 36 drawn" in out
        for result in evaluation.values():
            valid = round(result["drawn"] * result["validity"])
            assert result["drawn"] == 9 * 4
            matrix = np.array(result["params"]["asked_by_obtained"])
            assert matrix.sum() == valid and result["params"]["controllability"] == pytest.approx(matrix.trace() / 36)
            assert result["all"]["controllability"] <= result["params"]["controllability"]
            assert result["accuracy"]["by"] == ("supernet" if flags else "predictor")


def test_several_sampling_seeds_give_the_mean_and_deviation_of_their_evaluations(robust, nasdata, tmp_path):
    flags = ["generate_archs_multiobj.py", "--checkpoint", robust, "--num_archs", 4, "--evaluate", "--output_dir"]
    out = run(*flags, tmp_path / "all", "--seed", 5, "--sampling_seeds", 3)
    found = json.loads((tmp_path / "all" / "evaluation.json").read_text())
    assert found["sampling_seeds"] == [5, 6, 7]
    alone = []
    for seed in found["sampling_seeds"]:
        run(*flags, tmp_path / str(seed), "--seed", seed)
        alone.append(json.loads((tmp_path / str(seed) / "evaluation.json").read_text()))
    for title in ("generated cells", "random cells"):
        measures = found["over sampling seeds"][title]
        for name in ("accuracy", "params", "all"):
            shares = [one[title][name]["controllability"] for one in alone]
            value = measures[f"{name} controllability"]
            assert value["values"] == shares and len(set(shares)) > 1
            assert (value["mean"], value["std"]) == pytest.approx((np.mean(shares), np.std(shares, ddof=1)))
        assert found[title] == alone[0][title]
        assert f"{title} over the 3 sampling seeds 5 to 7, 36 drawn with each:" in out
    assert f"  all controllability: {value['mean']:.3f} +- {value['std']:.3f}" in out
    (gathered,) = sampling_seeds.gather([tmp_path / "all"])["runs"]
    assert (gathered["training_seed"], gathered["cells_of_each_sampling_seed"]) == (1997, 36)
    assert gathered["over sampling seeds"]["random cells"]["all controllability"]["mean"] == round(value["mean"], 5)
    assert "--sampling_seeds: expected with --evaluate" in run("generate_archs.py", "--sampling_seeds", 2, ok=False)


def test_a_class_without_a_valid_cell_has_no_mean_accuracy(gan, nasdata, capsys):
    records, objectives = read_records(nasdata), torch.load(gan / "generator.pt", weights_only=True)["objectives"]
    scorer = Mock(side_effect=lambda genotypes: np.full(len(genotypes), 0.5), ceiling=1.0, percentile80=0.5)
    scorer.classes = lambda genotypes: np.zeros(len(genotypes), int)
    objectives = [Objective.from_dict(objective) for objective in objectives]
    drawn = {(0,): [None, None], (1,): [record.genotype for record in records[:3]]}
    predictor = Predictor.from_checkpoint(gan / "generator.pt", "cpu")
    result = evaluate_cells(drawn, objectives, records, predictor, scorer)
    assert result["accuracy"]["mean"] == [None, 0.5]
    generate_archs.print_evaluation("generated", result, objectives)
    assert "mean accuracy by class asked -, 0.5000;" in capsys.readouterr().out


def test_supernet_builds_a_dataset_and_resumes(supernet, tmp_path):
    records = read_records(supernet / "nasdata.jsonl")
    assert len(records) == 6
    assert all(genotype_cost(record.genotype) == (record.params, record.macs) for record in records)
    state = torch.load(supernet / "checkpoint.pt", weights_only=True)
    state["scores"][1:, 3:] = float("nan")  # as if stopped within the scoring
    torch.save(state, tmp_path / "checkpoint.pt")
    run("-m", "build_nas_dataset", "--resume", tmp_path)
    assert read_records(tmp_path / "nasdata.jsonl") == records
    assert equal(weights(supernet / "supernet.pt", "supernet"), weights(tmp_path / "supernet.pt", "supernet"))


def test_a_supernet_is_not_resumed_with_other_images(supernet, images, tmp_path):
    shutil.copy(supernet / "checkpoint.pt", tmp_path)
    other = shutil.copytree(images, tmp_path / "images")
    next(path for path in sorted(other.glob("train/*/*"))).unlink()
    line = run("-m", "build_nas_dataset", "--resume", tmp_path, "--data", other, ok=False)
    assert f"--data: the images are not those of {tmp_path}" in line


def test_a_supernet_is_trained_in_float32_on_cuda_unless_asked_otherwise():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [settle_training_amp(amp, cuda) for amp in ("auto", "off", "bf16")] == ["off", "off", "bf16"]
    assert settle_training_amp("auto", cpu) == settle_amp("auto", cpu)


def test_a_supernet_that_diverges_says_so_and_scores_nothing(images, tmp_path):
    flags = ["--data", images, *SMALL_SUPERNET, "--epochs", 2, "--lr_max", 1e30, "--output_dir", tmp_path]
    assert "the loss is not finite in epoch 1" in run("-m", "build_nas_dataset", *flags, ok=False)
    assert not list(tmp_path.glob("*.pt")) and not (tmp_path / "nasdata.jsonl").exists()


def test_a_supernet_whose_weights_turn_nan_in_the_last_step_keeps_its_checkpoint(images, tmp_path, monkeypatch):
    def last_step_diverges(supernet, optimizer, images, pool, args, epoch, *rest):
        if epoch == 1:
            next(supernet.parameters()).data[0] = float("nan")
            return {"loss": 1.0}
        return train_epoch(supernet, optimizer, images, pool, args, epoch, *rest)

    monkeypatch.setattr(build_nas_dataset, "train_epoch", last_step_diverges)
    flags = ["--data", images, *SMALL_SUPERNET, "--epochs", 3, "--output_dir", tmp_path]
    line = run("-m", "build_nas_dataset", *flags, ok=False)
    assert line.endswith("the weights are not all finite numbers after epoch 2; a smaller --lr_max may help")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and all(weight.isfinite().all() for weight in state["supernet"].values())


def test_a_predictor_that_diverges_ends_the_run_before_the_gan_is_trained(nasdata, tmp_path, monkeypatch):
    monkeypatch.setattr("models.predictor.PEAK_LR", 1e30)
    flags = ["--nasbench_data", nasdata, *SMALL_GAN, *ROBUST_FLAGS, "--output_dir", tmp_path]
    line = run("gan.py", *flags, ok=False)
    assert "--nasbench_data: the predictor's training diverged in epoch 1; another --batch_size may help" in line
    assert not list(tmp_path.glob("*.pt"))


def test_a_generator_of_invalid_cells_writes_an_empty_list(gan, nasdata, tmp_path):
    state = torch.load(gan / "generator.pt", weights_only=True)
    state["generator"]["cells.normal.add_edge.2.bias"] -= 1e4  # no edges
    torch.save(state, tmp_path / "edgeless.pt")
    flags = ["--checkpoint", tmp_path / "edgeless.pt", "--num_archs", 4, "--output_dir", tmp_path / "out"]
    assert "nothing was written" in run("generate_archs.py", *flags, "--max_draws", 9, "--max_params", "9M", ok=False)
    assert "warning: none of the cells drawn is valid" in run("generate_archs.py", *flags, "--evaluate")
    assert json.loads((tmp_path / "out" / "genotypes.json").read_text()) == []


def test_cells_are_not_new_by_comparison_with_another_nas_dataset(gan, nasdata, tmp_path, capsys):
    """The default is a path that may be of another file by now."""
    checkpoint, args = torch.load(gan / "generator.pt", weights_only=True), generate_archs.parse_args([])
    objectives = [Objective.from_dict(objective) for objective in checkpoint["objectives"]]
    assert generate_archs.read_nas_dataset(args, checkpoint, objectives, NAG_SPACE) == read_records(nasdata)
    checkpoint["args"]["nasbench_data"] = "data/nasdata.jsonl"
    assert generate_archs.read_nas_dataset(args, checkpoint, objectives, NAG_SPACE) is None
    assert "novelty is not computed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (["gan.py"], "torchrun: this script works in one process"),
        (["-m", "build_nas_dataset"], "torchrun: one process trains"),
    ],
)
def test_scripts_of_one_process_refuse_torchrun(script, message, monkeypatch):
    as_by_torchrun(monkeypatch, rank=0, world=2)
    assert message in run(*script, ok=False)


BAD_INPUT = [
    ("gan.py --nasbench_data missing.jsonl", "no such NAS dataset"),
    ("gan.py --nasbench_data NASDATA --batch_size 64", "at least 64"),
    ("gan.py --n_epochs 0", "from 1"),
    ("gan.py --resume NASDATA", "not a readable checkpoint"),
    ("gan.py --device cuda:99", "not available"),
    ("gan.py --device cuda:", "expected auto, cpu, cuda or cuda:N"),
    ("generate_archs.py --checkpoint missing.pt", "no such checkpoint"),
    ("generate_archs.py --checkpoint GAN --perf_label 3", "0 (lowest accuracy) to 2"),
    ("generate_archs.py --checkpoint GAN --params_label 0", "trained on accuracy only"),
    ("generate_archs.py --checkpoint GAN --min_params 3M --max_params 2M", "at most --max_params"),
    ("generate_archs.py --checkpoint GAN --max_params 100", "no cell is that small"),
    ("generate_archs.py --checkpoint GAN --min_macs 9G", "no cell is that large"),
    ("generate_archs.py --checkpoint GAN --max_params lots", "expected a number from 1"),
    ("generate_archs.py --checkpoint GAN --supernet GAN", "expected kind supernet weights"),
    ("generate_archs.py --checkpoint GAN --supernet SMALLER --data IMAGES --random", "cells of up to 5 vertices"),
    ("generate_archs.py --checkpoint GAN --supernet SMALLER --data IMAGES --evaluate", "cells of up to 5 vertices"),
    ("generate_archs.py --checkpoint GAN --evaluate --max_params 3M", "without limits"),
    ("gan.py --resume GAN/generator.pt", "it lacks reference, discriminator, optimizers"),
    ("gan.py --n_epochs 18 --warmup_epochs 18", "more than the 18 --warmup_epochs"),
    ("gan.py --pool_size 999", "0 or from 1000"),
    ("gan.py --likelihood_weight 0 --warmup_epochs 0", "--pool_size: expected 0 without --likelihood_weight"),
    ("gan.py --nasbench_data FLAT --batch_size 8", "too few different values of accuracy for 3 classes"),
    ("gan.py --recipe paper --inverse_temperature 3", "--inverse_temperature: expected 0 without --pool_size"),
    (
        "gan.py --recipe paper --policy_gradient_cells 7",
        "--policy_gradient_cells: expected 0 without --pool_size or --policy_gradient_weight",
    ),
    ("gan.py --n_critic 2", "--n_critic: expected 1 without --adversarial_weight"),
    ("gan.py --nasbench_data NASDATA --batch_size 8 --recipe paper --n_epochs 2 --n_critic 7", "the 6 steps"),
    ("gan.py --resume GAN --n_epochs 1", "has done 2 epochs already, more than --n_epochs"),
    ("gan.py --temperature 1e38", "--temperature: expected a number from 0 to 1000"),
    ("generate_archs.py --checkpoint OLD", "is of another version of these networks"),
    ("generate_archs.py --checkpoint PARAMS --top 2", "--top: expected with --supernet"),
    (
        "generate_archs.py --checkpoint GAN --evaluate --nasbench_data data/nasdata.jsonl",
        "not the NAS dataset",
    ),
    ("generate_archs.py --checkpoint GAN --max_params 3M --max_draws 9", "--max_draws: expected at least the 100"),
    ("generate_archs.py --checkpoint GAN --supernet SUPERNET --data missing", "--data: missing is not a folder"),
    ("visualize.py --arch DEEP", "is not a JSON file"),
    ("visualize.py --arch LONG", "long.json is not a JSON file"),
    ("gan.py --resume RUN", "run.pt is of another version of these networks"),
    ("-m build_nas_dataset --resume LACKING", "lacking.pt is of another version of these networks"),
    ("generate_archs.py --checkpoint ROBUST", "generate_archs_multiobj.py"),
    ("generate_archs_multiobj.py --checkpoint GAN", "give it to generate_archs.py"),
    (
        "generate_archs_multiobj.py --checkpoint ROBUST --params_label 0 --min_params 6M",
        "--params_label: class 0,0",
    ),
    (
        "generate_archs.py --checkpoint GAN --num_archs 9 --max_draws 9 --max_params 300K --min_macs 900M",
        "nothing was written",
    ),
    ("generate_archs.py --checkpoint GAN --supernet EMPTY", "--supernet: expected a value"),
    ("generate_archs.py --checkpoint GAN --num_archs 1000000000000", "--num_archs: expected a whole number from 1"),
    ("gan.py --resume EMPTY", "--resume: expected a value"),
    ("gan.py --policy_gradient_cells 1", "--policy_gradient_cells: expected 0 or from 2"),
    ("gan.py --inverse_temperature 1e39", "--inverse_temperature: expected a number from 0 to 1000"),
    ("gan.py --objectives speed", "accuracy, params, macs"),
    ("train_cifar.py --arch NAG_BEST --dataset folder --data IMAGES", "NAG_HIGH_ACC"),
    ("train_cifar.py --dataset folder --data missing", "missing is not a folder"),
    ("train_cifar.py --resume GAN", "expected kind cifar"),
    ("train_cifar.py --keep_prob 1.5", "above 0 to 1"),
    ("-m build_nas_dataset --dataset folder --data IMAGES --holdout 80", "cannot hold out 80"),
]


@pytest.fixture(scope="module")
def files(nasdata, images, gan, robust, supernet, odd):
    """What the words in capitals of BAD_INPUT stand for."""
    named = {"NASDATA": nasdata, "IMAGES": images, "GAN": gan, "ROBUST": robust}
    return named | odd | {"SUPERNET": supernet / "supernet.pt"}


@pytest.mark.parametrize(("command", "reason"), BAD_INPUT)
def test_bad_input_gets_one_line_and_nothing_is_written(command, reason, files, tmp_path):
    output, arguments = tmp_path / "out", []
    for word in command.split():
        word = word.replace("EMPTY", "")
        head, *rest = word.split("/")
        arguments.append(Path(files[head], *rest) if head in files else word)
    resumed = [] if "--resume" in arguments else ["--output_dir", output]
    assert reason in run(*arguments, *resumed, ok=False)
    assert not output.exists()


def test_compile_without_a_compiler_is_refused(tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, str(tmp_path / "g++")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    flags = ["--device", "cpu", "--compile", "--output_dir", tmp_path / "out"]
    assert "--compile: torch.compile does not" in run("gan.py", *flags, ok=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", ["gan.py", "train_cifar.py --dataset folder --data IMAGES", "train_imagenet.py --data IMAGES"]
)
def test_compile_on_a_machine_without_a_compiler_is_refused(script, images, tmp_path):
    """In a Python of its own: torch reads the compiler's name when it is imported."""
    arguments = [str(images) if word == "IMAGES" else word for word in script.split()]
    flags = ["--device", "cpu", "--compile", "--output_dir", str(tmp_path / "out")]
    environment = {**os.environ, "CXX": str(tmp_path / "g++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, *arguments, *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "--compile: torch.compile does not" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_default_folder_that_cannot_be_made_is_found_out_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("not a folder")
    with pytest.raises(SystemExit):
        generate_archs.main(generate_archs.parse_args(["--device", "cpu"]))
    assert "--output_dir: expected a folder that can be written to, got runs" in capsys.readouterr().err
