"""The supernet: a training step and the scoring of a genotype, by the functions of build_nas_dataset.

    python benchmarks/supernet.py
    python benchmarks/supernet.py --device cuda --rounds 20

Random images: what they show makes no difference to the time. The genotypes are those of median MACs in the NAS
dataset, several of them, since ops of equal MACs differ in what they take.
The plain variant has its tensors in contiguous layout, glibc's malloc settings and, as the reference, a data loader of
16 workers for every scoring.
"""

if not __package__:
    from as_module import restart

    restart()

import argparse

import torch

from benchmarks import plain_images
from benchmarks.common import Comparison, Report, Run, begin, growth, parse_args, print_memory, steps_of
from build_nas_dataset.build_nas_dataset import parse_args as script_args
from build_nas_dataset.flags import settle_training_amp
from build_nas_dataset.records import read_records
from build_nas_dataset.scoring import build_supernet, score
from build_nas_dataset.supernet_training import make_optimizer, train_epoch
from genotypes import Genotype
from models.fast.cuda_graphs import can_record
from models.supernet import Supernet, SupernetConfig
from training.images import ImageSet, normalize
from utils import settle_amp, shipped

GENOTYPES = 4  # a run, one training step or scoring each
LOADER_WORKERS = 16  # of the reference
EPOCHS, TRAIN_IMAGES, POOL, SCORINGS = 150, 45_000, 4000, 10  # of a whole run with default settings


