"""Of a NAS dataset and of a generator's training: what was scored, and what was learned from it."""

import numpy as np
from scipy.stats import rankdata

from build_nas_dataset.objectives import ACCURACIES, Objective
from build_nas_dataset.statistics import tau
from generation import figures
from generation.report.parts import NasDataset, Page, Section, TrainedGenerator
from generation.report.runs import Run
from models.predictor import split_records
from plumbing.checkpoint_files import load_checkpoint
from utils import shown

COSTS = {"params": ("parameters (M)", 1e6), "macs": ("MACs (M)", 1e6)}
ACCURACY = "accuracy of the NAS dataset"


def dataset_section(page: Page, dataset: NasDataset, objectives: list[Objective], name: str) -> Section:
    """Accuracies, #params, MACs, Pareto fronts and class boundaries. objectives: those of a generator, or []."""
    dataset.shown = True
    section = Section("nas_dataset", "NAS dataset", name)
    cuts = {objective.name: objective.boundaries for objective in objectives or dataset.objectives()}
    records, accuracy = dataset.records, dataset.column("accuracy")
    section.number("cells", len(records))
    section.number("accuracy, mean", float(accuracy.mean()), 4)
    section.number("accuracy, standard deviation", float(accuracy.std(ddof=1)) if len(records) > 1 else None, 4)
    section.number("accuracy, lowest", float(accuracy.min()), 4)
    section.number("accuracy, highest", float(accuracy.max()), 4)
    add = section.figures.append
    add(page.figure(figures.histogram(accuracy, ACCURACY, cuts.get("accuracy", ())), "Accuracy",
                    "How the accuracies of the cells are spread; classes hold equally many cells."))  # fmt: skip
    for cost, (label, unit) in COSTS.items():
        values = dataset.column(cost) / unit
        if np.isnan(values).any():
            section.missing.append(f"The NAS dataset does not say {label.split(' (')[0]} of every cell.")
            continue
        if cost == "params":
            own = [cut / unit for cut in cuts.get(cost, ())]
            add(page.figure(figures.histogram(values, label, own), "Parameters",
                            "Of the stand-alone network without its auxiliary head."))  # fmt: skip
        section.number(f"Kendall's tau of accuracy with {label.split(' (')[0]}", tau(accuracy, values))
        drawn = dataset.drawn
        figure = figures.cloud(values[drawn], accuracy[drawn], label, ACCURACY, cuts.get("accuracy", ()))
        caption = "Every point is a cell; on the Pareto front no cell is both smaller and better."
        if len(drawn) < len(records):
            caption += f" {len(drawn):,} of {len(records):,} cells, drawn at random, are shown."
        place = (values[drawn], accuracy[drawn], dataset.numbers)
        add(page.figure(figure, f"Accuracy against {label.split(' (')[0]}", caption, place))
    best = records[int(accuracy.argmax())]
    section.verdict = (
        f"{len(records):,} cells, of accuracy {accuracy.min():.4f} to {accuracy.max():.4f}; "
        f"the best is cell {best.id}{'' if best.params is None else f' of {best.params / 1e6:.3f} M parameters'}."
    )
    section.next = f"python gan.py --nasbench_data {shown(dataset.path)}"
    repeat_numbers(section, dataset)
    return section


def repeat_numbers(section: Section, dataset: NasDataset) -> None:
    """Add how well two scorings agree, as the header of the file says it."""
    taus = (dataset.header.get("summary") or {}).get("repeatability_tau")
    if isinstance(taus, list) and taus:
        for i, value in enumerate(taus):
            name = "Kendall's tau of two scorings" + (f", {i + 1} and {i + 2}" if len(taus) > 1 else "")
            section.number(name, value)
        section.verdict += f" Two scorings agree with Kendall's tau {np.mean(taus):.2f}."
    else:
        section.missing.append("The NAS dataset does not say how well two scorings of the same cells agree.")


