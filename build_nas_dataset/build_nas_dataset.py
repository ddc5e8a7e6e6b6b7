"""Build a NAS dataset: train a supernet over a pool of random genotypes, then score every genotype with it.

    python -m build_nas_dataset --dataset cifar10 --data data                 # as published; a GPU is wanted
    python -m build_nas_dataset --dataset folder --data DIR --image_size 16 --auxiliary_weight 0 \\
        --layers 1 --channels 16 --epochs 45 --scorings 2 --score_images 1000 --lr_max 0.4 --cutout_size 0 \\
        --drop_path_keep_prob 1                                               # 2 CPU cores, about an hour
    python -m build_nas_dataset --resume runs/build_nas_dataset-...           # go on after a stop
    python -m build_nas_dataset --labels mixed --from data/nasdata.jsonl ...  # other labels: see brief_labels.py

Writes nasdata.jsonl (the records), supernet.pt (its weights, to score other genotypes), checkpoint.pt (what --resume
reads), metrics.jsonl and config.json. One process trains; several can score: see shards.py.
NAG paper, section 3.3. In every step one genotype of the pool is trained; after each of the last epochs all are
scored on the same held-out images, with batch statistics in every batch norm; the next scoring takes other images, so
that the agreement of two scorings tells how far the ranking can be trusted. A record's accuracy is their mean.
"""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

if not __package__:  # started as a file, the path that the published README names: packages are found beside the folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from build_nas_dataset.brief_labels import label, read_pool
from build_nas_dataset.flags import (
    MAX_SCORINGS,
    REFERENCE_FLAGS,
    add_image_flags,
    add_label_flags,
    add_scoring_flags,
    add_supernet_flags,
    add_training_flags,
    check_label_flags,
    check_supernet_flags,
    settle_training_amp,
    supernet_config,
)
from build_nas_dataset.scoring import (
    build_supernet,
    check_split,
    label_checksum,
    load_images_and_pool,
    score_pool,
    scoring_batches,
    settings_of,
    split_of,
    write_dataset,
)
from build_nas_dataset.shards import (
    Work,
    has_weights,
    keep_weights,
    remove_parts,
    this_shard,
    wait_for_folder,
    weights_file,
)
from build_nas_dataset.statistics import tau
from build_nas_dataset.supernet_training import make_optimizer, train_epoch
from models.network import CifarNetwork
from models.supernet import SupernetConfig
from plumbing.checkpoint_files import load_checkpoint, of_this_version, save_checkpoint
from plumbing.console import pace
from plumbing.flags import ArgumentParser, add_common_flags, explicit_flags, parse_resumable
from plumbing.locks import release_folder
from plumbing.run_folder import RunLog, output_folder
from plumbing.signals import signals
from plumbing.start import prepare
from training import distributed
from training.checkpoints import Checkpoints
from training.flags import check_image_size
from training.own_images import check_data_flags
from utils import (
    enough_memory,
    fail,
    load_optimizer,
    set_seed,
    settle_amp,
    shipped,
    shown,
    stop_if_diverged,
    user_input,
)

SAVED = ("supernet", "optimizer", "epoch", "scores", "seconds", "classes", "training_images", "held_out_checksum")
SAVE_MEMORY = "a smaller --batch_size and --score_batch_size take less, and --no-cuda_graphs takes a fraction"
# in a resumed run
MAY_CHANGE = ("data", "cache_dir", "cuda_graphs", "score_later", "score_only", "shard")


# -------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, reference_flags=REFERENCE_FLAGS)
    parser.prog = "python -m build_nas_dataset"
    add_image_flags(parser)
    add_supernet_flags(parser)
    add_training_flags(parser)
    add_scoring_flags(parser)
    add_label_flags(parser)
    add_common_flags(parser)
    if (asked := parser.parse_args(argv)).resume and asked.labels != "supernet":
        parser.error("argument --resume: expected without --labels; give the same command and --output_dir again")
    args = parse_resumable(parser, argv, "supernet", MAY_CHANGE, SAVED)
    if args.scorings is None:
        args.scorings = min(MAX_SCORINGS, args.epochs)
    given = explicit_flags(parser, argv)
    check_data_flags(parser, args, given)
    check_label_flags(parser, args, given, distributed.planned_world())
    if args.labels == "supernet" or not args.records:
        check_image_size(parser, args, CifarNetwork.auxiliary_sizes, given)
    check_supernet_flags(parser, args, distributed.planned_world())
    return args


