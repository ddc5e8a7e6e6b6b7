"""training/cifar.py: what of the flags reaches network, optimizer and steps, and which images are trained on."""

import argparse
import importlib.util
import math

import pytest
import torch
from small_training import TINY, augmented_by, make_images, white_images, words

import train_cifar
from genotypes import GENOTYPES
from models.network import CifarNetwork
from training import cifar
from training.steps import Step, build_network


class WatchedStep(Step):
    """Computes nothing, but keeps what it is given, and the learning rate."""

    def __call__(self, x, labels, progress):
        self.seen = [*getattr(self, "seen", ()), (x, labels, progress.item(), self.optimizer.param_groups[0]["lr"])]
        return torch.zeros(2)


def published(*flags) -> tuple[argparse.Namespace, CifarNetwork]:
    """The published recipe, but for the size of the network."""
    args = train_cifar.parse_args([*map(str, flags), *"--layers 1 --channels 4 --device cpu".split()])
    return args, build_network(CifarNetwork, GENOTYPES["NAG_ENSEMBLE_B"], 2, args, torch.device("cpu"))


def test_the_published_recipe_reaches_network_and_optimizer():
    args, network = published()
    (group,) = cifar.build_optimizer(network, args).param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.025, 0.9, 3e-4)
    assert len(group["params"]) == len(list(network.parameters()))
    assert network.dropout.p == pytest.approx(0.4)
    assert network.drop_path_keep_prob == 0.8 and network.auxiliary is not None
    assert (args.grad_clip, args.auxiliary_weight, args.schedule_epochs) == (5, 0.4, 600)


def test_epochs_go_on_with_the_schedules_and_see_other_orders_of_augmented_images():
    args, network = published("--epochs", 4)
    step = WatchedStep(network, cifar.build_optimizer(network, args), args, torch.device("cpu"))
    for epoch in (0, 1):
        cifar.train_epoch(step, white_images(200), args, epoch, torch.device("cpu"))
    x, labels, progress, rates = zip(*step.seen, strict=True)  # of 2 epochs of 2 steps
    assert augmented_by(torch.cat(x)) == (4, 16)
    assert [len(part) for part in labels] == [96] * 4
    first, second = torch.cat(labels[:2]), torch.cat(labels[2:])
    assert first.unique().numel() == second.unique().numel() == 2 * 96
    assert not first.equal(second) and not x[0].equal(x[2])
    assert progress == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8])
    assert rates == pytest.approx([0.025 * math.cos(math.pi * i / 16) ** 2 for i in range(4)])


def test_held_out_images_are_not_trained_on(tmp_path):
    images = make_images(tmp_path, {"dark": 60, "light": 180})
    args = train_cifar.parse_args([*TINY, *words("--data IMAGES --holdout 8", IMAGES=images)])
    training, held_out, test = cifar.load_data(args, torch.device("cpu"))
    assert (len(training), len(held_out), len(test)) == (48 - 8, 8, 20)
    seen, kept = ({image.numpy().tobytes() for image in part.images} for part in (training, held_out))
    assert len(seen) == 40 and not seen & kept


def test_adabelief_without_its_package_is_refused_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        train_cifar.parse_args(["--optimizer", "adabelief"])
    assert error.value.code == 2
    assert "pip install pytorch-optimizer" in capsys.readouterr().err


def test_every_optimizer_has_its_defaults_and_explicit_flags_win():
    pytest.importorskip("pytorch_optimizer")
    args = [train_cifar.parse_args(["--optimizer", name]) for name in ("sgd", "adabelief")]
    assert [(a.lr_max, a.l2_reg) for a in args] == [(0.025, 3e-4), (1e-3, 5e-4)]
    args = train_cifar.parse_args(["--optimizer", "adabelief", "--lr_max", "0.5", "--l2_reg", "0"])
    assert (args.lr_max, args.l2_reg) == (0.5, 0)
