"""train_imagenet.py, as a user starts it, on tiny trees of images and a tiny network."""

import json
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import small_training
import torch
from small_training import NO_THREADS_LEFT, PHOTO_CLASSES, ROOT, make_photos, start, threads, words

import train_imagenet
from generation.report.trained import read_predictions
from models.export import load_network
from models.network import ImageNetNetwork
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.console import pace
from training.image_stream import MEAN, STD, EvalStream, open_images
from training.images import normalize
from training.predicting import MOST_WRONG, Choices
from training.steps import network_from_checkpoint

CPU = torch.device("cpu")
TINY = """
    --layers 1 --channels 4 --image_size 32 --auxiliary_weight 0 --batch_size 8 --workers 0
    --device cpu --amp off --arch NAG_ENSEMBLE_B --lr 0.02 --epochs 2 --holdout 12
""".split()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def run(images, tmp_path_factory) -> tuple[Path, str]:
    """A finished run, and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "trained"
    return folder, start("train_imagenet.py", *TINY, "--data", images, "--output_dir", folder)


@pytest.fixture(autouse=True)
def one_thread():
    """As `start` gives each process: with another number, sums are rounded otherwise."""
    with threads(1):
        yield


def run_script(*flags) -> None:
    """Run the script in this process."""
    train_imagenet.main(train_imagenet.parse_args(list(map(str, flags))))
    assert pace.done == pace.expected  # what the time left is reckoned from


def train(*flags) -> None:
    run_script(*TINY, *flags)


def refused(capsys, *flags) -> str:
    """The last line on stderr of a training that must be refused."""
    return small_training.refused(capsys, train_imagenet, [*TINY, *flags])


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "data_wait")} for line in lines]


def same_weights(a: Path, b: Path) -> bool:
    ours, theirs = (load_checkpoint(path, "imagenet")["network"] for path in (a, b))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ------------------------------------------------------------------------------- what is chosen for the test images


def test_choices_are_those_of_all_batches_and_their_worst_images_have_the_pixels(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (60, 3, 4, 4), generator=rng, dtype=torch.uint8)
    labels, logits = torch.randint(3, (60,), generator=rng), torch.randn(60, 3, generator=rng)
    probability, chosen = logits.softmax(1).max(1)
    wrong = [i for i in range(60) if chosen[i] != labels[i]]
    expected = sorted(wrong, key=lambda i: -probability[i])[:MOST_WRONG]
    assert len(wrong) > MOST_WRONG
    parts = []
    for process in ((0, 25), (25, 60)):  # two processes, the second of two batches
        choices = Choices(MEAN, STD)
        for rows in torch.arange(*process).split(25):
            choices.add(normalize(images[rows], MEAN, STD), labels[rows], logits[rows])
        parts.append((choices.told, choices.worst, choices.images))
    monkeypatch.setattr("training.distributed.gathered", lambda own: parts)
    found = choices.arrays()
    assert found["labels"].tolist() == labels.tolist() and found["predicted"].tolist() == chosen.tolist()
    assert found["probability"].tolist() == pytest.approx(probability.tolist(), abs=1e-6)
    assert found["worst"].tolist() == expected
    assert (found["worst_images"] == images[expected].numpy()).all()


# ----------------------------------------------------------------------------------------------------- training


def test_a_training_that_diverges_keeps_the_last_good_checkpoints(capsys, images, tmp_path, monkeypatch):
    train_epoch = train_imagenet.train_epoch

    def last_step_diverges(step, stream, args, epoch, *rest):
        values = train_epoch(step, stream, args, epoch, *rest)
        if epoch == 1:
            next(step.network.parameters()).data[0] = float("nan")
        return values

    line = refused(capsys, "--data", images, "--lr", 1e30, "--grad_clip", 0, "--output_dir", tmp_path / "none")
    assert "epoch 1; a smaller --lr may help" in line and not list((tmp_path / "none").glob("*.pt"))
    monkeypatch.setattr(train_imagenet, "train_epoch", last_step_diverges)
    line = refused(capsys, "--data", images, "--output_dir", tmp_path)
    assert line.endswith("the weights are not all finite numbers after epoch 2; a smaller --lr may help")
    for name in ("checkpoint.pt", "best.pt"):
        state = load_checkpoint(tmp_path / name, "imagenet")
        assert state["epoch"] == 1 and all(weight.isfinite().all() for weight in state["network"].values())


def test_a_run_leaves_its_result_and_a_line_for_every_epoch(run):
    folder, output = run
    result = json.loads((folder / "result.json").read_text())
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["lr"] == pytest.approx(0.02 * 0.97)
    best = max(lines, key=lambda line: line["top1"])  # the first of equals
    assert result["best"]["epoch"] == best["step"] == load_checkpoint(folder / "best.pt", "imagenet")["epoch"]
    assert result["best"]["top1"] == best["top1"] and result["best"]["images"] == 12
    assert result["test"]["images"] == result["best"]["test"]["images"] == 24
    assert result["test"]["top5"] >= result["test"]["top1"]
    told = read_predictions(folder / "predictions.npz")
    assert (told["labels"] == told["predicted"]).mean() == pytest.approx(result["test"]["top1"])
    assert told["classes"].tolist() == sorted(PHOTO_CLASSES)
    assert re.search(r"waited for data \d+%", output)


def test_a_zip_trains_as_the_folder_it_was_made_of_with_any_number_of_workers(run, images, tmp_path):
    for part in ("train", "val"):
        with zipfile.ZipFile(tmp_path / f"{part}.zip", "w") as archive:
            for file in (images / part).rglob("*.jpg"):
                archive.write(file, file.relative_to(images).as_posix())
    train("--data", tmp_path, "--output_dir", tmp_path / "out", "--workers", 2)
    assert metrics(tmp_path / "out") == metrics(run[0])
    assert same_weights(tmp_path / "out", run[0])


def test_a_resumed_run_equals_one_that_never_stopped(run, images, tmp_path, monkeypatch):
    """Stopped in the second of two epochs, then gone on with."""
    folder, train_epoch, epochs = tmp_path / "stopped", train_imagenet.train_epoch, []

    def stop_in_second_epoch(*args):
        epochs.append(args)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_imagenet, "train_epoch", stop_in_second_epoch)
        train("--data", images, "--output_dir", folder)
    assert load_checkpoint(folder, "imagenet")["epoch"] == 1
    run_script("--resume", folder)
    assert same_weights(folder, run[0])
    assert metrics(folder) == metrics(run[0])
    ours, theirs = (json.loads((path / "result.json").read_text()) for path in (folder, run[0]))
    assert (ours["test"], ours["best"]) == (theirs["test"], theirs["best"])


def test_a_finished_run_goes_on_for_more_epochs(capsys, run, tmp_path, monkeypatch):
    """With the learning rate that a longer run would have had, and with drop path as at the end of its schedule."""
    folder, seen = Path(shutil.copytree(run[0], tmp_path / "longer")), []
    forward = ImageNetNetwork.forward
    monkeypatch.setattr(
        ImageNetNetwork,
        "forward",
        lambda self, x, progress=1.0: seen.append(float(progress)) or forward(self, x, progress),
    )
    run_script("--resume", folder, "--epochs", 3)
    state = load_checkpoint(folder, "imagenet")
    assert (state["epoch"], state["args"]["epochs"], state["args"]["schedule_epochs"]) == (3, 3, 2)
    assert metrics(folder)[:2] == metrics(run[0])
    assert metrics(folder)[2]["lr"] == pytest.approx(0.02 * 0.97**2) and set(seen) == {1.0}
    line = small_training.refused(capsys, train_imagenet, ["--resume", folder, "--epochs", 1])
    assert "--epochs: the run to resume has 3 epochs already, got 1" in line


def test_a_run_of_an_older_version_keeps_the_schedule_that_it_had(run, tmp_path):
    state = load_checkpoint(run[0], "imagenet")
    del state["args"]["schedule_epochs"]
    save_checkpoint(tmp_path / "checkpoint.pt", "imagenet", state)
    args = train_imagenet.parse_args(["--resume", str(tmp_path), "--epochs", "5"])
    assert (args.epochs, args.schedule_epochs) == (5, 2)


def test_the_best_epoch_is_measured_too_when_it_is_not_the_last(images, tmp_path, monkeypatch):
    real, selections = train_imagenet.accuracy, iter([0.9, 0.8])

    def accuracy(network, stream, *args):
        measured = real(network, stream, *args)
        return measured if len(stream.files) == 24 else {**measured, "top1": next(selections)}

    with monkeypatch.context() as patch:
        patch.setattr(train_imagenet, "accuracy", accuracy)
        train("--data", images, "--output_dir", tmp_path)
    best = json.loads((tmp_path / "result.json").read_text())["best"]
    state = load_checkpoint(tmp_path / "best.pt", "imagenet")
    assert (best["epoch"], best["top1"]) == (state["epoch"], state["best"]["top1"]) == (1, 0.9)
    stream = EvalStream(open_images(images)[1], 32, 24)
    assert best["test"] == real(network_from_checkpoint(state, tmp_path, CPU), stream, CPU, "off")


@pytest.mark.parametrize("epoch", [None, 7])
def test_a_run_is_not_resumed_without_its_best_network(capsys, run, tmp_path, epoch):
    """It would be missed after the last epoch only."""
    shutil.copy(run[0] / "checkpoint.pt", tmp_path)
    if epoch:
        torch.save({**load_checkpoint(run[0] / "best.pt", "imagenet"), "epoch": epoch}, tmp_path / "best.pt")
    line = small_training.refused(capsys, train_imagenet, ["--resume", tmp_path])
    assert ("best.pt is not of epoch" if epoch else "no such checkpoint") in line


def test_a_run_is_not_wound_back_to_its_best_network(capsys, run, tmp_path):
    """What came after it would be lost without a word."""
    for name in ("best.pt", "checkpoint.pt"):
        shutil.copy(run[0] / name, tmp_path)
    line = small_training.refused(capsys, train_imagenet, ["--resume", tmp_path / "best.pt"])
    assert f"best.pt is not the latest of its run; give {tmp_path}" in line


def test_select_on_val_chooses_on_the_validation_part(images, tmp_path):
    without_holdout = [flag for flag in TINY if flag not in ("--holdout", "12")]
    run_script(*without_holdout, *words("--data IMAGES --output_dir OUT --select_on_val --epochs 1",
                                        IMAGES=images, OUT=tmp_path))  # fmt: skip
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best"]["images"] == 24
    assert result["best"]["top1"] == result["best"]["test"]["top1"] == result["test"]["top1"]


COMPARISON = """  # run by each of two processes, before the script itself
import sys, torch, train_imagenet
from training import distributed, steps
from test_imagenet import CPU, tiny_network