# ---------------------------------------------------------------------------------------------------------- run


class Run:
    """A supernet in training: all that a checkpoint holds of it, and the images and genotypes that it works on.

    scores (scorings, P): accuracies of the pool, NaN where a genotype is not scored yet. epochs_done: epochs that it
    was trained for. seconds: time spent, "training" and "scoring". lines: that were logged, None if not known.
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
        self.epochs_done, self.seconds, self.lines = 0, {"training": 0.0, "scoring": 0.0}, None
        if state:
            self.go_on_from(state)
        self.checkpoints = Checkpoints(args.checkpoint_minutes, self.supernet, self.save, state)

    def open_log(self) -> None:
        """Begin the record of the run, or go on with it; from now on, this process alone writes to the folder."""
        step = self.epochs_done if self.args.resume else None
        self.log = RunLog(self.folder, self.args, self.device, step, self.lines)

    def go_on_from(self, state: dict) -> None:
        """Load a checkpoint of this run. Ends the script where the images do not go with it."""
        with user_input("--data"):
            check_split(self.train_images, self.held_out, state, self.args.resume)
        with user_input("--resume"), of_this_version(self.args.resume):
            self.supernet.load_state_dict(state["supernet"])
            load_optimizer(self.optimizer, state["optimizer"])
        self.scores, self.epochs_done, self.seconds = state["scores"], state["epoch"], state["seconds"]
        self.lines = state.get("lines")

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
        left = f"{left} for the training" if (left := pace.left()) else ""
        print(f"epoch {self.epochs_done}/{args.epochs}: {line}{left}")

    def score(self, scoring: int) -> None:
        """Score all genotypes that this scoring, from 0, has not scored yet; log it and save."""
        row, batches = self.scores[scoring], scoring_batches(self.held_out, self.args, scoring)
        later = int(self.scores[scoring + 1 :].isnan().sum())
        with enough_memory(SAVE_MEMORY), pace.paused():
            score_pool(
                self.supernet, self.pool, batches, row, self.args.score_amp, self.seconds, self.save_scores, later
            )
        self.report(scoring)
        self.save()

    def report(self, scoring: int) -> None:
        """Log and print what a scoring, from 0, has found."""
        row = self.scores[scoring]
        stability = {"tau_to_previous": tau(self.scores[scoring - 1], row)} if scoring else {}
        epoch = self.args.epochs - self.args.scorings + scoring + 1  # that it follows
        self.log.log(epoch, accuracy_mean=row.mean().item(), accuracy_std=row.std().item(), **stability)
        print(
            f"scoring {scoring + 1}/{self.args.scorings}: accuracy {row.mean():.4f} +- {row.std():.4f}"
            f" ({row.min():.4f} to {row.max():.4f})"
            + "".join(f", tau to the previous scoring {value:.3f}" for value in stability.values())
        )

    def score_later(self, scoring: int, trained: bool) -> None:
        """Leave the supernet for a scoring, from 0. trained: whether the epoch before it has just been trained.

        Else it was before a stop, and what was left then is kept: by now, the next epoch may be under way.
        """
        if trained or not weights_file(self.folder, scoring).exists():
            keep_weights(self.folder, scoring, self.supernet)

    def work(self) -> Work:
        """What is left to be scored."""
        return Work(self.folder, self.args, self.held_out, self.pool, self.scores)

    def merge(self) -> None:
        """Merge what shards have found and, if nothing is missing, finish. Ends the script if the run needs it all."""
        work = self.work()
        with user_input("--resume"):
            scores, seconds, note = work.merge()
        if missing := int(scores.isnan().sum()):
            there = f"{len(work.items) - missing} of {len(work.items)} scores are there"
            if not self.args.score_only:
                fail(f"--resume: {there}; find the others with --score_only, or --score_only --shard I/N")
            print(f"{there}; the last shard merges them")
            return
        if note:
            print(f"note: {note}")
        before = self.scores.isnan().any(1)
        self.args = argparse.Namespace(**{**vars(self.args), "score_only": False, "shard": None})
        self.scores, self.seconds["scoring"] = scores, self.seconds["scoring"] + seconds
        self.open_log()
        for scoring in before.nonzero().flatten().tolist():
            self.report(scoring)
        self.save()
        self.finish()

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
        remove_parts(self.folder)
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


# --------------------------------------------------------------------------------------------------------- main


def train_and_score(run: Run) -> None:
    """Train to the end, with the scorings after the last epochs, or with --score_later without them."""
    args, first_epoch = run.args, run.epochs_done
    run.open_log()
    print(
        f"{len(run.pool)} genotypes, {len(run.train_images)} training and {args.score_images} scoring images,"
        f" on {run.device}: {run.folder}"
    )
    pace.expect((args.epochs - first_epoch) * (len(run.train_images) // args.batch_size) - run.checkpoints.done)
    with signals.held():
        for epoch in range(max(first_epoch - 1, 0), args.epochs):  # the last epoch done may lack a part of its scoring
            if epoch >= first_epoch:
                run.train(epoch)
            scoring = epoch - (args.epochs - args.scorings)
            if scoring >= 0 and run.scores[scoring].isnan().any():
                run.score_later(scoring, epoch >= first_epoch) if args.score_later else run.score(scoring)
    if args.score_later and (work := run.work()).items.numel():
        run.log.close()
        print(f"trained; {len(work.items)} scores are left to be found\nnext: {work.command()}")
    else:
        run.finish()


def score_shard(run: Run) -> None:
    """Score this process's share of a trained run; the last process to finish merges what all have found."""
    index, count = this_shard(run.args.shard)
    work = run.work()
    if distributed.is_main():
        print(f"shard {index} of {count}: {len(work.share(index, count))} of {len(work.items)} scores, on {run.device}")
    with enough_memory(SAVE_MEMORY), signals.held():
        work.score(run.supernet, index, count, run.device)
    distributed.barrier()
    if not distributed.is_main():
        return
    wait_for_folder(run.folder, "--resume")
    with user_input("--resume"):
        state = load_checkpoint(run.folder, "supernet", SAVED)
    if state["scores"].isnan().any():
        run.go_on_from(state)  # the supernet too, in whose place those of the scorings were loaded
        run.merge()
    else:
        print(f"another process has merged the scores: {run.folder / 'nasdata.jsonl'}")
    release_folder(run.folder)


