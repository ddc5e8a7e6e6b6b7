"""Build a NAS dataset: train a supernet over a pool of random genotypes, then score every genotype with it.

    python -m build_nas_dataset --dataset cifar10 --data data                 # as published; a GPU is wanted
    python -m build_nas_dataset --dataset folder --data DIR --image_size 16 --auxiliary_weight 0 \
        --layers 1 --channels 16 --epochs 45 --scorings 2 --score_images 1000 --lr_max 0.4 --cutout_size 0 \
        --drop_path_keep_prob 1                                               # 2 CPU cores, about an hour
    python -m build_nas_dataset --resume runs/build_nas_dataset-...           # go on after a stop

Writes nasdata.jsonl (the records), supernet.pt (its weights, to score other genotypes), checkpoint.pt (what --resume
reads), metrics.jsonl and config.json.
NAG paper, section 3.3. In every step one genotype of the pool is trained; after each of the last epochs all are
scored on the same held-out images, with batch statistics in every batch norm; the next scoring takes other images, so
that the agreement of two scorings tells how far the ranking can be trusted. A record's accuracy is their mean.
"""

import argparse
import math
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional as F

from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from build_nas_dataset.scoring import check_split, label_checksum, score, scoring_batches, split_of
from build_nas_dataset.statistics import tau
from genotypes import NAG_SPACE, Genotype
from models.cost import genotype_cost
from models.network import CifarNetwork
from models.supernet import Supernet
from training.flags import check_image_size
from training.images import ImageSet, balanced_batch, check_classes, load_images, split, train_batches
from training.steps import build_optimizer
from utils import (
    ArgumentParser,
    RunLog,
    add_common_flags,
    add_cuda_graphs_flag,
    autocast,
    cosine,
    derive_seed,
    enough_memory,
    fail,
    load_checkpoint,
    load_optimizer,
    number,
    of_this_version,
    output_folder,
    parse_resumable,
    prepare,
    progress_bar,
    save_checkpoint,
    set_lr,
    set_seed,
    settle_amp,
    shown,
    user_input,
    versions,
)

RESUMED = ("supernet", "optimizer", "epoch", "scores", "seconds")  # what a checkpoint has to hold
SAVE_MEMORY = "a smaller --batch_size and --score_batch_size take less, and --no-cuda_graphs takes a fraction"
SAVE_SECONDS = 60  # a stop during a scoring costs no more than this


