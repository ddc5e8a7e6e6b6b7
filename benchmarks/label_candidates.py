"""How well do cheap labels of cells agree with long stand-alone training? Candidates for the accuracy of a NAS dataset.

    python -m benchmarks.label_candidates score --cells docs/results/truth_cells.json --data DIR --cache_dir DIR \
        --out docs/results/label_scores.json
    python -m benchmarks.label_candidates compare --scores docs/results/label_scores.json \
        --cells docs/results/truth_cells.json --truth docs/results/truth_seed*.jsonl --out docs/results/labels.json

`score` gives every cell the cheap scores below. `compare` holds them, and brief trainings (files of
`benchmarks.truth_set train --epochs 1`, given as --brief NAME=FILE), against the truth: Kendall's tau over all cells
and over those of equal size, with 95 % bootstrap intervals, and the difference to the supernet's tau with an interval
from resampling the same cells for both. DIR holds the images that the supernet was trained on.

The scores without training are naswot (Mellor et al. 2021, "Neural architecture search without training"), synflow
(Tanaka et al. 2020, "Pruning neural networks without any data"), the gradient norm (Abdelfattah et al. 2021, "Zero-cost
proxies for lightweight NAS") and wrcor (Jing et al. 2025, "Zero-shot neural architecture search with weighted response
correlation"). Each is the mean over three fresh initialisations of a network of the size that the truth is trained at,
on one batch of images; the function of its name computes it.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import pearsonr, rankdata
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from benchmarks.truth_set import SMALL_NETWORK, commit
from build_nas_dataset import eval_archs
from build_nas_dataset.scoring import SupernetScorer, load_supernet
from build_nas_dataset.statistics import bootstrap_interval, tau
from genotypes import Genotype, read_genotypes
from models.cost import genotype_cost
from models.network import CifarNetwork
from models.predictor import Predictor
from plumbing.files import write_json
from plumbing.run_folder import device_name, versions
from plumbing.start import prepare
from training.cifar import load_data
from training.images import balanced_batch, normalize

INITIALISATIONS = 3
BATCH = 128  # images of a score without training
CPU = torch.device("cpu")


# --------------------------------------------------------------------------------------- scores without training


class ReLUs(TorchFunctionMode):
    """Within it, `seen(layer, x)` is called for every ReLU of a network: the cell it is in, from 0, and its input."""

    def __init__(self, network: nn.Module, seen: Callable[[int, Tensor], None]):
        super().__init__()
        self.layer, self.seen = 0, seen
        for layer, cell in enumerate(network.cells):
            cell.register_forward_pre_hook(lambda *_, layer=layer: setattr(self, "layer", layer))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.relu:
            self.seen(self.layer, args[0])
        return func(*args, **(kwargs or {}))


def naswot(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The log determinant of the matrix that counts, for each pair of images x (B, 3, S, S), the ReLUs that agree.

    Mellor et al. 2021: two images agree on a ReLU that is on for both or off for both.
    """
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)

    def count_agreements(_, values: Tensor) -> None:
        on = (values.flatten(1) > 0).float()
        kernel.add_((on @ on.T + (1 - on) @ (1 - on).T).double())

    with torch.no_grad(), ReLUs(network, count_agreements):
        network.train()(x)
    return float(torch.linalg.slogdet(kernel).logabsdet)


