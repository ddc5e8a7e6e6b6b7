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
import torch

from build_nas_dataset.records import read_records
from genotypes import Genotype, read_genotypes
from images import ImageSet, balanced_batch, load_images, split
from metrics import tau, tau_interval
from models.network import genotype_cost
from train_cifar import accuracy, build_network, train_epoch
from utils import (
    RunLog,
    add_common_flags,
    load_checkpoint,
    number,
    output_folder,
    parse_resumable,
    prepare,
    save_checkpoint,
    set_seed,
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
    set_seed(args.seed)  # initial weights; train_epoch seeds batches and augmentation
    network = build_network(genotype.to_dict(), len(images.classes), vars(args))
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), args.lr_max, momentum=0.9, weight_decay=args.l2_reg)
    for epoch in range(args.epochs):
        values = train_epoch(network, optimizer, images, args, epoch)
    params, macs = genotype_cost(genotype, len(images.classes), args.layers, args.channels, args.image_size)
    return {
        **known,
        "held_out_accuracy": accuracy(network, held_out, args.eval_batch_size, args.amp),
        "training": {  # params and macs outside of it, if any, are those of the file the genotype came from
            "params": params,
            "macs": macs,
            "loss": values["loss"],
            "epochs": args.epochs,
            "schedule_epochs": max(args.schedule_epochs, args.epochs),
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--archs", default="data/nasdata.jsonl", help="genotype file (.json) or NAS dataset (default: %(default)s)")
    add("--num_archs", type=number(int, 0), default=50, help="candidates (0: all; default: %(default)s)")
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "folder"])
    add("--data", default="data", help="folder of the images (CIFAR: downloaded into it)")
    add("--cache_dir", help="where decoded image folders are kept (default: beside them)")
    add("--skip_bad", action="store_true", help="leave out images that cannot be read")
    add("--image_size", type=number(int, 8), default=32, help="pixels")
    add("--num_images", type=number(int, 0), default=0, help="train on that many images only (0: all)")
    add("--holdout", type=number(int, 1), default=5000, help="training images kept out, to rank the candidates on")
    add("--epochs", type=count, default=50)
    add(
        "--schedule_epochs", type=number(int, 0), default=600, help="length of the schedule, where longer than --epochs"
    )
    add("--batch_size", type=number(int, 2), default=96)
    add("--eval_batch_size", type=count, default=500)
    add("--layers", type=count, default=6, help="normal cells per stack")
    add("--channels", type=number(int, 2), default=36)
    add("--cutout_size", type=number(int, 0), default=16, help="pixels; 0: off")
    add("--grad_clip", type=number(float, 0, above=True), default=5.0, help="largest norm of the gradient")
    add("--lr_max", type=number(float, 0, above=True), default=0.025)
    add("--lr_min", type=number(float, 0), default=0.0)
    add("--keep_prob", type=number(float, 0, 1, above=True), default=0.6, help="of the classifier's dropout")
    add("--drop_path_keep_prob", type=number(float, 0, 1, above=True), default=0.8)
    add("--l2_reg", type=number(float, 0), default=3e-4, help="weight decay")
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help="0: no auxiliary head")
    add("--amp", default="auto", choices=["auto", "off", "bf16"])
    add("--resume", help="run folder to go on with; candidates that are done are skipped")
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "candidates", may_change=("data", "cache_dir", "num_archs", "archs"))
    if args.auxiliary_weight and not 29 <= args.image_size <= 40:
        parser.error("argument --image_size: the auxiliary head takes 29 to 40 px; add --auxiliary_weight 0")
    if args.lr_min > args.lr_max:
        parser.error("argument --lr_min: expected at most --lr_max")
    return args


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[ImageSet, ImageSet]:
    """Training and held-out images; the test images are not used. Ends the script on bad input."""
    with user_input("--data"):
        images, _ = load_images(args.dataset, args.data, args.image_size, args.cache_dir, args.skip_bad, device)
    with user_input("--holdout"):
        images, held_out = split(images, args.holdout, args.seed)
    if args.num_images:
        with user_input("--num_images"):
            images = balanced_batch(images, args.num_images, args.seed)
    with user_input("--batch_size"):
        if args.batch_size > len(images):
            raise ValueError(f"expected at most the {len(images)} training images, got {args.batch_size}")
    return images, held_out


def main(args: argparse.Namespace) -> None:
    device = prepare(args)
    with user_input("--archs"):
        candidates = read_candidates(args.archs, args.num_archs)
    results = []
    if args.resume:
        with user_input("--resume"):
            results = load_checkpoint(args.resume, "candidates")["results"]
    images, held_out = load_data(args, device)
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
