"""A training step of NAG_HIGH_ACC (6 layers, 36 channels, batch 96), by train_cifar.py's own train_epoch.

    python benchmarks/train_cifar.py
    python benchmarks/train_cifar.py --device cuda --rounds 20

Random images: what they show makes no difference to the time. The plain variant has its tensors in contiguous layout,
glibc's malloc settings, and images cropped, flipped and cut out one by one by a data loader of two workers.
"""

if not __package__:
    from as_module import restart

    restart()

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import train_cifar
from benchmarks import plain_images
from benchmarks.common import Comparison, Report, Run, begin, interleave, parse_args, print_memory, steps_of
from benchmarks.supernet import random_images
from genotypes import GENOTYPES
from models.network import CifarNetwork
from plumbing.checkpoint_files import save_checkpoint
from training.checkpoints import Checkpoints
from training.images import ImageSet, train_batches
from training.steps import Step, build_network, network_state


def flags_of(args: argparse.Namespace, amp: str = "off") -> argparse.Namespace:
    small = ["--layers", "1", "--channels", "4", "--batch_size", "8"] if args.quick else []
    return train_cifar.parse_args(["--amp", amp, *small])


def comparison(args: argparse.Namespace, device: torch.device) -> Comparison:
    flags = flags_of(args)
    steps = steps_of(device)
    images = random_images(flags.batch_size * steps, 32, device)
    few = images.subset(torch.arange(flags.batch_size))

    def network(flags: argparse.Namespace):
        return build_network(CifarNetwork, GENOTYPES["NAG_HIGH_ACC"], 10, flags, device)

    def plain() -> Run:
        net = plain_images.contiguous(network(flags)).train()
        optimizer = train_cifar.build_optimizer(net, flags)
        data = plain_images.Images(few, train=True)

        def run() -> None:
            for x, labels in DataLoader(data, flags.batch_size, shuffle=True, num_workers=0 if args.quick else 2):
                plain_images.train_step(net, optimizer, x.to(device), labels.to(device))

        return run

    def fast(amp: str, compiled: bool = False, images: ImageSet = images) -> Run:
        own = flags_of(args, amp)
        own.compile = compiled
        net = network(own)
        optimizer = train_cifar.build_optimizer(net, own)
        step = Step(net, optimizer, own, device)
        return lambda: train_cifar.train_epoch(step, images, own, 0, device)

    builds = {"float32": lambda: fast("off"), "bf16": lambda: fast("bf16")}
    if not args.quick:  # it takes minutes
        builds["bf16, compiled"] = lambda: fast("bf16", compiled=True)
    goals = dict.fromkeys(builds, "ratio 4") | {"bf16, compiled": "ratio 4; CUDA: 0.0345 s, 600 epochs in 3 h"}
    work = f"training step of NAG_HIGH_ACC, {flags.layers} layers, {flags.channels} channels, batch {flags.batch_size}"
    return Comparison(work, plain, builds, goals, (flags.batch_size, "images"), steps, lambda: fast("off", images=few))


def loading_share(report: Report) -> None:
    """Drawing, cropping, flipping, cutting out and normalising a batch, of the faster step."""
    flags = flags_of(report.args)
    images = random_images(flags.batch_size * 10, 32, report.device)
    source = torch.Generator(report.device).manual_seed(0)
    times = interleave(
        {"loading": lambda: list(train_batches(images, flags.batch_size, source))}, report.args.rounds, report.device
    )
    loading = statistics.median(times["loading"]) / 10
    step = min(value for key, value in report.seconds.items() if not key.endswith("plain"))
    share = f"{loading * 1e3:.2f} ms a batch, {loading / step:.2%}"
    report.figure("loading and augmentation, share of the faster step", share, "under 3 %")


def checkpoint_share(report: Report) -> None:
    """What a checkpoint within an epoch costs of the time between two, with weights and momentum of the network."""
    flags, genotype = flags_of(report.args), GENOTYPES["NAG_HIGH_ACC"]
    network = build_network(CifarNetwork, genotype, 10, flags, report.device)
    optimizer = train_cifar.build_optimizer(network, flags)
    for parameter in network.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint.pt")

        def save(part: dict) -> None:
            save_checkpoint(path, "cifar", network_state(network, genotype, optimizer) | part)

        checkpoints = Checkpoints(0, network, save)
        checkpoints.begin(0)
        times = interleave({"saving": lambda: checkpoints.after_step(1)}, report.args.rounds, report.device)["saving"]
        size = path.stat().st_size / 2**20
    share = statistics.median(times) / (60 * flags.checkpoint_minutes)
    value = f"{statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f}) for {size:.0f} MiB, {share:.2%}"
    report.figure("a checkpoint within an epoch, share of --checkpoint_minutes", value, "under 1 %")


def main(args: argparse.Namespace) -> None:
    device = begin(args)
    work = comparison(args, device)
    if args.memory_of:
        print_memory([work], args.memory_of)
        return
    report = Report("train_cifar", args, device)
    report.compare(work)
    loading_share(report)
    checkpoint_share(report)
    report.finish()


if __name__ == "__main__":
    main(parse_args(__doc__))
