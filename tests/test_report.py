"""report.py: what the page says is what the files hold, whatever the folders hold; and it works in a browser."""

import argparse
import html
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import generate_archs
import report
import train_cifar
from build_nas_dataset import build_nas_dataset
from build_nas_dataset.candidates import rank_correlations
from build_nas_dataset.objectives import objectives_of
from build_nas_dataset.records import read_records
from build_nas_dataset.scoring import settings_of
from build_nas_dataset.statistics import tau
from generation.figures import heat_map, in_view, new_axes, pareto_front, svg
from generation.pictures import show_confusions, show_nas_dataset, show_samples
from generation.report.cells import estimates, nearest
from generation.report.nas_dataset import held_out_quantiles
from generation.report.parts import Page, pack
from generation.report.runs import name_apart, read_run
from generation.report.trained import read_predictions
from genotypes import GENOTYPES, Genotype
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.files import write_json
from plumbing.run_folder import RunLog
from tests.browser import Browser
from tests.small_training import ROOT, refused, white_images
from tests.test_visualize import random_cell
from training.cifar import write_predictions

DATA = ROOT / "data"
RECORDS = 200  # of the NAS dataset of these tests


def write_run(folder: Path, args: dict, lines: tuple = (), **files) -> Path:
    """A run folder. lines: of metrics.jsonl. files: name without .json -> content."""
    folder.mkdir(parents=True)
    versions = {"python": "3.12", "torch": "2.99"}
    config = {"args": args, "command": "python script.py --flag 'a b'", "versions": versions, "device": "abacus"}
    write_json(folder / "config.json", config)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


GAN_ARGS = {"n_critic": 1, "n_epochs": 3, "warmup_epochs": 1, "objectives": ["accuracy"], "seed": 1997,
            "n_perf_classes": 3}  # fmt: skip


