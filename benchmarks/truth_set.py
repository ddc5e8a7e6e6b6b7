"""Train a fixed set of random cells stand-alone, for longer than any label costs: the truth to hold labels against.

    python -m benchmarks.truth_set draw --out docs/results/truth_cells.json
    python -m benchmarks.truth_set train --cells docs/results/truth_cells.json --seed 1 \
        --results docs/results/truth_seed1.jsonl --dataset folder --data DIR

`draw` writes 64 random genotypes that are not in the NAS dataset: by turns one of any size and one whose full network
(6 layers, 36 channels) has 2.5 to 2.75 million parameters. `train` trains those that the results file does not hold
yet, one after the other, and appends a line for each, so that a run that was stopped goes on where it was. The network
that is trained is small: one normal cell a stack, 16 channels, images of 16 x 16 pixels, 45,000 of them an epoch.
A line holds the cell's index, the seed, the accuracy on 5,000 held-out images after every epoch, and how it was made.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from build_nas_dataset import eval_archs
from build_nas_dataset.random_cells import random_genotype
from build_nas_dataset.records import read_records
from genotypes import Genotype, read_genotypes
from models.cost import genotype_cost
from models.network import CifarNetwork
from plumbing.files import atomic_file, to_json
from plumbing.run_folder import code_version, device_name, versions
from plumbing.start import prepare
from training.cifar import accuracy, build_optimizer, load_data, train
from training.steps import build_network
from utils import shipped

EQUAL_SIZE = 2_500_000, 2_750_000  # #params of the full network
SMALL_NETWORK = """
    --layers 1 --channels 16 --image_size 16 --auxiliary_weight 0 --keep_prob 1 --drop_path_keep_prob 1
    --batch_size 128 --num_archs 0 --amp off
""".split()


def draw_cells(n: int, seed: int, known: set[Genotype]) -> list[dict]:
    """n random valid genotypes outside of `known` (canonical forms): any size and EQUAL_SIZE by turns."""
    rng = np.random.default_rng(seed)
    seen, any_size, equal_size = set(known), [], []
    while len(any_size) < n // 2 or len(equal_size) < n // 2:
        genotype = random_genotype(rng)
        if (canonical := genotype.canonical()) in seen:
            continue
        seen.add(canonical)
        params, macs = genotype_cost(genotype)
        cell = {**genotype.to_dict(), "params": params, "macs": macs}
        if len(any_size) < n // 2:
            any_size.append({"group": "any size", **cell})
        elif EQUAL_SIZE[0] <= params <= EQUAL_SIZE[1]:
            equal_size.append({"group": "equal size", **cell})
    return [cell for pair in zip(equal_size, any_size, strict=True) for cell in pair]


def commit() -> str:
    """The git commit of the code, for records of results, with "-dirty" when its files are not those of that commit."""
    found = code_version()
    return f"{found['commit']}{'' if found['clean'] else '-dirty'}" if found["commit"] else "not known"


def train_cells(cells: list[Genotype], results: Path, args: argparse.Namespace) -> None:
    """Train the cells that `results` (JSON lines) lacks for this seed, and append a line for each."""
    device = prepare(args)
    images, held_out, _ = load_data(args, device)
    lines = results.read_text().splitlines() if results.exists() else []
    done = {(line["index"], line["seed"]) for line in map(json.loads, lines)}
    for index, genotype in enumerate(cells):
        if (index, args.seed) in done:
            continue
        started, epochs = time.monotonic(), []
        network = build_network(CifarNetwork, genotype, len(images.classes), args, device)

        def after_epoch(epoch: int, values: dict, network=network, epochs=epochs) -> None:
            epochs.append(accuracy(network, held_out, args.eval_batch_size, args.amp))

        last = train(network, images, args, device, build_optimizer(network, args), after_epoch=after_epoch)
        line = {
            "index": index,
            "seed": args.seed,
            "held_out_accuracy": epochs[-1],
            "by_epoch": [round(value, 4) for value in epochs],
            "loss": round(last["loss"], 4),
            "epochs": args.epochs,
            "seconds": round(time.monotonic() - started),
            "commit": commit(),
            "device": device_name(device),
            "torch": versions()["torch"],
        }
        with open(results, "a") as file:
            file.write(to_json(line) + "\n")
        print(f"cell {index}: {epochs[-1]:.4f} ({line['seconds']} s)", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw")
    draw.add_argument("--out", type=Path, required=True)
    draw.add_argument("--nasbench_data", default=shipped("data/nasdata.jsonl"), help="whose genotypes are left out")
    train = commands.add_parser("train")
    train.add_argument("--cells", required=True, help="genotype file")
    train.add_argument("--results", type=Path, required=True, help="JSON lines, appended to")
    train.add_argument("--epochs", default="8")
    args, rest = parser.parse_known_args()
    if args.command == "draw":
        known = {record.genotype.canonical() for record in read_records(args.nasbench_data)}
        cells = map(to_json, draw_cells(64, 20261127, known))
        with atomic_file(args.out) as file:
            file.write("[\n" + ",\n".join(cells) + "\n]\n")
        return
    torch.set_num_threads(1)
    flags = [*SMALL_NETWORK, "--archs", args.cells, "--epochs", args.epochs, "--schedule_epochs", args.epochs, *rest]
    cells = [genotype for genotype, _ in read_genotypes(args.cells)]
    train_cells(cells, args.results, eval_archs.parse_args(flags))


if __name__ == "__main__":
    main()