def synflow(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The logarithm of the sum of |weight x gradient| over all weights, for an image of ones and weights made positive.

    Tanaka et al. 2020. Batch norms do not count: in eval mode a fresh one is the identity.
    """
    network = network.double().eval()
    for parameter in network.parameters():
        parameter.data.abs_()
    network(torch.ones_like(x[:1], dtype=torch.float64))[0].sum().backward()
    total = sum((p.grad * p).sum() for p in network.parameters() if p.grad is not None)
    return total.log().item()


def gradient_norm(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The norm of the gradient of the cross entropy, on images x (B, 3, S, S) with labels (B,).

    Abdelfattah et al. 2021.
    """
    F.cross_entropy(network.train()(x)[0], labels).backward()
    return float(torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm())


def wrcor(network: nn.Module, x: Tensor, labels: Tensor) -> float:
    """The log determinant of a sum of |correlations between images|, of what each ReLU reads and of its gradient.

    x: (B, 3, S, S). A ReLU of cell l, from 0, has the weight 2^l. Jing et al. 2025.
    """
    kernel = torch.zeros(len(x), len(x), dtype=torch.float64)

    def add_correlations(layer: int, values: Tensor) -> None:
        found = torch.corrcoef(values.detach().flatten(1).double()).abs()
        if not found.isnan().any():
            kernel.add_(found, alpha=2.0**layer)

    def seen(layer: int, values: Tensor) -> None:
        add_correlations(layer, values)
        values.register_hook(lambda gradient: add_correlations(layer, gradient))

    with ReLUs(network, seen):
        logits, _ = network.train()(x)
    F.cross_entropy(logits, labels).backward()
    return float(torch.linalg.slogdet(kernel).logabsdet)


WITHOUT_TRAINING = {"naswot": naswot, "synflow": synflow, "gradient norm": gradient_norm, "wrcor": wrcor}


def score_without_training(
    cells: list[Genotype], images: tuple[Tensor, Tensor], classes: int, args: argparse.Namespace
) -> dict[str, dict]:
    """Every score of WITHOUT_TRAINING: {"values": one for each cell, "seconds": of processor time for a cell}."""
    found = {}
    for name, measure in WITHOUT_TRAINING.items():
        started, values = time.process_time(), []
        for genotype in cells:
            runs = []
            for seed in range(INITIALISATIONS):
                torch.manual_seed(seed)
                network = CifarNetwork(genotype, classes, args.layers, args.channels, auxiliary=False)
                runs.append(measure(network, *images))
            values.append(float(np.mean(runs)))
        found[name] = {"values": values, "seconds": (time.process_time() - started) / len(cells)}
        print(f"{name}: {found[name]['seconds']:.2f} s a cell", flush=True)
    return found


# -------------------------------------------------------------------------------------------------- other scores


def score_by_supernet(cells: list[Genotype], args: argparse.Namespace, scorings: Sequence[int]) -> dict[str, dict]:
    """Accuracies by a supernet, on held-out images that its NAS dataset did not take; with as many as are left, too."""
    scorer = SupernetScorer(*load_supernet(args.supernet, CPU), args.data, args.cache_dir)
    found, batches = {}, scorer.batches
    for n in scorings:
        scorer.batches, scorer.scored = batches[:n], {}
        images, started = sum(len(labels) for _, labels in scorer.batches), time.process_time()
        values = scorer(cells).tolist()
        found[f"supernet, {images} images"] = {
            "values": values,
            "seconds": (time.process_time() - started) / len(cells),
        }
    return found


def mean_rank(scores: Sequence[Sequence[float]]) -> list[float]:
    """The mean of the ranks that several scores give to each cell; the gradient norm and the rest count alike."""
    return np.mean([rankdata(values) for values in scores], axis=0).tolist()


def score(args: argparse.Namespace, rest: list[str]) -> None:
    """Write the cheap scores of all cells."""
    torch.set_num_threads(1)
    flags = [*SMALL_NETWORK, "--archs", args.cells, "--dataset", "folder", "--data", args.data, *rest]
    flags += ["--cache_dir", args.cache_dir] if args.cache_dir else []
    settings = eval_archs.parse_args(flags)
    prepare(settings)
    train, _, _ = load_data(settings, CPU)
    batch = balanced_batch(train, BATCH // len(train.classes) * len(train.classes), seed=0)
    images = normalize(batch.images, batch.mean, batch.std), batch.labels
    cells = [genotype for genotype, _ in read_genotypes(args.cells)]
    costs = np.array([genotype_cost(genotype) for genotype in cells], float)
    scores = {
        "#params": {"values": costs[:, 0].tolist(), "seconds": 0.0},
        "MACs": {"values": costs[:, 1].tolist(), "seconds": 0.0},
    }
    started = time.process_time()
    quantiles = Predictor.from_checkpoint(args.predictor, CPU).quantiles(cells)[:, 0].tolist()
    scores["predictor"] = {"values": quantiles, "seconds": (time.process_time() - started) / len(cells)}
    scores |= score_without_training(cells, images, len(train.classes), settings)
    ranked = mean_rank([scores[name]["values"] for name in ("naswot", "synflow", "wrcor")])
    scores["mean rank of naswot, synflow and wrcor"] = {"values": ranked, "seconds": 0.0}
    scores |= score_by_supernet(cells, args, [2, 4])
    known = {"cells": args.cells, "supernet": args.supernet, "predictor": args.predictor, "images": len(images[1])}
    known |= {"commit": commit(), "device": device_name(CPU), "torch": versions()["torch"]}
    write_json(args.out, {**known, "scores": scores})


# ------------------------------------------------------------------------------------------------------ comparison


def read_truth(paths: Sequence[Path], epoch: int = -1) -> dict[int, list[float]]:
    """Index of a cell -> its held-out accuracies, one for each training; only cells that all the files have.

    epoch: after which, as an index into a line's "by_epoch".
    """
    files = []
    for path in paths:
        lines = map(json.loads, Path(path).read_text().splitlines())
        files.append({line["index"]: line["by_epoch"][epoch] for line in lines})
    shared = set.intersection(*(set(file) for file in files))
    return {index: [file[index] for file in files] for index in sorted(shared)}


def agreement(values: np.ndarray, truth: np.ndarray, reference: np.ndarray) -> dict:
    """Kendall's tau and Pearson's r of a score with the truth, and tau's difference to that of a reference score."""
    difference = lambda a, b, t: tau(a, t) - tau(b, t)  # noqa: E731
    return {
        "n": len(truth),
        "tau": tau(values, truth),
        "interval": bootstrap_interval(tau, values, truth),
        "r": float(pearsonr(values, truth)[0]),
        "difference_to_supernet": difference(values, reference, truth),
        "difference_interval": bootstrap_interval(difference, values, reference, truth),
    }


def compare(args: argparse.Namespace) -> None:
    """Hold every score against the truth; print and write the table."""
    truth, scored = read_truth(args.truth), json.loads(args.scores.read_text())["scores"]
    groups = [cell["group"] for cell in json.loads(Path(args.cells).read_text())]
    columns = {name: dict(enumerate(entry["values"])) for name, entry in scored.items()}
    for name, _, path in (given.partition("=") for given in args.brief):
        columns[name] = {index: values[0] for index, values in read_truth([Path(path)]).items()}
    if len(args.truth) == 2:
        columns["the truth's first training, with its second"] = {i: values[0] for i, values in truth.items()}
    reference = next(name for name in columns if name.startswith("supernet"))
    result = {}
    for title, wanted in (("all sizes", {"any size", "equal size"}), ("equal size", {"equal size"})):
        for name, values in columns.items():
            cells = [i for i in truth if groups[i] in wanted and i in values and i in columns[reference]]
            if len(cells) < 4:
                continue
            second = name.startswith("the truth")
            long = np.array([truth[i][1] if second else np.mean(truth[i]) for i in cells])
            own, other = (np.array([column[i] for i in cells]) for column in (values, columns[reference]))
            found = agreement(own, long, other) | {"seconds": scored.get(name, {}).get("seconds")}
            result.setdefault(title, {})[name] = found
            low, high = found["interval"]
            print(f"{title:10s} {name:45s} n {found['n']:3d}  tau {found['tau']:6.3f} ({low:6.3f} to {high:6.3f})")
    write_json(args.out, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    scoring, comparing = commands.add_parser("score"), commands.add_parser("compare")
    for command in (scoring, comparing):
        command.add_argument("--cells", required=True, help="genotype file of the truth set")
        command.add_argument("--out", type=Path, required=True)
    scoring.add_argument("--data", required=True, help="folder of the images")
    scoring.add_argument("--cache_dir", help="folder that keeps decoded images")
    scoring.add_argument("--supernet", default="data/supernet.pt")
    scoring.add_argument("--predictor", default="data/generator.pt", help="checkpoint with a predictor")
    comparing.add_argument("--scores", type=Path, required=True, help="file that `score` wrote")
    comparing.add_argument("--truth", type=Path, nargs="+", required=True, help="files of benchmarks.truth_set train")
    comparing.add_argument("--brief", nargs="*", default=[], metavar="NAME=FILE", help="brief trainings")
    args, rest = parser.parse_known_args()
    if args.command == "score":
        score(args, rest)
    else:
        compare(args)


if __name__ == "__main__":
    main()
