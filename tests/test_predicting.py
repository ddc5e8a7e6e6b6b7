"""--predict: classes of single files, as the networks have them in an evaluation, and what is said of broken ones."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_training import refused
from test_own_images import SMALL, make_tree
from test_scripts import run

import train_cifar
import train_imagenet
from plumbing.checkpoint_files import load_checkpoint
from training.image_stream import EvalStream, open_images
from training.images import load_images
from training.predicting import Prediction, find_images, write_predictions
from training.steps import network_from_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return make_tree(tmp_path_factory.mktemp("photos") / "photos", dict.fromkeys("abcdef", 6))


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory) -> Path:
    """Two networks for small images, and one for large ones."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        run(
            "train_cifar.py",
            *SMALL,
            "--data",
            photos,
            "--epochs",
            2,
            "--seed",
            seed,
            "--output_dir",
            folder / str(seed),
        )
    flags = "--layers 1 --channels 4 --image_size 32 --workers 0 --epochs 1 --device cpu --amp off".split()
    run("train_imagenet.py", *flags, "--data", photos, "--output_dir", folder / "large")
    return folder


def read(folder: Path) -> list[dict]:
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def network_of(folder: Path, kind: str):
    state = load_checkpoint(folder, kind)
    return network_from_checkpoint(state, folder, CPU).eval()


def check_rows(rows: list[dict], logits: torch.Tensor, classes: list[str]) -> None:
    """Whether predictions without a vote are those of logits (N, classes)."""
    for row, probabilities in zip(rows, logits.softmax(1), strict=True):
        assert row["prediction"] == row["class_1"] and row["probability"] == row["probability_1"] and not row["error"]
        told = [float(row[f"probability_{k}"]) for k in range(1, 6)]
        assert told == pytest.approx(probabilities.sort(descending=True).values[:5].tolist(), abs=1e-5)
        named = [classes.index(row[f"class_{k}"]) for k in range(1, 6)]  # some may be tied but for rounding
        assert len({*named}) == 5 and told == pytest.approx(probabilities[named].tolist(), abs=1e-5)


@torch.no_grad()
def test_predictions_are_those_of_an_evaluation_of_the_same_files(photos, runs, tmp_path):
    """All the images, in the order of their names, as load_images has them."""
    run("train_cifar.py", "--evaluate", runs / "1", "--predict", photos, "--eval_batch_size", 7, "--device", "cpu",
        "--output_dir", tmp_path / "out")  # fmt: skip
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"]  # nothing was measured
    _, images = load_images("folder", photos, 8, tmp_path / "cache", test_split=(1.0, 0))
    state = load_checkpoint(runs / "1", "cifar")
    mean, std = (torch.tensor(state[name])[:, None, None] for name in ("mean", "std"))
    rows = read(tmp_path / "out")
    assert [row["file"] for row in rows] == sorted(str(path) for path in photos.rglob("*.jpg"))
    check_rows(rows, network_of(runs / "1", "cifar")((images.images / 255 - mean) / std)[0], state["classes"])


@torch.no_grad()
def test_predictions_on_large_images_are_those_of_an_evaluation(photos, runs, tmp_path):
    flags = ["--predict", photos, "--device", "cpu", "--output_dir", tmp_path / "out"]
    run("train_imagenet.py", "--evaluate", runs / "large" / "best.pt", *flags)
    _, images = open_images(photos, (1.0, 0))
    (batch,) = [x for x, _ in EvalStream(images, 32, 100).epoch(0, CPU)]
    rows = read(tmp_path / "out")
    assert [row["file"] for row in rows] == sorted(str(path) for path in photos.rglob("*.jpg"))
    check_rows(rows, network_of(runs / "large" / "best.pt", "imagenet")(batch)[0], images.classes)


def test_with_data_the_error_is_measured_too_and_agrees_with_the_predictions(photos, runs, tmp_path):
    both = [runs / "1", runs / "2"]
    flags = [
        "--data",
        photos,
        "--test_share",
        1,
        "--predict",
        photos,
        "--device",
        "cpu",
        "--output_dir",
        tmp_path / "out",
    ]
    run("train_cifar.py", "--evaluate", *both, *flags)
    right = [row["prediction"] == Path(row["file"]).parent.name for row in read(tmp_path / "out")]
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["voting"] == "hard" and result["test_accuracy"] == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("voting", ["hard", "soft"])
@torch.no_grad()
def test_several_networks_vote_and_probabilities_are_theirs(photos, runs, tmp_path, voting):
    flags = ["--predict", photos / "a" / "00.jpg", "--voting", voting, "--device", "cpu", "--output_dir", tmp_path]
    run("train_cifar.py", "--evaluate", runs / "1", runs / "2", *flags)
    (row,) = read(tmp_path)
    _, images = load_images("folder", photos, 8, tmp_path / "cache", test_split=(1.0, 0))
    logits = []
    for name in ("1", "2"):
        state = load_checkpoint(runs / name, "cifar")
        mean, std = (torch.tensor(state[name])[:, None, None] for name in ("mean", "std"))
        logits.append(network_of(runs / name, "cifar")((images.images[:1] / 255 - mean) / std)[0][0])
    logits = torch.stack(logits)
    expected = logits.mean(0).softmax(0) if voting == "soft" else logits.softmax(1).mean(0)
    chosen = state["classes"].index(row["prediction"])
    assert float(row["probability"]) == pytest.approx(expected[chosen].item(), abs=1e-5)
    assert float(row["probability_1"]) == pytest.approx(expected.max().item(), abs=1e-5)


