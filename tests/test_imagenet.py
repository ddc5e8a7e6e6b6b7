"""training/imagenet.py: the published recipe, which images are held out, and accuracies against a slow loop."""

import argparse
from pathlib import Path

import pytest
import torch
from small_training import PHOTO_CLASSES, as_by_torchrun, make_photos

import train_imagenet
from genotypes import GENOTYPES
from models.network import ImageNetNetwork
from training import imagenet
from training.image_stream import EvalStream, open_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_photos(tmp_path_factory.mktemp("images"))


def tiny_network(num_classes: int = 6) -> ImageNetNetwork:
    torch.manual_seed(0)
    network = ImageNetNetwork(GENOTYPES["NAG_ENSEMBLE_B"], num_classes, 1, 4, auxiliary=False)
    return network.to(memory_format=torch.channels_last)


def test_the_published_recipe_is_the_default():
    args = train_imagenet.parse_args([])
    assert (args.epochs, args.batch_size, args.layers, args.channels, args.image_size) == (250, 256, 4, 42, 224)
    assert (args.lr, args.gamma, args.decay_period, args.momentum, args.l2_reg) == (0.1, 0.97, 1, 0.9, 3e-5)
    assert (args.label_smooth, args.auxiliary_weight, args.keep_prob, args.drop_path_keep_prob) == (0.1, 0.4, 1, 1)
    assert args.grad_clip == 5.0


def test_the_published_network_has_5_million_parameters_and_520_million_macs():
    config = {"num_classes": 1000, "layers": 4, "channels": 42}
    size = train_imagenet.cost(GENOTYPES["NAG_HIGH_ACC"], config, 224)
    assert size["params"] == 4_971_763
    assert round(size["macs"] / 1e6) == 520


def test_by_default_10_images_a_class_are_held_out_but_at_most_a_tenth(images):
    args = train_imagenet.parse_args(["--data", str(images), "--batch_size", "8"])
    rest, held_out, test = imagenet.load_data(args)
    assert (len(rest), len(held_out), len(test)) == (44, 4, 24)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_evaluation_is_independent_of_the_batch_size_and_counts_as_a_loop_would(images, batch_size):
    _, test = open_images(images)
    network = tiny_network()
    measured = imagenet.accuracy(network, EvalStream(test, 32, batch_size), CPU, "off")
    top1 = top5 = 0
    with torch.no_grad():
        for x, labels in EvalStream(test, 32, 1).epoch(0, CPU):
            ranking = network(x)[0][0].argsort(descending=True).tolist()
            top1 += ranking[0] == labels.item()
            top5 += labels.item() in ranking[:5]
    assert measured == {"top1": top1 / 24, "top5": top5 / 24, "images": 24}


def test_top_5_of_fewer_classes_is_of_all_of_them(tmp_path):
    _, test = open_images(make_photos(tmp_path, PHOTO_CLASSES[:3]))
    assert imagenet.accuracy(tiny_network(3), EvalStream(test, 32, 6), CPU, "off")["top5"] == 1


def test_adabelief_has_its_own_learning_rate_and_decay(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())  # as if the package were there
    args = train_imagenet.parse_args(["--optimizer", "adabelief"])
    assert (args.lr, args.l2_reg) == (1e-3, 1e-2)
    args = train_imagenet.parse_args(["--optimizer", "adabelief", "--lr", "0.01"])
    assert args.lr == 0.01


def test_batches_that_do_not_fit_the_shared_memory_go_through_pipes(monkeypatch, capsys):
    args = argparse.Namespace(image_size=224, batch_size=256, eval_batch_size=100, workers=8)
    batch = 256 * (3 * 224 * 224 + 44)
    needed = imagenet.shared_memory_needed(224, 256, 8)
    assert 18 * batch < needed < 18 * (batch + 2**16)  # two for each worker, two in use
    assert imagenet.shared_memory_needed(224, 256, 0) == 0
    for free, fits in ((needed, True), (needed - 1, False), (64 * 2**20, False), (None, True)):
        monkeypatch.setattr(imagenet, "free_shared_memory", lambda free=free: free)
        assert imagenet.fits_shared_memory(args) == fits
        out = capsys.readouterr().out
        assert out.count("\n") == (not fits) and ("go through pipes" in out) == (not fits)
    assert out == ""
    as_by_torchrun(monkeypatch, rank=0, world=2)
    monkeypatch.setattr(imagenet, "free_shared_memory", lambda: needed)
    assert not imagenet.fits_shared_memory(args)


def test_free_shared_memory_is_that_of_the_file_system(monkeypatch, tmp_path):
    monkeypatch.setattr(imagenet, "SHARED_MEMORY", str(tmp_path))
    assert imagenet.free_shared_memory() > 0
    monkeypatch.setattr(imagenet, "SHARED_MEMORY", str(tmp_path / "nowhere"))
    assert imagenet.free_shared_memory() is None
