"""Write cells with a trained generator: for every accuracy class, or for the one that is wanted.

    python generate_archs.py --checkpoint runs/gan-.../checkpoint.pt
    python generate_archs.py --checkpoint runs/gan-... --perf_label 2 --num_archs 50
    python generate_archs.py --checkpoint runs/gan-... --target_acc 0.31     # on the NAS dataset's own scale
    python generate_archs.py --checkpoint runs/gan-... --target_quantile 0.9

Writes genotypes.json: every distinct valid genotype with its class, how often it was drawn, exact #params and MACs.
NAG paper, section 3.2; unlike in the reference, dropout is off and cells are pruned.
"""

import argparse
from collections import Counter
from pathlib import Path

from build_nas_dataset.records import class_of, read_records
from genotypes import Genotype
from metrics import generation_metrics
from models.generator import Generator
from models.network import genotype_cost
from utils import (
    add_common_flags,
    derive_seed,
    fail,
    load_checkpoint,
    number,
    output_folder,
    prepare,
    user_input,
    write_json,
)


def wanted_classes(args: argparse.Namespace, objective: dict) -> list[int]:
    """The accuracy classes to draw cells for. Ends the script when a target is outside of what the GAN has seen."""
    boundaries, low, high = objective["boundaries"], objective["minimum"], objective["maximum"]
    highest = len(boundaries)
    if args.perf_label is not None:
        if args.perf_label > highest:
            fail(f"--perf_label: expected 0 (lowest accuracy) to {highest} (highest), got {args.perf_label}")
        return [args.perf_label]
    if args.target_acc is not None:
        if not low <= args.target_acc <= high:
            fail(
                f"--target_acc: expected {low:.4f} to {high:.4f}, the accuracies of the NAS dataset that the GAN was "
                f"trained on (by a supernet, below those of trained networks), got {args.target_acc:g}"
            )
        return [class_of(args.target_acc, boundaries)]
    if args.target_quantile is not None:
        return [min(int(args.target_quantile * (highest + 1)), highest)]
    return list(range(highest + 1))


def known_genotypes(args: argparse.Namespace, checkpoint: dict) -> set[Genotype] | None:
    """Canonical genotypes of the NAS dataset, to tell which generated ones are new; None when it is not at hand."""
    path = args.nasbench_data or checkpoint["args"]["nasbench_data"]
    if args.nasbench_data is None and not Path(path).exists():
        print(f"{path} is not there: novelty is not computed (--nasbench_data names the NAS dataset)")
        return None
    with user_input("--nasbench_data"):
        return {record.genotype.canonical() for record in read_records(path)}


def merge(genotypes: list[Genotype | None], label: int, known: set[Genotype] | None, args) -> list[dict]:
    """One entry for each distinct valid genotype, in order of first appearance."""
    counts, first = Counter(), {}
    for genotype in filter(None, genotypes):
        canonical = genotype.canonical()
        counts[canonical] += 1
        first.setdefault(canonical, genotype)
    entries = []
    for canonical, genotype in first.items():
        params, macs = genotype_cost(genotype, args.num_classes, args.layers, args.channels)
        entry = {**genotype.to_dict(), "labels": [label], "count": counts[canonical], "params": params, "macs": macs}
        entries.append(entry if known is None else {**entry, "novel": canonical not in known})
    return entries


def print_class(label: int, range_text: str, genotypes: list, known: set[Genotype] | None, entries: list[dict]) -> None:
    quality = generation_metrics(genotypes, known or ())
    invalid = genotypes.count(None)
    if known is None:
        del quality["novelty"]
    numbers = ", ".join(f"{name} {value:.3f}" for name, value in quality.items())
    print(
        f"\nclass {label} ({range_text}): {len(genotypes)} drawn, {invalid} invalid, {len(entries)} distinct; {numbers}"
    )
    if entries:
        print("  index   #params       MACs  vertices  drawn  new")
    for entry in entries[:10]:
        vertices = "+".join(str(len(entry[cell]["ops"])) for cell in ("normal", "reduction"))
        new = {True: "yes", False: "no", None: "?"}[entry.get("novel")]
        print(
            f"  {entry['index']:5d} {entry['params'] / 1e6:8.3f}M {entry['macs'] / 1e6:9.1f}M {vertices:>9}"
            f" {entry['count']:6d}  {new}"
        )
    if len(entries) > 10:
        print(f"  ... {len(entries) - 10} more in the file")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, help="checkpoint.pt of gan.py, or the run folder that holds it")
    add("--num_archs", type=number(int, 1), default=100, help="cells to draw for each class")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--perf_label", type=number(int, 0), help="accuracy class, 0 = lowest (default: every class)")
    target.add_argument("--target_acc", type=number(float, 0, 1), help="accuracy on the NAS dataset's scale")
    target.add_argument("--target_quantile", type=number(float, 0, 1), help="0.9: like the best tenth of the dataset")
    add("--nasbench_data", help="NAS dataset for the novelty (default: the one the GAN was trained on)")
    add("--layers", type=number(int, 1), default=6, help="of the network whose #params and MACs are counted")
    add("--channels", type=number(int, 2), default=36, help="of that network")
    add("--num_classes", type=number(int, 2), default=10, help="of that network")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = prepare(args)
    with user_input("--checkpoint"):
        checkpoint = load_checkpoint(args.checkpoint, "gan")
        generator = Generator.from_checkpoint(args.checkpoint, device)
    objectives = checkpoint["objectives"]
    if [objective["name"] for objective in objectives] != ["accuracy"]:
        fail(f"--checkpoint: expected a GAN of one objective, accuracy, got {[o['name'] for o in objectives]}")
    labels = wanted_classes(args, objectives[0])
    known = known_genotypes(args, checkpoint)

    edges = [objectives[0]["minimum"], *objectives[0]["boundaries"], objectives[0]["maximum"]]
    results = []
    for label in labels:
        genotypes = generator.sample((label,), args.num_archs, derive_seed(args.seed, label))
        entries = merge(genotypes, label, known, args)
        for entry in entries:
            entry["index"] = len(results)
            results.append(entry)
        print_class(label, f"accuracy {edges[label]:.4f} to {edges[label + 1]:.4f}", genotypes, known, entries)

    path = output_folder(args) / "genotypes.json"
    write_json(path, results)
    print(f"\nwrote {len(results)} genotypes to {path}")
    if not results:
        print("warning: none of the cells drawn is valid; the generator may need more training")
    else:
        best = next(entry["index"] for entry in results if entry["labels"] == [labels[-1]] or entry is results[-1])
        print(f"next: python visualize.py --arch {path}:{best}\n      python train_cifar.py --arch {path}:{best}")


if __name__ == "__main__":
    main(parse_args())
