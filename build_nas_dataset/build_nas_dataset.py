"""Build a NAS dataset: train a supernet over a pool of random genotypes, then score every genotype with it.

    python -m build_nas_dataset --dataset cifar10 --data data                 # as published; a GPU is wanted
    python -m build_nas_dataset --dataset folder --data DIR --image_size 16 --auxiliary_weight 0 \\
        --layers 1 --channels 16 --epochs 45 --scorings 2 --score_images 1000 --lr_max 0.4 --cutout_size 0 \\
        --drop_path_keep_prob 1                                               # 2 CPU cores, about an hour
    python -m build_nas_dataset --resume runs/build_nas_dataset-...           # go on after a stop

Writes nasdata.jsonl (the records), supernet.pt (its weights, to score other genotypes), checkpoint.pt (what --resume
reads), metrics.jsonl and config.json.
NAG paper, section 3.3. In every step one genotype of the pool is trained; after each of the last epochs all are
scored on the same held-out images, with batch statistics in every batch norm; the next scoring takes other images, so
that the agreement of two scorings tells how far the ranking can be trusted. A record's accuracy is their mean.
"""

import argparse
import sys
import time
from dataclasses import asdict
from itertools import islice, pairwise
from pathlib import Path

if not __package__:  # started as a file, the path that the published README names: packages are found beside the folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn import functional as F

from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from build_nas_dataset.scoring import (
    build_supernet,
    check_split,
    clip_gradients,
    label_checksum,
    score_pool,
    scoring_batches,
    settings_of,
    split_of,
)
from build_nas_dataset.statistics import tau
from genotypes import NAG_SPACE, Genotype
from models.cost import genotype_cost
from models.network import CifarNetwork
from models.supernet import Supernet, SupernetConfig
from training.checkpoints import Checkpoints
from training.cifar import load_parts
from training.flags import check_image_size
from training.images import ImageSet, balanced_batch, check_classes, num_balanced, split, train_batches
from training.own_images import (
    add_split_flags,
    check_data_flags,
    settle_batch_size,
    settle_holdout,
    settle_scoring,
    take_unsettled,
)
from training.steps import build_optimizer
from utils import (
    LARGEST,
    MOST_LAYERS,
    UNREAD,
    ArgumentParser,
    RunLog,
    add_checkpoint_minutes_flag,
    add_common_flags,
    add_cuda_graphs_flag,
    autocast,
    cosine,
    derive_seed,
    enough_memory,
    explicit_flags,
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
    shipped,
    shown,
    signals,
    stop_if_diverged,
    user_input,
    versions,
)

SAVED = ("supernet", "optimizer", "epoch", "scores", "seconds", "classes", "training_images", "held_out_checksum")
SAVE_MEMORY = "a smaller --batch_size and --score_batch_size take less, and --no-cuda_graphs takes a fraction"
FITTED = "(default: {}, or what fits a small set)"
MAX_SCORINGS = 10  # by default, as published

# Flags of the public reference's build_nas_dataset.py -> what says the same here. It scores a genotype on one batch.
REFERENCE_FLAGS = {
    "num_sampled_arch": "--pool_size {}",
    "max_num_vertices": "--max_step {}",
    "eval_batch_size": "--score_images {} --score_batch_size {}",
    "use_aux_head": "--auxiliary_weight 0",  # which switches the head off there
    **dict.fromkeys(["arch_pool", "available_ops", "decay_period", "gamma", "label_smooth", "lazy_load"], UNREAD),
    **dict.fromkeys(["lr", "num_labels", "zip_file"], UNREAD),
}


# -------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, reference_flags=REFERENCE_FLAGS)
    parser.prog = "python -m build_nas_dataset"
    add_image_flags(parser)
    add_supernet_flags(parser)
    add_training_flags(parser)
    add_scoring_flags(parser)
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "supernet", ("data", "cache_dir", "cuda_graphs"), SAVED)
    if args.scorings is None:
        args.scorings = min(MAX_SCORINGS, args.epochs)
    given = explicit_flags(parser, argv)
    check_data_flags(parser, args, given)
    check_image_size(parser, args, CifarNetwork.auxiliary_sizes, given)
    if args.score_images % args.score_batch_size:
        parser.error("argument --score_images: expected a multiple of --score_batch_size")
    if args.scorings > args.epochs:
        parser.error("argument --scorings: expected at most --epochs")
    if args.lr_min > args.lr_max:
        parser.error("argument --lr_min: expected at most --lr_max")
    return args


