"""Train the stand-alone networks of several genotypes briefly, and rank them by their accuracy on held-out images.

    python -m build_nas_dataset.eval_archs --archs runs/generate_archs-.../genotypes.json --num_archs 50
    python -m build_nas_dataset.eval_archs --archs data/nasdata.jsonl --num_archs 30      # how good is the supernet?
    python -m build_nas_dataset.eval_archs --resume runs/eval_archs-...                   # go on after a stop

Every candidate is trained from the same seed, for the first epochs of the long schedule. Writes results.json (all
candidates, best first; a genotype file), best.json (the first of them, for train_cifar.py), checkpoint.pt (what
--resume reads), metrics.jsonl and config.json. The test images are never used. NAG paper, section 4.2: this is how one
of the cells that the generator writes is chosen.
"""

import argparse
import time
from pathlib import Path

import numpy as np

from build_nas_dataset.records import read_records
from genotypes import Genotype, read_genotypes
from metrics import tau, tau_interval
from models.network import genotype_cost
from train_cifar import accuracy, add_training_flags, build_network, check_training_flags, load_data, train
from utils import (
    ArgumentParser,
    RunLog,
    add_common_flags,
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


def train_candidate(genotype: Genotype, known: dict, images, held_out, args: argparse.Namespace, device) -> dict:
    """Train one candidate. Returns what was known of it and what was measured."""
    started = time.monotonic()
    network = build_network(genotype, len(images.classes), args, device)
    values = train(network, images, args, device)
    params, macs = genotype_cost(genotype, len(images.classes), args.layers, args.channels, args.image_size)
    return {
        **known,
        "held_out_accuracy": accuracy(network, held_out, args.eval_batch_size, args.amp),
        "training": {  # params and macs outside of it, if any, are those of the file the genotype came from
            "params": params,
            "macs": macs,
            "loss": values["loss"],
            "epochs": args.epochs,
            "schedule_epochs": args.schedule_epochs,
            "layers": args.layers,
            "channels": args.channels,
            "image_size": args.image_size,
            "seed": args.seed,
            "training_images": len(images),
            "held_out_images": len(held_out),
            "seconds": time.monotonic() - started,
        },
    }


def by_accuracy(results: list[dict]) -> list[dict]:
    return sorted(results, key=lambda result: -result["held_out_accuracy"])


def print_table(ranked: list[dict], most: int = 20) -> None:
    print(f"\n  rank  held-out   #params       MACs  {'supernet' if has_accuracy(ranked[0]) else ''}")
    for rank, result in enumerate(ranked[:most]):
        training = result["training"]
        supernet = f"{result['accuracy']:.4f}" if has_accuracy(result) else ""
        print(
            f"  {rank:4d}  {result['held_out_accuracy']:8.4f} {training['params'] / 1e6:8.3f}M"
            f" {training['macs'] / 1e6:9.1f}M  {supernet}"
        )
    if len(ranked) > most:
        print(f"  ... {len(ranked) - most} more in the file")


def has_accuracy(result: dict) -> bool:
    """Whether the file that the genotype came from knows its accuracy by the supernet."""
    return isinstance(result.get("accuracy"), (int, float))


def rank_correlations(results: list[dict]) -> dict[str, dict]:
    """Kendall's tau between brief training and the supernet's accuracy, and beside it with #params alone."""
    results = [result for result in results if has_accuracy(result)]
    brief = [result["held_out_accuracy"] for result in results]
    columns = {
        "supernet accuracy": [result["accuracy"] for result in results],
        "#params": [result["training"]["params"] for result in results],
    }
    return {
        name: {"tau": tau(brief, values), "interval": tau_interval(brief, values), "n": len(results)}
        for name, values in columns.items()
        if len(results) > 2 and len(set(brief)) > 1 and len(set(values)) > 1  # else there is no tau
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--archs", default="data/nasdata.jsonl", help="genotype file (.json) or NAS dataset (default: %(default)s)")
    add("--num_archs", type=number(int, 0), default=50, help="candidates (0: all; default: %(default)s)")
    add_training_flags(parser, epochs=50, schedule_epochs=600, holdout=5000)
    add("--resume", help="run folder to go on with; candidates that are done are skipped")
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "candidates", may_change=("data", "cache_dir", "num_archs", "archs"))
    check_training_flags(parser, args)
    if not args.holdout:
        parser.error("argument --holdout: expected at least 1 image to rank the candidates on")
    return args


def main(args: argparse.Namespace) -> None:
    device = prepare(args)
    with user_input("--archs"):
        candidates = read_candidates(args.archs, args.num_archs)
    results = []
    if args.resume:
        with user_input("--resume"):
            results = load_checkpoint(args.resume, "candidates")["results"]
    images, held_out, _ = load_data(args, device)
    done = {Genotype.from_dict(result).canonical() for result in results}
    todo = [(genotype, known) for genotype, known in candidates if genotype.canonical() not in done]

    folder = output_folder(args)
    with user_input("--output_dir"):
        log = RunLog(folder, args, device, len(results) if args.resume else None)
    print(
        f"{len(candidates)} candidates, {len(candidates) - len(todo)} of them done; {args.epochs} epochs each on "
        f"{len(images)} images, ranked on {len(held_out)} held-out ones, on {device}: {folder}"
    )
    for i, (genotype, known) in enumerate(todo, len(candidates) - len(todo) + 1):
        result = train_candidate(genotype, known, images, held_out, args, device)
        results.append(result)
        save_checkpoint(folder / "checkpoint.pt", "candidates", {"results": results, "args": vars(args)})
        write_json(folder / "results.json", by_accuracy(results))
        measured = {"held_out_accuracy": result["held_out_accuracy"], "loss": result["training"]["loss"]}
        log.log(len(results), **measured, seconds=result["training"]["seconds"])
        print(
            f"candidate {i}/{len(candidates)}: held-out accuracy {result['held_out_accuracy']:.4f}, "
            f"{result['training']['params'] / 1e6:.3f} M parameters ({result['training']['seconds']:.0f} s)",
            flush=True,
        )

    ranked = by_accuracy(results)
    correlations = rank_correlations(results)
    write_json(folder / "results.json", ranked)
    write_json(folder / "best.json", ranked[0])
    log.log(len(results), **{f"tau with {name}": value["tau"] for name, value in correlations.items()})
    log.close()
    print_table(ranked)
    for name, value in correlations.items():
        low, high = value["interval"]
        print(f"tau of brief training with {name}: {value['tau']:.3f} ({low:.3f} to {high:.3f}, n = {value['n']})")
    print(f"\nwrote {folder / 'results.json'} and {folder / 'best.json'}")
    print(f"next: python train_cifar.py --arch {folder / 'best.json'}")


if __name__ == "__main__":
    main(parse_args())
