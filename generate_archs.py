"""Write cells with a trained generator: for every class, or for the accuracy, #params and MACs that are wanted.

    python generate_archs.py                                    # with the generator that is shipped
    python generate_archs.py --checkpoint runs/gan-.../generator.pt
    python generate_archs.py --perf_label 2 --num_archs 50
    python generate_archs.py --target_acc 0.49                  # on the NAS dataset's own scale
    python generate_archs.py --target_quantile 0.9 --max_params 3.0M --top 20 --include_real
    python generate_archs.py --perf_label 2 --limits_for imagenet --max_macs 600M
    python generate_archs.py --checkpoint RUN --target_quantile 1 --min_params 2.5M --max_params 2.75M
                                                                # RUN of gan.py --objectives size_accuracy
    python generate_archs.py --num_archs 300 --evaluate         # are they what was asked for?
    python generate_archs.py --num_archs 300 --evaluate --sampling_seeds 8      # with mean and standard deviation
    python generate_archs.py --num_archs 300 --evaluate --supernet data/supernet.pt --data DIR
    python generate_archs.py --perf_label 2 --random            # the baseline, all else equal

Writes genotypes.json: the distinct valid genotypes with their class, how often each was drawn, exact #params and MACs,
and the quantile of each objective in the NAS dataset that the checkpoint's predictor expects, best first; best.json,
the first of the highest class; and config.json.
With a limit on #params or MACs, cells are drawn until --num_archs distinct ones of each class keep it; these are kept.
--include_real offers the NAS dataset's own cells within classes and limits too, at most --num_archs of each class.
--evaluate compares the classes asked for with those obtained, beside random cells, and writes evaluation.json. One
draw of cells is one sampling seed, --seed; with --sampling_seeds N, cells are drawn with --seed and the next N - 1 too.
NAG paper, section 3.2; unlike in the reference, dropout is off and cells are pruned.
"""

import argparse
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from build_nas_dataset.objectives import ACCURACIES, Objective, objectives_of
from build_nas_dataset.random_cells import RandomCells
from build_nas_dataset.records import Record, read_records
from build_nas_dataset.scoring import SupernetScorer, load_supernet
from generation.evaluation import beside_random, over_sampling_seeds, print_evaluation, print_over_sampling_seeds
from generation.listing import (
    Listing,
    accuracy_among,
    add_ranks,
    merge,
    print_class,
    print_next,
    rank,
    real_entries,
    write_entries,
)
from generation.metrics import evaluate_cells
from generation.targets import COUNTED_NETWORKS, LABEL_FLAGS, Limits, count, describe, wanted_labels
from genotypes import Genotype, SearchSpace
from models.generator import Generator
from models.network import CifarConfig, ImageNetConfig
from models.predictor import Predictor
from plumbing.checkpoint_files import load_checkpoint
from plumbing.console import progress_bar
from plumbing.files import write_json
from plumbing.flags import UNREAD, ArgumentParser, Refused, add_common_flags, number
from plumbing.locks import hold_folder, release_folder
from plumbing.run_folder import clear_temporary, output_folder, refuse_used, write_config
from plumbing.start import prepare
from utils import derive_seed, fail, shipped, user_input

# ------------------------------------------------------------------------------------------------------- drawing


def read_nas_dataset(
    args: argparse.Namespace, checkpoint: dict, objectives: list[Objective], space: SearchSpace
) -> list[Record] | None:
    """The NAS dataset, to tell which generated cells are new; None when it is not at hand.

    Ends the script when one that is named is not that of the GAN's training, and --evaluate or --include_real reads it.
    """
    path = args.nasbench_data or checkpoint["args"]["nasbench_data"]
    if not args.nasbench_data and path.endswith("data/nasdata.jsonl") and not Path(path).exists():
        path = shipped("data/nasdata.jsonl")  # it was trained in another folder
    try:
        records = read_records(path, space, checkpoint["args"].get("accuracy_column", "accuracy"))
        if args.evaluate or args.include_real or not args.nasbench_data:
            check_nas_dataset(path, records, objectives)
        return records
    except (ValueError, OSError) as error:
        if args.evaluate or args.include_real or args.nasbench_data:
            fail(f"--nasbench_data: {error}")
        print(f"novelty is not computed, --nasbench_data names the NAS dataset: {error}")
        return None


def check_nas_dataset(path: str, records: list[Record], objectives: list[Objective]) -> None:
    """Raise ValueError when records are not those that a generator with these objectives was trained on."""

    def numbers(those: list[Objective]) -> list[float]:
        return [x for one in those for x in (one.minimum, *one.boundaries, one.maximum)]

    found = objectives_of(records, {o.name: o.num_classes for o in objectives})
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


