"""Labels of other sources for a NAS dataset: brief stand-alone training, and a predictor of it. --labels brief, mixed.

    python -m build_nas_dataset --labels mixed --from data/nasdata.jsonl --brief_cells 300 --data DIR --output_dir RUN
    python -m build_nas_dataset ... --shard 0/4                       # one job of four, in any order; or torchrun

brief: some genotypes are trained by eval_archs.py, and the held-out accuracy becomes their accuracy; the others are
left out. mixed: the others get the accuracy that a predictor expects, which is trained on both at once: the supernet's
accuracy of all genotypes and the brief training's of some. Every record says its source, "brief" or "predictor", and
keeps the accuracies that there were as supernet_accuracy and brief_accuracy; the header describes the columns.

The same command with the same --output_dir goes on after a stop, and trains more genotypes with a larger --brief_cells.
Shard I of N trains every N-th genotype, in RUN/brief/shard-I-of-N; the shard that finishes last writes nasdata.jsonl.
"""

import argparse
import contextlib
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from build_nas_dataset.candidates import key_of, read_parts
from build_nas_dataset.flags import brief_flags
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, check_held_out, read_header, read_records, write_records
from build_nas_dataset.scoring import STAND_ALONE
from build_nas_dataset.shards import wait_for_folder
from genotypes import NAG_SPACE
from models.cost import genotype_cost
from models.graph import CellBatch
from models.predictor import train_predictor
from plumbing.checkpoint_files import load_checkpoint
from plumbing.files import from_json, write_json
from plumbing.run_folder import code_version, output_folder, refuse_used, versions, write_config
from plumbing.signals import signals
from training.cifar import load_parts
from training.images import check_classes
from utils import fail, shipped, shown, this_process, user_input

OF_THE_SUPERNET = ("settings", "training_images", "seconds", "summary", "versions")  # of a header, about its accuracies
OF_A_PLACE = set("archs num_archs data cache_dir output_dir resume device cuda_graphs checkpoint_minutes".split())
PREDICTOR_BATCH = 64  # genotypes of a step of the predictor's training


# ------------------------------------------------------------------------------------------------- brief training


def train_briefly(flags: Sequence[str], archs: Path, folder: Path) -> dict[str, float]:
    """Train the genotypes of a file by eval_archs.py in `folder`, or go on there. Returns scores, see brief_scores_of.

    It is a process of its own, which a signal to this one is passed on to, so that it saves what it has. Ends the
    script when it fails.
    """
    where = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else ["--output_dir", str(folder)]
    script = str(Path(__file__).with_name("eval_archs.py"))  # as a file it starts in any folder
    with signals.held():
        training = subprocess.Popen([sys.executable, script, *flags, "--archs", str(archs), "--num_archs", "0", *where])
        told = False
        while training.poll() is None:
            time.sleep(0.1)
            if signals.stop and not told:
                training.terminate()
                told = True
    if training.returncode:
        sys.exit(2 if training.returncode > 0 else 1)  # it has said why
    return brief_scores_of(read_parts(folder))


def brief_scores_of(results: dict[str, dict]) -> dict[str, float]:
    """Key of a genotype -> held-out accuracy after brief training; 0 where it diverged. results: of read_parts."""
    return {
        key: 0.0 if result["training"]["loss"] is None else result["held_out_accuracy"]
        for key, result in results.items()
    }


# --------------------------------------------------------------------------------------------- records and shards


def read_pool(args: argparse.Namespace) -> tuple[list[Record], dict]:
    """The records that are to be labelled, and their header: of --from, or random genotypes without an accuracy.

    Ends the script when they have such labels already, or a cell that is held out.
    """
    with user_input("--from"):
        if args.records:
            records, header = read_records(args.records, NAG_SPACE), read_header(args.records)
        else:
            pool = random_pool(args.pool_size, args.seed, NAG_SPACE, args.max_step)
            records = [Record(i, genotype, 0.0, *genotype_cost(genotype)) for i, genotype in enumerate(pool)]
            header = {"stand_alone": STAND_ALONE}
        for record in records:
            if taken := sorted({"brief_accuracy", "supernet_accuracy", "source"} & record.columns.keys()):
                what = f"{args.records}: record {record.id} has a {taken[0]} already"
                raise ValueError(f"{what}; expected a NAS dataset of --labels supernet")
    with user_input("--held_out_cells"):
        if args.held_out_cells:
            check_held_out(records, args.records or "the random pool", args.held_out_cells)
    return records, header


