"""One's own images: class folders that are split, flags that fit small sets, the commands of docs/own_images.md."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_training import ROOT, TINY, refused
from test_scripts import run

import train_cifar
import train_imagenet
from build_nas_dataset import eval_archs
from build_nas_dataset.build_nas_dataset import parse_args as supernet_args
from build_nas_dataset.candidates import TRAINED_ALIKE
from plumbing.checkpoint_files import load_checkpoint
from training import own_images
from training.cifar import load_data
from training.image_parts import list_parts
from training.images import load_images

CPU = torch.device("cpu")
COUNTS = {"cat": 10, "dog": 15, "owl": 7}
SMALL = [*TINY[2:6], *"--image_size 8 --device cpu --amp off".split()]  # one layer, four channels


def make_tree(folder: Path, counts: dict[str, int] = COUNTS) -> Path:
    """JPEG files of about 24 x 16 pixels in class folders, each of a brightness of its own."""
    rng = np.random.default_rng(0)
    for k, (name, n) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.normal(60 + 60 * k, 30, (16, 24 + i % 3, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.jpg")
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("tree") / "photos")


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory) -> tuple[Path, str]:
    """A finished run on a copy of the tree beside it, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tree, folder / "photos")
    flags = ["--data", folder / "photos", "--epochs", 1, "--output_dir", folder / "run"]
    return folder, run("train_cifar.py", *SMALL, *flags)


# ------------------------------------------------------------------------------------------ training and test images


def test_a_plain_tree_is_split_within_each_class(tree):
    train, test = list_parts(tree, 0.2, 1)
    assert train.classes == test.classes == ["cat", "dog", "owl"]
    assert test.labels().bincount().tolist() == [2, 3, 1] and train.labels().bincount().tolist() == [8, 12, 6]
    assert not train.members.keys() & test.members.keys()
    everything = {path.relative_to(tree).as_posix() for path in tree.rglob("*.jpg")}
    assert train.members.keys() | test.members.keys() == everything


def test_the_split_is_fixed_by_its_seed_and_spread_over_the_files(tree):
    tests = [frozenset(list_parts(tree, 0.2, seed)[1].members) for seed in range(20)]
    assert frozenset(list_parts(tree, 0.2, 3)[1].members) == tests[3]
    assert len(set(tests)) > 15 and len(frozenset.union(*tests)) > 25  # of 32 files
    assert len({list_parts(tree, 0.2, seed)[0].split.checksum for seed in range(20)}) == len(set(tests))


def test_a_zip_and_its_folder_are_split_alike_and_pixels_go_with_their_labels(tree, tmp_path):
    zipped = shutil.make_archive(
        str(tmp_path / "photos"), "zip", tree.parent, "photos"
    )  # with the folder's name on top
    ours = load_images("folder", tree, 8, tmp_path, test_split=(0.25, 5))
    theirs = load_images("folder", zipped, 8, tmp_path, test_split=(0.25, 5))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
        for label, brightness in enumerate((60, 120, 180)):
            assert a.images[a.labels == label].float().mean() == pytest.approx(brightness, abs=15)
    parts = list_parts(tree, 0.25, 5)
    assert [len(part) for part in ours] == [len(part.members) for part in parts]


