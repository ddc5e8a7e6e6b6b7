"""Training of stand-alone networks on small images, which train_cifar.py and eval_archs.py share.

    images, held_out, test = load_data(args, device)
    network = build_network(CifarNetwork, genotype, len(images.classes), args, device)
    train(network, images, args, device)
    accuracy(network, held_out)

`args` holds the flags of add_training_flags. NAG paper, section 4.2.
"""

import argparse
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from models.network import CifarConfig, CifarNetwork
from plumbing.flags import UNREAD, number
from training import distributed, steps
from training.checkpoints import Checkpoints
from training.flags import (
    add_network_flags,
    add_step_flags,
    check_image_size,
    check_step_flags,
    optimizer_defaults,
    shown_defaults,
)
from training.images import ImageSet, balanced_batch, check_classes, eval_batches, load_images, split, train_batches
from training.own_images import (
    add_split_flags,
    asked_split,
    check_data_flags,
    settle_batch_size,
    settle_holdout,
    settle_split,
    take_unsettled,
)
from training.predicting import MOST_WRONG, write_choices
from training.steps import ADABELIEF_LR, Step, own_part, train_steps
from utils import autocast, cosine, derive_seed, set_seed, user_input

# learning rate and weight decay of each optimizer; AdaBelief's decay is added to the gradient
OPTIMIZERS = {"sgd": (0.025, 3e-4), "adabelief": (ADABELIEF_LR, 5e-4)}

# Flags of the public reference's train_cifar.py and eval_archs.py. Others have the names and meanings that they have
# here, with two exceptions: on CIFAR-10 its train_cifar.py trains with AdaBelief and uses neither --lr_max and
# --lr_min nor --l2_reg; and --epochs of its eval_archs.py is the length of the schedule (here --schedule_epochs), of
# which it always trains 50 epochs (here the default of --epochs).
REFERENCE_FLAGS = {
    "use_aux_head": "--auxiliary_weight 0",  # the switch turns the head off
    "max_num_vertices": UNREAD,
}


# ------------------------------------------------------------------------------------------------------- flags


def add_training_flags(
    parser: argparse.ArgumentParser, epochs: int = 600, schedule_epochs: int | None = None, holdout: int = 0
) -> None:
    """Add the groups of flags about images, network and training. The other arguments are defaults.

    schedule_epochs: None for as many as --epochs.
    """
    add_data_flags(parser.add_argument_group("images"), holdout)
    add_network_flags(parser.add_argument_group("network"), CifarConfig())
    add_schedule_flags(parser.add_argument_group("training"), epochs, schedule_epochs)
    add_step_flags(parser.add_argument_group("training step"))


def add_data_flags(group: argparse._ActionsContainer, holdout: int) -> None:
    """The flags about images. holdout: default of --holdout."""
    add, count = group.add_argument, number(int, 0)
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "folder"], help="which images to use")
    add("--data", default="data", help="folder of the images; CIFAR is downloaded into it. One's own: a folder or .zip "
        "of class folders, or train and test of these")  # fmt: skip
    add_split_flags(group)
    add("--cache_dir", help="folder that keeps decoded images (default: beside the images)")
    add("--skip_bad", action="store_true", help="leave out images that cannot be read")
    add("--image_size", type=number(int, 8), default=32, help="side of the images in pixels")
    add("--num_images", type=count, default=0, help="training images to use, as many of each class; 0: all")
    fitted = f" (default: {holdout}, or what fits a small set)" if holdout else ""
    add("--holdout", type=count, default=holdout, help=f"training images held out, to select on; 0: none{fitted}")
    add("--cutout_size", type=count, default=16, help="side of cutout's square in pixels; 0: no cutout")


def add_schedule_flags(group: argparse._ActionsContainer, epochs: int, schedule_epochs: int | None) -> None:
    """The flags about epochs, batches and the optimizer. epochs, schedule_epochs: defaults."""
    add, count = group.add_argument, number(int, 1)
    rate, positive = number(float, 0), number(float, 0, above=True)
    add("--epochs", type=count, default=epochs, help="epochs to train")
    length = "epochs over which the learning rate falls and drop path grows"
    length += "" if schedule_epochs else " (default: as --epochs)"
    add("--schedule_epochs", type=count, default=schedule_epochs, help=length)
    size = "images of a step, over all processes (default: 96, or what fits a small set)"
    add("--batch_size", type=number(int, 2), default=96, help=size)
    add("--eval_batch_size", type=count, default=500, help="images of a batch in evaluations")
    highest = f"learning rate at the start, for a whole batch {shown_defaults(OPTIMIZERS, 0)}"
    add("--lr_max", type=positive, help=highest)
    add("--lr_min", type=rate, default=0.0, help="learning rate at the end of the cosine schedule")
    add("--l2_reg", type=rate, help=f"weight decay {shown_defaults(OPTIMIZERS, 1)}")
    add("--grad_clip", type=positive, default=5.0, help="largest L2 norm of the gradient; longer ones are scaled down")


def check_training_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, processes: int, given: set[str]
) -> None:
    """Settle the defaults that depend on other flags, and refuse what flags do not allow together.

    processes: the number of processes that share a batch. given: the flags that were given.
    """
    check_data_flags(parser, args, given, args.accumulate * processes)
    args.schedule_epochs = args.schedule_epochs or args.epochs
    optimizer_defaults(args, OPTIMIZERS, "lr_max")
    check_step_flags(parser, args, processes)
    check_image_size(parser, args, CifarNetwork.auxiliary_sizes, given)
    if args.lr_min > args.lr_max:
        parser.error("argument --lr_min: expected at most --lr_max")
    if args.epochs > args.schedule_epochs:
        parser.error(f"argument --epochs: expected at most the {args.schedule_epochs} of the schedule")


