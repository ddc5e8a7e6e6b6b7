"""Write cells with a trained generator: for every class, or for the accuracy, #params and MACs that are wanted.

    python generate_archs.py                                    # with the generator that is shipped
    python generate_archs.py --checkpoint runs/gan-.../generator.pt
    python generate_archs.py --perf_label 2 --num_archs 50
    python generate_archs.py --target_acc 0.49                  # on the NAS dataset's own scale
    python generate_archs.py --target_quantile 0.9 --max_params 3.0M --top 20
    python generate_archs.py --num_archs 300 --evaluate         # do the cells obey?
    python generate_archs.py --num_archs 300 --evaluate --supernet data/supernet.pt --data DIR
    python generate_archs.py --perf_label 2 --random            # the baseline, all else equal

Writes genotypes.json: the distinct valid genotypes with their class, how often each was drawn, exact #params and MACs,
and the quantile of each objective in the NAS dataset that the checkpoint's predictor expects; and config.json.
With a limit on #params or MACs, cells are drawn until --num_archs distinct ones of each class keep it; these are kept.
--evaluate compares the classes asked for with those obtained, beside random cells, and writes evaluation.json.
NAG paper, section 3.2; unlike in the reference, dropout is off and cells are pruned.
"""

import argparse
from collections import Counter
from itertools import product

import numpy as np

from build_nas_dataset.objectives import class_of, objectives_of
from build_nas_dataset.random_cells import RandomCells
from build_nas_dataset.records import Record, read_records
from build_nas_dataset.scoring import SupernetScorer, load_supernet
from generation.metrics import evaluate_cells, generation_metrics
from genotypes import NAG_SPACE, CellSpec, Genotype
from models.cost import genotype_cost
from models.generator import Generator
from models.predictor import Predictor
from utils import (
    ArgumentParser,
    add_common_flags,
    derive_seed,
    fail,
    load_checkpoint,
    number,
    output_folder,
    prepare,
    progress_bar,
    refuse_used,
    shown,
    user_input,
    write_config,
    write_json,
)

RECORDS_NETWORK = (10, 6, 36)  # classes, layers and channels, whose counts the NAS dataset has
LABEL_FLAGS = {"accuracy": "perf_label", "params": "params_label", "macs": "macs_label"}


def wanted_labels(args: argparse.Namespace, objectives: list[dict]) -> list[tuple[int, ...]]:
    """The combinations of classes to draw cells for. Ends the script when the GAN was not trained on what is asked."""
    names = [objective["name"] for objective in objectives]
    for name, flag in LABEL_FLAGS.items():
        if getattr(args, flag) is not None and name not in names:
            fail(f"--{flag}: the GAN was trained on {', '.join(names)} only")
    for flag in ("target_acc", "target_quantile"):
        if getattr(args, flag) is not None and "accuracy" not in names:
            fail(f"--{flag}: the GAN was trained on {', '.join(names)} only")
    return list(product(*(wanted_classes(args, objective) for objective in objectives)))


def wanted_classes(args: argparse.Namespace, objective: dict) -> list[int]:
    """The classes of one objective to draw cells for."""
    boundaries, low, high = objective["boundaries"], objective["minimum"], objective["maximum"]
    highest, flag = len(boundaries), LABEL_FLAGS[objective["name"]]
    label = getattr(args, flag)
    if label is not None:
        if label > highest:
            fail(f"--{flag}: expected 0 (lowest {objective['name']}) to {highest} (highest), got {label}")
        return [label]
    if objective["name"] == "accuracy" and args.target_acc is not None:
        if not low <= args.target_acc <= high:
            fail(
                f"--target_acc: expected {low:.4f} to {high:.4f}, the accuracies of the NAS dataset that the GAN was "
                f"trained on (by a supernet, below those of trained networks), got {args.target_acc:g}"
            )
        return [class_of(args.target_acc, boundaries)]
    if objective["name"] == "accuracy" and args.target_quantile is not None:
        return [min(int(args.target_quantile * (highest + 1)), highest)]
    return list(range(highest + 1))


