"""train_cifar.py, started as a user would, on a tiny folder of images."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_training import (
    NO_THREADS_LEFT,
    ROOT,
    TINY,
    TWO_PROCESSES,
    make_images,
    refused,
    start,
    threads,
    words,
)

import train_cifar
from genotypes import GENOTYPES
from models.cost import genotype_cost
from models.export import load_network
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from training.images import ImageSet
from training.steps import network_from_checkpoint

TWO_EPOCHS = "--data IMAGES --epochs 2 --holdout 8 --arch NAG_ENSEMBLE_B"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "trained here"
    return folder, start("train_cifar.py", *TINY, *words(TWO_EPOCHS, IMAGES=images), "--output_dir", folder)


def train(*flags) -> None:
    """Run the script in this process."""
    train_cifar.main(train_cifar.parse_args(list(map(str, flags))))


def load_data(images: Path, *flags) -> tuple[ImageSet, ImageSet, ImageSet]:
    """(training, held-out, test) images."""
    args = train_cifar.parse_args([*TINY, "--data", str(images), *map(str, flags)])
    return train_cifar.load_data(args, torch.device("cpu"))


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
    following = shlex.split(output[output.index("next: ") :])  # a path with a space
    assert following[1:] == ["python", "train_cifar.py", "--evaluate", str(folder / "checkpoint.pt")]


def test_weights_that_turn_nan_in_the_last_step_of_an_epoch_do_not_overwrite_the_checkpoint(
    capsys, images, tmp_path, monkeypatch
):
    train_epoch = train_cifar.train_epoch

    def last_step_diverges(step, images, args, epoch, *rest):
        values = train_epoch(step, images, args, epoch, *rest)
        if epoch == 1:
            next(step.network.parameters()).data[0] = float("inf")
        return values

    monkeypatch.setattr(train_cifar, "train_epoch", last_step_diverges)
    flags = [*TINY, *words(TWO_EPOCHS, IMAGES=images), "--output_dir", tmp_path]
    line = refused(capsys, train_cifar, flags)
    assert line.endswith("the weights are not all finite numbers after epoch 2; a smaller --lr_max may help")
    state = load_checkpoint(tmp_path, "cifar")
    assert state["epoch"] == 1 and all(weight.isfinite().all() for weight in state["network"].values())
    assert not (tmp_path / "result.json").exists()


def test_a_learning_rate_at_which_training_diverges_is_named(capsys, images, tmp_path):
    flags = [*TINY, *words(TWO_EPOCHS, IMAGES=images), *"--lr_max 1e30 --grad_clip 1e30 --output_dir".split(), tmp_path]
    assert "epoch 1; a smaller --lr_max may help" in refused(capsys, train_cifar, flags)
    assert not list(tmp_path.glob("*.pt"))


def test_test_images_are_used_once_after_the_last_epoch(run):
    folder, output = run
    assert len(re.findall("test error", output)) == 1
    assert "test" not in (folder / "metrics.jsonl").read_text()


def test_evaluate_gives_the_test_error_of_the_run(capsys, run, images, tmp_path):
    folder, output = run
    paths = {"CHECKPOINT": folder / "checkpoint.pt", "IMAGES": images, "OUT": tmp_path / "evaluated"}
    train(*TINY, *words("--evaluate CHECKPOINT --data IMAGES --output_dir OUT", **paths))
    pattern = r"test error ([\d.]+) ?%"
    assert re.search(pattern, capsys.readouterr().out).group(1) == re.search(pattern, output).group(1)


def test_a_resumed_run_equals_one_that_never_stopped(run, images, tmp_path, monkeypatch):
    """Stopped in the second of two epochs, then gone on with."""
    whole, _ = run
    folder = tmp_path / "stopped"
    train_epoch, epochs = train_cifar.train_epoch, []

    def stop_in_second_epoch(*args):
        epochs.append(args)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_cifar, "train_epoch", stop_in_second_epoch)
        train(*TINY, *words(TWO_EPOCHS, IMAGES=images), "--output_dir", folder)
    assert load_checkpoint(folder, "cifar")["epoch"] == 1
    train("--resume", folder)

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


# ----------------------------------------------------------------------------------------------- several processes

# A small learning rate: a step multiplies differences of rounding, the more so the larger it is.
PLAIN = """
    --schedule_epochs 4 --holdout 7 --keep_prob 1 --drop_path_keep_prob 1 --lr_max 0.001 --arch NAG_ENSEMBLE_B
