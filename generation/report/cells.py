"""Of generated cells: are they what was asked for, how do they compare with real ones, what do the best look like?"""

from argparse import Namespace
from collections.abc import Sequence

import numpy as np
from scipy.stats import rankdata

from build_nas_dataset.objectives import ACCURACIES, values_of
from build_nas_dataset.random_cells import RandomCells
from build_nas_dataset.scoring import with_images
from generation import figures
from generation.listing import accuracy_among, network_flags
from generation.metrics import cell_distributions
from generation.report.nas_dataset import COSTS, dataset_section
from generation.report.parts import NasDataset, Page, Section, TrainedGenerator, outside, real_text, strips_of
from generation.report.runs import Run
from generation.strips import best_of_each_class, class_name, describe
from genotypes import NAG_SPACE, Genotype, read_genotypes
from models.cost import network_cost
from models.network import CifarConfig, ImageNetConfig
from plumbing.checkpoint_files import load_checkpoint
from utils import shown

BY = {"exact count": "exact count", "supernet": "the supernet"}  # what told the class that was obtained
OBJECTIVES = (*ACCURACIES, "params", "macs")
BEST = 12  # cells of each class on the contact sheet


def generate_sections(page: Page, run: Run) -> list[Section]:
    """The sections on a run of generate_archs.py: its evaluation, what its cells look like, and a contact sheet."""
    section = Section("generate_archs", "Generated cells", run.name)
    if run.args.get("random"):
        section.title = "Random cells"
    try:
        entries = read_genotypes(run.folder / "genotypes.json")
    except (ValueError, OSError) as error:
        section.verdict = "The run is not finished, or its cells cannot be read."
        section.missing.append(f"genotypes.json cannot be read: {error}.")
        return [section]
    generator = generator_of(page, run, section)
    dataset, sections = dataset_of(page, run, generator, section), [section]
    if dataset and not dataset.shown:
        objectives = generator.objectives if generator else []
        sections = [dataset_section(page, dataset, objectives, str(dataset.path)), section]
    add_evaluation(page, section, run, generator)
    if entries:
        generated = [pair for pair in entries if not pair[1].get("real")]  # not those of --include_real
        if generated:
            add_distributions(page, section, generated, dataset)
        numbers = [page.cell(entry_text(i, genotype, known), genotype) for i, (genotype, known) in enumerate(entries)]
        if dataset:
            add_over_cloud(page, section, run, entries, numbers, dataset)
        add_sheet(page, section, run, entries, numbers, dataset)
    say_of_cells(section, run, entries)
    return sections


def generator_of(page: Page, run: Run, section: Section) -> TrainedGenerator | None:
    """The generator that drew the cells; None, and a sentence, where it is not at hand."""
    path = run.args.get("checkpoint")
    if not path:
        section.missing.append("Which generator drew the cells is not known.")
        return None
    try:
        return page.generator(path)
    except (ValueError, OSError) as error:
        section.missing.append(f"The generator that drew the cells cannot be read: {error}.")
        return None


def dataset_of(page: Page, run: Run, generator: TrainedGenerator | None, section: Section) -> NasDataset | None:
    """The NAS dataset of the generator; None, and a sentence, where it is not at hand."""
    path = run.args.get("nasbench_data") or (generator and generator.nasbench_data)
    if not path:
        section.missing.append("The NAS dataset is not known, so real cells are not drawn beside the generated ones.")
        return None
    try:
        return page.dataset(path, generator.accuracy_column if generator else "accuracy")
    except (ValueError, OSError) as error:
        section.missing.append(f"The NAS dataset cannot be read, so real cells are not drawn: {error}.")
        return None


def entry_text(i: int, genotype: Genotype, known: dict) -> str:
    """What is known of a generated cell, in words."""
    words = [f"{'real' if known.get('real') else 'generated'} cell {i}: {describe(genotype, known)}", *estimates(known)]
    return ", ".join(words)


def estimates(known: dict) -> list[str]:
    """What predictor and supernet say of a cell, in words; a place beyond 0 to 1 as generate_archs.py shows it."""
    places = known.get("predicted_unclipped") or {}
    words = [f"rank {known['rank']} among all candidates"] if isinstance(known.get("rank"), int) else []
    words += [f"predicted place in {name} {value:.4f}" for name, value in places.items()]
    if known.get("supernet_accuracy") is not None:
        words.append(f"re-scored accuracy {known['supernet_accuracy']:.4f}")
    return words


# --------------------------------------------------------------------------------------------------- evaluation