def trained_for_later(state: dict, folder: Path) -> bool:
    """Whether the run of a checkpoint is trained to its end and has left all supernets that are needed to score."""
    return state["epoch"] == state["args"]["epochs"] and has_weights(folder, state["scores"])


def label_by_supernet(args: argparse.Namespace) -> None:
    """Train a supernet, or go on with one, and score."""
    device = prepare(args, shared=args.score_only)
    device = distributed.start(device) if args.score_only else device
    args.amp = settle_training_amp(args.amp, device)  # which a resumed run keeps
    args.score_amp = settle_amp(args.score_amp, device)
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "supernet") if args.resume else {}
    unscored = not state or bool(state["scores"].isnan().any())
    trained = bool(state) and trained_for_later(state, Path(args.output_dir))
    if args.score_only and not trained:
        fail(f"--score_only: {args.output_dir} is not trained to its end with --score_later; for that, give "
             f"--resume {shown(args.output_dir)} --score_later")  # fmt: skip
    run = Run(args, device, state)
    if args.score_only and unscored:
        score_shard(run)
    elif args.score_only:
        print(f"nothing is left to be scored in {run.folder}")
    elif args.score_later and unscored and trained:
        run.merge()
    else:
        train_and_score(run)
    distributed.finish()


def supernet_first(args: argparse.Namespace) -> str:
    """For --labels mixed without --from: the NAS dataset by a supernet in OUTPUT_DIR/supernet, made where it lacks."""
    folder = Path(args.output_dir, "supernet")
    if not (folder / "nasdata.jsonl").exists():
        read_pool(args)  # refuses cells that are held out
        new = argparse.Namespace(**{**vars(args), "labels": "supernet", "output_dir": str(folder)})
        stopped = (folder / "checkpoint.pt").exists()
        label_by_supernet(parse_args(["--resume", str(folder), "--data", args.data]) if stopped else new)
    return str(folder / "nasdata.jsonl")


def main(args: argparse.Namespace) -> None:
    if args.labels == "supernet":
        label_by_supernet(args)
        return
    args.output_dir = str(output_folder(args))
    if args.labels == "mixed" and not args.records:
        args.records = supernet_first(args)
    label(args, prepare(args, shared=True))


if __name__ == "__main__":
    main(parse_args())
