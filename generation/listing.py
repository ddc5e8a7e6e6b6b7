"""The cells of generate_archs.py: ranked, as a table on the console, and as files, genotypes.json and best.json.

An entry is a dict: a genotype and what is known of it, as docs/formats.md says of genotypes.json.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from scipy.stats import rankdata

from build_nas_dataset.objectives import ACCURACIES, Objective, labels_of, values_of
from build_nas_dataset.records import Record
from build_nas_dataset.scoring import SupernetScorer
from generation.metrics import generation_metrics
from generation.targets import COUNTED_NETWORKS, Limits, describe
from genotypes import Genotype
from models.network import ImageNetConfig
from models.predictor import Predictor
from plumbing.files import atomic_file, to_json, write_json
from training.image_parts import TEST_SEED
from utils import shipped, shown, writes

SHOWN = 10  # cells of a class in the table


# ---------------------------------------------------------------------------------------------- entries and ranks


def merge(genotypes: list[Genotype | None], labels: tuple[int, ...], known: set[Genotype] | None, limits) -> list[dict]:
    """One entry for each distinct valid genotype within the limits, in order of first appearance."""
    counts, first = Counter(), {}
    for genotype in genotypes:
        if genotype is not None and limits.keep(genotype):
            canonical = genotype.canonical()
            counts[canonical] += 1
            first.setdefault(canonical, genotype)
    entries = []
    for canonical, genotype in first.items():
        entry = entry_of(genotype, labels, limits) | {"count": counts[canonical], "real": False}
        entries.append(entry if known is None else {**entry, "novel": canonical not in known})
    return entries


def entry_of(genotype: Genotype, labels: tuple[int, ...], limits: Limits) -> dict:
    """A genotype with its class and, where they can be counted, #params and MACs."""
    return {**genotype.to_dict(), "labels": labels, **(limits.cost(genotype)._asdict() if limits.counted else {})}


def real_entries(
    records: list[Record], drawn: dict[tuple, list], num_archs: int, objectives: list[Objective], limits: Limits
) -> dict[tuple, list[dict]]:
    """Labels -> entries of the NAS dataset's cells of that class, within the limits, that were not drawn for it.

    Of each class they are the num_archs of the highest accuracy in the NAS dataset, which is written beside them, or of
    the highest accuracy at their size, where that is an objective.
    """
    measure = accuracy_among(objective.name for objective in objectives) or "accuracy"
    classes = map(tuple, labels_of(records, objectives).tolist())
    best_first = sorted(zip(classes, records, values_of(records, measure), strict=True), key=lambda found: -found[2])
    made = {labels: {g.canonical() for g in genotypes if g is not None} for labels, genotypes in drawn.items()}
    found: dict[tuple, list[dict]] = {labels: [] for labels in drawn}
    for labels, record, _ in best_first:
        wanted = labels in found and len(found[labels]) < num_archs and limits.keep(record.genotype)
        if wanted and record.genotype.canonical() not in made[labels]:
            entry = entry_of(record.genotype, labels, limits) | {"count": 0, "real": True, "novel": False}
            found[labels].append(entry | {"id": record.id, "nas_dataset_accuracy": record.accuracy})
    return found


def rank(entries: list[dict], predictor: Predictor, objectives: list[Objective], scorer) -> None:
    """Add what predictor and supernet expect of the entries, and put those of the highest accuracy first."""
    if not entries:
        return
    names, space = [objective.name for objective in objectives], predictor.config.space
    genotypes = [Genotype.from_dict(entry, space) for entry in entries]
    for entry, quantiles in zip(entries, predictor.quantiles(genotypes).tolist(), strict=True):
        entry["predicted_unclipped"] = {name: round(q, 4) for name, q in zip(names, quantiles, strict=True)}
    if scorer is not None:
        for entry, accuracy in zip(entries, scorer(genotypes).tolist(), strict=True):
            entry["supernet_accuracy"] = round(accuracy, 6)
        entries.sort(key=lambda entry: -entry["supernet_accuracy"])
    elif (measure := accuracy_among(names)) is not None:
        entries.sort(key=lambda entry: -entry["predicted_unclipped"][measure])
    for entry in entries:  # of the best ones, many are expected beyond all that the predictor has seen
        entry["predicted_quantiles"] = {n: min(max(q, 0.0), 1.0) for n, q in entry["predicted_unclipped"].items()}