@pytest.mark.parametrize(("script", "name"), [("train_cifar.py", "1"), ("train_imagenet.py", "large")])
def test_a_photo_that_lies_on_its_side_is_turned_upright(photos, runs, tmp_path, script, name):
    upright = Image.open(photos / "a" / "00.jpg").convert("RGB")
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    (tmp_path / "in").mkdir()
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "lying.png", exif=exif)
    shutil.copy(tmp_path / "upright.png", tmp_path / "in")
    flags = ["--predict", tmp_path / "in", "--device", "cpu", "--output_dir", tmp_path / "out"]
    run(script, "--evaluate", runs / name, *flags)
    lying, straight = read(tmp_path / "out")
    assert {**lying, "file": ""} == {**straight, "file": ""}


@pytest.mark.parametrize(("script", "name"), [("train_cifar.py", "1"), ("train_imagenet.py", "large")])
def test_a_broken_image_is_named_and_the_others_are_classified(photos, runs, tmp_path, script, name):
    folder = tmp_path / "in" / "deep" / "er"
    folder.mkdir(parents=True)
    shutil.copy(photos / "a" / "00.jpg", folder / "good.jpg")
    (tmp_path / "in" / "cut, off.jpg").write_bytes((photos / "a" / "00.jpg").read_bytes()[:200])
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / ".hidden.jpg").write_text("no image")
    os.mkfifo(tmp_path / "in" / "pipe.png")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "in")
    flags = ["--predict", tmp_path / "in", "--device", "cpu", "--output_dir", tmp_path / "out"]
    output = run(script, "--evaluate", runs / name, *flags)
    assert "warning: 2 of 3 files cannot be read, see the column error" in output
    rows = {Path(row["file"]).name: row for row in read(tmp_path / "out")}
    assert list(rows) == ["cut, off.jpg", "good.jpg", "pipe.png"]
    for broken in ("cut, off.jpg", "pipe.png"):
        row = dict(rows[broken])
        assert row.pop("error") and not any(value for key, value in row.items() if key != "file")
    assert rows["pipe.png"]["error"] == "not a regular file" and rows["good.jpg"]["prediction"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--evaluate RUN --predict BROKEN", "--predict: none of 1 files can be read"),
        ("--evaluate RUN --predict missing.jpg", "--predict: no such file or folder: missing.jpg"),
        ("--evaluate RUN --predict EMPTY", "--predict: no image (.jpg"),
        ("--predict BROKEN", "--predict: needs --evaluate CHECKPOINT"),
    ],
)
@pytest.mark.parametrize(("script", "name"), [(train_cifar, "1"), (train_imagenet, "large")])
def test_what_cannot_be_predicted_is_one_line_and_nothing_is_written(
    capsys, runs, tmp_path, script, name, flags, expected
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    paths = {"RUN": runs / name, "BROKEN": tmp_path / "broken.jpg", "EMPTY": tmp_path / "empty"}
    argv = [paths.get(word, word) for word in flags.split()]
    argv += ["--device", "cpu", "--output_dir", tmp_path / "out"]
    assert expected in refused(capsys, script, argv)
    assert not (tmp_path / "out").exists()


def test_predictions_are_not_written_over(capsys, photos, runs, tmp_path):
    flags = ["--evaluate", runs / "1", "--predict", photos / "a", "--device", "cpu", "--output_dir", tmp_path]
    run("train_cifar.py", *flags)
    assert "holds another run (predictions.csv)" in refused(capsys, train_cifar, flags)


def test_files_and_classes_of_any_name_make_a_table_that_can_be_read(tmp_path):
    rows = [Prediction('a "quoted", \n name.jpg', 0, 0.75, ((0, 0.75), (1, 0.25))), Prediction("\udce9.jpg", error="x")]
    write_predictions(tmp_path / "predictions.csv", rows, ["café", "tea"])
    first, second = read(tmp_path)
    assert (first["file"], first["prediction"], first["class_2"]) == ('a "quoted", \n name.jpg', "café", "tea")
    assert (second["file"], second["error"]) == ("\\udce9.jpg", "x") and "class_3" not in second


def test_a_file_is_taken_whatever_its_name(tmp_path):
    (tmp_path / "photo").touch()
    assert find_images(tmp_path / "photo") == [tmp_path / "photo"]