class Limits:
    """Hard limits on exact counts. Ends the script when no cell of the space can keep them.

    max_vertices: of the cells that can be drawn.
    """

    def __init__(self, args: argparse.Namespace, max_vertices: int):
        self.network = (args.num_classes, args.layers, args.channels)
        self.bounds = {
            "params": (args.min_params or 0, args.max_params or float("inf")),
            "macs": (args.min_macs or 0, args.max_macs or float("inf")),
        }
        self.given = any((args.min_params, args.max_params, args.min_macs, args.max_macs))
        if self.given:
            self._check_reachable(max_vertices)

    def _check_reachable(self, max_vertices: int) -> None:
        extremes = [genotype_cost(genotype, *self.network) for genotype in extreme_genotypes(max_vertices)]
        _, layers, channels = self.network
        for name, costs in zip(self.bounds, zip(*extremes, strict=True), strict=True):
            low, high = self.bounds[name]
            reach = f"cells have {min(costs):,} to {max(costs):,} at --layers {layers} --channels {channels}"
            if low > high:
                fail(f"--min_{name}: expected at most --max_{name} {si(high)}, got {si(low)}; {reach}")
            if high < min(costs):
                fail(f"--max_{name}: no cell is that small: {reach}")
            if low > max(costs):
                fail(f"--min_{name}: no cell is that large: {reach}")

    def allow(self, labels: tuple[int, ...], objectives: list[dict]) -> bool:
        """Whether the classes of #params and MACs have cells within the limits."""
        if self.network != RECORDS_NETWORK:
            return True  # the classes are of other counts
        for objective, label in zip(objectives, labels, strict=True):
            low, high = self.bounds.get(objective["name"], (0, float("inf")))
            edges = [0, *objective["boundaries"], float("inf")]
            if edges[label] > high or low >= edges[label + 1]:
                return False
        return True

    def keep(self, genotype: Genotype) -> bool:
        counts = genotype_cost(genotype, *self.network)
        return all(low <= n <= high for n, (low, high) in zip(counts, self.bounds.values(), strict=True))


def extreme_genotypes(max_vertices: int) -> list[Genotype]:
    """Genotypes among which are those of least and most #params and MACs: tiny ones, and the full one."""
    space, cells = NAG_SPACE, []
    size = min(space.num_inputs + 2, max_vertices)
    free = [(i, j) for i in range(size - 1) for j in range(max(i + 1, space.num_inputs), size)]
    for op in ("maxpool3x3", "identity"):
        for chosen in product((0, 1), repeat=len(free)):
            matrix = [[0] * size for _ in range(size)]
            for (i, j), edge in zip(free, chosen, strict=True):
                matrix[i][j] = edge
            interior = [op] * (size - space.num_inputs - 1)
            cells.append(CellSpec(matrix, [*space.inputs, *interior, space.output]).prune())
    cells = list({cell.canonical(): cell for cell in cells if cell is not None}.values())
    size = max_vertices
    matrix = [[int(j > i and j >= space.num_inputs) for j in range(size)] for i in range(size)]
    full = CellSpec(matrix, [*space.inputs, *["seqconv5x5"] * (size - space.num_inputs - 1), space.output])
    return [Genotype(*pair) for pair in product(cells, repeat=len(space.cells))] + [
        Genotype(*[full] * len(space.cells))
    ]


