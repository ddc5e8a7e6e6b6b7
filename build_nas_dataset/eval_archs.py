"""Train the stand-alone networks of several genotypes briefly, and rank them by their accuracy on held-out images.

    python -m build_nas_dataset.eval_archs --archs runs/generate_archs-.../genotypes.json --num_archs 50
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

import argparse
import hashlib
import json
import math
import shlex
import shutil
import time
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import numpy as np
import torch

from build_nas_dataset.records import read_records
from build_nas_dataset.scoring import check_split, split_of
from build_nas_dataset.statistics import bootstrap_interval, tau
from genotypes import Genotype, read_genotypes
from models.cost import genotype_cost
from models.network import CifarNetwork
from train_cifar import (
    accuracy,
    add_training_flags,
    build_optimizer,
    check_training_flags,
    load_data,
    train,
)
from train_cifar import parse_args as parse_training_args
from training import distributed
from training.images import ImageSet
from training.steps import build_network, go_on_from, open_log
from utils import (
    ArgumentParser,
    RunLog,
    add_common_flags,
    fail,
    load_checkpoint,
    number,
    output_folder,
    parse_resumable,
    prepare,
    save_checkpoint,
    user_input,
    write_json,
)


def read_candidates(path: str, num_archs: int) -> list[tuple[Genotype, dict]]:
    """(genotype, what the file knows of it), duplicates left out.

    Of a NAS dataset num_archs genotypes, evenly spread over the ranking by accuracy; of a genotype file the first
    num_archs; 0: all.
    Raises ValueError naming the file and what is wrong with it.
    """
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    if path.endswith(".json"):
        candidates = read_genotypes(path)
        candidates = candidates[: num_archs or None]
    else:
        records = sorted(read_records(path), key=lambda record: record.accuracy)
        index = np.linspace(0, len(records) - 1, num_archs or len(records)).round().astype(int)
        candidates = [(records[i].genotype, records[i].to_dict()) for i in dict.fromkeys(index.tolist())]
    distinct = {}
    for i, (genotype, known) in enumerate(candidates):
        canonical = genotype.canonical()
        if canonical is None:
            raise ValueError(f"{path}, genotype {i} is not valid: a cell has no path from an input to the output")
        distinct.setdefault(canonical, (genotype, known))
    if not distinct:
        raise ValueError(f"{path} holds no genotypes")
    return list(distinct.values())


def key_of(genotype: Genotype) -> str:
    """A name for the candidate, the same for every relabelling of its vertices."""
    return hashlib.sha256(json.dumps(genotype.canonical().to_dict()).encode()).hexdigest()[:16]


def plan(candidates: int, args: argparse.Namespace) -> list[tuple[int, int]]:
    """(candidates, epochs that they have been trained for at its end) of each round; one round without --halving."""
    if not args.halving:
        return [(candidates, args.epochs)]
    rounds = [(candidates, args.epochs)]
    while rounds[-1][0] > 1 and rounds[0][1] >= args.eta:
        rounds = [(n, epochs // args.eta) for n, epochs in rounds]
        rounds.append((math.ceil(rounds[-1][0] / args.eta), args.epochs))
    return rounds


# ------------------------------------------------------------------------------------------- training candidates


def train_candidate(
    genotype: Genotype,
    known: dict,
    images: ImageSet,
    held_out: ImageSet,
    args: argparse.Namespace,
    device: torch.device,
    before: dict | None = None,
    weights: tuple[Path | None, Path | None] = (None, None),
) -> dict:
    """Train one candidate up to args.epochs. Returns what was known of it and what was measured.

    before: its result of the round before; None in the first.
    weights: the file to go on from, and the one to leave for the next round.
    """
    started, start_epoch = time.monotonic(), 0
    if args.compile:
        torch.compiler.reset()  # else it gives up after a few networks
    network = build_network(CifarNetwork, genotype, len(images.classes), args, device)
    optimizer = build_optimizer(network, args)
    if weights[0]:
        with user_input("--resume", everywhere=True):  # each process has candidates of its own
            state = load_checkpoint(weights[0], "candidate", ("network", "optimizer", "epoch"))
            go_on_from(state, weights[0], network, optimizer)
        start_epoch = state["epoch"]
    values = train(network, images, args, device, optimizer, start_epoch)
    measured = accuracy(network, held_out, args.eval_batch_size, args.amp)
    if weights[1]:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": args.epochs}
        save_checkpoint(weights[1], "candidate", state)
    rounds = before["training"]["rounds"] if before else []
    loss = values["loss"] if math.isfinite(values["loss"]) else None
    seconds = (before["training"]["seconds"] if before else 0.0) + time.monotonic() - started
    this_round = {"epochs": args.epochs, "held_out_accuracy": measured, "loss": loss, "seconds": seconds}
    params, macs = genotype_cost(genotype, len(images.classes), args.layers, args.channels, args.image_size)
    return {
        **known,
        "held_out_accuracy": measured,
        "training": {  # params and macs outside of it, if any, are those of the file the genotype came from
            "params": params,
            "macs": macs,
            "loss": loss,  # None: it diverged
            "epochs": args.epochs,
            "schedule_epochs": args.schedule_epochs,
            "layers": args.layers,
            "channels": args.channels,
            "image_size": args.image_size,
            "seed": args.seed,
            "training_images": len(images),
            "held_out_images": len(held_out),
            "rounds": [*rounds, this_round],
            "seconds": seconds,
        },
    }


def part_file(folder: Path, rank: int) -> Path:
    """Where a process keeps the results of its candidates."""
    return folder / (f"checkpoint-{rank}.pt" if rank else "checkpoint.pt")


def read_parts(folder: Path, names: str = "checkpoint*.pt", order: Iterable[str] = ()) -> dict[str, dict]:
    """The latest result of every candidate, by its key, whichever process trained it. order: keys to come first."""
    results = {}
    for path in sorted(folder.glob(names)):
        for result in load_checkpoint(path, "candidates", ("results",))["results"]:
            key, training = key_of(Genotype.from_dict(result)), result["training"]
            if training["loss"] is not None and not math.isfinite(training["loss"]):  # of an older version
                training["loss"] = None
            last = {name: training[name] for name in ("epochs", "loss", "seconds")}
            last["held_out_accuracy"] = result["held_out_accuracy"]
            training["rounds"] = [*training.get("rounds", [])[:-1], last]  # older versions tell less, or nothing
            if key not in results or rounds_done(results, key) < len(training["rounds"]):
                results[key] = result
    return {key: results[key] for key in dict.fromkeys([*order, *results]) if key in results}


def rounds_done(results: dict[str, dict], key: str) -> int:
    return len(results[key]["training"]["rounds"]) if key in results else 0


def best_of_round(keys: list[str], results: dict[str, dict], k: int, n: int) -> list[str]:
    """The n best candidates after round k, from 0; of equal ones the first."""
    return sorted(keys, key=lambda key: merit(results[key]["training"]["rounds"][k]), reverse=True)[:n]


def merit(measured: dict) -> tuple[bool, float]:
    """What candidates are ranked by after a round: whether the training has not diverged, held-out accuracy."""
    return measured.get("loss", 0.0) is not None, measured["held_out_accuracy"]  # older versions tell less


def weights_file(folder: Path, key: str, k: int) -> Path:
    """Where a candidate's weights wait between round k and the next."""
    return folder / "weights" / f"{key}-{k}.pt"


