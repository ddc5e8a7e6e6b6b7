"""build_nas_dataset.py: its flags, what reaches the training of the supernet, a stop, the file that it writes."""

import json
import math
from pathlib import Path

import pytest
import torch
from small_training import augmented_by, make_images, start, white_images

from build_nas_dataset import build_nas_dataset
from build_nas_dataset.build_nas_dataset import parse_args
from build_nas_dataset.flags import supernet_config
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import read_records
from build_nas_dataset.supernet_training import train_epoch
from models.cost import genotype_cost
from models.supernet import SupernetConfig
from plumbing.checkpoint_files import load_checkpoint

CPU = torch.device("cpu")


def test_by_default_the_supernet_is_the_published_one():
    args = parse_args([])
    assert supernet_config(args, num_classes=10) == SupernetConfig()
    assert (args.pool_size, args.epochs, args.scorings) == (4000, 150, 10)


@pytest.mark.parametrize(
    ("reference", "ours"),
    [
        ("--num_sampled_arch 70", "--pool_size 70"),
        ("--max_num_vertices=7", "--max_step 7"),
        ("--eval-batch-size 60", "--score_images 60 --score_batch_size 60"),
        ("--use_aux_head --image_size 16", "--auxiliary_weight 0 --image_size 16"),
    ],
)
def test_flags_of_the_reference_mean_what_they_mean_there(reference, ours):
    assert parse_args(reference.split()) == parse_args(ours.split()) != parse_args([])


@pytest.mark.parametrize(
    ("flag", "why"),
    [
        ("--arch_pool FILE", "has this flag but never reads it"),
        ("--num_labels 10", "has this flag but never reads it"),
        ("--lr 0.1", "reads this flag for ImageNet only, which it has no supernet for"),
        ("--label_smooth 0.1", "reads this flag for ImageNet only, which it has no supernet for"),
        ("--zip_file", "reads this flag for ImageNet only, which it has no supernet for"),
    ],
)
def test_flags_of_the_reference_without_a_meaning_here_are_refused(flag, why, capsys):
    with pytest.raises(SystemExit):
        parse_args(flag.split())
    assert f"argument {flag.split()[0]}: the reference {why}; leave it out" in capsys.readouterr().err


def test_there_are_at_most_as_many_scorings_as_epochs(capsys):
    assert [parse_args(["--epochs", epochs]).scorings for epochs in ("1", "9", "11")] == [1, 9, 10]
    with pytest.raises(SystemExit):
        parse_args("--epochs 3 --scorings 4".split())
    assert "argument --scorings: expected at most --epochs" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["-m build_nas_dataset", "build_nas_dataset/build_nas_dataset.py"])
def test_the_script_starts_as_a_module_and_as_a_file(words):
    text = start(*words.split(), "--help")
    assert text.startswith("usage: python -m build_nas_dataset ")
    assert all(f"\n{group}:\n" in text for group in "data pool supernet training scoring run".split())
    assert "num_sampled_arch" not in text and "(default: 10, or --epochs if that is less)" in " ".join(text.split())


class Watched(torch.nn.Module):
    """In the place of a supernet: keeps what it is given, and the optimizer's learning rate then."""

    def __init__(self, classes: int):
        super().__init__()
        self.logits, self.seen = torch.nn.Parameter(torch.zeros(classes)), []

    def forward(self, x, genotype, progress):
        self.seen.append((x, genotype, progress, self.optimizer.param_groups[0]["lr"], self.training))
        return self.logits.expand(len(x), -1), None


def test_epochs_go_on_with_the_schedules_and_take_other_genotypes_and_images():
    """By the published recipe but for 4 epochs, of 2 steps each; a genotype is a number here."""
    args = build_nas_dataset.parse_args("--epochs 4 --scorings 1 --device cpu".split())
    supernet = Watched(300)
    supernet.optimizer = torch.optim.SGD(supernet.parameters(), 1.0)
    for epoch in (0, 1):
        supernet.eval()  # as a scoring leaves it
        train_epoch(supernet, supernet.optimizer, white_images(300), range(10**6), args, epoch, device=CPU)
    x, genotypes, progress, rates, training = zip(*supernet.seen, strict=True)
    assert all(training) and [len(batch) for batch in x] == [128] * 4
    assert augmented_by(torch.cat(x)) == (4, 16)
    assert not x[0].equal(x[2])
    assert len(set(genotypes)) == 4
    assert progress == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert rates == pytest.approx([0.001 + 0.024 * math.cos(math.pi * i / 16) ** 2 for i in range(4)])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