def small_generator(folder: Path) -> None:
    """nasdata.jsonl, the first records of the shipped NAS dataset, and the shipped generator as if trained on them."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nasdata.jsonl"
    path.write_text("".join((DATA / "nasdata.jsonl").read_text().splitlines(keepends=True)[: RECORDS + 1]))
    state = load_checkpoint(DATA / "generator.pt", "gan")
    state["objectives"] = [o.to_dict() for o in objectives_of(read_records(path), {"accuracy": 3})]
    state["args"] = {"nasbench_data": str(path)}
    save_checkpoint(folder / "generator.pt", "gan", state)
    page = Page()
    predicted, true = held_out_quantiles(page.generator(folder / "generator.pt"), page.dataset(path), GAN_ARGS["seed"])
    save_checkpoint(folder / "generator.pt", "gan", state | {"predictor_tau": [tau(predicted[:, 0], true[:, 0])]})


def gan_run(folder: Path, checkpoint: bool = True) -> Path:
    quality = {"validity": 0.991, "uniqueness": 1.0, "novelty": 0.876, "vertices": 7.0, "density": 0.7}
    lines = [{"step": 1, "nll": 42.75, "seconds": 60.0}, {"step": 2, "nll": 41.5, "reward": 0.71, "seconds": 61.5},
             {"step": 3, "nll": 40.25, "reward": 0.74, "divergence": 0.31, "seconds": 62.0, **quality,
              "controllability_accuracy": 0.8125}]  # fmt: skip
    small_generator(folder.parent)
    write_run(folder, {**GAN_ARGS, "nasbench_data": str(folder.parent / "nasdata.jsonl")}, lines)
    if checkpoint:
        shutil.copy(folder.parent / "generator.pt", folder / "generator.pt")
    names = sorted(GENOTYPES)
    for epoch in (1, 3):
        entries = [{**GENOTYPES[name].to_dict(), "labels": [i % 3], "index": i} for i, name in enumerate(names)]
        write_json(folder / "samples" / f"epoch-{epoch:04d}.json", entries)
    return folder


def cifar_run(folder: Path, **args) -> Path:
    args = {"voting": "hard", "arch": "NAG_HIGH_ACC", "dataset": "cifar10", "epochs": 2, **args}
    lines = [{"step": i, "loss": 1 / i, "train_accuracy": 0.4 * i, "lr": 0.1, "seconds": 9.5} for i in (1, 2)]
    result = {"genotype": GENOTYPES["NAG_HIGH_ACC"].to_dict(), "params": 4_274_000, "macs": 681_200_000,
              "test_accuracy": 0.75, "test_error": 0.25, "seconds": 3700.0}  # fmt: skip
    write_run(folder, args, lines, result=result)
    labels, predicted = np.array([0, 1, 1, 0]), np.array([0, 1, 0, 1])
    arrays = {"labels": labels, "predicted": predicted, "probability": np.array([0.9, 0.8, 0.7, 0.95], np.float32)}
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 8, 8), np.uint8)
    np.savez(folder / "predictions.npz", **arrays, classes=["cat", "<b>dog"], worst=[3, 2], worst_images=images)
    return folder


def eval_run(folder: Path) -> Path:
    records = read_records(folder.parent / "nasdata.jsonl")[:5]
    results = []
    for i, record in enumerate(records):
        measured = [{"epochs": e, "held_out_accuracy": 0.5 + 0.01 * e - 0.03 * i, "loss": 1.0} for e in (1, 3)]
        training = {"epochs": 3, "params": record.params, "loss": 1.0, "rounds": measured}
        results.append({**record.to_dict(), "held_out_accuracy": 0.53 - 0.03 * i, "training": training})
    args = {"halving": True, "layers": 2, "optimizer": "adabelief", "lr_max": 0.002, "l2_reg": 5e-4, "batch_size": 64}
    args |= {"dataset": "folder", "data": "my photos", "epochs": 3, "schedule_epochs": 30, "amp": "auto"}
    return write_run(folder, args, results=results, best=results[0])


def imagenet_run(folder: Path) -> Path:
    """A run of train_imagenet.py: its accuracies are those of predictions.npz of cifar_run."""
    cifar = cifar_run(folder.parent / f"{folder.name}-cifar")
    args = {
        "select_on_val": False,
        "arch": "NAG_HIGH_ACC",
        "optimizer": "sgd",
        "lr": 0.1,
        "batch_size": 256,
        "epochs": 2,
    }
    lines = [{"step": i, "loss": 1 / i, "top1": 0.3 * i, "top5": 0.4 * i, "seconds": 9.5} for i in (1, 2)]
    best = {"epoch": 1, "test": {"top1": 0.75, "top5": 1.0, "images": 4}}
    result = {"params": 4_971_763, "test": {"top1": 0.5, "top5": 1.0, "images": 4}, "best": best}
    write_run(folder, args, lines, result=result)
    shutil.copy(cifar / "predictions.npz", folder)
    (folder / "best.pt").touch()
    return folder


def nas_run(folder: Path) -> Path:
    write_run(folder, {"scorings": 2, "epochs": 2}, [{"step": 1, "loss": 2.0, "train_accuracy": 0.2}])
    lines = (DATA / "nasdata.jsonl").read_text().splitlines()[:41]
    (folder / "nasdata.jsonl").write_text("\n".join(lines) + "\n")
    scores = torch.tensor(np.random.default_rng(0).random((2, 40)), dtype=torch.float32)
    save_checkpoint(folder / "checkpoint.pt", "supernet", {"scores": scores})
    return folder


def search_run(folder: Path) -> Path:
    """Two methods, two repeats: what the best query has after the queries at which that changes."""
    runs = {"random": [{"seed": 1, "best": [[1, 0.5], [7, 0.7]]}, {"seed": 2, "best": [[1, 0.6]]}],
            "nag": [{"seed": 1, "best": [[1, 0.5], [3, 0.9]]}, {"seed": 2, "best": [[1, 0.6], [20, 0.8]]}]}  # fmt: skip
    results = {"queries": 20, "optimum": 0.95, "runs": runs}
    return write_run(folder, {"queries": 20, "space": "nasbench201"}, results=results)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run of every kind, and page.html about all of them; cells are generated by the shipped generator."""
    folder = tmp_path_factory.mktemp("report")
    small_generator(folder)
    flags = ["--num_archs", "15", "--evaluate", "--device", "cpu", "--checkpoint", folder / "generator.pt"]
    flags += ["--output_dir", folder / "cells"]
    generate_archs.main(generate_archs.parse_args(list(map(str, flags))))
    makers = {"gan": gan_run, "cifar": cifar_run, "eval": eval_run, "nas": nas_run, "search": search_run}
    makers["imagenet"] = imagenet_run
    runs = [folder / "cells", *(make(folder / name) for name, make in makers.items())]
    write(folder / "page.html", *runs)
    return folder