def test_a_broken_image_is_left_out_of_the_side_that_it_is_on(tree, tmp_path, capsys):
    photos = Path(shutil.copytree(tree, tmp_path / "photos"))
    victim = next(name for name in list_parts(photos, 0.2, 1)[1].members if name.startswith("dog"))
    (photos / victim).write_bytes(b"no image")
    with pytest.raises(ValueError, match=victim):
        load_images("folder", photos, 8, tmp_path, test_split=(0.2, 1))
    train, test = load_images("folder", photos, 8, tmp_path, skip_bad=True, test_split=(0.2, 1))
    assert train.labels.bincount().tolist() == [8, 12, 6] and test.labels.bincount().tolist() == [2, 2, 1]
    assert "1 of 6 images cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("counts", "flags", "expected"),
    [
        ({"cat": 9, "dog": 1}, "", "--test_share 0.2 of 1 images leaves none to test on in class dog"),
        ({"cat": 9, "dog": 2}, "--test_share 0.8", "--test_share 0.8 of 2 images leaves none to train on in class dog"),
        ({"Training": 9, "Testing": 9}, "", "Testing, Training: parts rather than classes, expected"),
        ({"cat": 9}, "", "expected two or more class folders with images, found only cat"),
        ({"cat": 9, "dog": 9}, "--test_share 1", "--test_share: expected less than 1"),
        ({"cat": 9, "dog": 9}, "--test_share 0", "--test_share: expected a number above 0"),
        ({"cat": 9, "dog": 9}, "--test_share 0.2 --dataset cifar10", "--test_share: expected with --dataset folder"),
        ({"train/cat": 3, "train/dog": 3, "test/cat": 3, "test/dog": 3}, "--test_share 0.2", "test images of its own"),
        ({"train/cat": 3, "train/dog": 3}, "", "holds no test or val"),
    ],
)
def test_trees_that_cannot_be_split_are_refused_by_one_line(capsys, tmp_path, counts, flags, expected):
    data = make_tree(tmp_path / "photos", counts)
    dataset = [] if "--dataset" in flags else ["--dataset", "folder"]
    argv = [*dataset, "--data", data, *flags.split(), "--output_dir", tmp_path / "o"]
    assert expected in refused(capsys, train_cifar, [*SMALL, *argv])
    assert not (tmp_path / "o").exists()
    if not dataset or "less than" in expected or "above" in expected:
        return
    flags = ["--data", data, "--image_size", 32, *flags.split(), "--output_dir", tmp_path / "o"]
    assert expected in refused(capsys, train_imagenet, flags)


def test_a_run_records_the_split_and_goes_on_and_is_evaluated_with_it(trained, tmp_path, capsys):
    folder, output = trained
    assert "photos has no test part: 6 of 32 images are tested on" in output
    assert "(--test_share 0.2 --test_seed 1997)" in output and "26 training, 0 held-out" in output
    saved = load_checkpoint(folder / "run", "cifar")["args"]
    for args in (saved, json.loads((folder / "run" / "config.json").read_text())["args"]):
        assert (args["test_share"], args["test_seed"], args["batch_size"]) == (0.2, 1997, 13)
    result = json.loads((folder / "run" / "result.json").read_text())
    evaluated = run("train_cifar.py", "--evaluate", folder / "run", "--device", "cpu", "--output_dir", tmp_path / "e")
    assert "6 of 32 images are tested on" in evaluated
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text())["test_error"] == result["test_error"]

    resumed = shutil.copytree(folder / "run", tmp_path / "resumed")
    assert "6 of 32" in run("train_cifar.py", "--resume", resumed)
    moved = shutil.copytree(folder / "photos", tmp_path / "moved")
    flags = ["--data", moved, "--device", "cpu", "--output_dir", tmp_path / "m"]
    assert "6 of 32" in run("train_cifar.py", "--evaluate", folder / "run", *flags)
    (moved / "cat" / "00.jpg").rename(moved / "cat" / "99.jpg")
    for flag in ("--evaluate", "--resume"):  # now other images would be split off
        line = refused(capsys, train_cifar, [flag, resumed, "--data", moved])
        assert f"--data: the images of {moved} are not those that the run was started with" in line
    flags = ["--data", moved, "--test_share", 1, "--device", "cpu", "--output_dir", tmp_path / "all"]
    assert "32 of 32 images are tested on" in run("train_cifar.py", "--evaluate", resumed, *flags)


def test_other_seeds_of_a_run_have_the_same_test_images(tree, tmp_path):
    tests = []
    for seed in (1, 2):
        args = train_cifar.parse_args([*SMALL, *map(str, ("--data", tree, "--cache_dir", tmp_path, "--seed", seed))])
        tests.append(load_data(args, CPU)[2].images)
    assert torch.equal(*tests)