def test_a_supernet_stopped_between_epochs_equals_one_never_stopped(images, tmp_path, monkeypatch):
    """The momentum and the scores of the first epoch included."""
    flags = "--dataset folder --layers 1 --channels 4 --batch_size 8 --device cpu --amp off --holdout 8 --pool_size 3"
    flags += " --epochs 2 --scorings 2 --score_images 4 --score_batch_size 4 --score_amp off --lr_max 0.1"

    def build(*flags) -> None:
        build_nas_dataset.main(parse_args(list(map(str, flags))))

    def stop_in_second_epoch(*args):
        if args[5] == 1:
            raise KeyboardInterrupt
        return train_epoch(*args)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    score_pool, scored_on = build_nas_dataset.score_pool, []
    with monkeypatch.context() as patch:
        patch.setattr(
            build_nas_dataset, "score_pool", lambda *args: scored_on.append(args[2][0][0]) or score_pool(*args)
        )
        build(*flags.split(), "--data", images, "--output_dir", whole)
    first, second = scored_on
    assert not any(a.equal(b) for a in first for b in second)  # each scoring on other images
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_nas_dataset, "train_epoch", stop_in_second_epoch)
        build(*flags.split(), "--data", images, "--output_dir", stopped)
    assert load_checkpoint(stopped, "supernet")["epoch"] == 1
    build("--resume", stopped)
    expected, resumed = load_checkpoint(whole, "supernet"), load_checkpoint(stopped, "supernet")
    assert resumed["scores"].equal(expected["scores"])
    assert all(resumed["supernet"][name].equal(weights) for name, weights in expected["supernet"].items())
    (group,) = expected["optimizer"]["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 3e-4)
    momentum = [state["momentum_buffer"] for state in expected["optimizer"]["state"].values()]
    assert len(momentum) == len(group["params"]) and any(part.any() for part in momentum)
    assert not all(part.any() for part in momentum)  # zeros where a parameter was not trained
    assert read_records(stopped / "nasdata.jsonl") == read_records(whole / "nasdata.jsonl")


@pytest.mark.parametrize("in_recording", [False, True])
def test_a_lack_of_gpu_memory_is_one_line(images, tmp_path, monkeypatch, capsys, in_recording):
    def out_of_memory(*args):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        finally:
            if in_recording:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    monkeypatch.setattr(build_nas_dataset, "train_epoch", out_of_memory)
    flags = "--dataset folder --layers 1 --channels 4 --batch_size 8 --device cpu --holdout 8 --pool_size 3 --epochs 1"
    flags += " --scorings 1 --score_images 4 --score_batch_size 4"
    flags += f" --data {images} --output_dir {tmp_path / 'run'}"
    with pytest.raises(SystemExit) as end:
        build_nas_dataset.main(parse_args(flags.split()))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of GPU memory: " in line and "--no-cuda_graphs" in line


def test_a_records_accuracy_is_the_mean_of_all_scorings(tmp_path):
    pool = random_pool(3, seed=0)
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.7, 0.1], [0.3, 0.6, 0.2]])
    seconds = {"training": 1.4, "scoring": 2.6}
    build_nas_dataset.write_dataset(tmp_path / "nasdata.jsonl", pool, scores, {}, white_images(5), seconds)
    records = read_records(tmp_path / "nasdata.jsonl")
    assert [record.accuracy for record in records] == pytest.approx([0.2, 0.6, 0.2])
    assert [(record.params, record.macs) for record in records] == [genotype_cost(genotype) for genotype in pool]
    header = json.loads((tmp_path / "nasdata.jsonl").read_text().splitlines()[0])
    assert header["training_images"] == 5 and header["seconds"] == {"training": 1, "scoring": 3}
    assert header["summary"]["accuracy_mean"] == pytest.approx(1 / 3)
    assert header["summary"]["repeatability_tau"] == pytest.approx([1 / 3, 1])