# ------------------------------------------------------------------------------------------------------- flags

# The reference's script repeats the flags of gan.py; what it reads of them is in the checkpoint here.
IN_CHECKPOINT = (
    "latent_dim vocab_size g_emb_size g_num_layers g_dropout g_hidden_size g_aggr max_step n_perf_classes "
    "cls_perf_embedding_size n_params_classes cls_params_embedding_size"
).split()
UNUSED = (
    "n_epochs batch_size lr b1 b2 n_cpu img_size sample_interval d_emb_size d_gnn_num_layers d_mlp_num_layers "
    "d_gnn_dropout d_mlp_dropout d_hidden_size n_critic clip_value"
).split()
REFERENCE_FLAGS = {
    "gpu": "--device cuda:{}",
    **dict.fromkeys(IN_CHECKPOINT, Refused("the reference has to be told what --checkpoint holds here")),
    **dict.fromkeys(UNUSED, UNREAD),
}


# The flags for the size of the network whose #params and MACs are counted.
NETWORK_FLAGS = {
    "layers": (number(int, 1, 1000), "normal cells per stack of that network"),
    "channels": (number(int, 2, 10**4), "channels of that network"),
    "num_classes": (number(int, 2), "classes of that network"),
}


def parse_args(
    argv: list[str] | None = None, description: str = __doc__, checkpoint: str = "data/generator.pt"
) -> argparse.Namespace:
    """The flags. checkpoint: the default of --checkpoint."""
    parser = ArgumentParser(description, reference_flags=REFERENCE_FLAGS)
    add = parser.add_argument_group("generator").add_argument
    add("--checkpoint", default=shipped(checkpoint), help="file of gan.py, or its run folder")
    add("--num_archs", type=number(int, 1, 10**7), default=100, help="cells to draw for each class (limits: to find)")
    temperature = number(float, 0, 1000)
    add("--temperature", type=temperature, help="of the decisions; lower: likelier cells (default: the generator's)")
    add("--random", action="store_true", help="random cells instead of generated ones, all else equal: the baseline")

    group = parser.add_argument_group("what is asked for")
    add, target = group.add_argument, group.add_mutually_exclusive_group()
    target.add_argument("--perf_label", type=number(int, 0), help="accuracy class, 0 = lowest (default: every class)")
    target.add_argument("--target_acc", type=number(float, 0, 1), help="accuracy, on the NAS dataset's scale, 0 to 1")
    target.add_argument("--target_quantile", type=number(float, 0, 1), help="asks for the class that holds it")
    add("--params_label", type=number(int, 0), help="#params class, 0 = fewest (default: every class)")
    add("--macs_label", type=number(int, 0), help="MACs class, 0 = fewest (default: every class)")
    for name in ("params", "macs"):
        add(f"--min_{name}", type=count, help=f"hard limit on the exact {name}, e.g. 600K, 3.0M, 1.2G")
        add(f"--max_{name}", type=count, help=f"hard limit on the exact {name}")
    add("--max_draws", type=number(int, 1), default=10_000, help="cells drawn for a class at most, to meet the limits")
    add("--top", type=number(int, 1), help="keep that many of each class: those of the highest accuracy expected")
    add("--include_real", action="store_true", help="offer the NAS dataset's own cells beside the generated ones")
    add("--limits_for", choices=tuple(COUNTED_NETWORKS), default="cifar", help="network whose #params and MACs are "
        "counted: that of train_cifar.py for 32x32 pixels, or that of train_imagenet.py for 224x224")  # fmt: skip
    for name, (kind, text) in NETWORK_FLAGS.items():
        cifar, imagenet = getattr(CifarConfig, name), getattr(ImageNetConfig, name)
        add(f"--{name}", type=kind, help=f"{text} (default: cifar {cifar}, imagenet {imagenet})")

    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", action="store_true", help="compare asked with obtained classes, generated with random cells")
    add("--sampling_seeds", type=number(int, 1, 10**4), default=1, help="with --evaluate: draw with as many seeds, "
        "from --seed on, and write mean and standard deviation too")  # fmt: skip
    add("--nasbench_data", help="NAS dataset for the novelty (default: the one the generator was trained on)")
    add("--supernet", help="supernet.pt of build_nas_dataset: rank and evaluate by its accuracy on images of --data "
        "(of a GAN of size_accuracy, --evaluate scores the whole NAS dataset, too)")  # fmt: skip
    add("--data", default="data", help="folder of the images that --supernet was trained on")
    add("--cache_dir", help="where decoded image folders are kept (default: beside them)")
    add_common_flags(parser)
    args = parser.parse_args(argv)
    for name in NETWORK_FLAGS:
        if getattr(args, name) is None:
            setattr(args, name, getattr(COUNTED_NETWORKS[args.limits_for], name))
    limited = any((args.min_params, args.max_params, args.min_macs, args.max_macs))
    if limited and args.max_draws < args.num_archs:
        parser.error(f"argument --max_draws: expected at least the {args.num_archs} of --num_archs")
    if args.evaluate and limited:
        parser.error("argument --evaluate: expected without limits, since it is about all cells that are drawn")
    if args.sampling_seeds > 1 and not args.evaluate:
        parser.error("argument --sampling_seeds: expected with --evaluate")
    return args