def chosen_records(records: list[Record], args: argparse.Namespace) -> list[Record]:
    """Those that are trained, in a random order that does not depend on how many they are. Raises ValueError."""
    if args.brief_cells > len(records):
        raise ValueError(f"expected at most the {len(records)} genotypes that there are, got {args.brief_cells}")
    order = np.random.default_rng(args.seed).permutation(len(records))
    return [records[i] for i in order[: args.brief_cells]]


def shard_folder(run: Path, index: int, count: int) -> Path:
    return run / "brief" / f"shard-{index}-of-{count}"


def shard_folders(run: Path, count: int) -> list[Path]:
    """Those that are there. Raises ValueError naming one of another number of shards."""
    folders = sorted((run / "brief").glob("shard-*-of-*"))
    for folder in folders:
        if not folder.name.endswith(f"-of-{count}"):
            raise ValueError(f"{folder} is one of another number of shards than {count}; go on with as many")
    return folders


def check_images(args: argparse.Namespace, classes: list[str] | None) -> None:
    """End the script when the images have other classes than those that the supernet's accuracies were measured on."""
    images, _ = load_parts(args, torch.device("cpu"))
    with user_input("--data"):
        if classes:
            check_classes(images, classes, args.records)


def read_shards(run: Path, count: int) -> tuple[dict[str, dict], dict]:
    """The results of all shards by key, and how the header describes them.

    Raises ValueError naming the shard that was trained on other images, with other flags or among another number.
    """
    results, first, seconds, commits = {}, None, 0.0, set()
    for folder in shard_folders(run, count):
        if not (folder / "checkpoint.pt").exists():
            continue
        state = load_checkpoint(folder, "candidates", ("args", "classes", "training_images", "held_out_checksum"))
        settings = {name: value for name, value in state["args"].items() if name not in OF_A_PLACE}
        data = {name: state[name] for name in ("classes", "training_images", "held_out_checksum")}
        first = first or (folder, settings, data)
        for what, own, others in (("flags", settings, first[1]), ("images", data, first[2])):
            if own != others:
                raise ValueError(f"{folder} was trained with other {what} than {first[0]}")
        found = read_parts(folder)
        results |= found
        seconds += sum(result["training"]["seconds"] for result in found.values())
        commits.add(from_json((folder / "config.json").read_text())["commit"])
    if first is None:
        return {}, {}
    about = {"source": "brief", **first[2], "epochs": first[1]["epochs"], "seeds": [first[1]["seed"]]}
    about |= {"commits": sorted(map(str, commits)), "settings": first[1], "seconds": round(seconds)}
    return results, about | {"versions": versions()}


# -------------------------------------------------------------------------------------------------------- labels


def predict_rest(records: list[Record], brief: dict[int, float], seed: int) -> tuple[list[float], dict[str, float]]:
    """The accuracy after brief training that is expected of every record, and Kendall's tau of the predictor.

    brief: place of a record -> its accuracy. One predictor learns two rankings at once, the supernet's of all records
    and the brief training's of some. It gives an order; the genotypes that were not trained, in this order, get
    accuracies that are spread as those of the trained ones. tau: on records held out, by the source of the ranking.
    """
    space, places = records[0].genotype.space, np.full((len(records), 2), np.nan)
    places[:, 0] = (rankdata([record.accuracy for record in records]) - 0.5) / len(records)
    trained = sorted(brief)
    accuracies = [brief[i] for i in trained]
    places[trained, 1] = (rankdata(accuracies) - 0.5) / len(trained)
    cells = tuple(CellBatch.encode([record.genotype[name] for record in records]) for name in space.cells)
    quantiles = torch.tensor(places, dtype=torch.float32)
    canonical = [record.genotype.canonical() for record in records]
    predictor, taus = train_predictor(cells, quantiles, canonical, PREDICTOR_BATCH, seed)
    expected = predictor.quantiles([record.genotype for record in records])[:, 1]
    rest = [i for i in range(len(records)) if i not in brief]
    ranks = (rankdata(expected[rest]) - 0.5) / max(len(rest), 1)
    values = dict(zip(rest, np.quantile(accuracies, ranks).tolist(), strict=True)) if rest else {}
    known = {name: round(tau, 4) for name, tau in zip(("supernet", "brief"), taus, strict=True) if not math.isnan(tau)}
    return [brief.get(i, values.get(i)) for i in range(len(records))], known