# ------------------------------------------------------------------------------------------------------ images


def load_data(
    args: argparse.Namespace, device: torch.device, classes: list[str] | None = None
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """(training, held-out, test) images. There are no held-out images without --holdout.

    classes: of a resumed run, the classes that the images must have. Ends the script on bad input.
    """
    unsettled = take_unsettled(args)
    images, test = load_parts(args, device)
    if classes:
        with user_input("--data"):
            check_classes(images, classes, args.resume)
    settle_holdout(args, images, unsettled)
    with user_input("--holdout"):
        images, held_out = split(images, args.holdout, args.seed)
    if args.num_images:
        with user_input("--num_images"):
            images = balanced_batch(images, args.num_images, args.seed)
    settle_batch_size(args, images, unsettled)
    return images, held_out, test


def load_parts(args: argparse.Namespace, device: torch.device) -> tuple[ImageSet, ImageSet]:
    """The training part and the test part of the images. Process 0 downloads and decodes them for all others."""
    with user_input("--data"), distributed.first_process_first():
        source = (args.dataset, args.data, args.image_size, args.cache_dir, args.skip_bad)
        parts = load_images(*source, device, asked_split(args))
    with user_input("--data"):
        settle_split(args, *parts)
    return parts


# ---------------------------------------------------------------------------------------- training and accuracy


def build_optimizer(network: CifarNetwork, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of --optimizer for the network; SGD has a momentum of 0.9."""
    return steps.build_optimizer(args.optimizer, network, args.lr_max, momentum=0.9, weight_decay=args.l2_reg)


def train(
    network: CifarNetwork,
    images: ImageSet,
    args: argparse.Namespace,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    start_epoch: int = 0,
    after_epoch: Callable[[int, dict], None] = lambda epochs_done, values: None,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train up to epoch args.epochs of a schedule of args.schedule_epochs. Returns what train_epoch says of the last.

    optimizer: that of the epochs before start_epoch, if any. after_epoch(epochs_done, values) is called after each
    epoch with what train_epoch says of it.
    """
    step = Step(network, optimizer or build_optimizer(network, args), args, device)
    values = {}
    for epoch in range(start_epoch, args.epochs):
        values = train_epoch(step, images, args, epoch, device, checkpoints)
        after_epoch(epoch + 1, values)
    return values


def train_epoch(
    step: Step,
    images: ImageSet,
    args: argparse.Namespace,
    epoch: int,
    device: torch.device,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train for one epoch: {"loss", "train_accuracy", "lr" of the last step, "seconds"}.

    Every random stream starts anew from the seed and the epoch, so that a resumed run draws what the run would have.
    """
    checkpoints = checkpoints or Checkpoints(network=step.network)
    started = time.monotonic() - checkpoints.seconds
    set_seed(derive_seed(args.seed, epoch, 0, distributed.rank()))  # for dropout and drop path of this process
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    epoch_steps = len(images) // args.batch_size
    first, all_steps = epoch * epoch_steps, args.schedule_epochs * epoch_steps
    # a tensor, because torch.compile would compile the network anew for every other number
    progress = torch.arange(first + 1, first + epoch_steps + 1, device=device) / all_steps
    part = distributed.share(args.batch_size)
    batches = train_batches(images, args.batch_size, generator, args.cutout_size, args.image_size // 8)
    own_parts = ((x[part], labels[part]) for x, labels in islice(batches, checkpoints.done, None))

    def learning_rate(i: int) -> float:
        return cosine(first + i, all_steps, args.lr_max, args.lr_min)

    values = train_steps(step, own_parts, progress, learning_rate, epoch, checkpoints)
    lr = float(step.optimizer.param_groups[0]["lr"])
    return values | {"lr": lr, "seconds": time.monotonic() - started}


def accuracy(network: CifarNetwork, images: ImageSet, batch_size: int = 500, amp: str = "auto") -> float:
    """The share of the images that the network, in eval mode, classifies correctly; the processes share the work."""
    own = own_part(images)
    total, device = -(-len(own) // batch_size), images.labels.device
    return steps.evaluate(network, eval_batches(own, batch_size), device, amp, total)["top1"]


@torch.inference_mode()
def write_predictions(path: Path, network: CifarNetwork, images: ImageSet, args: argparse.Namespace) -> None:
    """Write what the network chooses for each of the images, as write_choices does."""
    network.eval()
    chosen, sure = [], []
    for x, _ in eval_batches(images, args.eval_batch_size):
        with autocast(args.amp, x.device):
            logits, _ = network(x)
        probability, choice = logits.float().softmax(1).max(1)
        chosen.append(choice)
        sure.append(probability)
    chosen, sure = torch.cat(chosen), torch.cat(sure)
    order = (sure * (chosen != images.labels)).argsort(descending=True, stable=True)[:MOST_WRONG]
    worst = order[(chosen != images.labels)[order]]
    arrays = {"labels": images.labels, "predicted": chosen, "probability": sure, "worst": worst}
    arrays["worst_images"] = images.images[worst]
    write_choices(path, {name: tensor.cpu().numpy() for name, tensor in arrays.items()}, images.classes)
