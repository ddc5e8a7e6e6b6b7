"""The flags of build_nas_dataset.py, by group, and what they ask for. The defaults are the published settings."""

import argparse
import shlex

import torch

from build_nas_dataset.shards import shard
from genotypes import NAG_SPACE
from models.supernet import SupernetConfig
from plumbing.checkpoint_files import LARGEST, MOST_LAYERS
from plumbing.flags import UNREAD, Refused, add_checkpoint_minutes_flag, add_cuda_graphs_flag, number
from training.own_images import add_split_flags
from utils import settle_amp

FITTED = "(default: {}, or what fits a small set)"
MAX_SCORINGS = 10  # by default, as published

OF_IMAGENET = Refused("the reference reads this flag for ImageNet only, which it has no supernet for")
# Flags of the public reference's build_nas_dataset.py -> what says the same here. It scores a genotype on one batch.
REFERENCE_FLAGS = {
    "num_sampled_arch": "--pool_size {}",
    "max_num_vertices": "--max_step {}",
    "eval_batch_size": "--score_images {} --score_batch_size {}",
    "use_aux_head": "--auxiliary_weight 0",  # which switches the head off there
    **dict.fromkeys(["arch_pool", "available_ops", "num_labels"], UNREAD),
    **dict.fromkeys(["decay_period", "gamma", "label_smooth", "lazy_load", "lr", "zip_file"], OF_IMAGENET),
}


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
    add("--score_later", action="store_true", help="end after training, and leave the scorings for --score_only")
    add("--score_only", action="store_true", help="with --resume: score what a run with --score_later left")
    add("--shard", type=shard, metavar="I/N", help="with --score_only: score the share of job I of N, from 0")


def check_supernet_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, world: int) -> None:
    """Refuse what flags of the supernet do not allow together. world: the number of processes."""
    if args.score_images % args.score_batch_size:
        parser.error("argument --score_images: expected a multiple of --score_batch_size")
    if args.scorings > args.epochs:
        parser.error("argument --scorings: expected at most --epochs")
    if args.lr_min > args.lr_max:
        parser.error("argument --lr_min: expected at most --lr_max")
    if args.score_only and not args.resume:
        parser.error("argument --score_only: needs --resume RUN, a run that was trained with --score_later")
    if args.labels != "supernet":
        return
    if args.shard and not args.score_only:
        parser.error("argument --shard: needs --score_only")
    if world > 1 and not args.score_only:
        parser.error(
            "torchrun: one process trains, with --score_later; then several score, with --resume RUN --score_only"
        )


# What --brief_flags is by default: a training that takes about 80 s on one core.
BRIEF_TRAINING = (
    "--layers 1 --channels 16 --auxiliary_weight 0 --keep_prob 1 --drop_path_keep_prob 1 --batch_size 128 "
    "--epochs 2 --schedule_epochs 2"
)
OF_IMAGES = "dataset data test_share test_seed cache_dir skip_bad image_size num_images holdout".split()
OF_LABELS = {"records": "from", **{name: name for name in ("brief_cells", "brief_flags", "held_out_cells")}}


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("labels").add_argument
    add("--labels", default="supernet", choices=["supernet", "brief", "mixed"], help="what the accuracies are: by the "
        "supernet; after brief stand-alone training, of --brief_cells genotypes alone; or of these, and what a "
        "predictor that knows both expects of the others")  # fmt: skip
    add("--from", dest="records", metavar="RECORDS", help="NAS dataset of --labels supernet whose genotypes get labels "
        "(default: random genotypes; mixed trains a supernet first)")  # fmt: skip
    add("--brief_cells", type=number(int, 2), default=300, help="genotypes that are trained briefly")
    text = "flags of eval_archs.py for their training, in quotes, beside those of the images"
    add("--brief_flags", metavar="FLAGS", default=BRIEF_TRAINING, help=text)
    add("--held_out_cells", metavar="FILE", help="genotype file of cells that must not be among the genotypes")


def check_label_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str], world: int) -> None:
    """Refuse what does not go with --labels. given: the flags that were given. world: the number of processes."""
    if args.labels == "supernet":
        for name in (name for name in OF_LABELS if name in given):
            parser.error(f"argument --{OF_LABELS[name]}: expected with --labels brief or mixed")
        return
    trained = args.labels == "mixed" and not args.records  # a supernet is
    if trained and (args.shard or world > 1):
        parser.error("argument --from: expected with several processes or --shard, of which one trains the supernet")
    known = {*OF_IMAGES, *OF_LABELS, *"labels pool_size max_step shard seed device tf32 output_dir".split()}
    if not trained and (others := sorted(given - known)):
        parser.error(f"argument --{others[0]}: is of a supernet, and none is trained; --brief_flags has other flags")
    if args.score_later or args.score_only:
        parser.error("argument --score_later, --score_only: expected with --labels supernet")


def brief_flags(args: argparse.Namespace) -> list[str]:
    """The flags of eval_archs.py for a brief training: those of --brief_flags, and those given about the images."""
    flags = shlex.split(args.brief_flags)
    for name in OF_IMAGES:
        value = getattr(args, name)
        if name not in args.unsettled["flags"]:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [*flags, "--seed", str(args.seed), "--device", args.device, *(["--tf32"] if args.tf32 else [])]


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


def settle_training_amp(amp: str, device: torch.device) -> str:
    """The mixed precision of the training, "off" or "bf16", that --amp asks for on a device.

    auto: as in utils.settle_amp, but float32 on GPUs. There a step waits for the host, and bf16, whose casts are
    further kernels, is no faster (docs/speed_notes.md).
    """
    return "off" if amp == "auto" and device.type != "cpu" else settle_amp(amp, device)
