"""benchmarks/tables.py: the tables of docs/results.md and docs/speed.md are those that the result files give.

Also the cards of the shipped files, and what the result files say of themselves.
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import sampling_seeds, table_rows, tables
from genotypes import GENOTYPES
from models.cost import genotype_cost

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / tables.PAGE).read_text(encoding="utf-8")
MARKED = tables.MARKED.findall(PAGE)


@pytest.fixture
def project(tmp_path):
    """A copy of the pages and of the files that they are made of."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for path in ("data/nasdata.jsonl", "benchmarks/results.json"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).symlink_to(ROOT / path)
    return tmp_path


def test_the_pages_are_what_the_result_files_give(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    assert len(MARKED) >= 8 and tables.faults(PAGE) == []


def test_a_number_that_was_changed_in_a_page_is_found_and_mended(project, capsys):
    page, speed = project / tables.PAGE, project / "docs" / "speed.md"
    page.write_text(page.read_text().replace("0.842 +- 0.004 | 0.101", "0.852 +- 0.004 | 0.101"))
    speed.write_text(speed.read_text() + "More.\n")
    changed = page.read_text()
    assert tables.main(["--check"], project) == 1 and page.read_text() == changed != PAGE
    assert capsys.readouterr().err.splitlines() == [
        f"{name} is not what the result files give; run `make tables`" for name in (tables.PAGE, "docs/speed.md")
    ]
    assert tables.main([], project) == 0 and page.read_text() == PAGE
    assert speed.read_text() == (ROOT / "docs" / "speed.md").read_text()
    assert not list(project.rglob("*.tmp"))
    out = capsys.readouterr().out
    assert "docs/results/sampling_seeds.json\n    python generate_archs_multiobj.py --num_archs 400 --evaluate" in out
    assert "docs/results/pilot_taus.json (not rebuilt: " in out


def test_a_number_that_is_changed_in_a_file_changes_that_cell_of_the_table(project):
    path = project / tables.FOLDER / "pilot_groups.json"
    data = json.loads(path.read_text())
    data["rows"][0][1] = 0.5
    path.write_text(json.dumps(data))
    tables.main([], project)
    assert (project / tables.PAGE).read_text() == PAGE.replace("| 0.98 | 0.0093", "| 0.50 | 0.0093")


def test_nothing_is_taken_for_a_table_where_an_end_is_missing(project, capsys):
    page = PAGE.replace("<!-- end -->\n", "", 1)
    (project / tables.PAGE).write_text(page)
    assert tables.main([], project) == 1 and (project / tables.PAGE).read_text() == page
    assert "a marker stands alone" in capsys.readouterr().err


def test_a_new_table_takes_a_caption_two_markers_and_a_file(project):
    number = len(MARKED) + 1
    new = f"\n**Table {number}.** New.\n\n<!-- table: new -->\n<!-- end -->\n"
    (project / tables.PAGE).write_text(PAGE + new)
    data = {"command": "python a.py", "commit": "0123456789", "hardware": "a CPU", "columns": ["", "n"]}
    (project / tables.FOLDER / "new.json").write_text(json.dumps(data | {"rows": [["a", 1800]]}))
    assert tables.main([], project) == 0
    table = "|  | n |\n|---|---|\n| a | 1,800 |\n"
    source = "From [docs/results/new.json](results/new.json), made by `python a.py`, commit 0123456, a CPU.\n"
    assert (project / tables.PAGE).read_text().endswith(f"<!-- table: new -->\n{table}\n{source}<!-- end -->\n")


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.8421, 3, "0.842"),
        (3600, 3, "3,600"),
        (None, 3, ""),
        ("not run", 3, "not run"),
        ({"mean": 0.84212, "std": 0.00438}, 3, "0.842 +- 0.004"),
        ({"mean": 0.99979, "std": 0.0002}, 3, "1.000"),
        ({"mean": 0.99979, "std": 0.0002}, 4, "0.9998 +- 0.0002"),
        ({"mean": 0.5}, 2, "0.50"),
        ({"value": 0.0093, "low": -0.0019, "high": 0.0164}, 4, "0.0093 (-0.0019 to 0.0164)"),
        ([0.11, {"mean": 0.069, "std": 0.01}], 3, "0.110, 0.069 +- 0.010"),
    ],
)
def test_values_are_shown_as_in_the_tables(value, digits, expected):
    assert table_rows.shown(value, digits) == expected