def write(page: Path, *runs: Path) -> str:
    """The text of the page about the runs."""
    report.main(report.parse_args([*map(str, runs), "--out", str(page)]))
    return page.read_text()


def numbers_of(text: str, section: str) -> dict[str, float]:
    """Name -> number, of the tables in the sections of a kind."""
    found = {}
    for part in re.findall(rf'<section [^>]*data-kind="{section}".*?</section>', text, flags=re.DOTALL):
        rows = re.findall(r'<th scope="row">([^<]*)</th><td><data value="([^"]*)">', part)
        found |= {html.unescape(name): float(value) for name, value in rows}
    return found


def test_the_page_has_every_section_and_needs_no_network(folder):
    text = (folder / "page.html").read_text()
    kinds = re.findall(r'data-kind="(\w+)"', text)
    in_order = "nas_dataset gan generate_archs eval_archs train_imagenet train_cifar search".split()
    assert set(kinds) == {*in_order} and kinds == sorted(kinds, key=in_order.index)
    assert len(text.encode()) < 5 * 10**6
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, not addresses
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= allowed
    assert all(uri.startswith(("data:", "#")) for uri in re.findall(r'(?:src|href)="([^"]*)"', text))
    assert "mathdefault" not in text and "train_imagenet.py</span> <span" in text and "/best.pt" in text
    assert "Next:" in text and "python train_cifar.py" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_numbers_on_the_page_equal_those_in_the_files(folder):
    text = (folder / "page.html").read_text()
    evaluation = json.loads((folder / "cells" / "evaluation.json").read_text())
    numbers = numbers_of(text, "generate_archs")
    for title in ("generated cells", "random cells"):
        for name in ("drawn", "validity", "uniqueness", "novelty"):
            assert numbers[f"{title}: {name}"] == evaluation[title][name]
        entry = evaluation[title]["accuracy"]
        assert numbers[f"{title}: controllability of accuracy"] == entry["controllability"]
        assert numbers[f"{title}: controllability of accuracy, low end of the interval"] == entry["interval"][0]
        for count in np.ravel(entry["asked_by_obtained"]):
            assert f">{count}</text>" in text
    last = json.loads((folder / "gan" / "metrics.jsonl").read_text().splitlines()[-1])
    numbers = numbers_of(text, "gan")
    for name in ("nll", "reward", "divergence", "validity", "uniqueness", "novelty"):
        assert numbers[f"{name}, last"] == last[name]
    assert numbers["controllability of accuracy, last"] == last["controllability_accuracy"]
    numbers = numbers_of(text, "eval_archs")
    expected = rank_correlations(json.loads((folder / "eval" / "results.json").read_text()))
    for name, value in expected.items():
        assert numbers[f"Kendall's tau with {name}"] == value["tau"]
        assert numbers[f"Kendall's tau with {name}, high end of the interval"] == value["interval"][1]
    numbers = numbers_of(text, "train_cifar")
    assert numbers["test error"] == 0.25 and numbers["published test error"] == 0.0273
    numbers = numbers_of(text, "train_imagenet")
    assert (numbers["test accuracy"], numbers["test accuracy of the best epoch, best.pt"]) == (0.5, 0.75)
    for kind in ("train_cifar", "train_imagenet"):
        (section,) = re.findall(rf'<section [^>]*data-kind="{kind}".*?</section>', text, flags=re.DOTALL)
        assert "2 of 4 test images are wrong" in section and section.count("<img src=") == 2
    numbers = numbers_of(text, "search")
    assert numbers["nag: regret after 20 queries, mean of percentage points"] == pytest.approx((5 + 15) / 2)
    assert numbers["random: regret after 20 queries, mean of percentage points"] == pytest.approx((25 + 35) / 2)