def settle_training_amp(amp: str, device: torch.device) -> str:
    """What --amp means for the training. auto: as in utils.settle_amp, but float32 on CUDA.

    There a step waits for the host, and bf16, whose casts are further kernels, is no faster (benchmarks/NOTES.md).
    """
    return "off" if amp == "auto" and device.type == "cuda" else settle_amp(amp, device)


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Zeros where a parameter has no momentum yet, which changes nothing: fused kernels want that of all or of none."""
    for parameter in optimizer.param_groups[0]["params"]:
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)


def train_epoch(supernet, optimizer, images: ImageSet, pool: list[Genotype], args, epoch: int, device) -> dict:
    """One epoch over the training images, one genotype a step. Returns mean loss and training accuracy."""
    set_seed(derive_seed(args.seed, epoch))
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    steps = len(images) // args.batch_size
    choices = torch.randint(len(pool), (steps,), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
    totals, parameters = torch.zeros(2, device=device), supernet.other_parameters()  # finding them takes milliseconds
    supernet.train()
    batches = train_batches(images, args.batch_size, generator, args.cutout_size, args.image_size // 8)
    for step, (x, labels) in enumerate(progress_bar(batches, total=steps, desc=f"epoch {epoch + 1}")):
        done = epoch * steps + step
        set_lr(optimizer, cosine(done, args.epochs * steps, args.lr_max, args.lr_min))
        with autocast(args.amp, device):
            logits, auxiliary = supernet(x, pool[choices[step]], progress=(done + 1) / (args.epochs * steps))
            loss = F.cross_entropy(logits, labels)
            total = loss if auxiliary is None else loss + args.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_([*supernet.recorded_parameters(), *parameters], args.grad_clip)
        optimizer.step()
        totals += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
    loss, accuracy = (totals / steps).tolist()
    return {"loss": loss, "train_accuracy": accuracy}


def score_pool(supernet, pool, batches, scores: torch.Tensor, args, seconds: dict, save) -> None:
    """Fill `scores` (P,) where it is NaN, and add to seconds["scoring"]; `save()` every minute, but not at the end."""
    supernet.eval()
    todo, saved, results = scores.isnan().nonzero().flatten().tolist(), time.monotonic(), {}
    for i in progress_bar(todo, desc="scoring"):
        results[i] = score(supernet, pool[i], batches, args.score_amp)
        if time.monotonic() - saved > SAVE_SECONDS or i == todo[-1]:
            scores[list(results)] = torch.stack(list(results.values())).cpu()
            seconds["scoring"] += time.monotonic() - saved
            saved, results = time.monotonic(), {}
            if i != todo[-1]:
                save()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "folder"])
    add("--data", default="data", help="folder of the images (CIFAR: downloaded into it)")
    add("--cache_dir", help="where decoded image folders are kept (default: beside them)")
    add("--skip_bad", action="store_true", help="leave out images that cannot be read")
    add("--image_size", type=number(int, 8), default=32, help="pixels")
    add("--num_images", type=number(int, 0), default=0, help="train on that many images only (0: all)")
    add("--holdout", type=number(int, 1), default=5000, help="training images kept out, to score on")
    add("--pool_size", type=number(int, 2), default=4000, help="genotypes")
    add("--max_step", type=number(int, 3, 10), default=10, help="vertices of a cell, at most")
    add("--layers", type=number(int, 1), default=3, help="normal cells per stack")
    add("--channels", type=number(int, 2), default=20)
    add("--epochs", type=number(int, 1), default=150)
    add("--batch_size", type=number(int, 2), default=128)
    add("--lr_max", type=number(float, 0, above=True), default=0.025)
    add("--lr_min", type=number(float, 0), default=0.001)
    add("--l2_reg", type=number(float, 0), default=3e-4, help="weight decay")
    add("--grad_clip", type=number(float, 0, above=True), default=5.0, help="largest norm of the gradient")
    add("--keep_prob", type=number(float, 0, 1, above=True), default=1.0, help="of the classifier's dropout")
    add("--drop_path_keep_prob", type=number(float, 0, 1, above=True), default=0.9)
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help="0: no auxiliary head")
    add("--cutout_size", type=number(int, 0), default=16, help="pixels; 0: off")
    add("--scorings", type=number(int, 1), default=10, help="last epochs, each with a scoring on other images")
    add("--score_images", type=number(int, 2), default=500, help="held-out images a genotype is scored on")
    add("--score_batch_size", type=number(int, 2), default=500, help="images that share batch statistics")
    add("--amp", default="auto", choices=["auto", "off", "bf16"], help="mixed precision of the training")
    add("--score_amp", default="auto", choices=["auto", "off", "bf16"], help="mixed precision of the scorings")
    add_cuda_graphs_flag(parser)
    add("--resume", help="run folder or checkpoint to go on with")
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "supernet", ("data", "cache_dir", "cuda_graphs"), RESUMED)
    check_image_size(parser, args, CifarNetwork.auxiliary_sizes)
    if args.score_images % args.score_batch_size:
        parser.error("argument --score_images: expected a multiple of --score_batch_size")
    if args.scorings > args.epochs:
        parser.error("argument --scorings: expected at most --epochs")
    if args.lr_min > args.lr_max:
        parser.error("argument --lr_min: expected at most --lr_max")
    return args


def load_images_and_pool(
    args: argparse.Namespace, device: torch.device, classes: list[str] | None = None
) -> tuple[ImageSet, ImageSet, list[Genotype]]:
    """Training images, held-out images and the pool. Ends the script when the flags ask for more than there is.

    classes: those that the images must have, of the run to resume.
    """
    with user_input("--data"):
        train, _ = load_images(args.dataset, args.data, args.image_size, args.cache_dir, args.skip_bad, device)
        if classes:
            check_classes(train, classes, args.resume)
    with user_input("--holdout"):
        train, held_out = split(train, args.holdout, args.seed)
        scoring_batches(held_out, args)  # are there enough?
    if args.num_images:
        with user_input("--num_images"):
            train = balanced_batch(train, args.num_images, args.seed)
    if args.batch_size > len(train):
        fail(f"--batch_size: expected at most the {len(train)} training images, got {args.batch_size}")
    with user_input("--pool_size"):
        return train, held_out, random_pool(args.pool_size, args.seed, NAG_SPACE, args.max_step)


def settings_of(args: argparse.Namespace) -> dict:
    """The flags that a score depends on: what travels with the files that are passed on."""
    left_out = ("data", "cache_dir", "output_dir", "resume", "device", "cuda_graphs")
    return {name: value for name, value in vars(args).items() if name not in left_out}


def write_dataset(
    path: Path, pool: list[Genotype], scores: torch.Tensor, settings: dict, train: ImageSet, seconds: dict
) -> dict:
    """Write the NAS dataset from scores (scorings, P). Returns the summary that its header holds."""
    accuracies, costs = scores.mean(0), [genotype_cost(genotype) for genotype in pool]
    summary = {
        "accuracy_mean": accuracies.mean().item(),
        "accuracy_std": accuracies.std().item(),
        "repeatability_tau": [tau(a, b) for a, b in pairwise(scores)],
        "tau_with_params": tau(accuracies, [params for params, _ in costs]),
    }
    header = {
        "search_space": NAG_SPACE.name,
        "settings": settings,
        "training_images": len(train),
        "classes": train.classes,
        "seconds": {name: round(value) for name, value in seconds.items()},
        "summary": summary,
        "versions": versions(),
        "stand_alone": {"layers": 6, "channels": 36, "image_size": 32, "num_classes": 10},
    }
    records = [
        Record(i, genotype, round(accuracies[i].item(), 6), *cost)
        for i, (genotype, cost) in enumerate(zip(pool, costs, strict=True))
    ]
    write_records(path, records, header)
    return summary


def main(args: argparse.Namespace) -> None:
    device = prepare(args)
    args.amp = settle_training_amp(args.amp, device)  # which a resumed run keeps
    args.score_amp = settle_amp(args.score_amp, device)
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "supernet") if args.resume else {}
    train, held_out, pool = load_images_and_pool(args, device, state.get("classes"))
    set_seed(args.seed)
    supernet = Supernet(
        len(train.classes),
        args.layers,
        args.channels,
        args.max_step,
        args.keep_prob,
        args.drop_path_keep_prob,
        auxiliary=args.auxiliary_weight > 0,
    ).to(device, memory_format=torch.channels_last)
    optimizer = build_optimizer("sgd", supernet, args.lr_max, momentum=0.9, weight_decay=args.l2_reg)
    if device.type == "cuda" and args.cuda_graphs:
        supernet.record_parts()
    scores = torch.full((args.scorings, len(pool)), float("nan"))
    epochs_done, seconds = 0, {"training": 0.0, "scoring": 0.0}
    if args.resume:
        with user_input("--data"):
            check_split(train, held_out, state, args.resume)
        with user_input("--resume"), of_this_version(args.resume):
            supernet.load_state_dict(state["supernet"])
            load_optimizer(optimizer, state["optimizer"])
        scores, epochs_done, seconds = state["scores"], state["epoch"], state["seconds"]
    fill_momentum(optimizer)

    folder = output_folder(args)
    log = RunLog(folder, args, device, epochs_done if args.resume else None)
    print(f"{len(pool)} genotypes, {len(train)} training and {args.score_images} scoring images, on {device}: {folder}")

    def save() -> None:
        state = {
            "supernet": supernet.state_dict(),
            "supernet_config": asdict(supernet.config),
            "optimizer": optimizer.state_dict(),
            "epoch": epochs_done,
            "scores": scores,
            "seconds": seconds,
            **split_of(train, held_out),
            "args": vars(args),
        }
        save_checkpoint(folder / "checkpoint.pt", "supernet", state)

    first_epoch = epochs_done
    for epoch in range(max(first_epoch - 1, 0), args.epochs):  # the last epoch done may lack a part of its scoring
        started = time.monotonic()
        if epoch >= first_epoch:
            with enough_memory(SAVE_MEMORY):
                values = train_epoch(supernet, optimizer, train, pool, args, epoch, device)
            seconds["training"] += time.monotonic() - started
            if not math.isfinite(values["loss"]):
                fail(f"the loss is not finite in epoch {epoch + 1}; a smaller --lr_max may help")
            epochs_done = epoch + 1
            lr = float(optimizer.param_groups[0]["lr"])
            log.log(epochs_done, **values, lr=lr, seconds=time.monotonic() - started)
            save()
            line = " ".join(f"{name} {value:.3f}" for name, value in values.items())
            print(f"epoch {epochs_done}/{args.epochs}: {line}")
        scoring = epoch - (args.epochs - args.scorings)
        if scoring >= 0 and scores[scoring].isnan().any():
            row = scores[scoring]
            with enough_memory(SAVE_MEMORY):
                score_pool(supernet, pool, scoring_batches(held_out, args, scoring), row, args, seconds, save)
            stability = {"tau_to_previous": tau(scores[scoring - 1], row)} if scoring else {}
            log.log(epochs_done, accuracy_mean=row.mean().item(), accuracy_std=row.std().item(), **stability)
            print(
                f"scoring {scoring + 1}/{args.scorings}: accuracy {row.mean():.4f} +- {row.std():.4f}"
                f" ({row.min():.4f} to {row.max():.4f})"
                + "".join(f", tau to the previous scoring {value:.3f}" for value in stability.values())
            )
            save()

    settings = settings_of(args)
    weights = {
        "supernet": supernet.state_dict(),
        "supernet_config": asdict(supernet.config),
        "settings": {**settings, "held_out_checksum": label_checksum(held_out)},
    }
    save_checkpoint(folder / "supernet.pt", "supernet weights", weights)
    summary = write_dataset(folder / "nasdata.jsonl", pool, scores, settings, train, seconds)
    log.close()
    print(
        f"accuracy {summary['accuracy_mean']:.4f} +- {summary['accuracy_std']:.4f} over the pool; "
        f"tau with #params {summary['tau_with_params']:.3f}\n"
        f"training {seconds['training']:.0f} s, scoring {seconds['scoring']:.0f} s\n"
        f"wrote {folder / 'nasdata.jsonl'}\n"
        f"next: python gan.py --nasbench_data {shown(folder / 'nasdata.jsonl')}"
    )


if __name__ == "__main__":
    main(parse_args())