def accuracy_among(names: Iterable[str]) -> str | None:
    """Which of the objectives says how well a genotype classifies: "accuracy", "size_accuracy" or None."""
    return next((name for name in names if name in ACCURACIES), None)


def add_ranks(entries: Sequence[dict]) -> None:
    """Add "rank", the place among all candidates, 1 for the highest accuracy expected; equal ones share a place.

    entries: of all classes. Without a supernet and a predictor of accuracy there is no rank.
    """
    predicted = [(e["predicted_unclipped"], accuracy_among(e["predicted_unclipped"])) for e in entries]
    measure = [e.get("supernet_accuracy", of.get(name)) for e, (of, name) in zip(entries, predicted, strict=True)]
    if entries and None not in measure:
        for entry, place in zip(entries, rankdata([-value for value in measure], method="min"), strict=True):
            entry["rank"] = int(place)


# -------------------------------------------------------------------------------------------------------- table


def print_class(
    labels: tuple, genotypes: list, known: set[Genotype] | None, entries: list, found: int, listing: "Listing"
) -> None:
    """A class: what was drawn for it, and its best cells.

    genotypes: as drawn, None where invalid. known: canonical genotypes of the NAS dataset, if it is at hand. entries:
    those that are written. found: how many distinct genotypes within the limits were drawn.
    """
    quality = generation_metrics(genotypes, known or ())
    if known is None:
        del quality["novelty"]
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in quality.items())
    real = sum(entry["real"] for entry in entries)
    within = f"{found} distinct within the limits" if listing.limits.given else f"{found} distinct"
    within += f", {len(entries) - real} kept" if len(entries) - real < found else ""
    within += f", {real} real ones beside them" if real else ""
    print(f"\n{listing.title(labels)}: {len(genotypes)} drawn, {genotypes.count(None)} invalid, {within}; {numbers}")
    if entries:
        print(listing.header())
    for entry in entries[:SHOWN]:
        print(listing.row(entry))
    if len(entries) > SHOWN:
        print(f"  ... {len(entries) - SHOWN} more in the file")


class Listing:
    """The table's columns.

    random: whether the cells are random ones in the place of generated ones. supernet: whether it scored them.
    """

    def __init__(self, limits: Limits, objectives: Sequence[Objective], random: bool, supernet: bool):
        self.limits, self.objectives, self.random, self.supernet = limits, objectives, random, supernet
        self.at_its_size = not supernet and any(objective.name == "size_accuracy" for objective in objectives)
        self.ranked = supernet or accuracy_among(objective.name for objective in objectives) is not None

    def title(self, labels: tuple[int, ...]) -> str:
        title = describe(labels, self.objectives)
        return f"random cells in the place of {title}" if self.random else title

    def header(self) -> str:
        costs = "   #params       MACs" if self.limits.counted else ""
        ranks = "   rank" if self.ranked else ""
        return f"  index{ranks}{costs}  vertices  drawn  new  predicted quantile" + self.supernet * ", supernet"

    def row(self, entry: dict) -> str:
        vertices = "+".join(str(len(entry[cell]["ops"])) for cell in self.limits.space.cells)
        new = {True: "yes", False: "no", None: "?"}[entry.get("novel")]
        drawn = "real" if entry["real"] else entry["count"]
        measured = ", ".join(f"{name} {q:.4f}" for name, q in entry["predicted_unclipped"].items())
        measured += f"  supernet {entry['supernet_accuracy']:.4f}" if self.supernet else ""
        costs = f" {entry['params'] / 1e6:8.3f}M {entry['macs'] / 1e6:9.1f}M" if self.limits.counted else ""
        ranks = f" {entry['rank']:6d}" if self.ranked else ""
        return f"  {entry['index']:5d}{ranks}{costs} {vertices:>9} {drawn:>6}  {new:>3}  {measured}"

    def footnote(self, candidates: int, real: bool) -> str:
        """What the columns mean. candidates: how many cells were ranked. real: whether real cells are among them."""
        lines = ["index: the cell's place in genotypes.json"]
        if self.ranked:
            by = "the supernet" if self.supernet else "the predictor"
            measure = "accuracy at its size" if self.at_its_size else "accuracy"
            lines.append(
                f"rank: among all {candidates} candidates by the {measure} that {by} expects, 1 is the highest"
            )
        if self.limits.counted:
            kind = "ImageNet" if isinstance(self.limits.network, ImageNetConfig) else "CIFAR"
            size = f"{self.limits.network.layers} layers and {self.limits.network.channels} channels"
            lines.append(f"#params, MACs: counted exactly in the {kind} network of {size}")
        lines.append(f"vertices: of {' + '.join(f'the {cell} cell' for cell in self.limits.space.cells)}")
        how_often = "drawn: how often the cell was drawn"
        lines.append(how_often + ("; real: a cell of the NAS dataset" if real else ""))
        lines.append("new: whether the NAS dataset lacks it; ?: the NAS dataset is not at hand")
        lines.append("predicted quantile: the place in the NAS dataset's ranking that the predictor expects, 0 lowest, "
                     "1 highest; beyond\n    these, it expects more, or less, than it has seen, and only the order "
                     "counts")  # fmt: skip
        if self.supernet:
            lines.append("supernet: the accuracy on held-out images with the supernet's weights")
        return "\n".join(["columns", *(f"  {line}" for line in lines)])