def count(text: str) -> int:
    """An argparse type: 3000000, 3.0M, 600M or 1.2G."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        value = float(digits) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[unit]
        if not 1 <= value < 1e15:
            raise ValueError
    except (ValueError, KeyError):
        what = "expected a number from 1 to 1e15, like 3000000 or 3.0M"
        raise argparse.ArgumentTypeError(f"{what}, got {text!r}") from None
    return round(value)


def si(value: float) -> str:
    return f"{value / 1e6:.3f}M"


def read_nas_dataset(args: argparse.Namespace, checkpoint: dict) -> list[Record] | None:
    """The NAS dataset, to tell which generated cells are new; None when it is not at hand.

    Ends the script when one that is named is not that of the GAN's training and --evaluate compares with it.
    """
    path = args.nasbench_data or checkpoint["args"]["nasbench_data"]
    try:
        records = read_records(path)
        if args.evaluate or not args.nasbench_data:
            check_nas_dataset(path, records, checkpoint["objectives"])
        return records
    except (ValueError, OSError) as error:
        if args.evaluate or args.nasbench_data:
            fail(f"--nasbench_data: {error}")
        print(f"novelty is not computed, --nasbench_data names the NAS dataset: {error}")
        return None


def check_nas_dataset(path: str, records: list[Record], objectives: list[dict]) -> None:
    """Raise ValueError when records are not those that a GAN with these objectives was trained on."""

    def numbers(those: list[dict]) -> list[float]:
        return [x for one in those for x in (one["minimum"], *one["boundaries"], one["maximum"])]

    found = objectives_of(records, {o["name"]: len(o["boundaries"]) + 1 for o in objectives})
    if not np.allclose(numbers(found), numbers(objectives), rtol=1e-9, atol=0):  # quantiles of any numpy
        raise ValueError(f"{path} is not the NAS dataset that the GAN was trained on")


def draw(source: Generator | RandomCells, labels: tuple[int, ...], args: argparse.Namespace, limits: Limits) -> list:
    """Genotypes as drawn, None where invalid: --num_archs, or as many as it takes to meet the limits."""
    seed = derive_seed(args.seed, *labels)
    drawn = source.sample(labels, args.num_archs, seed, temperature=args.temperature)
    if limits.given:
        kept, batch = set(), 0
        bar = progress_bar(total=args.num_archs, desc="within the limits")
        new = drawn
        while True:
            kept |= {genotype.canonical() for genotype in new if genotype is not None and limits.keep(genotype)}
            bar.update(len(kept) - bar.n)
            if len(kept) >= args.num_archs or len(drawn) >= args.max_draws:
                break
            batch += 1
            size = min(max(args.num_archs, 256), args.max_draws - len(drawn))
            new = source.sample(labels, size, derive_seed(seed, batch), temperature=args.temperature)
            drawn += new
        bar.close()
    return drawn


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
        params, macs = genotype_cost(genotype, *limits.network)
        entry = {**genotype.to_dict(), "labels": labels, "count": counts[canonical], "params": params, "macs": macs}
        entries.append(entry if known is None else {**entry, "novel": canonical not in known})
    return entries


def rank(entries: list[dict], predictor: Predictor, objectives: list[dict], scorer) -> None:
    """Add what predictor and supernet expect of the entries, and put those of the highest accuracy first."""
    if not entries:
        return
    names, genotypes = [objective["name"] for objective in objectives], [Genotype.from_dict(e) for e in entries]
    for entry, quantiles in zip(entries, predictor.quantiles(genotypes).tolist(), strict=True):
        entry["predicted_quantiles"] = {name: round(q, 4) for name, q in zip(names, quantiles, strict=True)}
    if scorer is not None:
        for entry, accuracy in zip(entries, scorer(genotypes).tolist(), strict=True):
            entry["supernet_accuracy"] = round(accuracy, 6)
        entries.sort(key=lambda entry: -entry["supernet_accuracy"])
    elif "accuracy" in names:
        entries.sort(key=lambda entry: -entry["predicted_quantiles"]["accuracy"])
    for entry in entries:  # only now: of the best ones, many are expected beyond all that the predictor has seen
        entry["predicted_quantiles"] = {n: min(max(q, 0.0), 1.0) for n, q in entry["predicted_quantiles"].items()}


def describe(labels: tuple[int, ...], objectives: list[dict]) -> str:
    """class 2 (accuracy 0.4805 to 0.5180)"""
    parts = []
    for label, objective in zip(labels, objectives, strict=True):
        edges = [objective["minimum"], *objective["boundaries"], objective["maximum"]]
        show = (lambda value: f"{value:.4f}") if objective["name"] == "accuracy" else si
        parts.append(f"{objective['name']} {show(edges[label])} to {show(edges[label + 1])}")
    return f"class {','.join(map(str, labels))} ({', '.join(parts)})"


def print_class(title: str, genotypes: list, known: set[Genotype] | None, entries: list, found: int, limits) -> None:
    """entries: those that are written, of `found` distinct genotypes within the limits."""
    quality = generation_metrics(genotypes, known or ())
    invalid = genotypes.count(None)
    if known is None:
        del quality["novelty"]
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in quality.items())
    within = f"{found} distinct within the limits" if limits.given else f"{found} distinct"
    within += f", {len(entries)} kept" if len(entries) < found else ""
    print(f"\n{title}: {len(genotypes)} drawn, {invalid} invalid, {within}; {numbers}")
    if entries:
        print("  index   #params       MACs  vertices  drawn  new  predicted quantile")
    for entry in entries[:10]:
        vertices = "+".join(str(len(entry[cell]["ops"])) for cell in NAG_SPACE.cells)
        new = {True: "yes", False: "no", None: "?"}[entry.get("novel")]
        quantiles = ", ".join(f"{name} {q:.2f}" for name, q in entry["predicted_quantiles"].items())
        if "supernet_accuracy" in entry:
            quantiles += f"  supernet {entry['supernet_accuracy']:.4f}"
        print(
            f"  {entry['index']:5d} {entry['params'] / 1e6:8.3f}M {entry['macs'] / 1e6:9.1f}M {vertices:>9}"
            f" {entry['count']:6d}  {new:>3}  {quantiles}"
        )
    if len(entries) > 10:
        print(f"  ... {len(entries) - 10} more in the file")


def print_evaluation(title: str, result: dict, objectives: list[dict]) -> None:
    shares = ", ".join(f"{name} {result[name]:.3f}" for name in ("validity", "uniqueness", "novelty"))
    print(f"\n{title}: {result['drawn']} drawn; {shares}")
    if "all" not in result:
        return
    for objective in objectives:
        entry = result[objective["name"]]
        low, high = entry["interval"]
        ceiling = f", ceiling {entry['ceiling']:.3f}" if "ceiling" in entry else ""
        print(f"  {objective['name']} ({entry['by']}): obeys {entry['obeys']:.3f} ({low:.3f} to {high:.3f}){ceiling}")
        if "mean" in entry:
            means = ", ".join("-" if value is None else f"{value:.4f}" for value in entry["mean"])
            print(
                f"    mean accuracy by class asked {means}; 80th percentile of real {entry['real_80th_percentile']:.4f}"
            )
        for label, row in enumerate(entry["asked_by_obtained"]):
            print(f"    asked {label}: " + " ".join(f"{n:6d}" for n in row))
    low, high = result["all"]["interval"]
    print(f"  all labels at once: {result['all']['obeys']:.3f} ({low:.3f} to {high:.3f})")
    distances = ", ".join(f"{name} {value:.3f}" for name, value in result["distance"].items())
    print(f"  total-variation distance to the real cells of the class asked for: {distances}")


def evaluate_and_print(sets: dict[str, dict], objectives, records, predictor, scorer, seed: int) -> dict[str, dict]:
    """The evaluation of each of the sets of genotypes drawn, title -> labels -> genotypes."""
    for objective in objectives:
        if scorer is not None and objective["name"] == "accuracy":
            scorer.cut_classes(records, objective["boundaries"], seed)
    results = {}
    for title, drawn in sets.items():
        results[title] = evaluate_cells(drawn, objectives, records, predictor, scorer)
        print_evaluation(title, results[title], objectives)
    return results


def parse_args(
    argv: list[str] | None = None, description: str = __doc__, checkpoint: str = "data/generator.pt"
) -> argparse.Namespace:
    parser = ArgumentParser(description)
    add = parser.add_argument
    add("--checkpoint", default=checkpoint, help="file of gan.py, or its run folder (default: the shipped generator)")
    add("--num_archs", type=number(int, 1, 10**7), default=100, help="cells to draw for each class (limits: to find)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--perf_label", type=number(int, 0), help="accuracy class, 0 = lowest (default: every class)")
    target.add_argument("--target_acc", type=number(float, 0, 1), help="accuracy on the NAS dataset's scale")
    target.add_argument("--target_quantile", type=number(float, 0, 1), help="asks for the class that holds it")
    add("--params_label", type=number(int, 0), help="#params class, 0 = fewest (default: every class)")
    add("--macs_label", type=number(int, 0), help="MACs class, 0 = fewest (default: every class)")
    for name in ("params", "macs"):
        add(f"--min_{name}", type=count, help="hard limit on the exact count, e.g. 600K, 3.0M, 1.2G")
        add(f"--max_{name}", type=count, help="hard limit on the exact count")
    add("--max_draws", type=number(int, 1), default=10_000, help="cells drawn for a class at most, to meet the limits")
    add("--top", type=number(int, 1), help="keep that many of each class: those of the highest accuracy expected")
    add("--evaluate", action="store_true", help="compare asked with obtained classes, generated with random cells")
    add(
        "--temperature",
        type=number(float, 0, 1000),
        help="of the decisions (default: the GAN's); lower: likelier cells",
    )
    add("--random", action="store_true", help="random cells instead of generated ones, all else equal: the baseline")
    add("--supernet", help="supernet.pt of build_nas_dataset: rank and evaluate by its accuracy on images of --data")
    add("--data", default="data", help="folder of the images that --supernet was trained on")
    add("--cache_dir", help="where decoded image folders are kept (default: beside them)")
    add("--nasbench_data", help="NAS dataset for the novelty (default: the one the GAN was trained on)")
    add("--layers", type=number(int, 1, 1000), default=6, help="of the network whose #params and MACs are counted")
    add("--channels", type=number(int, 2, 10**4), default=36, help="of that network")
    add("--num_classes", type=number(int, 2), default=10, help="of that network")
    add_common_flags(parser)
    args = parser.parse_args(argv)
    limited = any((args.min_params, args.max_params, args.min_macs, args.max_macs))
    if limited and args.max_draws < args.num_archs:
        parser.error(f"argument --max_draws: expected at least the {args.num_archs} of --num_archs")
    if args.evaluate and limited:
        parser.error("argument --evaluate: expected without limits, since it is about all cells that are drawn")
    return args


def main(args: argparse.Namespace, single: bool = True) -> None:
    """single: whether this is the script for GANs of one objective."""
    device = prepare(args)
    with user_input("--checkpoint"):
        checkpoint = load_checkpoint(args.checkpoint, "gan", ("args", "objectives", "predictor_tau"))
        source = Generator.from_checkpoint(args.checkpoint, device)
        predictor = Predictor.from_checkpoint(args.checkpoint, device)
    objectives = checkpoint["objectives"]
    if single != (len(objectives) == 1):
        script = "generate_archs.py" if len(objectives) == 1 else "generate_archs_multiobj.py"
        fail(f"--checkpoint: a GAN of {' and '.join(o['name'] for o in objectives)}; give it to {script}")
    if args.top and not args.supernet and "accuracy" not in [o["name"] for o in objectives]:
        fail("--top: expected with --supernet, since the GAN was not trained on accuracy and cannot rank by it")
    max_vertices = source.config["max_vertices"]
    baseline = RandomCells(max_vertices)
    combinations, limits = wanted_labels(args, objectives), Limits(args, max_vertices)
    within = [labels for labels in combinations if limits.allow(labels, objectives)]
    if not within:
        flags = ", ".join(f"--{LABEL_FLAGS[o['name']]}" for o in objectives if o["name"] in limits.bounds)
        fail(f"{flags}: {describe(combinations[0], objectives)} is not within the limits")
    source = baseline if args.random else source
    folder = output_folder(args)
    refuse_used(folder, "config.json", "genotypes.json", "evaluation.json")
    records = read_nas_dataset(args, checkpoint)
    known = None if records is None else {record.genotype.canonical() for record in records}
    for objective, value in zip(objectives, checkpoint["predictor_tau"], strict=True):
        print(f"predictor of {objective['name']}: Kendall tau {value:.3f} on records that it was not trained on")

    for labels in combinations:
        if labels not in within:
            print(f"{describe(labels, objectives)} is left out: not within the limits")

    scorer = None
    if args.supernet:
        with user_input("--supernet"):
            supernet, settings = load_supernet(args.supernet, device)
        with user_input("--data"):
            scorer = SupernetScorer(supernet, settings, args.data, args.cache_dir)
        if args.evaluate:  # of real and random cells too
            with user_input("--supernet"):
                scorer.check(max_vertices)
    drawn = {labels: draw(source, labels, args, limits) for labels in within}
    merged = {labels: merge(genotypes, labels, known, limits) for labels, genotypes in drawn.items()}
    if scorer:
        kept = [Genotype.from_dict(entry) for entries in merged.values() for entry in entries[: args.num_archs]]
        with user_input("--supernet"):
            scorer.check(max((cell.num_vertices for genotype in kept for cell in genotype.cells), default=0))
    results, best = [], None
    for labels, genotypes in drawn.items():
        found = len(merged[labels])
        entries = merged[labels][: args.num_archs]  # the last batch drawn may have brought more
        rank(entries, predictor, objectives, scorer)
        entries = entries[: args.top]
        for entry in entries:
            entry |= {"index": len(results), "random": args.random}
            results.append(entry)
        title = describe(labels, objectives)
        title = f"random cells in the place of {title}" if args.random else title
        print_class(title, genotypes, known, entries, found, limits)
        if limits.given and found < args.num_archs:
            print(f"  only {found} of the {args.num_archs} that were asked for; --max_draws {args.max_draws}")
        best = entries[0]["index"] if entries else best

    if not results and limits.given:
        fail("none of the cells drawn is valid and within the limits, nothing was written")
    path = folder / "genotypes.json"
    write_config(folder, args, device)
    write_json(path, results)
    if args.evaluate:
        if not args.random:  # as many random cells, dealt out to the labels
            random = {k: baseline.sample(k, len(v), derive_seed(args.seed, 10**6, *k)) for k, v in drawn.items()}
        sets = {"random cells": drawn} if args.random else {"generated cells": drawn, "random cells": random}
        evaluation = evaluate_and_print(sets, objectives, records, predictor, scorer, args.seed)
        write_json(path.with_name("evaluation.json"), evaluation)
    print(f"\nwrote {len(results)} genotypes to {path}")
    if not results:
        print("warning: none of the cells drawn is valid; longer training may help")
    if best is not None:
        arch = shown(f"{path}:{best}")
        print(f"next: python visualize.py --arch {arch}\n      python train_cifar.py --arch {arch}")


if __name__ == "__main__":
    main(parse_args())