def by_accuracy(results: list[dict]) -> list[dict]:
    """Best first: those that were trained longer, and among them the more accurate ones; last those that diverged."""

    def key(result: dict) -> tuple[bool, int, float]:
        last = result["training"]["rounds"][-1]
        converged, accuracy = merit(last)
        return converged, last["epochs"], accuracy

    return sorted(results, key=key, reverse=True)


# ------------------------------------------------------------------------------------------------------ results


def print_table(ranked: list[dict], most: int = 20) -> None:
    supernet = "supernet" if any(supernet_accuracy(result) is not None for result in ranked) else ""
    print(f"\n  rank  epochs  held-out   #params       MACs  {supernet}")
    for rank, result in enumerate(ranked[:most]):
        training, accuracy = result["training"], supernet_accuracy(result)
        supernet = "" if accuracy is None else f"{accuracy:.4f}"
        print(
            f"  {rank:4d}  {training['epochs']:6d}  {result['held_out_accuracy']:8.4f} {training['params'] / 1e6:8.3f}M"
            f" {training['macs'] / 1e6:9.1f}M  {supernet}"
        )
    if len(ranked) > most:
        print(f"  ... {len(ranked) - most} more in the file")


def supernet_accuracy(result: dict) -> float | None:
    """What the file that the genotype came from, a NAS dataset or one of generate_archs.py, knows of it."""
    known = result.get("supernet_accuracy", result.get("accuracy"))
    return known if isinstance(known, (int, float)) else None