def random_images(n: int, size: int, device: torch.device) -> ImageSet:
    """n images of `size` pixels, of 10 classes, on the device."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)
    classes = [str(i) for i in range(10)]
    return ImageSet(pixels, torch.arange(n) % 10, classes, (0.5,) * 3, (0.25,) * 3).to(device)


def median_genotypes(n: int) -> list[Genotype]:
    """n genotypes of the NAS dataset, of MACs around the median."""
    records = sorted(read_records(shipped("data/nasdata.jsonl")), key=lambda record: record.macs)
    first = (len(records) - n) // 2
    return [record.genotype for record in records[first : first + n]]


def make_supernet(quick: bool, device: torch.device, recorded: bool = False) -> Supernet:
    """The published supernet, or a tiny one. recorded: whether it is replayed as CUDA graphs."""
    torch.manual_seed(0)
    config = SupernetConfig(layers=1, channels=4) if quick else SupernetConfig()
    return build_supernet(config, device, recorded)


def scoring_run(
    genotypes: list[Genotype], images: ImageSet, batch_size: int, amp: str, args, device, recorded: bool = False
) -> Run:
    """Score genotypes one after the other on all images, in batches."""
    supernet = make_supernet(args.quick, device, recorded).eval()
    x = normalize(images.images, images.mean, images.std)
    batches = list(zip(x.split(batch_size), images.labels.split(batch_size), strict=True))
    return lambda: [score(supernet, genotype, batches, amp).item() for genotype in genotypes]


def training(args: argparse.Namespace, device: torch.device) -> Comparison:
    """Training steps of the supernet: the plain one, and in each precision the project's."""
    batch = 8 if args.quick else 128
    genotypes, steps = median_genotypes(1 if args.quick else GENOTYPES), steps_of(device)
    images = random_images(batch * steps, 32, device)

    def plain() -> Run:
        supernet = plain_images.contiguous(make_supernet(args.quick, device)).train()
        optimizer = torch.optim.SGD(supernet.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
        x = normalize(images.images[:batch], images.mean, images.std).contiguous()
        return lambda: [plain_images.train_step(supernet, optimizer, x, images.labels[:batch], g) for g in genotypes]

    def fast(amp: str, recorded: bool = False, images: ImageSet = images) -> Run:
        supernet = make_supernet(args.quick, device, recorded)
        flags = script_args(f"--batch_size {batch} --amp {amp}".split())
        optimizer = make_optimizer(supernet, flags)
        return lambda: [train_epoch(supernet, optimizer, images, [g], flags, 0, device) for g in genotypes]

    def once() -> Run:
        return fast("off", images=images.subset(torch.arange(batch)))

    builds = {"float32": lambda: fast("off"), "bf16": lambda: fast("bf16")}
    if can_record(device):
        builds["float32, recorded"] = lambda: fast("off", recorded=True)
        builds["bf16, recorded"] = lambda: fast("bf16", recorded=True)
    work = f"{len(genotypes)} training steps, batch {batch}, 32 px"
    return Comparison(
        work, plain, builds, dict.fromkeys(builds, "ratio 4"), (len(genotypes) * batch, "images"), steps, once
    )


def scoring(args: argparse.Namespace, device: torch.device) -> Comparison:
    """Scorings of single genotypes: the plain one, and in each precision the project's."""
    n = 20 if args.quick else 500
    images, genotypes = random_images(n, 32, device), median_genotypes(1 if args.quick else GENOTYPES)
    workers = 0 if args.quick else LOADER_WORKERS

    def plain() -> Run:
        supernet = plain_images.contiguous(make_supernet(args.quick, device)).eval()
        return lambda: [plain_images.score(supernet, g, images, n, workers) for g in genotypes]

    builds = {
        "float32": lambda: scoring_run(genotypes, images, n, "off", args, device),
        "bf16": lambda: scoring_run(genotypes, images, n, "bf16", args, device),
    }
    if can_record(device):
        builds["float32, recorded"] = lambda: scoring_run(genotypes, images, n, "off", args, device, recorded=True)
        builds["bf16, recorded"] = lambda: scoring_run(genotypes, images, n, "bf16", args, device, recorded=True)
    work = f"scoring {len(genotypes)} genotypes on {n} images"
    return Comparison(work, plain, builds, dict.fromkeys(builds, "ratio 4"), (len(genotypes), "genotypes"))


def linearity(report: Report) -> None:
    """Report how the time of scoring grows with genotypes and with images, relative to the smallest number."""
    args, device = report.args, report.device
    n = 20 if args.quick else 250
    genotypes, images = median_genotypes(4), random_images(4 * n, 32, device)
    runs = {str(k): scoring_run(genotypes[:k], images.subset(torch.arange(n)), n, "off", args, device) for k in (1, 4)}
    report.figure("scoring of 1 and 4 genotypes of similar MACs, relative to 1 x genotypes", growth(runs, report))
    runs = {
        str(k * n): scoring_run(genotypes[:1], images.subset(torch.arange(k * n)), n, "off", args, device)
        for k in (1, 2, 4)
    }
    report.figure(f"scoring on {n}, {2 * n}, {4 * n} images, relative to {n} x images", growth(runs, report))


def whole_run(report: Report, step: str, score_one: str) -> None:
    """Report the time of a whole run with default settings, extrapolated from one step and one scoring.

    step, score_one: the names of these two comparisons. The precisions are those that `auto` means on this device.
    """
    n = 1 if report.args.quick else GENOTYPES
    steps, scored = EPOCHS * (TRAIN_IMAGES // 128), POOL * SCORINGS
    settled = settle_training_amp("auto", report.device), settle_amp("auto", report.device)
    training, scoring = ("float32" if amp == "off" else amp for amp in settled)
    for how in ("", ", recorded"):
        if (seconds := report.seconds.get(f"{step}|{training}{how}")) is not None:
            of_scoring = scored * report.seconds[f"{score_one}|{scoring}{how}"] / n
            total = steps * seconds / n + of_scoring
            report.figure(
                f"scoring's share of a run of {POOL} genotypes, extrapolated: {steps} steps, {scored} scorings{how}",
                f"{of_scoring / total:.0%} of {total / 3600:.2f} h",
                "stated",
            )


def main(args: argparse.Namespace) -> None:
    device = begin(args)
    works = [training(args, device), scoring(args, device)]
    if args.memory_of:
        print_memory(works, args.memory_of)
        return
    report = Report("supernet", args, device)
    for work in works:
        report.compare(work)
    linearity(report)
    whole_run(report, *(work.work for work in works))
    report.finish()


if __name__ == "__main__":
    main(parse_args(__doc__))
