"""Searches: rivals and the loop on made-up tables, the benchmark script, and scores by a command."""

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from build_nas_dataset.random_cells import random_cell
from build_nas_dataset.tabular import Benchmark, Row
from generation import search_benchmark
from generation.search import Candidates, GeneratorSearch, PredictorSearch, SearchSettings, run_search
from generation.search_report import summary_of, tables_of
from generation.search_rivals import evolution, local_search, random_search
from generation.search_table import SearchTable, changed_cells
from genotypes import NASBENCH101, NASBENCH201, CellSpec, to_nasbench201
from tests.small_training import ROOT, refused, start
from tests.test_tabular import CHAIN, PAIR, STRINGS, payload, tfrecord

SMALL101 = replace(NASBENCH101, max_vertices=4)
SMALL = SearchSettings(
    start=8, batch=4, explore=1, predictor_size=8, predictor_steps=(6, 2), generator_size=8, graph_size=4,
    generator_steps=(4, 2), generator_batch=8, pool_size=128, draws=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def table():
    """NAS-Bench-201 with a made-up signal: the number of 3x3 convolutions on all paths, then a little of the row."""
    rows = []
    for i, ops in enumerate(itertools.product(NASBENCH201.ops, repeat=6)):
        labels = ("input", *ops, "output")
        function = CellSpec(NASBENCH201.wiring, labels, NASBENCH201).canonical()
        packed = bytes(map(NASBENCH201.token_id.__getitem__, labels))
        rows.append(Row(packed, str(function).count("conv_3x3") / 10 + i / 10**6, 0.5 + i / 10**5))
    return SearchTable(Benchmark(NASBENCH201, rows, 12, 200, "0" * 64))


def small_table(tmp_path):
    """A file of NAS-Bench-101 with 60 cells of up to four vertices."""
    rng, cells = np.random.default_rng(0), {}
    while len(cells) < 60:
        cell = random_cell(rng, NASBENCH101, 4)
        if cell.is_valid:
            cells.setdefault(cell.canonical(), None)
    path, records = tmp_path / "small.tfrecord", []
    for i, cell in enumerate(cells):
        text = "".join(str(entry) for row in cell.matrix for entry in row)
        valid = cell.ops.count("conv3x3-bn-relu") / 4 + i / 1000
        records.append(payload((f"{i:032x}", text, ",".join(cell.ops)), valid=valid, test=valid / 2))
    path.write_bytes(tfrecord(*records))
    return path


# ------------------------------------------------------------------------------------------------------ tables


def test_the_figure_is_the_truth_of_the_best_by_the_signal(table):
    rows = np.random.default_rng(0).permutation(len(table))[:60].tolist()
    slow = [table.truth[max(rows[:n], key=lambda row: table.signal[row])] for n in range(1, 61)]
    assert table.figure(rows).tolist() == slow


def test_neighbours_of_nasbench201_differ_in_one_op(table):
    ops = [genotype["cell"].ops for genotype in table.genotypes]
    for row in (0, 777, 15624):
        slow = [i for i in range(len(ops)) if sum(a != b for a, b in zip(ops[i], ops[row], strict=True)) == 1]
        assert table.neighbours(row) == slow
        assert len(slow) == 24


def test_changes_lead_from_any_small_cell_of_nasbench101_to_any_other_and_back():
    matrix = [[0, 1, 0], [0, 0, 1], [0, 0, 0]]
    start = CellSpec(matrix, ("input", "maxpool3x3", "output"), SMALL101).canonical()
    leads_to, new = {}, [start]
    while new:
        for cell in new:
            leads_to[cell] = {changed.canonical() for changed in changed_cells(cell)}
        new = set().union(*leads_to.values()) - leads_to.keys()
    assert len(leads_to) == 91
    for cell, found in leads_to.items():
        assert any(cell in leads_to[other] for other in found)


# ------------------------------------------------------------------------------------------------------ rivals


@pytest.mark.parametrize("search", [random_search, evolution, local_search])
def test_a_rival_queries_each_row_once_and_as_often_as_it_may(table, search):
    rows = search(table, 120, np.random.default_rng(1))
    assert len(rows) == len(set(rows)) == 120
    assert rows[0] == np.random.default_rng(1).permutation(len(table))[0]  # they begin alike
    assert search(table, 120, np.random.default_rng(1)) == rows


@pytest.mark.parametrize("search", [evolution, local_search])
def test_a_rival_climbs_to_the_best_row_that_random_search_misses(table, search):
    best = [table.figure(search(table, 300, np.random.default_rng(seed)))[-1] for seed in range(3)]
    at_random = [table.figure(random_search(table, 300, np.random.default_rng(seed)))[-1] for seed in range(3)]
    optimum = table.truth[table.signal.argmax()]
    assert best.count(optimum) >= 2
    assert at_random.count(optimum) == 0


def test_rivals_can_query_a_whole_table(tmp_path):
    table = search_benchmark.read_table("nasbench101", str(small_table(tmp_path)), None)
    for search in (random_search, evolution, local_search):
        assert sorted(search(table, 60, np.random.default_rng(0))) == list(range(60))


# ----------------------------------------------------------------------------------------- predictor and generator


@pytest.mark.parametrize("kind", ["nag", "predictor"])
def test_a_search_finds_better_cells_than_random_search(table, kind):
    settings = replace(
        SMALL, start=16, batch=8, predictor_size=16, predictor_steps=(60, 20), generator_steps=(20, 5), draws=256
    )
    if kind == "nag":
        search = GeneratorSearch(NASBENCH201, 8, 0, settings)
    else:
        search = PredictorSearch(NASBENCH201, 8, 0, settings, Candidates(table.genotypes[::7], 8))
    rows = np.random.default_rng(0).permutation(len(table))[:64].tolist()
    run_search(
        search,
        [table.genotypes[row] for row in rows[:16]],
        lambda found: [table.signal[table.row_of(g)] for g in found],
        64,
    )
    forms = [genotype.canonical() for genotype in search.genotypes[16:]]
    assert len(search.genotypes) == 64
    assert len(set(forms)) == len(forms)
    assert None not in forms
    assert np.median(search.scores[40:]) > np.median(table.signal[rows]) + 0.05


def test_a_search_goes_on_from_its_state_as_if_it_had_not_stopped(table):
    def score(found):
        return [float(table.signal[table.row_of(genotype)]) for genotype in found]

    start, whole = table.genotypes[100:108], GeneratorSearch(NASBENCH201, 8, 3, SMALL)
    run_search(whole, start, score, 20)
    first = GeneratorSearch(NASBENCH201, 8, 3, SMALL)
    run_search(first, start, score, 12)
    second = GeneratorSearch(NASBENCH201, 8, 3, SMALL)
    second.load_state_dict(first.state_dict())
    run_search(second, [], score, 20)
    assert list(map(to_nasbench201, second.genotypes)) == list(map(to_nasbench201, whole.genotypes))


# ---------------------------------------------------------------------------------------------------- benchmark


@pytest.fixture
def small_settings(monkeypatch):
    monkeypatch.setattr(search_benchmark, "SearchSettings", lambda: SMALL)


def test_the_benchmark_compares_goes_on_and_keeps_what_is_done(tmp_path, capsys, small_settings):
    path, out = small_table(tmp_path), tmp_path / "out"
    flags = ["--space", "nasbench101", "--table", path, "--queries", 24, "--output_dir", out]

    def start(*more):
        search_benchmark.main(search_benchmark.parse_args(list(map(str, [*flags, *more]))))
        return json.loads((out / "results.json").read_text())["runs"]

    start("--repeats", 2, "--methods", "random,nag")
    kept = (out / "nag.jsonl").read_text()
    (out / "nag.jsonl").write_text(kept + '{"seed": 2, "ro')  # a kill while a line was written
    runs = start("--repeats", 3)
    assert (out / "nag.jsonl").read_text().startswith(kept)
    assert {*runs} == {"nag", "random", "evolution-50-10", "evolution-20-10", "local", "predictor"}
    for of_method in runs.values():
        assert [run["seed"] for run in of_method] == [0, 1, 2]
        assert all(len(set(run["rows"])) == 24 for run in of_method)
        assert len({run["rows"][0] for run in of_method}) > 1
    for seed in range(3):
        assert len({runs[name][seed]["rows"][0] for name in runs}) == 1
    summary = json.loads((out / "summary.json").read_text())
    assert summary["methods"]["nag"]["at"]["24"]["mean"] == pytest.approx(
        100 * np.mean([r["best"][-1][1] for r in runs["nag"]])
    )
    assert "| nag (3 repeats) |" in capsys.readouterr().out
    assert (out / "regret.png").read_bytes().startswith(b"\x89PNG")

    assert "--queries: the run in" in refused(capsys, search_benchmark, [*flags[:4], "--queries", 25, *flags[6:]])
    for rows in ([1, 2], [*range(23), 60], [[1]] * 24, None):
        (out / "local.jsonl").write_text(json.dumps({"seed": 0, "rows": rows}) + "\n")
        assert "no search of 24 queries" in refused(capsys, search_benchmark, flags)
    assert "has 60 cells, got 61" in refused(capsys, search_benchmark, [*flags[:4], "--queries", 61])


@pytest.mark.slow
def test_several_processes_find_the_same_and_end_by_a_signal(tmp_path):
    flags = ["--space", "nasbench101", "--table", small_table(tmp_path), "--queries", 20, "--methods", "random,local"]
    for out, workers in (("a", 1), ("b", 2)):
        start(
            "-m",
            "generation.search_benchmark",
            *flags,
            "--output_dir",
            tmp_path / out,
            "--workers",
            workers,
            "--repeats",
            3,
        )
    for name in ("random.jsonl", "local.jsonl"):
        rows = [
            {line["seed"]: line["rows"] for line in map(json.loads, (tmp_path / out / name).read_text().splitlines())}
            for out in "ab"
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) == 3
    words = [sys.executable, "-m", "generation.search_benchmark", *flags, "--output_dir", tmp_path / "c"]
    with subprocess.Popen([*map(str, words), "--workers", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "c" / "random.jsonl").exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "ended by SIGINT" in errors
    assert 0 < len((tmp_path / "c" / "random.jsonl").read_text().splitlines()) < 200


def test_flags_of_the_benchmark_that_do_not_fit_are_refused(capsys, tmp_path):
    path = tmp_path / "table"
    path.write_bytes(tfrecord(payload(CHAIN), payload(PAIR)))
    for message, flags in {
        "--table: expected either": [],
        "--table: there are tables of nasbench101, nasbench201": ["--space", "nag", "--table", path],
        "--methods: unknown method 'best'": ["--table", path, "--methods", "nag,best"],
        "only after 4": ["--space", "nasbench101", "--table", path, "--epochs", 108],
        "--table: ": ["--table", tmp_path / "none.csv"],
        "there is no program 'no-such-program'": ["--evaluate_with", "no-such-program x"],
        "No closing quotation": ["--evaluate_with", "python 'x"],
    }.items():
        assert message in refused(capsys, search_benchmark, flags)


def test_the_summary_has_paired_differences():
    rng = np.random.default_rng(0)
    luck = rng.random((40, 100)) / 10  # of a repeat, the same for both
    summary = summary_of({"nag": 0.5 + luck, "random": 0.49 + luck}, {"nag": 1.0, "random": 2.0}, [50, 100])
    at = summary["nag_minus"]["random"]["100"]
    assert (at["mean"], at["low"], at["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert summary["methods"]["nag"]["at"]["50"]["std"] == pytest.approx(np.std(100 * luck[:, 49], ddof=1))
    assert "| random | +1.000 (+1.000 to +1.000) |" in tables_of(summary)
    assert len(STRINGS) == 15625


# --------------------------------------------------------------------------------------------------- a command

SCORER = """
import json, sys
genotypes = json.load(open(sys.argv[-2]))
json.dump([g["normal"]["ops"].count("seqconv3x3") for g in genotypes], open(sys.argv[-1], "w"))
"""


def test_a_command_scores_a_search_that_goes_on_after_a_stop(tmp_path, small_settings, capsys):
    def start(queries, out, scorer):
        words = ["--space", "nag", "--queries", queries, "--output_dir", out]
        words += ["--evaluate_with", f"{sys.executable} {scorer}"]
        search_benchmark.main(search_benchmark.parse_args(list(map(str, words))))

    scorer, failing = tmp_path / "scorer.py", tmp_path / "failing.py"
    scorer.write_text(SCORER)
    start(16, tmp_path / "whole", scorer)
    whole = json.loads((tmp_path / "whole" / "genotypes.json").read_text())
    assert len(whole) == 16
    assert [g["score"] for g in whole] == sorted((g["normal"]["ops"].count("seqconv3x3") for g in whole), reverse=True)

    failing.write_text(
        f"import os, sys\nif '0001' in sys.argv[-1] and not os.path.exists('{tmp_path}/go'): 1 / 0\n{SCORER}"
    )
    with pytest.raises(SystemExit):
        start(16, tmp_path / "stopped", failing)
    assert "ended with status 1: " in (message := capsys.readouterr().err)
    assert "ZeroDivisionError" in message
    (tmp_path / "go").touch()
    start(16, tmp_path / "stopped", failing)
    assert json.loads((tmp_path / "stopped" / "genotypes.json").read_text()) == whole


@pytest.mark.slow
def test_brief_scores_lead_a_search(tmp_path):
    from tests.small_training import TINY, make_images, start

    make_images(tmp_path / "images", {"dark": 60, "light": 190})
    flags = [*TINY, "--data", tmp_path / "images", "--epochs", 1, "--schedule_epochs", 1, "--holdout", 8]
    flags += ["--auxiliary_weight", 0]
    command = " ".join(map(str, [sys.executable, "-m", "build_nas_dataset.brief_scores", *flags]))
    words = ["--space", "nag", "--queries", 3, "--output_dir", tmp_path / "out", "--evaluate_with", command]
    start("-m", "generation.search_benchmark", *words)
    found = json.loads((tmp_path / "out" / "genotypes.json").read_text())
    assert len(found) == 3
    assert all(0 <= genotype["score"] <= 1 for genotype in found)
