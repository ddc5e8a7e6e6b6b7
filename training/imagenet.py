"""Training of stand-alone networks on ImageNet or another tree of images, for train_imagenet.py.

    images, selection, test = load_data(args)
    network = build_network(ImageNetNetwork, genotype, len(images.classes), args, device)
    step = Step(network, build_optimizer(network, args), args, device, args.label_smooth)
    stream = TrainStream(images, args.image_size, args.batch_size, **stream_options(args, device))
    train_epoch(step, stream, args, 0, device)

`args` holds the flags of add_training_flags. NAG paper, section 4.3.
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator

import torch

from models.network import ImageNetConfig, ImageNetNetwork
from plumbing.flags import UNREAD, number
from training import distributed, steps
from training.checkpoints import Checkpoints
from training.flags import (
    ALREADY_SO,
    add_network_flags,
    add_step_flags,
    check_image_size,
    check_step_flags,
    optimizer_defaults,
    shown_defaults,
)
from training.image_decoding import find_jpeg_decoder
from training.image_stream import PREFETCH, Decoded, EvalStream, ImageFiles, TrainStream, open_images
from training.images import balanced_batch, check_classes, split
from training.own_images import (
    add_split_flags,
    asked_split,
    check_data_flags,
    settle_batch_size,
    settle_split,
    take_unsettled,
)
from training.predicting import Choices
from training.steps import ADABELIEF_LR, Step, train_steps
from utils import derive_seed, fail, set_seed, this_process, user_input

HELD_OUT_PER_CLASS = 10  # default of --holdout, but at most a tenth of the training images
SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share
# learning rate and weight decay of each optimizer; AdaBelief's decay is decoupled
OPTIMIZERS = {"sgd": (0.1, 3e-5), "adabelief": (ADABELIEF_LR, 1e-2)}

# Flags of the public reference's train_imagenet.py that have other names here.
REFERENCE_FLAGS = {
    "use_aux_head": "--auxiliary_weight 0",  # the switch turns the head off
    "zip_file": ALREADY_SO,  # train.zip and valid.zip are found where there is no folder of that name
    "lazy_load": ALREADY_SO,  # images always stay in their files
    "mode": UNREAD,
    "cutout_size": UNREAD,
    "max_num_vertices": UNREAD,
}


# ---------------------------------------------------------------------------------------------------------------- flags


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add the groups of flags about images, network and training."""
    add_data_flags(parser.add_argument_group("images"))
    add_network_flags(parser.add_argument_group("network"), ImageNetConfig())
    add_schedule_flags(parser.add_argument_group("training"))
    add_step_flags(parser.add_argument_group("training step"))