""".split()
PLAIN = [*TINY, *PLAIN]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def one_thread():
    """As torchrun gives each process: with another number, sums are rounded otherwise."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def two(images, tmp_path_factory) -> tuple[Path, str]:
    """A finished run of two processes, without dropout and drop path, and what they printed."""
    folder = tmp_path_factory.mktemp("two") / "run"
    flags = [*PLAIN, "--data", images, "--epochs", 2, "--output_dir", folder]
    return folder, start(*NO_THREADS_LEFT, "train_cifar.py", *flags, processes=2)


def test_two_processes_equal_one_that_accumulates(two, images, tmp_path, one_thread):
    """The same parts of the same batches: losses and weights to rounding. Running statistics are averaged instead."""
    folder, output = two
    train(*PLAIN, "--data", images, "--epochs", 2, "--accumulate", 2, "--output_dir", tmp_path)
    assert losses(folder) == pytest.approx(losses(tmp_path), rel=1e-5)
    ours, theirs = load_checkpoint(folder, "cifar"), load_checkpoint(tmp_path, "cifar")
    for name, weights in ours["network"].items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weights, theirs["network"][name], rtol=1e-3, atol=1e-5, msg=name)
    assert "2 processes" in output and output.count("epoch 1/2") == output.count("test error") == 1


def test_two_processes_evaluate_every_image_once(two, images):
    """20 test and 7 held-out images: one process counts the same on the network that two have left."""
    folder, _ = two
    _, held_out, test = load_data(images, "--holdout", 7)
    network = network_from_checkpoint(load_checkpoint(folder, "cifar"), folder, torch.device("cpu"))
    result = json.loads((folder / "result.json").read_text())
    assert result["test_accuracy"] == train_cifar.accuracy(network, test, 3, "off")
    assert result["held_out_accuracy"] == train_cifar.accuracy(network, held_out, 3, "off")


def test_one_process_goes_on_with_a_run_of_two(two, images, tmp_path, one_thread):
    """In the same parts: three epochs of one process are the two of two processes and one more."""
    folder = Path(shutil.copytree(two[0], tmp_path / "resumed"))
    train("--resume", folder, "--epochs", 3, "--accumulate", 2)
    train(*PLAIN, "--data", images, "--epochs", 3, "--accumulate", 2, "--output_dir", tmp_path / "whole")
    assert len(losses(folder)) == 3
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


# --------------------------------------------------------------------------------------------- ensemble and export


@pytest.mark.parametrize("voting", ["hard", "soft"])
def test_an_ensemble_has_the_error_of_its_votes_and_the_sum_of_params(run, two, images, tmp_path, voting):
    folders = [run[0], two[0], run[0]]
    train(
        "--evaluate", *folders, "--voting", voting, "--eval_batch_size", 7, "--output_dir", tmp_path, "--device", "cpu"
    )
    result = json.loads((tmp_path / "evaluation.json").read_text())
    logits = []
    for folder, member in zip(folders, result["members"], strict=True):
        alone = json.loads((folder / "result.json").read_text())
        assert (member["test_error"], member["params"]) == (alone["test_error"], alone["params"])
        state = load_checkpoint(folder, "cifar")
        test = load_data(images)[2]
        x = (test.images / 255 - torch.tensor(state["mean"])[:, None, None]) / torch.tensor(state["std"])[:, None, None]
        network = network_from_checkpoint(state, folder, torch.device("cpu"))
        with torch.no_grad():
            logits.append(network(x.float())[0])
    right = (train_cifar.vote(torch.stack(logits), voting) == test.labels).float().mean().item()
    assert result["test_accuracy"] == pytest.approx(right)
    assert result["voting"] == voting
    assert result["params"] == sum(member["params"] for member in result["members"])


