"""Train the stand-alone networks of several genotypes briefly, and rank them by their accuracy on held-out images.

    python build_nas_dataset/eval_archs.py --archs runs/generate_archs-.../genotypes.json --num_archs 50
    python -m build_nas_dataset.eval_archs --archs data/nasdata.jsonl --num_archs 30      # how good is the supernet?
    python -m build_nas_dataset.eval_archs --archs ... --halving          # all briefly, the better ones for longer
    torchrun --standalone --nproc_per_node=8 -m build_nas_dataset.eval_archs --archs ...  # candidates among processes
    python -m build_nas_dataset.eval_archs --resume runs/eval_archs-...                   # go on after a stop

Every candidate is trained from the same seed, for the first epochs of the long schedule. Writes results.json (all
candidates, best first; a genotype file), best.json (the first of them, for train_cifar.py), checkpoint.pt (what
--resume reads; of process N checkpoint-N.pt), metrics.jsonl and config.json. The test images are never used. NAG paper,
section 4.2: this is how one of the cells that the generator writes is chosen.

--halving is successive halving (Jamieson and Talwalkar 2016): all candidates are trained for --epochs / eta^k epochs,
the best 1/eta of them go on from where they were to eta times as many, and so on up to --epochs.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file, the path that the published README names: packages are found beside the folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
import shutil
from dataclasses import dataclass

import torch

from build_nas_dataset.candidate_training import Weights, train_candidate
from build_nas_dataset.candidates import (
    best_of_round,
    by_accuracy,
    flags_of_full_training,
    key_of,
    part_file,
    print_table,
    rank_correlations,
    read_candidates,
    read_parts,
    rounds_done,
    said_of,
    unfinished_file,
    weights_file,
)
from build_nas_dataset.scoring import check_split, split_of
from genotypes import Genotype
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.console import pace
from plumbing.files import write_json
from plumbing.flags import (
    ArgumentParser,
    add_checkpoint_minutes_flag,
    add_common_flags,
    explicit_flags,
    number,
    parse_resumable,
)
from plumbing.run_folder import RunLog, output_folder
from plumbing.signals import signals
from plumbing.start import prepare
from training import distributed
from training.cifar import (
    REFERENCE_FLAGS,
    add_training_flags,
    check_training_flags,
    load_data,
)
from training.images import ImageSet
from training.steps import open_log
from utils import fail, shipped, shown, user_input

MAY_CHANGE = "data cache_dir num_archs archs cuda_graphs".split()  # the flags that a resumed run need not keep


# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, reference_flags=REFERENCE_FLAGS)
    parser.prog = "python -m build_nas_dataset.eval_archs"
    group = parser.add_argument_group("genotypes")
    group.add_argument("--archs", default=shipped("data/nasdata.jsonl"), help="genotype file (.json) or NAS dataset")
    taken = "candidates: the first of a genotype file, evenly over the ranking of a NAS dataset; 0: all"
    group.add_argument("--num_archs", type=number(int, 0), default=50, help=taken)
    add_training_flags(parser, epochs=50, schedule_epochs=600, holdout=5000)
    group = parser.add_argument_group("search and checkpoints")
    group.add_argument("--halving", action="store_true", help="successive halving: stop the worse candidates early")
    group.add_argument("--eta", type=number(int, 2), default=3, help="with --halving, one candidate in eta goes on")
    add_checkpoint_minutes_flag(group)
    group.add_argument("--resume", help="run folder to go on with; candidates that are done are skipped")
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "candidates", tuple(MAY_CHANGE), ("results", "candidates"))
    check_training_flags(parser, args, processes=1, given=explicit_flags(parser, argv))
    if args.sync_bn:
        parser.error("argument --sync_bn: not here, where each candidate is trained by one process")
    if args.halving and args.epochs < args.eta:
        parser.error(f"argument --epochs: expected at least --eta ({args.eta}) with --halving")
    if not args.holdout:
        parser.error("argument --holdout: expected at least 1 image to rank the candidates on")
    return args


def plan(candidates: int, args: argparse.Namespace) -> list[tuple[int, int]]:
    """The rounds: (how many candidates, up to which epoch they are trained). There is one round without --halving."""
    if not args.halving:
        return [(candidates, args.epochs)]
    rounds = [(candidates, args.epochs)]
    while rounds[-1][0] > 1 and rounds[0][1] >= args.eta:
        rounds = [(n, epochs // args.eta) for n, epochs in rounds]
        rounds.append((math.ceil(rounds[-1][0] / args.eta), args.epochs))
    return rounds


# --------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A run as one of its processes sees it.

    candidates: key -> (genotype, what its file knows of it). results: key -> result, of all processes up to the last
    round. own: those of the candidates that this process has trained, which it keeps in own_file. log: None in all
    processes but the first. logged: lines of the log.
    """

    args: argparse.Namespace
    device: torch.device
    folder: Path
    candidates: dict[str, tuple[Genotype, dict]]
    images: ImageSet
    held_out: ImageSet
    results: dict[str, dict]
    own: dict[str, dict]
    log: RunLog | None
    logged: int = 0

    def save(self) -> None:
        """Write the results of this process."""
        state = {"results": list(self.own.values()), "candidates": len(self.candidates), "args": vars(self.args)}
        own_file = part_file(self.folder, distributed.rank())
        save_checkpoint(own_file, "candidates", state | split_of(self.images, self.held_out))

    def log_round(self, keys: list[str], k: int) -> None:
        """Log what candidates have reached in round k (from 0)."""
        for key in keys if self.log else ():
            self.logged += 1
            self.log.log(self.logged, **self.results[key]["training"]["rounds"][k])

    def do_round(self, keys: list[str], k: int, rounds: list[tuple[int, int]]) -> None:
        """Round k (from 0) of the rounds: train those of the candidates `keys` that have not been trained in it yet."""
        todo = [key for key in keys if rounds_done(self.results, key) <= k]
        self.log_round([key for key in self.results if rounds_done(self.results, key) > k], k)
        if self.log:
            text = f"{len(keys)} candidates up to epoch {rounds[k][1]}, {len(todo)} to be trained"
            print(f"round {k + 1}/{len(rounds)}: {text}")
        own_todo = todo[distributed.rank() :: distributed.world()]
        pace.expect(self.steps_left(len(own_todo), k, rounds))
        self.train_candidates(own_todo, k, rounds)
        distributed.barrier()
        self.results = read_parts(self.folder, order=self.candidates)
        if missing := [key for key in keys if rounds_done(self.results, key) <= k]:
            fail(f"--output_dir: {len(missing)} results are missing in {self.folder}; "
                 "all processes must share that folder")  # fmt: skip
        self.log_round([key for key in todo if key not in own_todo], k)  # what the other processes found
        last = k + 1 == len(rounds)
        if self.log and (todo or last):  # else this round was done before the stop, and its weights are cleared up
            self.clear_weights({weights_file(self.folder, key, k) for key in keys}, last)
        distributed.barrier()  # until all have read and process 0 has cleared up, before anyone writes again

    def steps_left(self, todo: int, k: int, rounds: list[tuple[int, int]]) -> int:
        """The training steps of this process from round k on. todo: how many candidates it trains in that round."""
        candidates = [todo, *(math.ceil(n / distributed.world()) for n, _ in rounds[k + 1 :])]
        ends = [0, *(epochs for _, epochs in rounds)][k:]
        epochs = sum(n * (after - before) for n, before, after in zip(candidates, ends, ends[1:], strict=False))
        return epochs * (len(self.images) // self.args.batch_size)

    def train_candidates(self, keys: list[str], k: int, rounds: list[tuple[int, int]]) -> None:
        """Train candidates in round k one after the other, and save after each and within each."""
        args = argparse.Namespace(**{**vars(self.args), "epochs": rounds[k][1]})
        for i, key in enumerate(keys, 1):
            weights = Weights(
                before=weights_file(self.folder, key, k - 1) if k else None,
                after=weights_file(self.folder, key, k) if k + 1 < len(rounds) else None,
                unfinished=unfinished_file(self.folder, key, k),
            )
            genotype, known = self.candidates[key]
            with signals.held():
                with distributed.alone():
                    result = train_candidate(
                        genotype, known, self.images, self.held_out, args, self.device, self.results.get(key), weights
                    )
                self.own[key] = self.results[key] = result
                self.log_round([key], k)
                self.save()
            weights.unfinished.unlink(missing_ok=True)
            if self.log:
                write_json(self.folder / "results.json", by_accuracy(list(self.results.values())))
                training = result["training"]
                print(
                    f"candidate {i}/{len(keys)}: held-out accuracy {result['held_out_accuracy']:.4f}, "
                    f"{training['params'] / 1e6:.3f} M parameters ({training['seconds']:.0f} s)"
                    f"{said_of(training)}{pace.left()}"
                )

    def clear_weights(self, kept: set[Path], last: bool) -> None:
        """Delete the weights that no further round goes on from. last: whether no round follows."""
        for path in self.folder.glob("weights/*.pt"):
            if path not in kept:
                path.unlink()
        if last:
            shutil.rmtree(self.folder / "weights", ignore_errors=True)  # with what a kill has left of a file


def begin(args: argparse.Namespace, device: torch.device) -> Run:
    """A new run, or the one to resume with what it has found so far. Ends the script on bad input."""
    with user_input("--archs"):
        candidates = {key_of(found[0]): found for found in read_candidates(args.archs, args.num_archs)}
    folder = Path(distributed.same_everywhere(str(output_folder(args))))
    state, results, own = {}, {}, {}
    if args.resume:
        with user_input("--resume"):
            state = load_checkpoint(args.resume, "candidates")
            results = read_parts(folder, order=candidates)
            own = read_parts(folder, part_file(folder, distributed.rank()).name)
        # with --halving, candidates are compared with each other round by round
        if args.halving and (state["candidates"] != len(candidates) or not results.keys() <= candidates.keys()):
            fail("--archs, --num_archs: a run with --halving is resumed with the candidates that it was started with")
    images, held_out, _ = load_data(args, device, state.get("classes"))
    if args.resume:
        with user_input("--data"):
            check_split(images, held_out, state, args.resume)
    distributed.barrier()  # until all have read what is there
    log = open_log(folder, args, device, 0 if args.resume else None)  # what was found before is logged again
    run = Run(args, device, folder, candidates, images, held_out, results, own, log)
    if distributed.is_main() and not args.resume:
        run.save()  # for --resume, where a run stops before process 0 has its first result
    return run


def finish(run: Run) -> None:
    """Write and print the ranking."""
    ranked = by_accuracy(list(run.results.values()))
    if ranked[0]["training"]["loss"] is None:
        fail("the training of every candidate diverged; a smaller --lr_max may help")
    converged = [result for result in ranked if result["training"]["loss"] is not None]
    longest = [result for result in converged if result["training"]["epochs"] == ranked[0]["training"]["epochs"]]
    correlations = rank_correlations(longest)
    write_json(run.folder / "results.json", ranked)
    write_json(run.folder / "best.json", ranked[0])
    if correlations:
        run.log.log(run.logged + 1, **{f"tau with {name}": value["tau"] for name, value in correlations.items()})
    run.log.close()
    print_table(ranked)
    for name, value in correlations.items():
        low, high = value["interval"]
        print(f"tau of brief training with {name}: {value['tau']:.3f} ({low:.3f} to {high:.3f}, n = {value['n']})")
    print(f"\nwrote {run.folder / 'results.json'} and {run.folder / 'best.json'}")
    flags = flags_of_full_training(vars(run.args), len(run.images))
    print(f"next: python {shown(shipped('train_cifar.py'))} --arch {shown(run.folder / 'best.json')}{flags}")


# --------------------------------------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    device = distributed.start(prepare(args, shared=True))
    run = begin(args, device)
    if run.log:
        print(
            f"{len(run.candidates)} candidates, {len(run.candidates.keys() & run.results.keys())} of them done; "
            f"{len(run.images)} training images, ranked on {len(run.held_out)} held-out ones, "
            f"{distributed.processes()} on {device}: {run.folder}"
        )
    keys, rounds = list(run.candidates), plan(len(run.candidates), args)
    for k, (n, _) in enumerate(rounds):
        keys = best_of_round(keys, run.results, k - 1, n) if k else keys
        run.do_round(keys, k, rounds)
    if run.log:
        finish(run)
    distributed.finish()


if __name__ == "__main__":
    main(parse_args())
