"""Of trained networks: curves beside the published numbers, confusions, rankings of candidates, searches."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from build_nas_dataset.candidates import flags_of_full_training, rank_correlations, supernet_accuracy
from generation import figures
from generation.report.cells import known_cell
from generation.report.parts import Page, Section, strips_of
from generation.report.runs import Run
from utils import shown

# NAG paper, tables of sections 4.2 and 4.3: (genotype, dataset) -> test error.
PUBLISHED = {
    ("NAG_HIGH_ACC", "cifar10"): 0.0273,
    ("NAG_FEW_PARAMS", "cifar10"): 0.0356,
    ("NAG_ENSEMBLE_B", "cifar10"): 0.0356,  # the same cells
    ("NAG_HIGH_ACC", "cifar100"): 0.1957,
    ("NAG_HIGH_ACC", "imagenet"): 0.272,
}
PUBLISHED_EPOCHS = {"train_cifar": 600, "train_imagenet": 250}
WORST = 24  # images


def train_sections(page: Page, run: Run) -> list[Section]:
    """The section on a run of train_cifar.py or train_imagenet.py: its curves, its result and its mistakes."""
    imagenet = run.kind == "train_imagenet"
    section = Section(run.kind, f"Training of {run.args.get('arch', 'a network')}", run.name)
    result = run.json("result.json")
    result = result if isinstance(result, dict) else {}
    test = result.get("test") if isinstance(result.get("test"), dict) else {}
    accuracy = test.get("top1") if imagenet else result.get("test_accuracy")
    published = PUBLISHED.get((run.args.get("arch"), "imagenet" if imagenet else run.args.get("dataset")))
    add_curves(page, section, run, accuracy, published)
    for name in ("params", "macs"):
        section.number({"params": "parameters", "macs": "MACs"}[name], result.get(name))
    section.number("test accuracy", accuracy, 4)
    section.number("test error", result.get("test_error"), 4)
    section.number("test accuracy, top-5", test.get("top5"), 4)
    if imagenet and isinstance(best := (result.get("best") or {}).get("test"), dict):
        section.number("test accuracy of the best epoch, best.pt", best.get("top1"), 4)
    section.number("published test error", published, 4)
    add_predictions(page, section, run)
    add_genotype(page, section, result)
    say_of_training(section, run, result, accuracy, published)
    return [section]


def add_curves(page: Page, section: Section, run: Run, accuracy: float | None, published: float | None) -> None:
    """Loss and accuracies by epoch, with the levels of the test accuracy and of the published one."""
    names = {"loss": "training loss"}
    if run.column("loss")[0]:
        figure = figures.curves({"loss": run.column("loss")}, names["loss"])
        section.figures.append(page.figure(figure, "Loss", "Mean over the steps of an epoch, on augmented images."))
    lines = {"train_accuracy": "training", "held_out_accuracy": "held-out", "top1": "selection, top-1",
             "top5": "selection, top-5"}  # fmt: skip
    lines = {label: run.column(name) for name, label in lines.items() if run.column(name)[0]}
    levels = {} if accuracy is None else {f"test, {accuracy:.4f}": accuracy}
    levels |= {} if published is None else {f"published, {1 - published:.4f}": 1 - published}
    if lines:
        figure = figures.curves(lines, "accuracy", levels=levels)
        caption = "The test images are used once, after the last epoch."
        section.figures.append(page.figure(figure, "Accuracy", caption))
    else:
        section.missing.append("No epoch is done yet, so there are no curves.")


def add_genotype(page: Page, section: Section, result: dict) -> None:
    """The cells that were trained."""
    genotype = known_cell(result.get("genotype"))
    if genotype is not None:
        number = page.cell(section.title, genotype)
        facts = [f"{result['params'] / 1e6:.3f} M parameters"] if result.get("params") else []
        cell = {"number": number, "index": "", "strips": strips_of(genotype), "facts": facts, "command": ""}
        section.sheet.append({"title": "The cells that were trained", "cells": [cell]})


def say_of_training(section: Section, run: Run, result: dict, accuracy: float | None, published: float | None) -> None:
    """The verdict and the next command."""
    script = f"{run.kind}.py"
    done, wanted = max((line.get("step", 0) for line in run.metrics), default=0), run.args.get("epochs")
    section.number("epochs", done)
    if accuracy is None:
        section.verdict = f"The run is not finished: {done} of {wanted} epochs are done."
        section.next = f"python {script} --resume {shown(run.folder)}"
        section.missing.append("result.json is missing: the test images are used after the last epoch.")
        return
    section.verdict = f"Test error {1 - accuracy:.2%} after {done} epochs"
    if result.get("params"):
        section.verdict += f", with {result['params'] / 1e6:.3f} M parameters"
    of_paper = f"; published are {published:.2%} after {PUBLISHED_EPOCHS[run.kind]} epochs." if published else "."
    section.verdict += of_paper
    kept = "best.pt" if (run.folder / "best.pt").exists() else "checkpoint.pt"  # of train_imagenet.py
    section.next = f"python {script} --evaluate {shown(run.folder / kept)}"


# --------------------------------------------------------------------------------------------------- predictions


def add_predictions(page: Page, section: Section, run: Run) -> None:
    """Confusion matrix and the images that were most wrong, where the run wrote predictions.npz."""
    path = run.folder / "predictions.npz"
    if not path.is_file():
        what = "The run wrote no predictions.npz, so there are neither confusions nor the images that are most wrong."
        section.missing.append(what)
        return
    try:
        found = read_predictions(path)
    except (ValueError, OSError, KeyError) as error:
        section.missing.append(f"predictions.npz cannot be read: {error}.")
        return
    labels, predicted, classes = found["labels"], found["predicted"], [str(name) for name in found["classes"]]
    counts = np.zeros((len(classes), len(classes)), int)
    np.add.at(counts, (labels, predicted), 1)
    figure = figures.heat_map(counts, "class chosen", "true class", classes)
    wrong = int((labels != predicted).sum())
    caption = f"{wrong:,} of {len(labels):,} test images are wrong."
    section.figures.append(page.figure(figure, "Confusions", caption))
    for place, pixels in zip(found["worst"][:WORST], found["worst_images"][:WORST], strict=True):
        text = f"{classes[labels[place]]}, taken for {classes[predicted[place]]}"
        section.images.append({"uri": data_uri(pixels), "text": text, "share": float(found["probability"][place])})


def read_predictions(path: Path) -> dict[str, np.ndarray]:
    """predictions.npz, checked; see train_cifar.py. Raises ValueError, KeyError or OSError."""
    with np.load(path, allow_pickle=False) as file:
        names = ("labels", "predicted", "probability", "classes", "worst", "worst_images")
        found = {name: file[name] for name in names}
    n, classes = len(found["labels"]), len(found["classes"])
    if any(found[name].shape != (n,) for name in ("predicted", "probability")) or not n:
        raise ValueError("its arrays are not of one length")
    if any(found[name].min() < 0 or found[name].max() >= classes for name in ("labels", "predicted")):
        raise ValueError("it names classes that it does not list")
    worst, images = found["worst"], found["worst_images"]
    if len(worst) != len(images) or (len(worst) and (images.ndim != 4 or images.shape[1] != 3 or worst.max() >= n)):
        raise ValueError("its images do not fit")
    return found


def data_uri(pixels: np.ndarray) -> str:
    """An image (3, H, W) of bytes as a PNG within a page."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0).astype(np.uint8))).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ------------------------------------------------------------------------------------------ candidates, searches