# -------------------------------------------------------------------------------------------------------- main


WRITTEN = ("config.json", "genotypes.json", "best.json", "evaluation.json")


class Measures(NamedTuple):
    """What cells are ranked and classified by. scorer: with --supernet, in the place of the predictor of accuracy."""

    predictor: Predictor
    objectives: list[Objective]
    scorer: SupernetScorer | None


def main(args: argparse.Namespace, single: bool = True) -> None:
    """single: whether this is the script for generators of one objective."""
    device = prepare(args)
    with user_input("--checkpoint"):
        checkpoint = load_checkpoint(args.checkpoint, "gan", ("args", "objectives", "predictor_tau"))
        generator = Generator.from_checkpoint(args.checkpoint, device)
        predictor = Predictor.from_checkpoint(args.checkpoint, device)
    objectives = [Objective.from_dict(objective) for objective in checkpoint["objectives"]]
    check_objectives(args, objectives, single)
    max_vertices, space = generator.config.max_vertices, generator.space
    combinations, limits = wanted_labels(args, objectives), Limits(args, max_vertices, space)
    if args.supernet and not limits.counted:
        fail(f"--supernet: expected with a GAN of NAG's cells, got one of the space {space.name}")
    within = labels_within(limits, combinations, objectives)
    folder = output_folder(args)
    refuse_used(folder, *WRITTEN)
    records = read_nas_dataset(args, checkpoint, objectives, space)
    known = None if records is None else {record.genotype.canonical() for record in records}
    for objective, value in zip(objectives, checkpoint["predictor_tau"], strict=True):
        print(f"predictor of {objective.name}: Kendall tau {value:.3f} on records that it was not trained on")
    for labels in combinations:
        if labels not in within:
            print(f"{describe(labels, objectives)} is left out: not within the limits")

    scorer = open_scorer(args, device, max_vertices) if args.supernet else None
    source = RandomCells(max_vertices, space) if args.random else generator
    drawn = {labels: draw(source, labels, args, limits) for labels in progress_bar(within, desc="draw cells")}
    measures = Measures(predictor, objectives, scorer)
    real = real_entries(records, drawn, args.num_archs, objectives, limits) if args.include_real else {}
    results = collect(args, drawn, real, known, limits, measures)
    if not results and limits.given:
        fail("none of the cells drawn is valid and within the limits, nothing was written")
    hold_folder(folder)
    refuse_used(folder, *WRITTEN)  # again: another run may have been quicker
    clear_temporary(folder)
    write_config(folder, args, device)
    write_entries(folder, results)
    if args.evaluate:
        evaluation = evaluate_and_print(args, source, drawn, records, max_vertices, measures)
        write_json(folder / "evaluation.json", evaluation)
    release_folder(folder)
    print(f"\nwrote {len(results)} genotypes to {folder / 'genotypes.json'}")
    if not results:
        print("warning: none of the cells drawn is valid; longer training may help")
    else:
        print_next(folder, results, args, limits, scorer)


def check_objectives(args: argparse.Namespace, objectives: list[Objective], single: bool) -> None:
    """End the script when the generator belongs to the other script, or cannot rank by accuracy."""
    names = [objective.name for objective in objectives]
    if single != (len(names) == 1):
        script = "generate_archs.py" if len(names) == 1 else "generate_archs_multiobj.py"
        fail(f"--checkpoint: a GAN of {' and '.join(names)}; give it to {script}")
    if args.top and not args.supernet and accuracy_among(names) is None:
        fail("--top: expected with --supernet, since the GAN was not trained on accuracy and cannot rank by it")


def labels_within(limits: Limits, combinations: list[tuple], objectives: list[Objective]) -> list[tuple[int, ...]]:
    """The combinations of labels whose classes have cells within the limits. Ends the script when there are none."""
    within = [labels for labels in combinations if limits.allow(labels, objectives)]
    if not within:
        flags = ", ".join(f"--{LABEL_FLAGS[o.name]}" for o in objectives if o.name in limits.bounds)
        fail(f"{flags}: {describe(combinations[0], objectives)} is not within the limits")
    return within