def build_section(page: Page, run: Run) -> list[Section]:
    """The sections on a run of build_nas_dataset: its NAS dataset, how the supernet trained, how two scorings agree."""
    path = run.folder if run.folder.is_file() else run.folder / "nasdata.jsonl"
    if path.is_file():
        section = dataset_section(page, page.dataset(path), [], run.name)
    else:
        section = Section("nas_dataset", "NAS dataset", run.name)
        epochs, wanted = len(run.column("loss")[0]), run.args.get("epochs")
        section.verdict = f"The run is not finished: {epochs} of {wanted} epochs of the supernet are done."
        section.next = f"python -m build_nas_dataset --resume {shown(run.folder)}"
        section.missing.append("nasdata.jsonl is missing: the cells are not scored yet.")
    if run.column("loss")[0]:
        lines = {"loss": run.column("loss"), "training accuracy": run.column("train_accuracy")}
        figure = figures.curves(lines, "loss, accuracy")
        caption = "Every step trains one cell of the pool on the weights that all share."
        section.figures.append(page.figure(figure, "Training of the supernet", caption))
    if not run.folder.is_file():
        add_scorings(page, section, run)
    return [section]


def add_scorings(page: Page, section: Section, run: Run) -> None:
    """The last two scorings of the pool against each other, from the checkpoint."""
    try:
        scores = load_checkpoint(run.folder, "supernet", ("scores",))["scores"].numpy()
    except ValueError as error:
        section.missing.append(f"Scoring against scoring cannot be drawn: {error}.")
        return
    whole = scores[~np.isnan(scores).any(1)]
    if len(whole) < 2:
        section.missing.append("Scoring against scoring cannot be drawn: fewer than two scorings are whole.")
        return
    value = tau(whole[-2], whole[-1])
    figure = figures.agreement(whole[-2], whole[-1], "scoring before the last", "last scoring")
    caption = f"The same cells on other images, an epoch apart: Kendall's tau {value:.3f}."
    section.figures.append(page.figure(figure, "Scoring against scoring", caption))


# --------------------------------------------------------------------------------------------------- predictor