def evaluations(run: Run) -> dict[str, dict]:
    """The evaluations in evaluation.json by what was evaluated: "generated cells", "random cells"."""
    content = run.json("evaluation.json")
    if not isinstance(content, dict):
        return {}
    return {name: entry for name, entry in content.items() if isinstance(entry, dict) and "drawn" in entry}


def add_evaluation(page: Page, section: Section, run: Run, generator: TrainedGenerator | None) -> None:
    """Asked against obtained as heat maps, generated cells beside random ones, and their numbers."""
    found = evaluations(run)
    if not found:
        section.missing.append(
            "The cells were not evaluated: generate_archs.py --evaluate compares asked with obtained."
        )
    for title, entry in found.items():
        for name in ("drawn", "validity", "uniqueness", "novelty"):
            section.number(f"{title}: {name}", entry.get(name))
        for objective in OBJECTIVES:
            if not isinstance(own := entry.get(objective), dict):
                continue
            low, high = own["interval"]
            section.number(f"{title}: controllability of {objective}", own["controllability"])
            section.number(f"{title}: controllability of {objective}, low end of the interval", low)
            section.number(f"{title}: controllability of {objective}, high end of the interval", high)
            counts = np.array(own["asked_by_obtained"])
            by = BY.get(own.get("by"), "the predictor")
            caption = (
                f"{own['controllability']:.3f} ({low:.3f} to {high:.3f}) of {entry['drawn']} are of the class asked "
                f"for; chance is {1 / len(counts):.3f}. The class obtained is by {by}."
            )
            figure = figures.heat_map(counts, f"{objective} class obtained", f"{objective} class asked for")
            section.figures.append(page.figure(figure, f"Asked against obtained: {title}", caption))
        several = run.json("evaluation.json").get("over sampling seeds", {}).get(title, {})
        for name, value in several.items():
            section.number(f"{title}: {name}, mean over sampling seeds", value["mean"])
            section.number(f"{title}: {name}, standard deviation over sampling seeds", value["std"])
        if isinstance(entry.get("all"), dict) and sum(name in entry for name in OBJECTIVES) > 1:
            section.number(f"{title}: all labels at once", entry["all"]["controllability"])


# ------------------------------------------------------------------------------------------------ distributions


def add_distributions(page: Page, section: Section, entries: list, dataset: NasDataset | None) -> None:
    """Vertices, ops and density of real, generated and random cells."""
    space = entries[0][0].space
    sets = {"real": [record.genotype for record in dataset.records]} if dataset else {}
    own = "random" if section.title == "Random cells" else "generated"
    sets[own] = [genotype.prune() or genotype for genotype, known in entries for _ in range(known.get("count") or 1)]
    if own == "generated":
        sets["random"] = RandomCells(space=space).sample((), 500, seed=0)
    shares = {name: cell_distributions(genotypes, space) for name, genotypes in sets.items()}
    labels = {
        "vertices": list(map(str, range(space.max_vertices + 1))),
        "ops": list(space.ops),
        "density": [f".{i}" for i in range(10)],
    }
    captions = {
        "vertices": "Vertices of a cell, its inputs and output included.",
        "ops": "Share of the interior vertices that carry an op.",
        "density": "Share of the edges that a cell of its size may have; .6 stands for 0.6 to 0.7.",
    }
    for name, own_labels in labels.items():
        first = space.min_vertices if name == "vertices" else 0
        groups = {of: values[name][first:] for of, values in shares.items()}
        figure = figures.grouped_bars(groups, own_labels[first:], name)
        section.figures.append(page.figure(figure, name.capitalize(), captions[name]))


# ------------------------------------------------------------------------------------------- over the real cells