def add_data_flags(group: argparse._ActionsContainer) -> None:
    """The flags about images."""
    add = group.add_argument
    add("--data", default="data/imagenet", help="folder that holds train and test (or val): folders or .zip files; or "
        "a folder or .zip of class folders")  # fmt: skip
    add_split_flags(group)
    add("--image_size", type=number(int, 32), default=224, help="side of the crops in pixels")
    add("--num_images", type=number(int, 0), default=0, help="training images to use, as many of each class; 0: all")
    held_out = f"training images held out, to select on (default: {HELD_OUT_PER_CLASS} a class, a tenth at most)"
    add("--holdout", type=number(int, 1), help=held_out)
    add("--select_on_val", action="store_true", help="choose the best epoch on the validation part instead")
    add("--skip_bad", action="store_true", help="go on without images that cannot be read")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(16, max(1, cores // this_process().local_world))  # of the processes on this machine
    decoding = "processes that decode images, for each training process and each part of the images"
    add("--workers", type=number(int, 0), default=workers, help=decoding)
    decoder = "decoder of JPEG files; auto: torchcodec where it is installed"
    add("--decoder", default="auto", choices=["auto", "pil", "torchcodec"], help=decoder)


def add_schedule_flags(group: argparse._ActionsContainer) -> None:
    """The flags about epochs, batches, the optimizer and the loss."""
    add, count = group.add_argument, number(int, 1)
    share, unit, not_negative = number(float, 0, 1, above=True), number(float, 0, 1), number(float, 0)
    add("--epochs", type=count, default=250, help="epochs to train")
    add("--schedule_epochs", type=count, help="epochs over which drop path grows (default: as --epochs)")
    size = "images of a step, over all processes (default: 256, or what fits a small set)"
    add("--batch_size", type=number(int, 2), default=256, help=size)
    add("--eval_batch_size", type=count, default=256, help="images of a batch in evaluations, for one process")
    rate = f"learning rate at the start, for a whole batch {shown_defaults(OPTIMIZERS, 0)}"
    add("--lr", type=number(float, 0, above=True), help=rate)
    add("--gamma", type=share, default=0.97, help="factor of the learning rate after every --decay_period epochs")
    add("--decay_period", type=count, default=1, help="epochs between decays of the learning rate")
    add("--momentum", type=unit, default=0.9, help="momentum of SGD")
    add("--l2_reg", type=not_negative, help=f"weight decay {shown_defaults(OPTIMIZERS, 1)}")
    add("--label_smooth", type=unit, default=0.1, help="label smoothing: probability spread over all classes")
    clip = "largest L2 norm of the gradient; longer ones are scaled down; 0: no limit"
    add("--grad_clip", type=not_negative, default=5.0, help=clip)


def check_training_flags(
    parser: argparse.ArgumentParser, args: argparse.Namespace, processes: int, given: set[str]
) -> None:
    """Settle the defaults that depend on other flags, and refuse what flags do not allow together.

    processes: the number of processes that share a batch. given: the flags that were given.
    """
    check_data_flags(parser, args, given, args.accumulate * processes)
    args.schedule_epochs = args.schedule_epochs or args.epochs
    optimizer_defaults(args, OPTIMIZERS, "lr")
    check_step_flags(parser, args, processes)
    check_image_size(parser, args, ImageNetNetwork.auxiliary_sizes, given)
    if args.select_on_val and args.holdout:
        parser.error("argument --holdout: not with --select_on_val")


# ------------------------------------------------------------------------------------------------------ images


def load_data(args: argparse.Namespace, classes: list[str] | None = None) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
    """(training, selection, test) images; with --select_on_val, the selection is the test part, else held-out images.

    classes: of a resumed run, the classes that the images must have. Ends the script on bad input.
    """
    unsettled = take_unsettled(args)
    with user_input("--data"):
        images, test = load_parts(args)
        if classes:
            check_classes(images, classes, args.resume)
    selection = test
    if not args.select_on_val:
        if args.holdout is None:
            args.holdout = min(HELD_OUT_PER_CLASS * len(images.classes), len(images) // 10)
            if not args.holdout:
                fail(f"--data: a tenth of {len(images)} training images is none to choose the best epoch on; "
                     "give --holdout or --select_on_val")  # fmt: skip
        with user_input("--holdout"):
            images, selection = split(images, args.holdout, args.seed)
    if args.num_images:
        with user_input("--num_images"):
            images = balanced_batch(images, args.num_images, args.seed)
    settle_batch_size(args, images, unsettled)
    return images, selection, test


def load_parts(args: argparse.Namespace) -> tuple[ImageFiles, ImageFiles]:
    """The training part and the test part of the images. Raises ValueError or OSError on bad input."""
    images, test = open_images(args.data, asked_split(args))
    settle_split(args, images, test)
    return images, test


def centre_crop(image_size: int, decoder: str) -> Callable[[bytes], torch.Tensor]:
    """A function from the content of an image file to (3, S, S) uint8, resized and cropped as test images are.

    decoder: the value of --decoder.
    """
    with user_input("--decoder"):
        return Decoded(None, image_size, random_crop=False, seed=0, decode_jpeg=find_jpeg_decoder(decoder)).prepared


def stream_options(args: argparse.Namespace, device: torch.device) -> dict:
    """The options that all streams of a run have in common."""
    with user_input("--decoder"):
        decoder = find_jpeg_decoder(args.decoder)
    options = {"workers": args.workers, "seed": args.seed, "skip_bad": args.skip_bad, "decode_jpeg": decoder}
    return options | {
        "rank": distributed.rank(),
        "world": distributed.world(),
        "pin_memory": device.type != "cpu",
        "shared_memory": fits_shared_memory(args),
    }


def fits_shared_memory(args: argparse.Namespace) -> bool:
    """Whether the batches of all processes on this machine fit the shared memory; if not, says what is done instead."""
    batch_size = max(args.eval_batch_size, -(-args.batch_size // distributed.world()))
    neighbours = this_process().local_world
    needed = shared_memory_needed(args.image_size, batch_size, args.workers) * neighbours
    free = free_shared_memory()
    if free is None or needed <= free:
        return True
    if distributed.is_main():
        print(
            f"shared memory has {free / 2**20:.0f} MiB free of {needed / 2**20:.0f} that batches need: they go through "
            "pipes, which is slower (a container gets more by docker run --shm-size)"
        )
    return False


def shared_memory_needed(image_size: int, batch_size: int, workers: int) -> int:
    """The bytes of shared memory that the batches of one process take; batch_size counts its own images.

    Batches wait there that the workers have made ahead, and two more are in use.
    """
    page = 4096  # an image has 8 bytes of label and 36 of draws beside its pixels
    return (PREFETCH * workers + 2) * (batch_size * (3 * image_size**2 + 44) + 3 * page) if workers else 0


def free_shared_memory() -> int | None:
    """The free bytes of shared memory; None where they are not counted."""
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return None


def readable(stream: TrainStream | EvalStream, epoch: int, device: torch.device, first: int = 0) -> Iterator:
    """The batches of a stream from number `first`; an image that cannot be read ends the script with its name."""
    with user_input("--data", everywhere=True):  # each process reads other images
        yield from stream.epoch(epoch, device, first)


# ------------------------------------------------------------------------------------------------ training and accuracy


def build_optimizer(network: ImageNetNetwork, args: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer of --optimizer for the network."""
    return steps.build_optimizer(args.optimizer, network, args.lr, args.momentum, args.l2_reg, decoupled=True)


def train_epoch(
    step: Step,
    stream: TrainStream,
    args: argparse.Namespace,
    epoch: int,
    device: torch.device,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train for one epoch: {"loss", "train_accuracy", "lr", "seconds", "data_wait": share of the time without data}.

    Every random stream starts anew from the seed and the epoch, so that a resumed run draws what the run would have.
    """
    checkpoints = checkpoints or Checkpoints(network=step.network)
    started, waited, before = time.monotonic(), stream.waited, checkpoints.seconds
    set_seed(derive_seed(args.seed, epoch, stream.rank))  # for dropout and drop path of this process
    epoch_steps, lr = len(stream), args.lr * args.gamma ** (epoch // args.decay_period)
    first, all_steps = epoch * epoch_steps, args.schedule_epochs * epoch_steps
    progress = torch.arange(first + 1, first + epoch_steps + 1, device=device) / all_steps
    progress = progress.clamp(max=1)  # in epochs beyond the schedule, drop path stays as it is at its end
    batches = readable(stream, epoch, device, checkpoints.done)
    values = train_steps(step, batches, progress, lambda _: lr, epoch, checkpoints)
    seconds = time.monotonic() - started
    return values | {"lr": lr, "seconds": before + seconds, "data_wait": (stream.waited - waited) / seconds}


def accuracy(
    network: ImageNetNetwork,
    stream: EvalStream,
    device: torch.device,
    amp: str = "auto",
    choices: Choices | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in eval mode over the images of all processes, and how many images there are.

    choices: takes down what the network chooses for each image.
    """
    total, tell = len(stream.batches(0)), choices and choices.add
    with user_input(f"--data: {stream.files.part.path}"):
        return steps.evaluate(network, readable(stream, 0, device), device, amp, total, tell)