def gradients(wrap, part, accumulate):
    network = tiny_network().double().eval()  # a batch norm in train mode would see other images
    args = train_imagenet.parse_args(["--amp", "off", "--accumulate", str(accumulate)])
    totals = steps.accumulate_gradients(wrap(network, args), x[part], labels[part], progress, args, CPU)
    return totals[0].double(), [p.grad for p in network.parameters()]

progress = torch.tensor(1.0)
x, labels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double(), torch.arange(8) % 6
loss, expected = gradients(lambda network, args: network, slice(None), 1)
args = train_imagenet.parse_args()
distributed.start(CPU)
for accumulate in (1, 2):
    total, averaged = gradients(steps.wrap, slice(distributed.rank(), None, distributed.world()), accumulate)
    torch.testing.assert_close(distributed.sum_over_ranks(total) / distributed.world(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(averaged, expected)
    del total, averaged
print("equal", flush=True)
distributed.start = lambda device: device  # done
train_imagenet.main(args)
"""


@pytest.fixture(scope="module")
def two(images, tmp_path_factory) -> tuple[Path, str, list[str]]:
    """A finished run of two processes, what they printed, and the two test images that could not be read."""
    folder = tmp_path_factory.mktemp("two")
    broken = shutil.copytree(images, folder / "images")
    names = [path.relative_to(broken / "val") for path in sorted(broken.glob("val/*/*"))[:2]]  # read by one each
    for name in names:
        (broken / "val" / name).write_bytes(b"no image")
    (folder / "compare.py").write_text(COMPARISON)
    flags = words("--data IMAGES --output_dir OUT --epochs 1 --accumulate 2 --skip_bad", IMAGES=broken, OUT=folder)
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    output = start(*NO_THREADS_LEFT, folder / "compare.py", *TINY, *flags, processes=2, environment=own)
    return folder, output, list(map(str, names))


def test_two_processes_have_the_loss_and_the_gradients_of_one(two):
    """At an equal batch of all processes, with and without accumulation."""
    assert two[1].count("equal") == 2


def test_two_processes_write_once_and_evaluate_every_image_once(two):
    folder, output, _ = two
    assert "2 processes" in output and output.count("epoch 1/1") == 1
    result = json.loads((folder / "result.json").read_text())
    assert result["test"]["images"] == 22 and result["best"]["images"] == 12  # none counted twice
    network = network_from_checkpoint(load_checkpoint(folder, "imagenet"), folder, CPU)
    _, test = open_images(folder / "images")
    alone = train_imagenet.accuracy(network, EvalStream(test, 32, 7, skip_bad=True), CPU, "off")
    assert alone == result["test"]


def test_two_processes_tell_of_all_images_that_they_skipped(two):
    folder, _, names = two
    assert json.loads((folder / "result.json").read_text())["skipped"]["test"].keys() == set(names)


# --------------------------------------------------------------------------------------------------- evaluation


def test_evaluate_gives_the_accuracy_of_the_run(run, images, tmp_path):
    paths = {"CHECKPOINT": run[0] / "checkpoint.pt", "OUT": tmp_path}
    run_script(*words("--evaluate CHECKPOINT --device cpu --workers 0 --output_dir OUT", **paths))
    evaluated = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluated["test"] == json.loads((run[0] / "result.json").read_text())["test"]


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--arch NAG_BEST", "NAG_HIGH_ACC"),
        ("--data missing", "missing is not a folder"),
        ("--image_size 192 --auxiliary_weight 0.4", "193 to 256"),
        ("--image_size 257 --auxiliary_weight 0.4", "193 to 256"),
        ("--batch_size 100", "36 training images"),
        ("--accumulate 3", "3 equal parts"),
        ("--holdout 48", "--holdout"),
        ("--select_on_val", "--holdout"),
        ("--gamma 1.5", "--gamma"),
        ("--sync_bn", "CUDA devices only"),
        ("--resume missing", "no such checkpoint"),
        ("--evaluate RUN --arch NAG_HIGH_ACC", "--arch: NAG_HIGH_ACC is another genotype than that of"),
        ("--evaluate RUN --channels 8", "--channels: "),
    ],
)
def test_bad_flags_are_refused_by_name_and_nothing_is_written(capsys, run, images, tmp_path, flags, expected):
    paths = {"RUN": run[0], "IMAGES": images, "OUT": tmp_path / "out"}
    assert expected in refused(capsys, *words("--data IMAGES --output_dir OUT " + flags, **paths))
    assert not (tmp_path / "out").exists()


def test_a_broken_image_ends_a_run_with_one_line_or_is_skipped_and_told(capfd, images, tmp_path):
    data = shutil.copytree(images, tmp_path / "data")
    (data / "train" / "red" / "3.jpg").write_bytes(b"no image")
    flags = words("--data IMAGES --output_dir OUT --epochs 1", IMAGES=data, OUT=tmp_path / "out")
    with pytest.raises(SystemExit) as error:
        train(*flags, "--workers", 1)
    assert error.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()  # of the worker too
    assert "cannot read image red/3.jpg" in line and "--skip_bad" in line
    train(*flags, "--skip_bad")
    output = capfd.readouterr().out
    assert "1 skipped" in output and "red/3.jpg" in output
    skipped = json.loads((tmp_path / "out" / "result.json").read_text())["skipped"]
    assert list(skipped["train"]) == ["red/3.jpg"] and not skipped["test"]
    run_script("--resume", tmp_path / "out")  # it reads no training image again
    assert json.loads((tmp_path / "out" / "result.json").read_text())["skipped"] == skipped


def test_images_that_were_skipped_before_a_stop_are_told_at_the_end(images, tmp_path, monkeypatch):
    broken = shutil.copytree(images, tmp_path / "images")
    (broken / "train" / "red" / "3.jpg").write_bytes(b"no image")
    train_epoch = train_imagenet.train_epoch

    def stop_in_the_second(step, stream, args, epoch, *rest):
        if epoch == 1:
            raise KeyboardInterrupt
        return train_epoch(step, stream, args, epoch, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_imagenet, "train_epoch", stop_in_the_second)
        train("--data", broken, "--skip_bad", "--output_dir", tmp_path / "out")
    shutil.copy(images / "train" / "red" / "3.jpg", broken / "train" / "red" / "3.jpg")
    run_script("--resume", tmp_path / "out")
    assert list(json.loads((tmp_path / "out" / "result.json").read_text())["skipped"]["train"]) == ["red/3.jpg"]


def test_too_few_images_to_hold_some_out_are_refused_before_the_training(capsys, tmp_path):
    make_photos(tmp_path / "images", PHOTO_CLASSES[:2])
    for name in ("4", "5", "6", "7"):
        (tmp_path / "images" / "train" / PHOTO_CLASSES[0] / f"{name}.jpg").unlink()
        (tmp_path / "images" / "train" / PHOTO_CLASSES[1] / f"{name}.jpg").unlink()
    paths = {"IMAGES": tmp_path / "images", "OUT": tmp_path / "out"}
    argv = words("--data IMAGES --batch_size 2 --output_dir OUT", **paths)
    line = small_training.refused(capsys, train_imagenet, argv)
    assert "--data: a tenth of 8 training images is none to choose the best epoch on" in line
    assert not (tmp_path / "out").exists()


def test_a_missing_part_and_differing_classes_are_refused(capsys, tmp_path):
    make_photos(tmp_path)
    shutil.move(tmp_path / "val" / "red", tmp_path / "val" / "rouge")
    assert "only in" in refused(capsys, "--data", tmp_path)
    shutil.rmtree(tmp_path / "val")
    assert "holds no test or val" in refused(capsys, "--data", tmp_path)


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_of_another_kind_is_refused(capsys, images, tmp_path, flag):
    save_checkpoint(tmp_path / "cifar.pt", "cifar", {})
    assert "is a checkpoint of kind cifar" in refused(capsys, "--data", images, flag, tmp_path / "cifar.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar.pt"]


@pytest.mark.parametrize("flag", ["--resume", "--evaluate"])
def test_a_checkpoint_of_other_weights_is_refused(capsys, run, tmp_path, flag):
    folder = shutil.copytree(run[0], tmp_path / "run")
    state = load_checkpoint(folder, "imagenet")
    state["network"].popitem()
    save_checkpoint(folder / "checkpoint.pt", "imagenet", state)
    line = small_training.refused(capsys, train_imagenet, [flag, folder / "checkpoint.pt"])
    assert "is of another version of these networks" in line


def test_images_of_other_classes_are_refused_by_evaluate(capsys, run, tmp_path):
    other = make_photos(tmp_path / "other", ("black", *PHOTO_CLASSES[1:]))
    flags = ["--data", other, "--evaluate", run[0] / "best.pt", "--output_dir", tmp_path / "out"]
    assert f"class 0 of the images is black, of {run[0] / 'best.pt'} blue" in refused(capsys, *flags)
    assert not (tmp_path / "out").exists()


def test_an_exported_network_has_the_logits_of_the_checkpoint(run, images, tmp_path):
    folder, _ = run
    path = tmp_path / "network.safetensors"
    paths = {"CHECKPOINT": folder / "best.pt", "IMAGES": images, "FILE": path, "OUT": tmp_path / "out"}
    run_script(*words("--evaluate CHECKPOINT --data IMAGES --export FILE --output_dir OUT --workers 0", **paths))
    x = torch.randn(2, 3, 32, 32)
    expected = network_from_checkpoint(load_checkpoint(folder / "best.pt", "imagenet"), folder, CPU)(x)
    torch.testing.assert_close(load_network(path)(x)[0], expected[0])