def add_over_cloud(
    page: Page, section: Section, run: Run, entries: list, numbers: list[int], dataset: NasDataset
) -> None:
    """Generated cells over the cloud of real ones: accuracy, or the place in its ranking, against #params and MACs.

    The ranking is that of the accuracy, or of the accuracy at its size, as the generator was trained.
    """
    known = [entry for _, entry in entries]
    drawn = dataset.drawn
    names = set.intersection(*(set(entry.get("predicted_quantiles") or {}) for entry in known))
    ranking = accuracy_among(names)
    if all(entry.get("supernet_accuracy") is not None for entry in known):
        y, real_y, label = [e["supernet_accuracy"] for e in known], dataset.column("accuracy")[drawn], "accuracy"
        how = "The accuracy of generated cells is that of the supernet."
    elif ranking:
        y = [entry["predicted_quantiles"][ranking] for entry in known]
        real_y = ((rankdata(values_of(dataset.records, ranking)) - 0.5) / len(dataset.records))[drawn]
        label = f"place in the ranking by {'accuracy at its size' if ranking == 'size_accuracy' else ranking}"
        how = "Of generated cells, the place is what the predictor expects; 1 is the best of the NAS dataset."
    else:
        section.missing.append("No accuracy is expected of the cells, so they are not drawn over the real ones.")
        return
    real_costs = costs_of_real(run, dataset)
    for cost, (cost_label, unit) in COSTS.items():
        if real_costs.get(cost) is None or not all(cost in entry for entry in known):
            continue
        x, real_x = np.array([entry[cost] for entry in known]) / unit, real_costs[cost] / unit
        limits = ((run.args.get(f"min_{cost}") or -np.inf) / unit, (run.args.get(f"max_{cost}") or np.inf) / unit)
        groups = by_first_label(known)
        sets = {name: (x[rows], np.array(y)[rows]) for name, rows in groups.items()}
        figure = figures.over_cloud((real_x, real_y), sets, limits, cost_label, label)
        points = (np.concatenate([x, real_x]), np.concatenate([y, real_y]), [*numbers, *dataset.numbers])
        limited = np.isfinite(limits).any()
        caption = how + (f" {outside(x, *limits)} of {len(x)} are outside the limits, shaded." if limited else "")
        title = f"Generated cells over real ones, by {cost_label.split(' (')[0]}"
        section.figures.append(page.figure(figure, title, caption, points))


def by_first_label(known: list[dict]) -> dict[str, list[int]]:
    """Name of a class of the first objective -> the places of its cells."""
    groups: dict[str, list[int]] = {}
    for i, entry in enumerate(known):
        labels = entry.get("labels")
        groups.setdefault(f"class {labels[0]}" if labels else "cells", []).append(i)
    return dict(sorted(groups.items()))


def costs_of_real(run: Run, dataset: NasDataset) -> dict[str, np.ndarray | None]:
    """#params and MACs of the drawn real cells, in the network whose costs the run's file has; None if not known."""
    kind = ImageNetConfig if run.args.get("limits_for") == "imagenet" else CifarConfig
    network = kind(**{name: run.args.get(name, getattr(kind, name)) for name in ("num_classes", "layers", "channels")})
    genotypes = [dataset.records[i].genotype for i in dataset.drawn]
    if network != CifarConfig() and genotypes[0].space == NAG_SPACE:
        counted = np.array([network_cost(genotype, network) for genotype in genotypes], float)
        return dict(zip(("params", "macs"), counted.T, strict=True))
    columns = {cost: dataset.column(cost)[dataset.drawn] for cost in COSTS}
    return {cost: None if np.isnan(values).any() else values for cost, values in columns.items()}


# ------------------------------------------------------------------------------------------------- contact sheet


def counts_of(genotypes: Sequence[Genotype]) -> np.ndarray:
    """How many vertices of each label and edges of each pair of labels every genotype has, cell by cell (n, D)."""
    space = genotypes[0].space
    size = len(space.tokens)
    counts = np.zeros((len(genotypes), len(space.cells), size + size * size), np.int16)
    for i, genotype in enumerate(genotypes):
        for k, cell in enumerate(genotype.cells):
            tokens = [space.token_id[op] for op in cell.ops]
            for dst, token in enumerate(tokens):
                counts[i, k, token] += 1
                for src in cell.predecessors(dst):
                    counts[i, k, size + tokens[src] * size + token] += 1
    return counts.reshape(len(genotypes), -1)


def nearest(genotypes: Sequence[Genotype], real: Sequence[Genotype]) -> list[tuple[int, int]]:
    """For each genotype, the place of the nearest real one and the distance to it.

    The distance is the number of vertices and edges that only one of the two has, edges told by the ops at their ends;
    it is 0 for isomorphic genotypes, and never more than vertices and edges that must be changed.
    """
    own, others = counts_of(genotypes), counts_of(real)
    distances = [np.abs(others - row).sum(1) for row in own]
    return [(int(row.argmin()), int(row.min())) for row in distances]


def add_sheet(
    page: Page, section: Section, run: Run, entries: list, numbers: list[int], dataset: NasDataset | None
) -> None:
    """The first 12 cells of each class, which are those of the highest accuracy expected, the highest class first."""
    flags = training_flags(run, section)
    pruned = {i: genotype.prune() or genotype for i, (genotype, _) in enumerate(entries)}
    for labels, chosen in best_of_each_class(entries, BEST).items():
        near = nearest([pruned[i] for i, _, _ in chosen], [r.genotype for r in dataset.records]) if dataset else []
        cells = []
        for place, (i, genotype, known) in enumerate(chosen):
            index = known.get("index", i)
            cell = {
                "number": numbers[i],
                "index": index,
                "strips": strips_of(genotype),
                "facts": [describe(genotype, {**known, "labels": None}), *estimates(known)],
                "command": f"python {trained_by(run)} --arch {shown(f'{run.folder}/genotypes.json:{i}')}{flags}",
            }
            if near:
                record, distance = dataset.records[near[place][0]], near[place][1]
                cell["near"] = {
                    "number": page.cell(real_text(record), record.genotype),
                    "text": f"real cell {record.id}, {distance} ops and edges differ",
                }
            cells.append(cell)
        section.sheet.append({"title": f"Class {class_name(labels)}" if labels else "Cells", "cells": cells})