def test_a_row_of_the_ablation_is_named_by_what_its_training_was_given():
    found = {f"distance {name}": {"mean": 0.1, "std": 0.01} for name in ("vertices", "ops", "density")}
    for name in ("uniqueness", "params controllability", "all controllability"):
        found[name] = {"mean": 0.9, "std": 0.01}
    found["accuracy controllability"] = {"mean": 0.8, "std": 0.02}
    start = "python gan_multiobj.py --n_epochs 12 --warmup_epochs 8 --device cpu"
    trainings = [start, f"{start} --pool_size 0", f"{start} --warmup_epochs 0 --kl_weight 0"]
    runs = [{"training": one, "over sampling seeds": {"generated cells": found}} for one in trainings]
    _, first, *others = table_rows.ablation({"runs": runs})
    assert first == ["as it is", *["0.900 +- 0.010"] * 2, "0.800 +- 0.020", "0.900 +- 0.010", "0.100, 0.100, 0.100"]
    titles = ["likelihood of the NAS dataset's own cells (`--pool_size 0`)", "`--warmup_epochs 0 --kl_weight 0`"]
    assert [row[0] for row in others] == titles


TABLE = "**Table 1.** A caption.\n\n<!-- table: a -->\n| a |\n|---|\n<!-- end -->\n"


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (TABLE, None),
        (TABLE + "\n" + TABLE.replace("1.", "2."), None),
        (TABLE + "\n" + TABLE, r"captions have the numbers \[1, 1\]"),
        (TABLE + "| typed | by hand |\n|---|---|\n", r"a table is not between markers.*\| typed \| by hand \|"),
        (TABLE.replace("**", ""), r"table a: expected a caption"),
        (TABLE.replace("<!-- end -->\n", ""), "a marker stands alone"),
        (TABLE.replace("<!-- table: a -->\n", ""), "a marker stands alone"),
        (TABLE.replace("<!-- end -->\n", "") + "\n" + TABLE.replace("1.", "2."), "a marker stands alone"),
    ],
)
def test_tables_without_caption_marker_or_number_are_named(page, expected):
    found = tables.faults(page)
    assert (found == []) if expected is None else re.search(expected, "\n".join(found))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "docs/results/pilot_groups.json: No such file"),
        ("{", "docs/results/pilot_groups.json is not JSON"),
        ("{}", "table pilot_groups cannot be made of docs/results/pilot_groups.json: KeyError: 'columns'"),
        ('{"columns": ["a"], "rows": [[1, 2]], "command": "b"}', "table pilot_groups cannot be made of .*: ValueError"),
        ('{"columns": ["a"], "rows": [[1]]}', 'pilot_groups.json: expected the "command" that makes it'),
        (
            '{"columns": ["a"], "rows": [[1]], "rebuilt": false}',
            "table pilot_groups cannot .*: KeyError: 'why'",
        ),
    ],
)
def test_a_result_file_that_does_not_give_the_table_is_named_in_one_line(project, content, expected, capsys):
    path = project / tables.FOLDER / "pilot_groups.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        tables.main([], project)
    assert stopped.value.code == 2 and re.search(expected, capsys.readouterr().err.splitlines()[-1])
    assert (project / tables.PAGE).read_text() == PAGE