def rank_correlations(results: list[dict]) -> dict[str, dict]:
    """Kendall's tau between brief training and the supernet's accuracy, where it is known, and with #params alone."""
    columns = {
        "supernet accuracy": [supernet_accuracy(result) for result in results],
        "#params": [result["training"]["params"] for result in results],
    }
    correlations = {}
    for name, column in columns.items():
        known = [i for i, value in enumerate(column) if value is not None]
        brief, values = [results[i]["held_out_accuracy"] for i in known], [column[i] for i in known]
        if len(known) > 2 and len(set(brief)) > 1 and len(set(values)) > 1:  # else there is no tau
            interval = bootstrap_interval(tau, brief, values)
            correlations[name] = {"tau": tau(brief, values), "interval": interval, "n": len(known)}
    return correlations


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--archs", default="data/nasdata.jsonl", help="genotype file (.json) or NAS dataset (default: %(default)s)")
    add("--num_archs", type=number(int, 0), default=50, help="candidates (0: all; default: %(default)s)")
    add_training_flags(parser, epochs=50, schedule_epochs=600, holdout=5000)
    add("--halving", action="store_true", help="successive halving: stop the worse candidates early")
    add("--eta", type=number(int, 2), default=3, help="of --halving: one in eta goes on (default: %(default)s)")
    add("--resume", help="run folder to go on with; candidates that are done are skipped")
    add_common_flags(parser)
    args = parse_resumable(
        parser, argv, "candidates", ("data", "cache_dir", "num_archs", "archs", "cuda_graphs"), ("results",)
    )
    check_training_flags(parser, args, processes=1)
    if args.sync_bn:
        parser.error("argument --sync_bn: not here, where each candidate is trained by one process")
    if args.halving and args.epochs < args.eta:
        parser.error(f"argument --epochs: expected at least --eta ({args.eta}) with --halving")
    if not args.holdout:
        parser.error("argument --holdout: expected at least 1 image to rank the candidates on")
    return args