# -------------------------------------------------------------------------------------- files and the next command


def best_of(entries: Sequence[dict]) -> dict:
    """The best entry of the highest class: the first of those with the highest labels."""
    return max(entries, key=lambda entry: entry["labels"])


def write_entries(folder: Path, entries: Sequence[dict]) -> None:
    """Write genotypes.json, a JSON list with one genotype a line, and best.json unless there are none."""
    path = folder / "genotypes.json"
    with writes(path), atomic_file(path) as file:
        file.write("[\n" + ",\n".join(map(to_json, entries)) + "\n]\n" if entries else "[]\n")
    if entries:
        write_json(folder / "best.json", best_of(entries))


def print_next(
    folder: Path, entries: Sequence[dict], args: argparse.Namespace, limits: Limits, scorer: SupernetScorer | None
) -> None:
    """Say which cell is in best.json, and the commands that draw it and train it."""
    best, arch = best_of(entries), shown(folder / "best.json")
    print(f"number {best['index']}{', a real one,' if best['real'] else ''} is the best of the highest class: {arch}")
    print(f"next: python {shown(shipped('visualize.py'))} --arch {arch}")
    if limits.counted:
        train = shown(shipped(f"train_{args.limits_for}.py"))
        print(f"      python {train} --arch {arch}{network_flags(args, vars(scorer.settings) if scorer else None)}")


def network_flags(args: argparse.Namespace, found: dict | None) -> str:
    """The flags of train_cifar.py or train_imagenet.py, if any, for the network that was counted.

    found: the settings of --supernet, whose images those of train_cifar.py name too, and train_imagenet.py cannot take.
    """
    flags, network = [], COUNTED_NETWORKS[args.limits_for]
    for name in ("layers", "channels"):
        if (value := getattr(args, name)) != getattr(network, name):
            flags += [f"--{name}", value]
    if args.limits_for == "imagenet":
        flags += ["--data", "DIR"] if args.num_classes != network.num_classes else []
    elif found:
        images = {"dataset": "cifar10", "data": "data", "image_size": 32, "test_share": None, "test_seed": TEST_SEED}
        flags += [word for name in images if found[name] != images[name] for word in (f"--{name}", found[name])]
        flags += ["--cache_dir", args.cache_dir] if args.cache_dir else []
        flags += ["--skip_bad"] if found["skip_bad"] else []
    elif args.num_classes == 100:
        flags += ["--dataset", "cifar100"]
    elif args.num_classes != network.num_classes:
        flags += ["--dataset", "folder", "--data", "DIR"]
    return "".join(f" {shown(word)}" for word in flags)