def add_image_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "folder"], help="which images")
    add("--data", default="data", help="folder of the images; CIFAR is downloaded into it. One's own: a folder or .zip "
        "of class folders, or train and test of these")  # fmt: skip
    add_split_flags(group)
    add("--cache_dir", help="folder for decoded image folders (default: beside the images)")
    add("--skip_bad", action="store_true", help="leave out images that cannot be read")
    add("--image_size", type=number(int, 8), default=32, help="width and height of an image, in pixels")
    add("--num_images", type=number(int, 0), default=0, help="training images that are used; 0: all")
    held_out = f"training images kept out of training, to score on {FITTED.format(5000)}"
    add("--holdout", type=number(int, 1), default=5000, help=held_out)


def add_supernet_flags(parser: argparse.ArgumentParser) -> None:
    """The pool and the supernet; the defaults are those of SupernetConfig."""
    published, fraction = SupernetConfig(), number(float, 0, 1, above=True)
    add = parser.add_argument_group("pool").add_argument
    add("--pool_size", type=number(int, 2), default=4000, help="genotypes that are trained and scored")
    vertices = number(int, NAG_SPACE.min_vertices, NAG_SPACE.max_vertices)
    add("--max_step", type=vertices, default=published.max_vertices, help="vertices of the largest cells, all counted")
    add = parser.add_argument_group("supernet").add_argument
    add("--layers", type=number(int, 1, MOST_LAYERS), default=published.layers, help="normal cells per stack, N")
    add(
        "--channels",
        type=number(int, 2, LARGEST),
        default=published.channels,
        help="channels of the first stack's cells, C",
    )
    add("--keep_prob", type=fraction, default=published.keep_prob, help="keep probability before the classifier")
    text = "keep probability of drop path in the last cell at the end of training"
    add("--drop_path_keep_prob", type=fraction, default=published.drop_path_keep_prob, help=text)


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--epochs", type=number(int, 1), default=150, help="passes over the training images")
    size = f"images of a step, which trains one genotype {FITTED.format(128)}"
    add("--batch_size", type=number(int, 2), default=128, help=size)
    add("--lr_max", type=number(float, 0, above=True), default=0.025, help="learning rate at the start")
    add("--lr_min", type=number(float, 0), default=0.001, help="learning rate at the end of a cosine")
    add("--l2_reg", type=number(float, 0), default=3e-4, help="weight decay")
    add("--grad_clip", type=number(float, 0, above=True), default=5.0, help="largest norm of the gradient")
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help="of the auxiliary head's loss; 0: no head")
    add("--cutout_size", type=number(int, 0), default=16, help="side of the square cut out of images, pixels; 0: none")
    add("--amp", default="auto", choices=["auto", "off", "bf16"], help="mixed precision of the training")
    add_cuda_graphs_flag(group)
    add_checkpoint_minutes_flag(group)
    add("--resume", help="run folder, or its checkpoint.pt, to go on with")


def add_scoring_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("scoring").add_argument
    text = "last epochs that are followed by a scoring, each on other images"
    add("--scorings", type=number(int, 1), help=f"{text} (default: {MAX_SCORINGS}, or --epochs if that is less)")
    images = f"held-out images that a genotype is scored on {FITTED.format(500)}"
    add("--score_images", type=number(int, 2), default=500, help=images)
    text = f"images that share batch statistics {FITTED.format(500)}"
    add("--score_batch_size", type=number(int, 2), default=500, help=text)
    add("--score_amp", default="auto", choices=["auto", "off", "bf16"], help="mixed precision of the scorings")


def settle_training_amp(amp: str, device: torch.device) -> str:
    """The mixed precision of the training, "off" or "bf16", that --amp asks for on a device.

    auto: as in utils.settle_amp, but float32 on GPUs. There a step waits for the host, and bf16, whose casts are
    further kernels, is no faster (docs/speed_notes.md).
    """
    return "off" if amp == "auto" and device.type != "cpu" else settle_amp(amp, device)


# -------------------------------------------------------------------------------------------------------- parts


def load_images_and_pool(
    args: argparse.Namespace, device: torch.device, classes: list[str] | None = None
) -> tuple[ImageSet, ImageSet, list[Genotype]]:
    """Training images, held-out images and the pool. Ends the script when the flags ask for more than there is.

    classes: the names of the classes that the images must have, those of the run to resume.
    """
    unsettled = take_unsettled(args)
    train, _ = load_parts(args, device)
    if classes:
        with user_input("--data"):
            check_classes(train, classes, args.resume)
    settle_holdout(args, train, unsettled)
    with user_input("--holdout"):
        train, held_out = split(train, args.holdout, args.seed)
        settle_scoring(args, num_balanced(held_out), unsettled)
        scoring_batches(held_out, args)  # are there enough?
    if args.num_images:
        with user_input("--num_images"):
            train = balanced_batch(train, args.num_images, args.seed)
    settle_batch_size(args, train, unsettled)
    if args.batch_size > len(train):
        fail(f"--batch_size: expected at most the {len(train)} training images, got {args.batch_size}")
    with user_input("--pool_size"):
        return train, held_out, random_pool(args.pool_size, args.seed, NAG_SPACE, args.max_step)