def test_cifar_is_not_downloaded_into_ones_own_images(tree, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert own_images.holds_images(tree) and not own_images.holds_images(make_tree(tmp_path / "a", {}).parent)
    assert train_cifar.parse_args(["--data", str(tree)]).dataset == "folder"
    assert supernet_args(["--data", str(tree)]).dataset == "folder"
    assert train_cifar.parse_args(["--data", str(tree), "--dataset", "cifar10"]).dataset == "cifar10"
    assert train_cifar.parse_args(["--data", str(ROOT / "data")]).dataset == "cifar10"


# --------------------------------------------------------------------------------------- defaults that fit few images


@pytest.mark.parametrize(
    "case",  # images, batch size, parts, expected batch size
    """
    180 96 1 20, 144 96 1 18, 30 96 1 15, 97 96 1 16, 149 96 1 21, 192 96 1 24, 180 96 4 20, 31 96 2 30, 1 96 1 96,
    1000 96 1 90, 960 96 1 96, 5 96 4 96, 2000 96 1 96, 50000 96 1 96, 1281167 256 8 256, 45000 128 1 128
    """.split(","),
)
def test_a_batch_fits_few_images_and_no_others(case):
    images, batch_size, parts, expected = map(int, case.split())
    assert own_images.fit_batch(images, batch_size, parts) == expected


def test_a_fitted_batch_leaves_over_few_images():
    for n in range(2, 2500):
        size = own_images.fit_batch(n, 96)
        assert 2 <= size <= 96 and n % size <= max(1, 0.05 * n), n
        assert n < 100 or n // size >= 4, n  # steps


@pytest.mark.parametrize(
    ("counts", "holdout", "expected"),
    [((60, 60, 60), 5000, 36), ((5, 5, 5), 5000, 6), ((100, 4), 5000, 4), ((5000,) * 10, 5000, 5000), ((4, 4), 2, 2)],
)
def test_a_holdout_fits_few_images_and_leaves_half_of_the_smallest_class(counts, holdout, expected):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    assert own_images.fit_holdout(labels, len(counts), holdout) == expected


def test_a_batch_size_that_was_given_is_kept_and_the_images_left_over_are_told(tree, tmp_path, capsys):
    flags = [*SMALL, *map(str, ("--data", tree, "--cache_dir", tmp_path))]
    args = train_cifar.parse_args([*flags, "--batch_size", "12"])
    load_data(args, CPU)
    assert args.batch_size == 12 and "unsettled" not in vars(args)
    assert "--batch_size 12: 2 of 26 training images, others in every epoch, are left over" in capsys.readouterr().out
    args = train_cifar.parse_args([*flags, "--accumulate", "3"])
    load_data(args, CPU)
    assert args.batch_size == 24
    assert "--batch_size 24: an epoch has 1 step and leaves over 2 of 26 training images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parse", "flags", "sizes"),
    [
        (train_cifar.parse_args, "--image_size 41", "29 to 40"),
        (eval_archs.parse_args, "--image_size 28", "29 to 40"),
        (train_imagenet.parse_args, "--image_size 64", "193 to 256"),
        (supernet_args, "--image_size 16", "29 to 40"),
    ],
)
def test_images_that_the_auxiliary_head_does_not_take_switch_it_off(capsys, parse, flags, sizes):
    assert parse(flags.split()).auxiliary_weight == 0
    assert f"--auxiliary_weight 0: no auxiliary head, which takes images of {sizes} px" in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        parse([*flags.split(), "--auxiliary_weight", "0.4"])
    assert error.value.code == 2 and f"takes {sizes} px" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- commands that follow