def test_the_script_runs_as_a_file_and_needs_no_package():
    command = [sys.executable, "benchmarks/tables.py", "--check"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    code = "import sys, benchmarks.tables; print(sorted({'torch', 'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout.strip() == b"[]"


@pytest.mark.parametrize("path", sorted((ROOT / tables.FOLDER).glob("*.json")), ids=lambda path: path.name)
def test_result_files_of_tables_say_how_they_came_about(path):
    data = json.loads(path.read_text())
    if not isinstance(data, dict) or "rows" not in data:
        return
    assert {"what", "command", "commit", "seeds", "hardware", "rebuilt"} <= data.keys()
    if not data["rebuilt"]:
        assert data["why"] and data["recorded"]


def test_counted_parameters_and_macs_of_the_published_cells_are_those_of_the_code():
    rows = {row[0]: row[2:4] for row in json.loads((ROOT / tables.FOLDER / "published.json").read_text())["rows"]}
    for name in ("NAG_HIGH_ACC", "NAG_FEW_PARAMS"):
        params, macs = genotype_cost(GENOTYPES[name])
        assert rows[f"{name}, CIFAR-10"] == [params, f"{macs / 1e6:.1f} M"]


def test_gathered_evaluations_are_what_the_runs_hold(tmp_path):
    data = json.loads((ROOT / tables.FOLDER / "sampling_seeds.json").read_text())
    folders = [tmp_path / str(i) for i in range(len(data["runs"]))]
    for folder, run in zip(folders, data["runs"], strict=True):
        folder.mkdir()
        args = {"checkpoint": str(ROOT / run["generator"])}
        config = {"args": args, "command": run["command"], "commit": "abc", "versions": {"torch": "2"}, "device": "d"}
        (folder / "config.json").write_text(json.dumps(config))
        found = {name: run[name] for name in ("sampling_seeds", "over sampling seeds")}
        found["random cells"] = {"drawn": run["cells_of_each_sampling_seed"]}
        (folder / "evaluation.json").write_text(json.dumps(found))
    sampling_seeds.main([*map(str, folders), "--out", str(tmp_path / "out.json")])
    made = json.loads((tmp_path / "out.json").read_text())
    assert made["commit"] == "abc" and made["rebuilt"] is True
    assert [set(run) for run in made["runs"]] == [set(run) for run in data["runs"]]
    trained = json.loads((ROOT / tables.FOLDER / "multiobj_seeds.json").read_text())
    rows, expected = (table_rows.controllability(found, trained) for found in (made, data))
    assert rows == [[cell.replace("`data/", f"`{ROOT}/data/") for cell in row] for row in expected]
    seeds = [data["runs"][0], *trained["runs"]]
    (title,) = [row for row in rows if f"over {len(seeds)} training seeds, of the means" in row[0]]
    both = [np.mean(run["over sampling seeds"]["generated cells"]["all controllability"]["values"]) for run in seeds]
    assert title[7] == f"{np.mean(both):.3f} +- {np.std(both, ddof=1):.3f}"


def test_a_command_in_a_result_file_names_no_folder_of_the_machine():
    command = (
        "python generate_archs.py --checkpoint /a/run --data=/b --cache_dir /c --seed 1 --output_dir=/d --evaluate"
    )
    assert sampling_seeds.anywhere(command) == (
        "python generate_archs.py --checkpoint RUN --data DIR --seed 1 --evaluate"
    )
    kept = "python generate_archs.py --checkpoint data/generator.pt --supernet data/supernet.pt"
    assert sampling_seeds.anywhere(kept) == kept


def test_runs_of_different_commits_are_not_gathered(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        config = {"args": {"checkpoint": str(ROOT / "data" / "generator.pt")}, "command": "c", "commit": name}
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"versions": {}, "device": "d"}))
        found = {"sampling_seeds": [1, 2], "random cells": {"drawn": 3}, "over sampling seeds": {}}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(found))
    with pytest.raises(SystemExit) as stopped:
        sampling_seeds.main([str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "out.json")])
    assert stopped.value.code == 2 and "is of another commit, version or device" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_the_cards_give_sizes_and_digests_of_the_shipped_files():
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \| `(\w{64})` \|$", (ROOT / "data" / "README.md").read_text(), re.M)
    shipped = {"nasdata.jsonl", "supernet.pt", "generator.pt", "generator_multiobj.pt"}
    assert {name for name, *_ in rows} == shipped and len(rows) == len(shipped)
    for name, size, digest in rows:
        content = (ROOT / "data" / name).read_bytes()
        assert (f"{len(content):,}", hashlib.sha256(content).hexdigest()) == (size, digest), name