def test_the_nas_dataset_is_told_as_it_is(folder):
    text = write(folder / "nas.html", folder / "nasdata.jsonl")
    numbers, records = numbers_of(text, "nas_dataset"), read_records(folder / "nasdata.jsonl")
    accuracy = np.array([record.accuracy for record in records])
    assert numbers["cells"] == len(records)
    assert numbers["accuracy, highest"] == accuracy.max()
    assert numbers["accuracy, standard deviation"] == pytest.approx(accuracy.std(ddof=1))
    assert numbers["Kendall's tau of accuracy with parameters"] == tau(accuracy, [r.params for r in records])
    header = json.loads((DATA / "nasdata.jsonl").open().readline())
    assert numbers["Kendall's tau of two scorings"] == header["summary"]["repeatability_tau"][0]
    assert numbers_of((folder / "page.html").read_text(), "gan")[
        "predictor of accuracy, Kendall's tau on held-out cells"
    ]


def test_a_search_scored_by_a_command_is_told(tmp_path):
    queries = [{**GENOTYPES[name].to_dict(), "score": score, "query": query}
               for name, score, query in (("NAG_ENSEMBLE_A", 0.75, 2), ("NAG_ENSEMBLE_C", 0.5, 1))]  # fmt: skip
    run = write_run(tmp_path / "run", {"queries": 2, "evaluate_with": "command"}, genotypes=queries)
    text = write(tmp_path / "page.html", run)
    assert "The best of 2 queries has the score 0.7500" in text
    assert numbers_of(text, "search") == {"queries": 2, "best score": 0.75}


