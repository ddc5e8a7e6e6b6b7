"""Candidates of eval_archs.py: reading them, the results of their trainings, and their ranking.

A result is a JSON object: the cells, what the file of the candidates knows of them, "held_out_accuracy", and "training"
with what was measured after each round of successive halving (one round without it), for example

    {"normal": {...}, "reduction": {...}, "held_out_accuracy": 0.71, "training": {"params": 403274, ..., "rounds": [
        {"epochs": 5, "held_out_accuracy": 0.64, "loss": 1.02, "seconds": 80.1},
        {"epochs": 15, "held_out_accuracy": 0.71, "loss": 0.83, "seconds": 241.7}]}}

A loss of null says that the training diverged: the loss, or a weight after the last step, was not a finite number. Such
a candidate is ranked below all others. A candidate is known by its key, see key_of.
"""

import hashlib
import json
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from build_nas_dataset.records import read_records
from build_nas_dataset.statistics import bootstrap_interval, tau
from genotypes import Genotype, read_genotypes
from models.ops import check_has_network
from plumbing.checkpoint_files import load_checkpoint
from plumbing.flags import ArgumentParser, add_common_flags
from training.cifar import OPTIMIZERS, add_training_flags, check_training_flags
from training.own_images import fit_batch


def read_candidates(path: str, num_archs: int) -> list[tuple[Genotype, dict]]:
    """The candidates of a file: (genotype, what the file knows of it), isomorphic ones once.

    num_archs: how many are taken; 0: all. Of a genotype file they are the first ones, of a NAS dataset they are spread
    evenly over the ranking by accuracy.
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
        check_has_network(genotype.space)
        canonical = genotype.canonical()
        if canonical is None:
            raise ValueError(f"{path}, genotype {i} is not valid: a cell has no path from an input to the output")
        distinct.setdefault(canonical, (genotype, known))
    if not distinct:
        raise ValueError(f"{path} holds no genotypes")
    return list(distinct.values())


def key_of(genotype: Genotype) -> str:
    """A name for a candidate: equal for isomorphic genotypes, different for all others."""
    return hashlib.sha256(json.dumps(genotype.canonical().to_dict()).encode()).hexdigest()[:16]


# -------------------------------------------------------------------------------------------- files of a run


def part_file(folder: Path, rank: int) -> Path:
    """The file in which process `rank` keeps the results of the candidates that it has trained."""
    return folder / (f"checkpoint-{rank}.pt" if rank else "checkpoint.pt")


def weights_file(folder: Path, key: str, k: int) -> Path:
    """The file in which a candidate's weights wait from the end of round k (from 0) for the next round."""
    return folder / "weights" / f"{key}-{k}.pt"


def unfinished_file(folder: Path, key: str, k: int) -> Path:
    """The file in which a candidate is saved within round k (from 0)."""
    return folder / "weights" / f"{key}-{k}-unfinished.pt"


def read_parts(folder: Path, names: str = "checkpoint*.pt", order: Iterable[str] = ()) -> dict[str, dict]:
    """The latest result of every candidate by its key, from the files of all processes.

    names: pattern of the files to read. order: the keys that come first, in this order.
    """
    results = {}
    for path in sorted(folder.glob(names)):
        for result in load_checkpoint(path, "candidates", ("results",))["results"]:
            key = key_of(Genotype.from_dict(result))
            if rounds_done(results, key) < len(result["training"]["rounds"]):
                results[key] = result
    return {key: results[key] for key in dict.fromkeys([*order, *results]) if key in results}


def rounds_done(results: dict[str, dict], key: str) -> int:
    """The number of rounds that a candidate has been trained in."""
    return len(results[key]["training"]["rounds"]) if key in results else 0


# --------------------------------------------------------------------------------------------------- ranking


def merit(measured: dict) -> tuple[bool, float]:
    """What candidates are ranked by after a round: not having diverged, then held-out accuracy."""
    return measured["loss"] is not None, measured["held_out_accuracy"]


def best_of_round(keys: list[str], results: dict[str, dict], k: int, n: int) -> list[str]:
    """The keys of the n best candidates after round k (from 0), best first; equally good ones stay in their order."""
    return sorted(keys, key=lambda key: merit(results[key]["training"]["rounds"][k]), reverse=True)[:n]