def open_scorer(args: argparse.Namespace, device: torch.device, max_vertices: int) -> SupernetScorer:
    """The supernet of --supernet, on the images of --data."""
    with user_input("--supernet"):
        supernet, settings = load_supernet(args.supernet, device)
    with user_input("--data"):
        scorer = SupernetScorer(supernet, settings, args.data, args.cache_dir)
    if args.evaluate:  # all cells that can be drawn are scored
        with user_input("--supernet"):
            scorer.check(max_vertices)
    return scorer


def collect(
    args: argparse.Namespace,
    drawn: dict[tuple, list],
    real: dict[tuple, list[dict]],
    known: set[Genotype] | None,
    limits: Limits,
    measures: Measures,
) -> list[dict]:
    """Entries of genotypes.json: of each class the distinct cells within the limits, best first; and print them.

    drawn: labels -> genotypes. real: labels -> entries of real cells to be offered beside them.
    """
    _, objectives, scorer = measures
    merged = {labels: merge(genotypes, labels, known, limits) for labels, genotypes in drawn.items()}
    # the last batch may have brought more
    candidates = {labels: entries[: args.num_archs] + real.get(labels, []) for labels, entries in merged.items()}
    if scorer:
        score_all(scorer, [entry for entries in candidates.values() for entry in entries])
    for entries in candidates.values():
        rank(entries, *measures)
    everything = [entry for entries in candidates.values() for entry in entries]
    add_ranks(everything)
    results, listing = [], Listing(limits, objectives, args.random, scorer is not None)
    for labels, genotypes in drawn.items():
        found, entries = len(merged[labels]), candidates[labels][: args.top]
        for entry in entries:
            entry |= {"index": len(results), "random": args.random}
            results.append(entry)
        print_class(labels, genotypes, known, entries, found, listing)
        if limits.given and found < args.num_archs:
            print(f"  only {found} of the {args.num_archs} that were asked for; --max_draws {args.max_draws}")
    if results:
        print(f"\n{listing.footnote(len(everything), args.include_real)}")
    return results


def score_all(scorer: SupernetScorer, entries: list[dict]) -> None:
    """Score the genotypes of all classes at once, which the supernet remembers. Ends the script on too large cells."""
    genotypes = [Genotype.from_dict(entry) for entry in entries]
    with user_input("--supernet"):
        scorer.check(max((cell.num_vertices for genotype in genotypes for cell in genotype.cells), default=0))
    if genotypes:
        scorer(genotypes)


def evaluate_and_print(
    args: argparse.Namespace,
    source: Generator | RandomCells,
    drawn: dict[tuple, list],
    records: list[Record],
    max_vertices: int,
    measures: Measures,
) -> dict:
    """The evaluation of the genotypes drawn and, unless they are random, of as many random ones beside them.

    drawn: labels -> genotypes that `source` gave with --seed; with the other sampling seeds they are drawn here.
    Returns {"sampling_seeds": all of them, title: the evaluation with the first one} and, of several sampling seeds,
    also {"over sampling seeds": {title: measures}}.
    """
    predictor, objectives, scorer = measures
    for objective in objectives:
        if scorer is not None and objective.name in ACCURACIES:
            scorer.cut_classes(records, objective, args.seed)
    seeds = [args.seed + i for i in range(args.sampling_seeds)]
    baseline, sets = RandomCells(max_vertices, predictor.config.space), []
    for seed in progress_bar(seeds, desc="draw cells of the sampling seeds"):
        if seed != args.seed:
            n, t = args.num_archs, args.temperature
            drawn = {labels: source.sample(labels, n, derive_seed(seed, *labels), temperature=t) for labels in drawn}
        sets.append({"random cells": drawn} if args.random else beside_random(drawn, seed, baseline))
    if scorer is not None:  # all at once, for the time that they take together; it remembers them
        scored = [g for of_seed in sets for those in of_seed.values() for g in chain(*those.values()) if g]
        if scored:
            scorer(scored)
    results: dict[str, list[dict]] = {}
    for of_seed in progress_bar(sets, desc="evaluate"):
        for title, genotypes in of_seed.items():
            results.setdefault(title, []).append(evaluate_cells(genotypes, objectives, records, predictor, scorer))
    for title, (first, *_) in results.items():
        print_evaluation(f"{title}, sampling seed {args.seed}", first, objectives)
    evaluation = {"sampling_seeds": seeds, **{title: those[0] for title, those in results.items()}}
    if len(seeds) > 1:
        evaluation["over sampling seeds"] = {title: over_sampling_seeds(those) for title, those in results.items()}
        for title, found in evaluation["over sampling seeds"].items():
            print_over_sampling_seeds(title, found, seeds, results[title][0]["drawn"])
    return evaluation


if __name__ == "__main__":
    main(parse_args())