def eval_sections(page: Page, run: Run) -> list[Section]:
    """The section on a run of eval_archs.py: ranks by epoch, and how well other measures foretell the ranking."""
    section = Section("eval_archs", "Brief training of candidates", run.name)
    results = [entry for entry in run.objects("results.json") if isinstance(entry.get("training"), dict)]
    if not results:
        section.verdict = "No candidate is trained yet."
        section.next = f"python -m build_nas_dataset.eval_archs --resume {shown(run.folder)}"
        section.missing.append("results.json is missing.")
        return [section]
    rounds = [[(r["epochs"], r["held_out_accuracy"]) for r in entry["training"]["rounds"]] for entry in results]
    if max(map(len, rounds)) > 1:
        caption = "Of the candidates that were trained as long; the three best at the end are coloured."
        section.figures.append(page.figure(figures.ranks_by_epoch(rounds), "Ranks by epoch", caption))
    else:
        section.missing.append(
            "There are no ranks by epoch: without --halving, candidates are measured once, at the end."
        )
    longest = [e for e in results if e["training"]["epochs"] == results[0]["training"]["epochs"]]
    section.number("candidates", len(results))
    section.number("candidates that were trained longest", len(longest))
    section.number("held-out accuracy of the best", results[0]["held_out_accuracy"], 4)
    words = add_correlations(page, section, longest)
    add_candidates(page, section, run, results)
    finished = (run.folder / "best.json").is_file()
    accuracy, epochs = results[0]["held_out_accuracy"], results[0]["training"]["epochs"]
    section.verdict = (
        f"{'' if finished else 'The run is not finished: so far, '}{len(results)} candidates; the best reaches a "
        f"held-out accuracy of {accuracy:.4f} after {epochs} epochs. {words}"
    )
    best = f"python train_cifar.py --arch {shown(run.folder / 'best.json')}{flags_of_full_training(run.args)}"
    resume = f"python -m build_nas_dataset.eval_archs --resume {shown(run.folder)}"
    section.next = best if finished else resume
    return [section]