def main(args: argparse.Namespace) -> None:
    device = distributed.start(prepare(args, shared=True))
    with user_input("--archs"):
        candidates = {key_of(found[0]): found for found in read_candidates(args.archs, args.num_archs)}
    folder = Path(distributed.same_everywhere(str(output_folder(args))))
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "candidates") if args.resume else {}
    results = resumed_results(folder, state, candidates, args) if args.resume else {}
    own_file = part_file(folder, distributed.rank())
    own = read_parts(folder, own_file.name) if args.resume else {}
    images, held_out, _ = load_data(args, device, state.get("classes"))
    if args.resume:
        with user_input("--data"):
            check_split(images, held_out, state, args.resume)
    distributed.barrier()  # until all have read what is there
    log = open_log(folder, args, device, 0 if args.resume else None)  # what was found before is logged again

    def save() -> None:
        state = {"results": list(own.values()), "candidates": len(candidates), "args": vars(args)}
        save_checkpoint(own_file, "candidates", state | split_of(images, held_out))

    if distributed.is_main() and not args.resume:
        save()  # for --resume, where a run stops before process 0 has its first result
    done, keys, rounds = len(candidates.keys() & results.keys()), list(candidates), plan(len(candidates), args)
    if log:
        print(
            f"{len(candidates)} candidates, {done} of them done; {len(images)} training images, ranked on "
            f"{len(held_out)} held-out ones, {distributed.processes()} on {device}: {folder}"
        )
    logged = count(1)

    def log_rounds(keys: list[str], k: int) -> None:
        for key in keys if log else ():
            log.log(next(logged), **results[key]["training"]["rounds"][k])

    for k, (n, epochs) in enumerate(rounds):
        keys = best_of_round(keys, results, k - 1, n) if k else keys
        todo = [key for key in keys if rounds_done(results, key) <= k]
        log_rounds([key for key in results if rounds_done(results, key) > k], k)
        if log:
            print(f"round {k + 1}/{len(rounds)}: {n} candidates up to epoch {epochs}, {len(todo)} to be trained")
        flags = argparse.Namespace(**{**vars(args), "epochs": epochs})
        own_todo = todo[distributed.rank() :: distributed.world()]
        for i, key in enumerate(own_todo, 1):
            weights = (
                weights_file(folder, key, k - 1) if k else None,
                weights_file(folder, key, k) if k + 1 < len(rounds) else None,
            )
            with distributed.alone():
                before = results.get(key)
                result = train_candidate(*candidates[key], images, held_out, flags, device, before, weights)
            own[key] = results[key] = result
            log_rounds([key], k)
            save()
            if log:
                write_json(folder / "results.json", by_accuracy(list(results.values())))
                print(
                    f"candidate {i}/{len(own_todo)}: held-out accuracy {result['held_out_accuracy']:.4f}, "
                    f"{result['training']['params'] / 1e6:.3f} M parameters ({result['training']['seconds']:.0f} s)"
                )
        distributed.barrier()
        results = read_parts(folder, order=candidates)
        if missing := [key for key in keys if rounds_done(results, key) <= k]:
            fail(f"--output_dir: {len(missing)} results are missing in {folder}; all processes must share that folder")
        log_rounds([key for key in todo if key not in own_todo], k)  # what the other processes found
        last = k + 1 == len(rounds)
        if log and (todo or last):  # nothing was done in a round before the one that a resumed run goes on with
            for path in folder.glob("weights/*.pt"):
                if path not in {weights_file(folder, key, k) for key in keys}:
                    path.unlink()
            if last:
                shutil.rmtree(folder / "weights", ignore_errors=True)  # with what a kill has left of a file
        distributed.barrier()  # until all have read and process 0 has cleared up, before anyone writes again
    if log:
        finish(list(results.values()), args, folder, log, next(logged))
    distributed.finish()


def resumed_results(folder: Path, state: dict, candidates: dict, args: argparse.Namespace) -> dict[str, dict]:
    """What the run to resume has found so far; its candidates are the same where they are compared round by round.

    state: its checkpoint.
    """
    with user_input("--resume"):
        results = read_parts(folder, order=candidates)
    if args.halving and (state.get("candidates") != len(candidates) or not results.keys() <= candidates.keys()):
        fail("--archs, --num_archs: a run with --halving is resumed with the candidates that it was started with")
    return results


def finish(results: list[dict], args: argparse.Namespace, folder: Path, log: RunLog, step: int) -> None:
    """Write and print the ranking. step: of the log, for what is computed here."""
    ranked = by_accuracy(results)
    if ranked[0]["training"]["loss"] is None:
        fail("no candidate has a finite loss; a smaller --lr_max may help")
    longest = [result for result in ranked if result["training"]["epochs"] == ranked[0]["training"]["epochs"]]
    correlations = rank_correlations(longest)
    write_json(folder / "results.json", ranked)
    write_json(folder / "best.json", ranked[0])
    if correlations:
        log.log(step, **{f"tau with {name}": value["tau"] for name, value in correlations.items()})
    log.close()
    print_table(ranked)
    for name, value in correlations.items():
        low, high = value["interval"]
        print(f"tau of brief training with {name}: {value['tau']:.3f} ({low:.3f} to {high:.3f}, n = {value['n']})")
    print(f"\nwrote {folder / 'results.json'} and {folder / 'best.json'}")
    flags, default = ["--arch", folder / "best.json"], parse_training_args([])
    for name in ("dataset", "data", "cache_dir", "skip_bad", "image_size", "auxiliary_weight"):
        if (value := getattr(args, name)) != getattr(default, name):
            flags += [f"--{name}"] if value is True else [f"--{name}", value]
    print(f"next: python train_cifar.py {shlex.join(map(str, flags))}")


if __name__ == "__main__":
    main(parse_args())