def training_flags(run: Run, section: Section) -> str:
    """The flags of that script for the same network and, with --supernet, for the same images."""
    network = ImageNetConfig if run.args.get("limits_for") == "imagenet" else CifarConfig
    defaults = {name: getattr(network, name) for name in ("num_classes", "layers", "channels")}
    defaults |= {"limits_for": "cifar", "cache_dir": None}
    images = None
    if run.args.get("supernet"):
        try:
            settings = load_checkpoint(run.args["supernet"], "supernet weights", ("settings",))["settings"]
            images = with_images(settings, run.args["data"])
        except (ValueError, OSError) as error:
            section.missing.append(f"The supernet cannot be read, so the commands do not name its images: {error}.")
    return network_flags(Namespace(**{**defaults, **run.args}), images)


def trained_by(run: Run) -> str:
    """The script that trains the network whose #params and MACs the run has counted."""
    return "train_imagenet.py" if run.args.get("limits_for") == "imagenet" else "train_cifar.py"


def say_of_cells(section: Section, run: Run, entries: list) -> None:
    """The verdict and the next command."""
    section.number("genotypes in the file", len(entries))
    found = evaluations(run)
    if "generated cells" in found and "all" in found["generated cells"]:
        generated, random = found["generated cells"], found.get("random cells", {})
        low, high = generated["all"]["interval"]
        share = generated["all"]["controllability"]
        section.verdict = (
            f"{share:.2f} ({low:.2f} to {high:.2f}) of {generated['drawn']} generated cells are of the class asked for"
        )
        section.verdict += (
            f", against {random['all']['controllability']:.2f} of random ones." if "all" in random else "."
        )
    else:
        classes = len({tuple(known.get("labels") or ()) for _, known in entries})
        section.verdict = f"{len(entries)} distinct cells in {classes} class{'es' if classes != 1 else ''}."
    if (run.folder / "best.json").is_file():
        flags = training_flags(run, section)
        section.next = f"python {trained_by(run)} --arch {shown(run.folder / 'best.json')}{flags}"
    elif section.sheet:
        section.next = section.sheet[0]["cells"][0]["command"]


# --------------------------------------------------------------------------------------- samples along the way


def add_samples(section: Section, run: Run, page: Page, epochs: int = 5, noises: int = 2) -> None:
    """Add a figure of how the cells that a generator draws from the same noise change during its training.

    epochs: how many epochs are shown, spread over the training. noises: how many samples of noise for each class.
    """
    paths = sorted((run.folder / "samples").glob("epoch-*.json"))
    if not paths:
        return
    chosen = [paths[i] for i in sorted({round(i) for i in np.linspace(0, len(paths) - 1, min(epochs, len(paths)))})]
    found: dict[int, dict[tuple, dict]] = {}  # epoch -> (labels, index) -> the sample
    for path in chosen:
        entries = run.objects(f"samples/{path.name}")
        if any("index" not in entry for entry in entries):
            section.missing.append("Which cells came from the same noise is not told by the samples of this run.")
            return
        epoch = int("".join(filter(str.isdigit, path.stem)) or 0)
        found[epoch] = {(tuple(entry["labels"]), entry["index"]): entry for entry in entries}
    everywhere = sorted(set.intersection(*(set(samples) for samples in found.values())))
    for labels in sorted({labels for labels, _ in everywhere}, reverse=True):
        for index in [index for own, index in everywhere if own == labels][:noises]:
            cells = []
            for epoch, samples in found.items():
                genotype = Genotype.from_dict(samples[labels, index])
                text = f"class {class_name(labels)}, noise {index}, epoch {epoch}"
                cells.append({"epoch": epoch, "strips": strips_of(genotype), "number": page.cell(text, genotype)})
            section.samples.append({"title": f"Class {class_name(labels)}, noise {index}", "cells": cells})


def known_cell(data: dict) -> Genotype | None:
    """The genotype of a result; None where it holds none that can be read."""
    try:
        return Genotype.from_dict(data)
    except ValueError:
        return None