def add_correlations(page: Page, section: Section, longest: list[dict]) -> str:
    """Held-out accuracy against supernet accuracy and #params, with tau and its interval. Returns a sentence."""
    columns = {"supernet accuracy": supernet_accuracy, "#params": lambda entry: entry["training"]["params"] / 1e6}
    sentences = []
    for name, value in rank_correlations(longest).items():
        low, high = value["interval"]
        section.number(f"Kendall's tau with {name}", value["tau"])
        section.number(f"Kendall's tau with {name}, low end of the interval", low)
        section.number(f"Kendall's tau with {name}, high end of the interval", high)
        known = [entry for entry in longest if columns[name](entry) is not None]
        x, y = [columns[name](entry) for entry in known], [entry["held_out_accuracy"] for entry in known]
        genotypes = [known_cell(entry) for entry in known]
        texts = [f"held-out accuracy {a:.4f}, {name} {b:.4f}" for a, b in zip(y, x, strict=True)]
        numbers = [page.cell(text, genotype) for text, genotype in zip(texts, genotypes, strict=True)]
        label = "parameters (M)" if name == "#params" else name
        figure = figures.cloud(x, y, label, "held-out accuracy", front=False, label="candidates")
        caption = f"Kendall's tau {value['tau']:.3f} ({low:.3f} to {high:.3f}, n = {value['n']})."
        section.figures.append(page.figure(figure, f"Brief training against {name}", caption, (x, y, numbers)))
        sentences.append(f"Kendall's tau with {name} is {value['tau']:.2f} ({low:.2f} to {high:.2f}).")
    return " ".join(sentences)


def add_candidates(page: Page, section: Section, run: Run, results: list[dict]) -> None:
    """The 12 best candidates."""
    cells = []
    for i, entry in enumerate(results[:12]):
        genotype, training = known_cell(entry), entry["training"]
        facts = [f"held-out accuracy {entry['held_out_accuracy']:.4f} after {training['epochs']} epochs",
                 f"{training['params'] / 1e6:.3f} M parameters"]  # fmt: skip
        arch = shown(f"{run.folder}/results.json:{i}")
        command = f"python train_cifar.py --arch {arch}{flags_of_full_training(run.args)}"
        number = page.cell(", ".join([f"candidate {i}", *facts]), genotype)
        strips = strips_of(genotype)
        cells.append({"number": number, "index": i, "strips": strips, "facts": facts, "command": command})
    section.sheet.append({"title": "The best candidates", "cells": cells})


def search_sections(page: Page, run: Run) -> list[Section]:
    """The section on a run of search_benchmark.py: regret against queries, or the scores that a command gave."""
    section = Section("search", f"Search of the space {run.args.get('space', '')}".rstrip(), run.name)
    found = run.json("results.json")
    if isinstance(found, dict) and isinstance(found.get("runs"), dict) and found["runs"]:
        add_regret(page, section, found)
    elif queries := run.objects("genotypes.json"):
        add_queries(page, section, run, queries)
    else:
        section.verdict = "No search is done yet."
        section.missing.append("There is neither results.json with searches nor genotypes.json with what was queried.")
    return [section]


def add_regret(page: Page, section: Section, found: dict) -> None:
    """How far the best query so far, by the signal, is below the best of all cells, in percentage points."""
    optimum, queries = found["optimum"], found["queries"]
    methods = {}
    for name, runs in found["runs"].items():
        steps = [np.array(run["best"], float) for run in runs]  # (changes, 2): the query, the figure from then on
        at = [np.searchsorted(changes[:, 0], np.arange(1, queries + 1), side="right") - 1 for changes in steps]
        figure = np.stack([changes[place, 1] for changes, place in zip(steps, at, strict=True)])
        methods[name] = 100 * (optimum - figure)
    drawn = figures.regret(methods, "regret (percentage points)")
    caption = f"Mean over repeats, and one standard deviation; the best of all cells has {100 * optimum:.3f} %."
    section.figures.append(page.figure(drawn, "Regret against queries", caption))
    section.number("best of all cells", optimum, 5)
    for name, values in methods.items():
        section.number(f"{name}: repeats", len(values))
        section.number(
            f"{name}: regret after {queries} queries, mean of percentage points", float(values[:, -1].mean())
        )
    last = {name: values[:, -1].mean() for name, values in methods.items()}
    best = min(last, key=last.get)
    section.verdict = f"After {queries} queries {best} has the lowest mean regret, {last[best]:.3f} percentage points."


def add_queries(page: Page, section: Section, run: Run, queries: list[dict]) -> None:
    """The score of the best query so far, and the 12 best cells."""
    in_order = sorted(queries, key=lambda entry: entry["query"])
    scores = [entry["score"] for entry in in_order]
    steps = [entry["query"] for entry in in_order]
    lines = {"best so far": (steps, np.maximum.accumulate(scores).tolist()), "query": (steps, scores)}
    section.figures.append(page.figure(figures.curves(lines, "score", "query"), "Scores", "By the command of the run."))
    section.number("queries", len(queries))
    section.number("best score", max(scores), 4)
    section.verdict = f"The best of {len(queries)} queries has the score {max(scores):.4f}."
    cells = []
    for i, entry in enumerate(queries[:12]):
        genotype = known_cell(entry)
        facts = [f"score {entry['score']:.4f}, query {entry['query']}"]
        number = page.cell(f"query {entry['query']}: score {entry['score']:.4f}", genotype)
        arch = shown(f"{run.folder}/genotypes.json:{i}")
        cell = {"number": number, "index": i, "strips": strips_of(genotype), "facts": facts}
        cells.append(cell | {"command": f"python visualize.py --arch {arch}"})
    section.sheet.append({"title": "The best queries", "cells": cells})