def test_candidates_and_their_winner_are_trained_alike_on_the_same_images(tree, tmp_path):
    flags = "--num_archs 2 --epochs 1 --schedule_epochs 7 --lr_max 0.01 --test_seed 3 --skip_bad --cutout_size 2"
    archs = tmp_path / "archs.json"
    with open(ROOT / "data" / "nasdata.jsonl") as file:
        archs.write_text(json.dumps([json.loads(file.readline()) for _ in range(3)][1:]))
    paths = ["--data", tree, "--cache_dir", tmp_path / "cache", "--archs", archs, "--output_dir", tmp_path / "run"]
    output = run("build_nas_dataset.eval_archs.py", *SMALL, *paths, *flags.split())
    assert "--holdout 9: the default, 5000, is too much of 26 images" in output  # 3 a class
    following = shlex.split(output[output.index("next: ") :])
    assert following[1:3] == ["python", "train_cifar.py"]
    ours = eval_archs.parse_args([*SMALL, *map(str, paths), *flags.split()])
    theirs = train_cifar.parse_args(following[3:])
    for name in {*TRAINED_ALIKE, "batch_size"} - {"test_share"}:
        assert getattr(theirs, name) == getattr(ours, name), name
    assert (theirs.epochs, theirs.test_share) == (7, 0.2)


def test_a_supernet_of_a_small_tree_fits_itself_and_scores_its_own_held_out_images(tree, tmp_path):
    data = ["--data", tree, "--cache_dir", tmp_path / "cache"]
    flags = [*data, *"--layers 1 --channels 4 --image_size 8 --pool_size 12 --epochs 1 --device cpu --amp off".split()]
    output = run("-m", "build_nas_dataset", *flags, "--max_step", 6, "--output_dir", tmp_path / "small")
    assert f"next: python gan.py --nasbench_data {tmp_path / 'small' / 'nasdata.jsonl'} --max_step 6" in output
    output = run("-m", "build_nas_dataset", *flags, "--output_dir", tmp_path / "net")
    assert "6 of 32 images are tested on" in output and "--holdout 9" in output
    assert "--score_images 9 --score_batch_size 9" in output
    assert output.endswith(f"next: python gan.py --nasbench_data {tmp_path / 'net' / 'nasdata.jsonl'}\n")
    supernet = ["--supernet", tmp_path / "net" / "supernet.pt", *data, "--max_draws", 8, "--num_archs", 4]
    limits = ["--random", "--max_params", "100M", "--perf_label", 2]
    output = run("generate_archs.py", *supernet, *limits, "--output_dir", tmp_path / "cells")
    following = train_cifar.parse_args(shlex.split(output[output.index("python train_cifar.py") :])[2:])
    assert (following.dataset, following.data, following.image_size) == ("folder", str(tree), 8)
    assert (following.test_share, following.test_seed, following.auxiliary_weight) == (0.2, 1997, 0)


# ------------------------------------------------------------------------------------------------------ the page


SMALLER = {  # what the commands of the page are given beside their own flags
    "train_cifar.py": "--epochs 1 --layers 1 --channels 4 --image_size 8 --device cpu",
    "train_imagenet.py": "--epochs 1 --layers 1 --channels 4 --image_size 32 --workers 0 --device cpu",
    "build_nas_dataset.eval_archs": "--epochs 1 --layers 1 --channels 4 --image_size 8 --num_archs 2 --device cpu",
    "generate_archs.py": "--num_archs 4",
}


def commands_of(page: str) -> list[list[str]]:
    """The commands in the fenced blocks of a page, without their comments."""
    blocks = re.findall(r"^```\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


def test_every_command_of_the_page_runs_in_the_order_of_the_page(tmp_path, monkeypatch):
    make_tree(tmp_path / "photos", {"cat": 15, "dog": 15, "owl": 15})
    new = make_tree(tmp_path / "new", {"a": 2, "b": 1})
    shutil.move(new / "b" / "00.jpg", new / "holiday.jpg")
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    commands = commands_of((ROOT / "docs" / "own_images.md").read_text())
    assert len(commands) > 8
    for _, *words in commands:
        name = words[1] if words[0] == "-m" else words[0]
        small = [] if {"--evaluate", "--resume"} & {*words} else SMALLER[name].split()
        start = ["build_nas_dataset.eval_archs.py", *words[2:]] if words[0] == "-m" else words
        run(*start, *small)
    assert len(list(tmp_path.glob("runs/*/predictions.csv"))) >= 3