class IsBright(torch.nn.Module):
    """Class 1 where the mean pixel, normalised, is above 1."""

    def forward(self, x):
        logit = x.mean((1, 2, 3)) - 1
        return torch.stack([-logit, logit], 1), None


def test_each_member_of_an_ensemble_sees_images_normalised_as_in_its_training():
    """Members that find a pixel bright above 0.3, 0.5 and 0.7 of images of 0.2, 0.4 and 0.6."""
    pixels = torch.tensor([51, 102, 153], dtype=torch.uint8)[:, None, None, None].expand(3, 3, 32, 32)
    test = ImageSet(pixels, torch.ones(3, dtype=torch.long), ["dark", "bright"], (0.0,) * 3, (0.9,) * 3)
    states = [{"mean": [mean] * 3, "std": [std] * 3} for mean, std in ((0.1, 0.2), (0.2, 0.3), (0.5, 0.2))]
    args = argparse.Namespace(eval_batch_size=2, amp="off", voting="hard")
    assert train_cifar.count_correct([IsBright()] * 3, states, test, args) == [2, 1, 0, 1]


def test_an_exported_network_has_the_test_error_of_the_run(run, images, tmp_path, capsys):
    path = tmp_path / "network.safetensors"
    train("--evaluate", run[0], "--export", path, "--output_dir", tmp_path, "--device", "cpu")
    assert str(path) in capsys.readouterr().out
    known = json.loads((tmp_path / "network.safetensors.json").read_text())
    assert known["classes"] == ["dark", "light"]
    test = load_data(images)[2]
    test.mean, test.std = known["mean"], known["std"]
    accuracy = train_cifar.accuracy(load_network(path), test)
    assert accuracy == json.loads((run[0] / "result.json").read_text())["test_accuracy"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--evaluate RUN RUN --export x.onnx", "expected one checkpoint"),
        ("--evaluate RUN --export x.pth", ".safetensors, .onnx, .pt2"),
        ("--export x.onnx", "needs --evaluate"),
        ("--evaluate RUN SMALLER", "--image_size 16"),
        ("--evaluate RUN missing.pt", "no such checkpoint"),
        ("--evaluate RUN --arch NAG_HIGH_ACC", "--arch: NAG_HIGH_ACC is another genotype than that of"),
        ("--evaluate RUN --layers 3", "--layers: "),
        ("--evaluate RUN --voting loud", "--voting"),
        ("--evaluate RUN --voting soft", "--voting: needs --evaluate with several"),
        ("--evaluate RUN --export RUN/config.json/x.pt2", "--export: expected a folder"),
        ("--accumulate 3", "--batch_size: expected at least 2 for each of 3 equal parts"),
        ("--accumulate 8", "--batch_size: expected at least 2 for each of 8 equal parts"),
        ("--optimizer adam", "--optimizer"),
        ("--sync_bn", "CUDA devices only"),
    ],
)
def test_bad_flags_of_ensembles_exports_and_steps_are_refused(capsys, run, images, tmp_path, flags, expected):
    state = load_checkpoint(run[0], "cifar")
    state["args"]["image_size"] = 16
    save_checkpoint(tmp_path / "smaller.pt", "cifar", state)
    paths = {"RUN": run[0], "SMALLER": tmp_path / "smaller.pt", "RUN/config.json/x.pt2": run[0] / "config.json/x.pt2"}
    paths |= {"IMAGES": images, "OUT": tmp_path / "out"}
    argv = [*TINY, *words("--data IMAGES --output_dir OUT " + flags, **paths)]
    assert expected in refused(capsys, train_cifar, argv)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--arch NAG_HIGH_ACCURACY", "NAG_HIGH_ACC, NAG_ENSEMBLE_A"),
        ("--arch missing.json", "missing.json"),
        ("--epochs 0", "--epochs"),
        ("--keep_prob 1.5", "--keep_prob"),
        ("--image_size 16 --auxiliary_weight 0.4", "29 to 40"),
        ("--holdout 48", "--holdout"),
        ("--batch_size 100", "48 training images"),
    ],
)
def test_bad_flags_are_refused_by_name_and_nothing_is_written(capsys, images, tmp_path, flags, expected):
    paths = {"IMAGES": images, "OUT": tmp_path / "out"}
    argv = [*TINY, *words("--data IMAGES --output_dir OUT " + flags, **paths)]
    assert expected in refused(capsys, train_cifar, argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none(capsys, images, tmp_path):
    paths = {"IMAGES": images, "OUT": tmp_path / "out"}
    line = refused(capsys, train_cifar, [*TINY, *words("--data IMAGES --output_dir OUT --device cuda", **paths)])
    assert "cuda is not available" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--data", "--output_dir"])
def test_what_the_first_of_two_processes_refuses_ends_both_with_one_line(images, tmp_path, flag):
    (tmp_path / "checkpoint.pt").write_text("")  # so the folder holds another run, and no images
    flags = {"--data": images, "--output_dir": tmp_path / "out"} | {flag: tmp_path}
    flags = [word for pair in flags.items() for word in pair]
    command = [sys.executable, *TWO_PROCESSES, "train_cifar.py", *TINY, *flags]
    result = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode and not (tmp_path / "out").exists()
    assert result.stderr.count(f"train_cifar.py: error: {flag}") == 1
    assert result.stderr.count("Traceback (most recent call last)") == 1  # of torchrun itself
    assert "terminate called" not in result.stderr


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_of_another_kind_is_refused(capsys, images, tmp_path, flag):
    save_checkpoint(tmp_path / "gan.pt", "gan", {})
    before = sorted(tmp_path.rglob("*"))
    assert "expected kind cifar" in refused(capsys, train_cifar, [*TINY, "--data", images, flag, tmp_path / "gan.pt"])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_of_other_weights_is_refused(capsys, run, images, tmp_path, flag):
    state = load_checkpoint(run[0], "cifar")
    state["network"].popitem()
    save_checkpoint(tmp_path / "checkpoint.pt", "cifar", state)
    line = refused(capsys, train_cifar, [flag, tmp_path / "checkpoint.pt"])
    assert f"{flag}: {tmp_path / 'checkpoint.pt'} is of another version of these networks" in line
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_an_evaluation_is_not_written_over(capsys, run, tmp_path):
    flags = ["--evaluate", run[0], "--output_dir", tmp_path, "--device", "cpu"]
    train(*flags)
    before = (tmp_path / "evaluation.json").read_bytes()
    line = refused(capsys, train_cifar, flags)
    assert f"--output_dir: {tmp_path} holds another run (evaluation.json)" in line
    assert (tmp_path / "evaluation.json").read_bytes() == before


@pytest.mark.parametrize("classes", [{"dark": 60, "bright": 180}, {"dark": 60, "light": 180, "medium": 120}])
@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_images_of_other_classes_are_refused(capsys, run, tmp_path, classes, flag):
    other = make_images(tmp_path / "other", classes)
    for path in other.glob("train/*/[2-9].png"):  # too few to hold 8 out, but that is not what is wrong
        path.unlink()
    for path in other.glob("train/*/??.png"):
        path.unlink()
    shutil.copy(run[0] / "checkpoint.pt", tmp_path)
    flags = ["--data", other, flag, tmp_path / "checkpoint.pt"]
    line = refused(capsys, train_cifar, flags)
    assert "--data" in line
    assert "class" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "other"]