def supernet_config(args: argparse.Namespace, num_classes: int) -> SupernetConfig:
    """The settings of the supernet that the flags ask for."""
    return SupernetConfig(
        num_classes=num_classes,
        layers=args.layers,
        channels=args.channels,
        max_vertices=args.max_step,
        keep_prob=args.keep_prob,
        drop_path_keep_prob=args.drop_path_keep_prob,
        auxiliary=args.auxiliary_weight > 0,
    )


def make_optimizer(supernet: Supernet, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD for the weights of a supernet, with a momentum of zero to start with.

    torch would start a weight's momentum in the first step that gives it a gradient, with the same result. But a step
    gives gradients to the weights on one genotype's path, and fused kernels take the momentum of all weights or none.
    """
    optimizer = build_optimizer("sgd", supernet, args.lr_max, momentum=0.9, weight_decay=args.l2_reg)
    for parameter in supernet.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_epoch(
    supernet, optimizer, images: ImageSet, pool: list[Genotype], args, epoch: int, device, checkpoints=None
) -> dict:
    """Train for one epoch over the images, one random genotype of the pool a step. Returns mean loss and accuracy."""
    checkpoints = checkpoints or Checkpoints(network=supernet)
    set_seed(derive_seed(args.seed, epoch))
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    steps = len(images) // args.batch_size
    choices = torch.randint(len(pool), (steps,), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
    parameters = list(supernet.parameters())  # finding them takes milliseconds
    supernet.train()
    batches = train_batches(images, args.batch_size, generator, args.cutout_size, args.image_size // 8)
    first, totals = checkpoints.done, checkpoints.begin(epoch)
    bar = progress_bar(islice(batches, first, None), initial=first, total=steps, desc=f"epoch {epoch + 1}")
    for step, (x, labels) in enumerate(bar, start=first):
        done = epoch * steps + step
        set_lr(optimizer, cosine(done, args.epochs * steps, args.lr_max, args.lr_min))
        with autocast(args.amp, device):
            logits, auxiliary = supernet(x, pool[choices[step]], progress=(done + 1) / (args.epochs * steps))
            loss = F.cross_entropy(logits, labels)
            total = loss if auxiliary is None else loss + args.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        optimizer.zero_grad()
        total.backward()
        clip_gradients(supernet, parameters, args.grad_clip)
        optimizer.step()
        totals += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
        checkpoints.after_step(step + 1)
    set_lr(optimizer, cosine((epoch + 1) * steps - 1, args.epochs * steps, args.lr_max, args.lr_min))
    loss, accuracy = (totals / steps).tolist()
    return {"loss": loss, "train_accuracy": accuracy}


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


# ---------------------------------------------------------------------------------------------------------- run


class Run:
    """A supernet in training: all that a checkpoint holds of it, and the images and genotypes that it works on.

    scores (scorings, P): accuracies of the pool, NaN where a genotype is not scored yet. epochs_done: epochs that it
    was trained for. seconds: time spent, "training" and "scoring".
    state: the checkpoint to go on from, or {}. Ends the script where the flags or images do not go with it.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device, state: dict):
        self.args, self.device, self.folder = args, device, output_folder(args)
        self.train_images, self.held_out, self.pool = load_images_and_pool(args, device, state.get("classes"))
        set_seed(args.seed)
        config = supernet_config(args, len(self.train_images.classes))
        self.supernet = build_supernet(config, device, args.cuda_graphs)
        self.optimizer = make_optimizer(self.supernet, args)
        self.scores = torch.full((args.scorings, len(self.pool)), float("nan"))
        self.epochs_done, self.seconds = 0, {"training": 0.0, "scoring": 0.0}
        if state:
            self._go_on_from(state)
        self.checkpoints = Checkpoints(args.checkpoint_minutes, self.supernet, self.save, state)
        self.log = RunLog(self.folder, args, device, self.epochs_done if state else None, state.get("lines"))

    def _go_on_from(self, state: dict) -> None:
        with user_input("--data"):
            check_split(self.train_images, self.held_out, state, self.args.resume)
        with user_input("--resume"), of_this_version(self.args.resume):
            self.supernet.load_state_dict(state["supernet"])
            load_optimizer(self.optimizer, state["optimizer"])
        self.scores, self.epochs_done, self.seconds = state["scores"], state["epoch"], state["seconds"]

    def save(self, part: dict | None = None) -> None:
        """Write checkpoint.pt, which --resume goes on from. part: of an epoch under way, see Checkpoints."""
        state = {
            "supernet": self.supernet.state_dict(),
            "supernet_config": asdict(self.supernet.config),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epochs_done,
            "scores": self.scores,
            "seconds": self.seconds,
            "lines": self.log.lines,
            **split_of(self.train_images, self.held_out),
            "args": vars(self.args),
        }
        save_checkpoint(self.folder / "checkpoint.pt", "supernet", state | (part or {}))

    def save_scores(self) -> None:
        """Save within a scoring; end the script if a signal asked for that."""
        self.save()
        signals.save = False
        if signals.stop:
            signals.end()

    def train(self, epoch: int) -> None:
        """Train for one epoch, log it and save. Ends the script when training has diverged."""
        started, args = time.monotonic() - self.checkpoints.seconds, self.args
        parts = self.supernet, self.optimizer, self.train_images, self.pool
        with enough_memory(SAVE_MEMORY):
            values = train_epoch(*parts, args, epoch, self.device, self.checkpoints)
        self.seconds["training"] += time.monotonic() - started
        stop_if_diverged(epoch + 1, values["loss"], self.supernet, advice="a smaller --lr_max may help")
        self.epochs_done = epoch + 1
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.log.log(self.epochs_done, **values, lr=lr, seconds=time.monotonic() - started)
        self.save()
        line = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"epoch {self.epochs_done}/{args.epochs}: {line}")

    def score(self, scoring: int) -> None:
        """Score all genotypes that this scoring, from 0, has not scored yet; log it and save."""
        row, batches = self.scores[scoring], scoring_batches(self.held_out, self.args, scoring)
        with enough_memory(SAVE_MEMORY):
            score_pool(self.supernet, self.pool, batches, row, self.args.score_amp, self.seconds, self.save_scores)
        stability = {"tau_to_previous": tau(self.scores[scoring - 1], row)} if scoring else {}
        self.log.log(self.epochs_done, accuracy_mean=row.mean().item(), accuracy_std=row.std().item(), **stability)
        print(
            f"scoring {scoring + 1}/{self.args.scorings}: accuracy {row.mean():.4f} +- {row.std():.4f}"
            f" ({row.min():.4f} to {row.max():.4f})"
            + "".join(f", tau to the previous scoring {value:.3f}" for value in stability.values())
        )
        self.save()

    def finish(self) -> None:
        """Write supernet.pt and nasdata.jsonl."""
        settings, path = settings_of(self.args), self.folder / "nasdata.jsonl"
        weights = {
            "supernet": self.supernet.state_dict(),
            "supernet_config": asdict(self.supernet.config),
            "settings": {**settings, "held_out_checksum": label_checksum(self.held_out)},
        }
        save_checkpoint(self.folder / "supernet.pt", "supernet weights", weights)
        summary = write_dataset(path, self.pool, self.scores, settings, self.train_images, self.seconds)
        self.log.close()
        largest = self.args.max_step  # the supernet scores no larger cells
        size = f" --max_step {largest}" if largest != SupernetConfig.max_vertices else ""
        print(
            f"accuracy {summary['accuracy_mean']:.4f} +- {summary['accuracy_std']:.4f} over the pool; "
            f"tau with #params {summary['tau_with_params']:.3f}\n"
            f"training {self.seconds['training']:.0f} s, scoring {self.seconds['scoring']:.0f} s\n"
            f"wrote {path}\n"
            f"next: python {shown(shipped('gan.py'))} --nasbench_data {shown(path)}{size}"
        )


def main(args: argparse.Namespace) -> None:
    device = prepare(args)
    args.amp = settle_training_amp(args.amp, device)  # which a resumed run keeps
    args.score_amp = settle_amp(args.score_amp, device)
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "supernet") if args.resume else {}
    run = Run(args, device, state)
    print(
        f"{len(run.pool)} genotypes, {len(run.train_images)} training and {args.score_images} scoring images,"
        f" on {device}: {run.folder}"
    )
    first_epoch = run.epochs_done
    with signals.held():
        for epoch in range(max(first_epoch - 1, 0), args.epochs):  # the last epoch done may lack a part of its scoring
            if epoch >= first_epoch:
                run.train(epoch)
            scoring = epoch - (args.epochs - args.scorings)
            if scoring >= 0 and run.scores[scoring].isnan().any():
                run.score(scoring)
    run.finish()


if __name__ == "__main__":
    main(parse_args())