def words_of(page: Path) -> str:
    """The text of a page without its markup."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page.read_text())).split())


def test_commands_train_the_same_network_on_the_same_images_by_the_same_optimizer(folder, tmp_path):
    words = words_of(folder / "page.html")
    flags = "--dataset folder --data 'my photos' --layers 2 --optimizer adabelief --lr_max 0.002 "
    flags += "--batch_size 64 --epochs 30"
    for arch in ("best.json", "results.json:1"):
        command = f"python train_cifar.py --arch {folder}/eval/{arch} {flags}"
        assert command in words
        found = train_cifar.parse_args(shlex.split(command)[2:])
        assert (found.optimizer, found.lr_max, found.batch_size, found.epochs) == ("adabelief", 0.002, 64, 30)
        assert (found.dataset, found.data, found.layers) == ("folder", "my photos", 2)
    flags = "--dataset folder --data another --image_size 16 --skip_bad"  # the file does not hold the folder
    settings = settings_of(build_nas_dataset.parse_args(flags.split()))
    weights = {"supernet": {}, "supernet_config": {}, "settings": settings}
    save_checkpoint(tmp_path / "supernet.pt", "supernet weights", weights)
    entries = json.loads((folder / "cells" / "genotypes.json").read_text())[:2]
    for args, expected in (
        ({"supernet": str(tmp_path / "supernet.pt"), "data": "d", "layers": 3},
         "train_cifar.py --arch ARCH --layers 3 --dataset folder --data d --image_size 16 --skip_bad"),
        ({"num_classes": 100}, "train_cifar.py --arch ARCH --dataset cifar100"),
        ({"limits_for": "imagenet", "channels": 40}, "train_imagenet.py --arch ARCH --channels 40"),
    ):  # fmt: skip
        run = write_run(tmp_path / str(len(args)) / expected[6:9], {"max_draws": 9, **args}, genotypes=entries)
        write(tmp_path / "page.html", run)
        assert expected.replace("ARCH", f"{run}/genotypes.json:0") in words_of(tmp_path / "page.html")
    gone = write_run(tmp_path / "gone", {"max_draws": 9, "supernet": "gone.pt"}, genotypes=entries)
    write(tmp_path / "page.html", gone)
    assert "the commands do not name its images" in words_of(tmp_path / "page.html")


def test_head_says_command_versions_device_and_duration(folder):
    words = words_of(folder / "page.html")
    for expected in (
        "python script.py --flag 'a b'", "torch 2.99", "abacus", "3 min 4 s", "commit not recorded",
        "0.81 of the cells drawn have the accuracy class asked for (chance 0.33)",
        "training adabelief, learning rate 0.002, batch 64, weight decay 0.0005, 3 epochs, schedule of 30 epochs",
        "training sgd, learning rate 0.1, batch 256, 2 epochs", "published are 27.20% after 250 epochs",
    ):  # fmt: skip
        assert expected in words
    assert report.duration(3700.0) == "1 h 1 min" and report.duration(7.26) == "7.3 s"


def test_what_files_hold_cannot_become_markup(folder, tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    text = write(tmp_path / "page.html", cifar_run(tmp_path / evil, arch=evil))
    assert "<img src=x" not in text and "<b>dog" not in text
    assert html.escape(evil, quote=False) in text


def test_an_unfinished_run_and_one_of_another_version_say_what_is_missing(tmp_path):
    gan = gan_run(tmp_path / "gan", checkpoint=False)
    (gan / "metrics.jsonl").write_text('{"step": 1, "nll": 42.75}\n{"step": 2, "nl')
    text = write(tmp_path / "page.html", gan)
    assert "not finished: 1 of 3 epochs" in text and 'gan.py</span> <span class="w">--resume' in text
    assert "generator.pt and checkpoint.pt are missing" in text
    state = torch.load(tmp_path / "generator.pt", weights_only=True)
    torch.save({**state, "version": 1}, gan / "generator.pt")
    text = write(tmp_path / "page.html", gan)
    assert "has format version 1, this code reads" in text
    cifar = cifar_run(tmp_path / "cifar")
    (cifar / "result.json").unlink()
    (cifar / "predictions.npz").write_bytes(b"PK")
    text = write(tmp_path / "page.html", cifar)
    assert "result.json is missing" in text and "predictions.npz cannot be read" in text
    (cifar / "config.json").write_text("{")
    nas = write_run(tmp_path / "nas", {"scorings": 2, "epochs": 2})
    cells = write_run(tmp_path / "cells", {"max_draws": 9, "checkpoint": "gone.pt"}, genotypes=[])
    text = write(tmp_path / "page.html", nas, cells, write_run(tmp_path / "e", {"halving": 0}),
                 write_run(tmp_path / "s", {"queries": 1}, results=[]),
                 write_run(tmp_path / "odd", {"halving": 0}, results=[{"training": {"rounds": 3}}]))  # fmt: skip
    for sentence in ("nasdata.jsonl is missing", "no such checkpoint: gone.pt", "results.json is missing",
                     "neither results.json with searches", "not as this version writes them"):  # fmt: skip
        assert sentence in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [read_run(cifar_run(tmp_path / parent / "run")) for parent in ("a", "b")]
    name_apart(runs)
    assert [run.name for run in runs] == ["a/run", "b/run"]
    text = write(tmp_path / "page.html", tmp_path / "a" / "run", tmp_path / "b" / "run")
    assert 'class="run-name">a/run' in text and 'class="run-name">b/run' in text


def test_bad_input_is_one_line_and_nothing_is_written(tmp_path, capsys):
    run, empty = cifar_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    write_json(tmp_path / "foreign" / "config.json", {"args": {"something": 1}})
    out = tmp_path / "page.html"
    for argv, words in (
        ([empty], "is no run folder"),
        ([tmp_path / "foreign"], "is no run folder"),
        ([tmp_path / "gone"], "no such run folder"),
        ([run, f"{run}/../run"], "is given twice"),
        ([run, "--out", empty], "--out: expected a file"),
        ([run, "--out", run / "result.json" / "page.html"], "--out: expected a folder"),
    ):
        argv = argv if "--out" in argv else [*argv, "--out", out]
        assert words in refused(capsys, report, argv)
    assert not out.exists()


# ------------------------------------------------------------------------------------------------- figures, parts


def test_pareto_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    cost, value = rng.integers(0, 12, 60), rng.integers(0, 12, 60)
    points = list(zip(cost.tolist(), value.tolist(), strict=True))
    beaten = [any((c <= x and v > y) or (c < x and v >= y) for c, v in points) for x, y in points]
    front = pareto_front(cost, value)
    found = {(cost[i], value[i]) for i in front}
    assert found == {(cost[i], value[i]) for i in range(60) if not beaten[i]}
    assert list(cost[front]) == sorted(cost[front])
    assert len(pareto_front([], [])) == 0


def test_points_lie_where_matplotlib_draws_them():
    figure, axes = new_axes("x", "y")
    axes.plot([1, 2, 4], [10, 30, 20], "o", gid="points")
    axes.set(xlim=(0, 3), ylim=(0, 40))
    text = svg(figure, "f")
    at = in_view(figure, [1, 2, 4], [10, 30, 20])
    drawn = re.findall(
        r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill: var\(--c0|<use [^>]*x="([\d.]+)" y="([\d.]+)"', text
    )
    places = np.array([[float(v) for v in row if v] for row in drawn])
    for point in at[:2]:
        assert np.abs(places - point).max(1).min() < 0.1
    assert np.isnan(at[2]).all()  # outside the axes
    assert 'viewBox="0 0' in text and not re.search(r"<svg[^>]* (width|height)=", text)


def test_figures_take_the_colours_of_the_page_and_ids_of_their_own():
    first, second = (svg(heat_map(np.eye(3, dtype=int), "x", "y", ["a<b", "$b$", "c"]), name) for name in "fg")
    assert "var(--ink" in first and "a&lt;b" in first and "$b$" in first
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (first, second)]
    assert not ids[0] & ids[1]
    for text, own in zip((first, second), ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= own


def test_the_nearest_real_cell_of_a_real_one_is_itself(folder):
    records = [record.genotype for record in read_records(folder / "nasdata.jsonl")]
    chosen = [records[i].canonical() for i in (3, 77, 150)]
    found = nearest(chosen, records)
    assert [distance for _, distance in found] == [0, 0, 0]
    assert [records[place].canonical() for place, _ in found] == chosen
    other = GENOTYPES["NAG_ENSEMBLE_B"]  # one op more, and 3 edges for 1
    assert nearest([other], [Genotype(other.reduction, other.reduction)]) == [(0, 1 + 3 + 1)]


def test_the_confusions_and_worst_images_are_those_of_the_network(tmp_path):
    class Chooses(torch.nn.Module):
        """Gives image i the class of `choice` with a sureness of its own."""

        place = 0

        def forward(self, x):
            rows = range(self.place, self.place + len(x))
            self.place += len(x)
            logits = torch.zeros(len(x), 4)
            for row, i in enumerate(rows):
                logits[row, [0, 1, 3, 2][i]] = 1.0 + i
            return logits, None

    images, args = white_images(4), type("Args", (), {"eval_batch_size": 3, "amp": "off"})
    images.images[2] = 7
    write_predictions(tmp_path / "p.npz", Chooses(), images, args)
    found = read_predictions(tmp_path / "p.npz")
    assert found["labels"].tolist() == [0, 1, 2, 3] and found["predicted"].tolist() == [0, 1, 3, 2]
    assert found["worst"].tolist() == [3, 2]
    assert found["worst_images"].shape == (2, 3, 32, 32) and (found["worst_images"][1] == 7).all()
    assert found["probability"][3] == pytest.approx(np.exp(4) / (np.exp(4) + 3))
    np.savez(tmp_path / "bad.npz", **(found | {"labels": np.array([0, 1, 2, 9])}))
    with pytest.raises(ValueError, match="classes that it does not list"):
        read_predictions(tmp_path / "bad.npz")


def test_tensorboard_has_the_figures_and_the_hyperparameters(folder, tmp_path):
    args = argparse.Namespace(lr=0.1, objectives=("accuracy",), resume=None)
    log = RunLog(tmp_path / "run", args, torch.device("cpu"))
    records = read_records(folder / "nasdata.jsonl")
    show_nas_dataset(log, records, objectives_of(records, {"accuracy": 3}))
    for epoch in (1, 3):
        show_samples(log, json.loads((folder / "gan" / "samples" / f"epoch-{epoch:04d}.json").read_text()), epoch)
    show_confusions(log, folder / "cifar" / "predictions.npz", 2)
    log.log(1, loss=0.5)
    log.log(2, loss=0.25)
    log.close()
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0})
    events.Reload()
    names = {"NAS dataset/accuracy", "NAS dataset/accuracy against params", "NAS dataset/accuracy against macs"}
    assert set(events.Tags()["images"]) == names | {"cells", "confusions"}
    assert [image.step for image in events.Images("cells")] == [1, 3]
    assert all(image.width > 300 and image.height > 300 for image in events.Images("cells"))
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"objectives" in start and b"('accuracy',)" in start


# ------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("width, dark", [(1280, False), (400, True)])
def test_the_page_opens_without_errors_and_without_scrolling_sideways(folder, browser, width, dark):
    browser.open(folder / "page.html", width, dark)
    assert browser.trouble() == []
    assert browser.js("document.querySelectorAll('main > section').length") >= 6
    assert browser.js("document.documentElement.scrollWidth") <= width
    background = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark
    smallest = browser.js("Math.min(...[...document.querySelectorAll('.plot text')].map(t => parseFloat("
                          "getComputedStyle(t).fontSize) * t.ownerSVGElement.getScreenCTM().a))")  # fmt: skip
    assert smallest >= 7


def test_pointing_names_a_cell_and_clicking_shows_it(folder, browser):
    browser.open(folder / "page.html", 1280)
    where = """(() => { const plot = document.querySelector('[data-points]'); plot.scrollIntoView({block: 'center'});
        const at = JSON.parse(plot.dataset.points).sort((a, b) => a[1] - b[1]).at(-1); // the lowest lies apart
        const p = new DOMPoint(at[0], at[1]).matrixTransform(plot.querySelector('svg').getScreenCTM());
        return [p.x, p.y, at[2], data.cells[at[2]][0]]; })()"""
    x, y, number, text = browser.js(where)
    browser.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")  # the scroll is over
    browser.mouse(x, y)
    assert browser.js("[tip.hidden, tip.textContent]") == [False, text]
    browser.mouse(x, y, click=True)
    assert browser.js("[full.open, document.getElementById('full-title').textContent]") == [True, text]
    drawn = browser.js("document.querySelectorAll('#full-cells path').length")
    records = read_records(folder / "nasdata.jsonl")
    packed = browser.js(f"data.cells[{number}].slice(2)")
    (record,) = [r for r in records if [pack(cell) for cell in r.genotype.cells] == packed and f" {r.id}:" in text]
    assert drawn == sum(cell.num_edges for cell in record.genotype.cells)
    browser.key("Escape")
    browser.js("full.close(); document.querySelector('[data-points]').focus()")
    browser.key("ArrowRight")
    assert browser.js("tip.hidden") is False
    browser.key("Enter")
    assert browser.js("full.open") is True
    browser.js("full.close(); document.querySelector('.sheet .cell').click()")
    assert browser.js("full.open && document.getElementById('full-title').textContent").startswith("generated cell")
    browser.js("full.close(); document.querySelector('.copy').click()")
    assert browser.trouble() == []


def test_the_browser_unpacks_cells_as_they_were_packed(folder, browser):
    browser.open(folder / "page.html", 1280)
    for seed in range(20):
        cell = random_cell(seed)
        found = browser.js(f"unpack({json.dumps(pack(cell))}, data.spaces[0])")
        assert found["labels"] == list(cell.ops)
        assert found["reads"] == [cell.predecessors(v) for v in range(cell.num_vertices)]


@pytest.mark.parametrize("dark", [False, True])
def test_axe_finds_nothing_serious(folder, browser, dark):
    """Needs the package axe-core-python, which holds axe.min.js."""
    axe = pytest.importorskip("axe_core_python")
    browser.open(folder / "page.html", 1280, dark)
    browser.js(Path(axe.__file__).with_name("axe.min.js").read_text() + "; 0")
    browser.js("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    for before in ("0", "document.querySelector('.sheet .cell').click()"):
        browser.js(before)
        script = "axe.run().then(r => [r.passes.length, r.violations.map(v => [v.impact, v.id, v.nodes[0].html])])"
        passes, found = browser.js(script)
        assert passes > 10
        assert [problem for problem in found if problem[0] in ("serious", "critical")] == []


def test_a_place_beyond_the_nas_dataset_is_shown_as_it_is():
    known = {"rank": 1, "predicted_quantiles": {"accuracy": 1.0}, "predicted_unclipped": {"accuracy": 1.0643}}
    assert estimates(known) == ["rank 1 among all candidates", "predicted place in accuracy 1.0643"]