def labelled(
    records: list[Record], scores: dict[str, float], about: dict, args: argparse.Namespace
) -> tuple[list[Record], dict[str, dict]]:
    """The records with their labels, and the descriptions of the columns. scores: key of a genotype -> brief accuracy.

    about: how the brief accuracies came about.
    """
    brief = {i: scores[key] for i, record in enumerate(records) if (key := key_of(record.genotype)) in scores}
    columns = {"brief_accuracy": about}
    if args.labels == "mixed":
        accuracies, taus = predict_rest(records, brief, args.seed)
        counts = {"brief": len(brief), "predictor": len(records) - len(brief)}
        columns["accuracy"] = {"source": "mixed", "records": counts, "predictor_tau": taus, "seed": args.seed}
    else:
        accuracies = [brief.get(i) for i in range(len(records))]
        columns["accuracy"] = {"source": "brief"}
    found = []
    for i, (record, accuracy) in enumerate(zip(records, accuracies, strict=True)):
        if accuracy is None:
            continue
        others = {"source": "brief" if i in brief else "predictor"}
        others |= {"supernet_accuracy": record.accuracy} if args.records else {}
        others |= {"brief_accuracy": brief[i]} if i in brief else {}
        found.append(replace(record, accuracy=round(accuracy, 6), columns={**record.columns, **others}))
    return found, columns


def header_with(header: dict, columns: dict[str, dict]) -> dict:
    """The header of the labelled records. What it said of the supernet's accuracies now describes their new column."""
    classes = columns["brief_accuracy"]["classes"]
    about = {name: header[name] for name in OF_THE_SUPERNET if name in header}
    if about:
        columns = {"supernet_accuracy": {"source": "supernet", "classes": classes, **about}, **columns}
    kept = {name: value for name, value in header.items() if name not in {*OF_THE_SUPERNET, "columns"}}
    return {**kept, "classes": classes, "columns": columns, **code_version()}


def label(args: argparse.Namespace, device: torch.device) -> None:
    """Train this process's share of the genotypes; the last one writes nasdata.jsonl. Ends the script on bad input."""
    run, (index, count) = output_folder(args), args.shard or (0, 1)
    refuse_used(run, "checkpoint.pt")  # of a supernet
    if not (run / "brief").exists():
        refuse_used(run, "nasdata.jsonl")
    records, header = read_pool(args)
    with user_input("--brief_cells"):
        chosen = chosen_records(records, args)
    with user_input("--shard"):
        shard_folders(run, count)
        if count > len(chosen):
            raise ValueError(f"expected at most {len(chosen)} shards, one for each of --brief_cells, got {count}")
    flags, folder = brief_flags(args), shard_folder(run, index, count)
    main = this_process().rank == 0
    if main:
        check_images(args, header.get("classes"))
        write_json(folder / "cells.json", [record.genotype.to_dict() for record in chosen[index::count]])
        print(f"{len(chosen[index::count])} of {len(records)} genotypes are trained briefly: {folder}")
    try:
        train_briefly(flags, folder / "cells.json", folder)
    except SystemExit:
        if main and not (folder / "checkpoint.pt").exists():
            take_back(folder / "cells.json", run)
        raise
    if not main:
        return
    wait_for_folder(run, "--output_dir")
    with user_input("--output_dir"):
        results, about = read_shards(run, count)
    scores = brief_scores_of(results)
    wanted = [key_of(record.genotype) for record in chosen]
    if missing := sum(key not in scores for key in wanted):
        print(f"{len(wanted) - missing} of {len(wanted)} genotypes are trained; the last shard merges them")
        return
    found, columns = labelled(records, {key: scores[key] for key in wanted}, about, args)
    if len({record.accuracy for record in found}) < 2:
        fail("the brief training gives all genotypes the same accuracy; longer training may help")
    write_records(run / "nasdata.jsonl", found, header_with(header, columns))
    write_config(run, args, device)
    say_what_was_written(run / "nasdata.jsonl", found, columns["accuracy"])


def take_back(path: Path, run: Path) -> None:
    """Delete a file of a run in which no training began, and the folders left empty by it, up to that of the run."""
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # of a folder that is not empty: another shard works there
        for folder in (f for f in path.parents if f == run or run in f.parents):
            folder.rmdir()


def say_what_was_written(path: Path, records: list[Record], about: dict) -> None:
    """Print the end of a run."""
    accuracies = [record.accuracy for record in records]
    taus = ", ".join(f"{name} {value:.3f}" for name, value in about.get("predictor_tau", {}).items())
    print(f"accuracy {np.mean(accuracies):.4f} +- {np.std(accuracies, ddof=1):.4f}, by {about['source']} labels")
    if taus:
        print(f"predictor, Kendall tau on records that it was not trained on: {taus}")
    print(f"wrote {len(records)} records to {path}")
    print(f"next: python {shown(shipped('gan.py'))} --nasbench_data {shown(path)}")