def held_out_quantiles(generator: TrainedGenerator, dataset: NasDataset, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true places in the ranking (n, K) of the records that train_predictor held out with that seed."""
    records = dataset.records
    held_out, _ = split_records([record.genotype.canonical() for record in records], seed)
    ranks = [rankdata(objective.values(records)) for objective in generator.objectives]
    true = (np.stack(ranks, axis=1) - 0.5) / len(records)
    return generator.predictor.quantiles([records[i].genotype for i in held_out]), true[held_out]


def add_calibration(page: Page, section: Section, generator: TrainedGenerator, dataset: NasDataset, seed: int) -> None:
    """The predictor's calibration on held-out records, where it is sure that they are those."""
    predicted, true = held_out_quantiles(generator, dataset, seed)
    for k, (objective, known) in enumerate(zip(generator.objectives, generator.tau, strict=True)):
        section.number(f"predictor of {objective.name}, Kendall's tau on held-out cells", known)
        if not abs(tau(predicted[:, k], true[:, k]) - known) < 0.005:  # another seed, or another NAS dataset
            section.missing.append(
                f"The predictor's calibration for {objective.name} cannot be drawn: the cells that it was not trained "
                "on are not known, since the run's seed or NAS dataset is not."
            )
            continue
        figure = figures.calibration(predicted[:, k], true[:, k])
        error = float(np.sqrt(np.mean((predicted[:, k] - true[:, k]) ** 2)))
        caption = (
            f"{len(true)} cells that it was not trained on: Kendall's tau {known:.3f}, error of the place {error:.3f}."
        )
        section.figures.append(page.figure(figure, f"Calibration of the predictor, {objective.name}", caption))


# --------------------------------------------------------------------------------------------------- generator


def gan_sections(page: Page, run: Run) -> list[Section]:
    """The sections on a run of gan.py: the NAS dataset that it learned from, and its training."""
    section = Section("gan", "Training of the generator", run.name)
    generator = checkpoint_of(page, run, section)
    path = run.args.get("nasbench_data") or (generator.nasbench_data if generator else "data/nasdata.jsonl")
    sections = [section]
    try:
        dataset = page.dataset(path, run.args.get("accuracy_column", "accuracy"))
        if not dataset.shown:
            sections = [dataset_section(page, dataset, generator.objectives if generator else [], str(path)), section]
        if generator:
            add_calibration(page, section, generator, dataset, run.args.get("seed", 1997))
    except (ValueError, OSError) as error:
        section.missing.append(f"The NAS dataset of the training cannot be read: {error}.")
    add_training(page, section, run, generator)
    say_of_training(section, run, generator)
    return sections


def checkpoint_of(page: Page, run: Run, section: Section) -> TrainedGenerator | None:
    """The checkpoint of a gan run; None, and a sentence on what is missing, where it cannot be read."""
    path = next((run.folder / name for name in ("generator.pt", "checkpoint.pt") if (run.folder / name).exists()), None)
    if path is None:
        section.missing.append("generator.pt and checkpoint.pt are missing: no epoch was finished.")
        return None
    try:
        return page.generator(path)
    except (ValueError, OSError) as error:
        section.missing.append(f"The generator cannot be read: {error}.")
        return None


def chance_of(run: Run, generator: TrainedGenerator | None) -> dict[str, float]:
    """Objective -> one over its number of classes, the controllability of who does not know what is asked."""
    if generator:
        return {objective.name: 1 / objective.num_classes for objective in generator.objectives}
    flags = {**dict.fromkeys(ACCURACIES, "n_perf_classes"), "params": "n_params_classes", "macs": "n_macs_classes"}
    return {name: 1 / run.args.get(flags.get(name), 3) for name in run.args.get("objectives", ())}


def add_training(page: Page, section: Section, run: Run, generator: TrainedGenerator | None) -> None:
    """Losses, quality and controllability over the epochs."""
    warmup = run.args.get("warmup_epochs") or 0
    marks = {"end of the warm-up": warmup} if 0 < warmup < len(run.metrics) else {}
    losses = {"nll": "Negative log-likelihood of real cells, in nats; lower is better.",
              "reward": "Mean reward of the cells drawn, by the predictor and exact counts; higher is better.",
              "divergence": "Divergence from the generator at the end of the warm-up.",
              "generator_loss": "Loss of the generator in the published game.",
              "discriminator_loss": "Loss of the discriminator in the published game."}  # fmt: skip
    logged = {name for line in run.metrics for name in line}
    others = logged - {*losses, "step", "seconds", "validity", "uniqueness", "novelty", "vertices", "density"}
    for name in [*losses, *sorted(name for name in others if not name.startswith("controllability_"))]:
        if name in logged:
            figure = figures.curves({name: run.column(name)}, name.replace("_", " "), marks=marks)
            title = name.replace("_", " ").capitalize() if name != "nll" else "Likelihood (nll)"
            section.figures.append(page.figure(figure, title, losses.get(name, "As logged, by epoch.")))
    quality = {name: run.column(name) for name in ("validity", "uniqueness", "novelty") if name in logged}
    if quality:
        figure = figures.curves(quality, "share", marks=marks)
        caption = "Of the cells drawn along the way: valid, distinct among the valid, new among the distinct."
        section.figures.append(page.figure(figure, "Validity, uniqueness, novelty", caption))
    chance = chance_of(run, generator)
    obeyed = {name: run.column(f"controllability_{name}") for name in chance if f"controllability_{name}" in logged}
    if obeyed:
        level = {f"chance, {value:.2f}": value for value in chance.values()}
        figure = figures.curves(obeyed, "share of cells as asked", marks=marks, levels=level)
        caption = "Share of the cells drawn that are of the class asked for, invalid ones counted as failures."
        section.figures.append(page.figure(figure, "Controllability", caption))
    else:
        section.missing.append("No cells were drawn along the way yet: see --eval_every.")


def say_of_training(section: Section, run: Run, generator: TrainedGenerator | None) -> None:
    """The verdict, the last numbers and the next command."""
    done, wanted = max((line.get("step", 0) for line in run.metrics), default=0), run.args.get("n_epochs")
    last: dict = {}
    for line in run.metrics:
        last |= {name: value for name, value in line.items() if value is not None}
    section.number("epochs", done)
    for name in ("nll", "reward", "divergence", "validity", "uniqueness", "novelty"):
        section.number(f"{name}, last", last.get(name))
    chance, words = chance_of(run, generator), []
    for name, share in chance.items():
        if (value := last.get(f"controllability_{name}")) is not None:
            section.number(f"controllability of {name}, last", value)
            words.append(f"{value:.2f} of the cells drawn have the {name} class asked for (chance {share:.2f})")
    if wanted and done < wanted:
        section.verdict = f"The run is not finished: {done} of {wanted} epochs are done. "
        section.next = f"python gan.py --resume {shown(run.folder)}"
    else:
        script = "generate_archs.py" if len(chance) < 2 else "generate_archs_multiobj.py"
        section.next = f"python {script} --checkpoint {shown(run.folder / 'generator.pt')} --evaluate --num_archs 300"
    section.verdict += f"After {done} epochs, " + (" and ".join(words) or "no cells were drawn yet") + "."
