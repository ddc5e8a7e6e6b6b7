"""The rows of the tables of docs/results.md, from the contents of their result files: see benchmarks/tables.py.

A function for each layout of files; `plain` is for those that hold columns and rows. Needs no package.
"""

from statistics import mean, stdev
from typing import Any

Rows = list[list[str]]  # the first is the head


def shown(value: Any, digits: int = 3) -> str:
    """A value of a result file as a cell of a table.

    Fractions have `digits` digits, integers commas; a {"mean", "std"} is "0.842 +- 0.004", without a deviation that is
    not known or rounds to 0; a {"value", "low", "high"} is "0.741 (0.720 to 0.760)"; of a list, the values with commas
    between. None is empty, a text itself.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return ", ".join(shown(part, digits) for part in value)
    if isinstance(value, dict) and "mean" in value:
        spread = shown(value.get("std"), digits)
        return shown(value["mean"], digits) + (f" +- {spread}" if spread.strip("0.") else "")
    if isinstance(value, dict):
        return f"{shown(value['value'], digits)} ({shown(value['low'], digits)} to {shown(value['high'], digits)})"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def plain(data: dict) -> Rows:
    """The rows of a file with "columns", "rows" and perhaps "digits": one number for all columns, or one for each."""
    digits = data.get("digits", 3)
    digits = digits if isinstance(digits, list) else [digits] * len(data["columns"])
    cells = [[shown(value, n) for value, n in zip(row, digits, strict=True)] for row in data["rows"]]
    return [data["columns"], *cells]


def nas_dataset(lines: list[dict], trusted: dict) -> Rows:
    """Table of the shipped NAS dataset: what its file says, and what was found with it."""
    header, *records = lines
    summary, accuracies = header["summary"], [record["accuracy"] for record in records]
    spread = shown({"mean": summary["accuracy_mean"], "std": summary["accuracy_std"]})
    (repeatability,) = summary["repeatability_tau"]
    head, *others = plain(trusted)
    return [
        head,
        ["supernet accuracy over the pool", f"{spread} ({shown(min(accuracies))} to {shown(max(accuracies))})"],
        [
            "repeatability: Kendall tau between the two scorings, on disjoint images",
            f"{shown(repeatability)} (n = {len(records):,})",
        ],
        ["Kendall tau with #params", shown(summary["tau_with_params"])],
        *others,
    ]


MEASURES = (
    "validity",
    "uniqueness",
    "novelty",
    "params controllability",
    "accuracy controllability",
    "all controllability",
)
DISTANCES = tuple(f"distance {name}" for name in ("vertices", "ops", "density"))


def measures(found: dict) -> list[str]:
    """What a row of the table of controllability holds after its title and its number of cells.

    found: measure -> {"mean", "std"}. Of a generator with one label, the column "both" is left empty.
    """
    both = "params controllability" in found
    names = MEASURES if both else MEASURES[:-1]
    return [*(shown(found.get(name)) for name in names), *([] if both else [""]), shown([found[n] for n in DISTANCES])]


def over_training_seeds(runs: list[dict]) -> dict:
    """Mean and standard deviation, over generators of several training seeds, of each measure of their cells.

    runs: one for each training seed, of a file of benchmarks/sampling_seeds.py. A generator's value is the mean of its
    evaluations with several sampling seeds. Returns {measure: {"mean", "std"}}.
    """
    found = [run["over sampling seeds"]["generated cells"] for run in runs]
    means = {name: [one[name]["mean"] for one in found] for name in (*MEASURES, *DISTANCES)}
    return {name: {"mean": mean(values), "std": stdev(values)} for name, values in means.items()}


def controllability(over_seeds: dict, trained: dict) -> Rows:
    """Table of controllability: the shipped generators, random cells, and generators of other training seeds.

    over_seeds, trained: files of benchmarks/sampling_seeds.py. The first run of over_seeds is of the generator with the
        training seed 1997, those of trained are of generators by the same command with other training seeds.
    """
    rows = []
    for run in over_seeds["runs"]:
        if "--temperature" in run["command"]:  # told in the text
            continue
        found, count = run["over sampling seeds"], f"{run['cells_of_each_sampling_seed']:,} each"
        first = f"`{run['generator']}`; over {len(run['sampling_seeds'])} sampling seeds"
        rows.append([first, count, *measures(found["generated cells"])])
        rows.append(["random cells; over the same", count, *measures(found["random cells"])])
    for run in trained["runs"]:
        title = f"`gan_multiobj.py --seed {run['training_seed']}`; over {len(run['sampling_seeds'])} sampling seeds"
        count = f"{run['cells_of_each_sampling_seed']:,} each"
        rows.append([title, count, *measures(run["over sampling seeds"]["generated cells"])])
    together = [over_seeds["runs"][0], *trained["runs"]]
    title = f"`gan_multiobj.py`; over {len(together)} training seeds, of the means over sampling seeds"
    rows.append([title, count, *measures(over_training_seeds(together))])
    head = ["", "n", "validity", "uniqueness", "novelty", "#params class", "accuracy class, by the predictor", "both"]
    return [[*head, "distance: vertices, ops, density"], *rows]


def supernet_labels(over_seeds: dict) -> Rows:
    """Table of accuracy classes by the supernet: the shipped generators and random cells over sampling seeds."""
    rows = []
    for run in over_seeds["runs"]:
        count, seeds = f"{run['cells_of_each_sampling_seed']:,} each", len(run["sampling_seeds"])
        for title, key in ((f"`{run['generator']}`", "generated cells"), ("random cells", "random cells")):
            found = run["over sampling seeds"][key]
            share = found["accuracy controllability"]
            both = shown(found["all controllability"]) if "params controllability" in found else ""
            means = shown([found[f"accuracy mean of class {c}"]["mean"] for c in range(3)])
            ceiling = shown(share["mean"] / run["ceiling"], 2)
            rows.append([f"{title}; over {seeds} sampling seeds", count, shown(share), ceiling, both, means])
    return [["", "n", "accuracy class", "of the ceiling", "both", "mean accuracy of low, middle, high"], *rows]


# What the flags of the ablation leave out or add.
PARTS = {
    "": "as it is",
    "--policy_gradient_weight 0": "likelihood alone (`{}`)",
    "--pool_size 0": "likelihood of the NAS dataset's own cells (`{}`)",
    "--adversarial_weight 1": "with the discriminator (`{}`)",
}
ABLATION = "--n_epochs 12 --warmup_epochs 8 --device cpu"  # what all its trainings were given


def ablation(data: dict) -> Rows:
    """Table of the ablation: a row for each training, by the flags that it was given beside those of all."""
    names = ["uniqueness", "params controllability", "accuracy controllability", "all controllability"]
    rows = [["", "uniqueness", "#params class", "accuracy class, by the predictor", "both"]]
    rows[0].append("distance: vertices, ops, density")
    for run in data["runs"]:
        flags = run["training"].partition(ABLATION)[2].strip()
        found = run["over sampling seeds"]["generated cells"]
        distance = shown([found[f"distance {name}"]["mean"] for name in ("vertices", "ops", "density")])
        title = PARTS.get(flags, "`{}`").format(flags)
        rows.append([title, *(shown(found[name]) for name in names), distance])
    return rows


def training_flags(settings: dict) -> str:
    """The flags of gan.py that a generator was trained with, as far as they are not the defaults of its recipe."""
    robust = {"batch_size": 64, "policy_gradient_cells": 256, "inverse_temperature": 10, "lr": 2e-3, "latent_dim": 100}
    flags = []
    if settings["recipe"] == "paper":
        flags.append("--recipe paper")
    else:
        flags += [f"--{name} {settings[name]:g}" for name, usual in robust.items() if settings[name] != usual]
    title = f"`{' '.join(flags)}`" if flags else "defaults"
    done, asked = settings["epoch"], settings["n_epochs"]
    return title if done == asked else f"{title}, {done} of {asked} epochs"


def nasbench201(data: dict) -> Rows:
    """Table of generators for NAS-Bench-201: asked against obtained by the truth, and random cells beside them."""
    of_class = ["true class is the class asked for", "by the signal"]
    head = ["", "K", "n", *of_class, "validity", "uniqueness", "novelty", "reached"]

    def row(title: str, classes: int, found: dict) -> list[str]:
        low, high = found["interval"]
        hits = shown({"value": found["controllability"], "low": low, "high": high})
        shares = [shown(found["controllability_by_signal"]["controllability"])]
        shares += [shown(found[name]) for name in ("validity", "uniqueness", "novelty")]
        count = shown(sum(found["cells_by_class"]))
        return [title, str(classes), count, hits, *shares, shown(found["coverage_by_class"], 2)]

    rows, classes = [head], []
    for run in data["results"]:
        rows.append(row(training_flags(run["settings"]), run["classes"], run["generated"]))
        if run["classes"] not in classes:  # the random cells of runs with as many classes are the same
            classes.append(run["classes"])
            rows.append(row("random cells", run["classes"], run["random"]))
    return [head, *sorted(rows[1:], key=lambda cells: int(cells[1]))]


def searches(data: dict) -> Rows:
    """Table of searches on a tabular benchmark: figures after some queries, and what nag has more than the others."""
    budgets, rows = [str(n) for n in data["budgets"]], []
    for name, method in data["methods"].items():
        figures = [f"{at['mean']:.3f} ({at['std']:.3f})" for at in (method["at"][n] for n in budgets)]
        rows.append([name, str(method["repeats"]), *figures, f"{method['seconds']:.1f} s"])
    for name, at in data["nag_minus"].items():
        gaps = [f"{at[n]['mean']:+.3f} ({at[n]['low']:+.3f} to {at[n]['high']:+.3f})" for n in budgets]
        rows.append([f"nag minus {name}", str(data["methods"]["nag"]["repeats"]), *gaps, ""])
    return [["", "n", *budgets, "processor time"], *rows]


def faults_by_script(data: dict) -> Rows:
    """Table of the fault harness: a row for each kind of fault, a column for each script."""
    scripts = data["faults"]
    kinds = sorted({kind for met in scripts.values() for kind in met})
    counts = [[met.get(kind, 0) for met in scripts.values()] for kind in kinds]
    counts.append([sum(column) for column in zip(*counts, strict=True)])
    rows = [[kind, *map(str, met), str(sum(met))] for kind, met in zip([*kinds, "all"], counts, strict=True)]
    return [["fault", *scripts, "all"], *rows]