def by_accuracy(results: list[dict]) -> list[dict]:
    """Results, best first: by more epochs of training, then by accuracy; those that diverged come last."""

    def key(result: dict) -> tuple[bool, int, float]:
        last = result["training"]["rounds"][-1]
        converged, accuracy = merit(last)
        return converged, last["epochs"], accuracy

    return sorted(results, key=key, reverse=True)


def supernet_accuracy(result: dict) -> float | None:
    """The accuracy in a supernet, where the file of the candidates (a NAS dataset or generate_archs.py's) tells it."""
    known = result.get("supernet_accuracy", result.get("accuracy"))
    return known if isinstance(known, (int, float)) else None


def rank_correlations(results: list[dict]) -> dict[str, dict]:
    """Kendall's tau of held-out accuracy with supernet accuracy, where that is known, and with #params.

    Returns name -> {"tau", "interval": 95 % bootstrap interval, "n": how many candidates}, without names for which tau
    is not defined.
    """
    columns = {
        "supernet accuracy": [supernet_accuracy(result) for result in results],
        "#params": [result["training"]["params"] for result in results],
    }
    correlations = {}
    for name, column in columns.items():
        known = [i for i, value in enumerate(column) if value is not None]
        brief, values = [results[i]["held_out_accuracy"] for i in known], [column[i] for i in known]
        if len(known) > 2 and len(set(brief)) > 1 and len(set(values)) > 1:
            interval = bootstrap_interval(tau, brief, values)
            correlations[name] = {"tau": tau(brief, values), "interval": interval, "n": len(known)}
    return correlations


def said_of(training: dict) -> str:
    """What is added to a line about a candidate: nothing, or that its training diverged."""
    diverged = "; its training diverged, so it is ranked last (a smaller --lr_max may help)"
    return diverged if training["loss"] is None else ""


def print_table(ranked: list[dict], most: int = 20) -> None:
    """Print the first `most` of a ranking."""
    supernet = "supernet" if any(supernet_accuracy(result) is not None for result in ranked) else ""
    print(f"\n  rank  epochs  held-out   #params       MACs  {supernet}")
    for rank, result in enumerate(ranked[:most]):
        training, accuracy = result["training"], supernet_accuracy(result)
        supernet = "" if accuracy is None else f"{accuracy:.4f}"
        print(
            f"  {rank:4d}  {training['epochs']:6d}  {result['held_out_accuracy']:8.4f} {training['params'] / 1e6:8.3f}M"
            f" {training['macs'] / 1e6:9.1f}M  {supernet}{'' if training['loss'] is not None else '  diverged'}"
        )
    if len(ranked) > most:
        print(f"  ... {len(ranked) - most} more in the file")


# ------------------------------------------------------------------------------------------------- the full training

TRAINED_ALIKE = """
    dataset data cache_dir skip_bad image_size test_share test_seed cutout_size layers channels keep_prob
    drop_path_keep_prob auxiliary_weight optimizer lr_max lr_min l2_reg grad_clip accumulate amp seed tf32
""".split()  # the flags of train_cifar.py that a candidate's full training has in common with its brief one


def flags_of_full_training(settings: dict, num_images: int | None = None) -> str:
    """The flags of train_cifar.py, " --layers 1 ..." or "", that train a candidate in full by the same flags.

    settings: the flags of eval_archs.py; what it lacks is as by default. num_images: those that the candidates were
    trained on, to which train_cifar.py fits the batch of a folder; None: not known, so that the batch is named.
    Raises ValueError when the optimizer is none that train_cifar.py has.
    """
    optimizer = settings.get("optimizer", "sgd")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"expected one of the optimizers {', '.join(OPTIMIZERS)}, got {optimizer!r}")
    parser = ArgumentParser("")
    add_training_flags(parser)
    add_common_flags(parser)
    parser.set_defaults(resume=None)
    default = parser.parse_args(["--optimizer", optimizer])
    check_training_flags(parser, default, processes=1, given=set())
    default.optimizer, flags = "sgd", []
    if settings.get("dataset") == "folder" and num_images is not None:
        default.batch_size = fit_batch(num_images, default.batch_size, settings["accumulate"])
    for name in [*TRAINED_ALIKE, "batch_size"]:
        usual = getattr(default, name)
        if (value := settings.get(name, usual)) != usual:
            flags += [f"--{name}"] if value is True else [f"--{name}", value]
    if (epochs := settings.get("schedule_epochs") or default.epochs) != default.epochs:
        flags += ["--epochs", epochs]
    return "".join(f" {shlex.quote(str(word))}" for word in flags)
