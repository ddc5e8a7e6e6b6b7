"""Drawings of cells: every format, faithful sources, and what a user sees when something is wrong."""

import random
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import visualize
from genotypes import GENOTYPES, NAG_SPACE, CellSpec, SearchSpace

ROOT = Path(__file__).parent.parent
MAGIC = {"svg": b"<?xml", "png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-"}


def run_script(*arguments, cwd):
    command = [sys.executable, str(ROOT / "visualize.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def random_cell(seed: int) -> CellSpec:
    """A valid cell of the NAG space, of any size and density."""
    rng = random.Random(seed)
    while True:
        size, density = rng.randint(3, 10), rng.random()
        ops = [*NAG_SPACE.inputs, *(rng.choice(NAG_SPACE.ops) for _ in range(size - 3)), NAG_SPACE.output]
        matrix = [[int(src < dst and dst > 1 and rng.random() < density) for dst in range(size)] for src in range(size)]
        if CellSpec(matrix, ops).is_valid:
            return CellSpec(matrix, ops)


def vertices_and_edges(source: str):
    """Vertex number -> label and the set of edges of a .gv file."""
    labels = {int(v): label for v, label in re.findall(r'^\s*(\d+) \[label="?([^"\s\\\]]+)', source, re.MULTILINE)}
    return labels, {(int(src), int(dst)) for src, dst in re.findall(r"(\d+) -> (\d+)", source)}


@pytest.mark.parametrize("format", visualize.FORMATS)
def test_script_writes_a_picture_and_a_source_for_each_cell(tmp_path, format):
    result = run_script("--arch", "NAG_HIGH_ACC", "--output_dir", "figures", "--format", format, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {"normal.gv", f"normal.{format}", "reduction.gv", f"reduction.{format}"}
    for name in ("normal", "reduction"):
        picture = (tmp_path / "figures" / f"{name}.{format}").read_bytes()
        assert picture.startswith(MAGIC[format])
        assert len(picture) > 1000


def test_default_folder_is_a_run_folder(tmp_path):
    result = run_script("--arch", "NAG_FEW_PARAMS", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("visualize-")
    assert (folder / "normal.svg").is_file()


@pytest.mark.parametrize("cell", [*GENOTYPES["NAG_HIGH_ACC"].cells, *GENOTYPES["NAG_ENSEMBLE_C"].cells])
def test_source_has_each_vertex_and_each_edge(tmp_path, cell):
    visualize.write_source(cell, tmp_path / "cell")
    labels, edges = vertices_and_edges((tmp_path / "cell.gv").read_text())
    assert labels == dict(enumerate(cell.ops))
    size = range(cell.num_vertices)
    assert edges == {(src, dst) for src in size for dst in size if cell.matrix[src][dst]}


def test_svg_shows_every_label_and_arrow(tmp_path):
    cell = GENOTYPES["NAG_HIGH_ACC"].normal
    svg = visualize.draw(cell, tmp_path / "cell").read_text()
    assert svg.count('class="edge"') == cell.num_edges
    for op in set(cell.ops):
        assert svg.count(f">{op}</text>") == cell.ops.count(op)


@pytest.mark.parametrize("seed", range(20))
def test_any_cell_can_be_drawn(tmp_path, seed):
    assert visualize.draw(random_cell(seed), tmp_path / "cell").stat().st_size > 1000


def test_drawing_is_reproducible(tmp_path):
    cell = GENOTYPES["NAG_ENSEMBLE_A"].normal
    for format in visualize.FORMATS:
        first, second = (visualize.draw(cell, tmp_path / name / "cell", format).read_bytes() for name in "ab")
        assert first == second


def test_suffix_is_added_not_replaced(tmp_path):
    picture = visualize.draw(GENOTYPES["NAG_FEW_PARAMS"].normal, tmp_path / "class0.best")
    assert picture == tmp_path / "class0.best.svg"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["class0.best.gv", "class0.best.svg"]


def test_only_an_unused_input_is_dashed(tmp_path):
    cell = CellSpec(
        [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]], ["input0", "input1", "identity", "output"]
    )
    lines = visualize.write_source(cell, tmp_path / "cell").read_text().splitlines()
    assert [line.split()[0] for line in lines if "dashed" in line] == ["1"]


def test_cell_is_drawn_pruned_but_an_invalid_one_whole(tmp_path):
    ops = ["input0", "input1", "identity", "maxpool3x3", "output"]
    dangling = [[0, 0, 1, 1, 0], [0] * 5, [0, 0, 0, 0, 1], [0] * 5, [0] * 5]
    labels, _ = vertices_and_edges(visualize.to_graphviz(CellSpec(dangling, ops), "cell").source)
    assert list(labels.values()) == ["input0", "input1", "identity", "output"]
    invalid = [[0, 0, 1, 1, 0], *([0] * 5 for _ in range(4))]
    labels, _ = vertices_and_edges(visualize.to_graphviz(CellSpec(invalid, ops), "cell").source)
    assert list(labels.values()) == ops


def test_other_spaces_can_be_drawn(tmp_path):
    """One input, labels with characters that DOT has to quote, more ops than colours."""
    space = SearchSpace("one", ("cell",), ("in",), tuple(f"conv-{i}x{i}|bn" for i in range(12)), 7)
    cell = CellSpec([[0, 1, 1], [0, 0, 1], [0, 0, 0]], ["in", "conv-11x11|bn", "output"], space)
    svg = visualize.draw(cell, tmp_path / "cell").read_text()
    assert ">cell k&#45;1</text>" in svg
    assert ">conv&#45;11x11|bn</text>" in svg


def test_a_system_graphviz_stands_in_for_the_package(tmp_path, monkeypatch):
    programs = {"dot": shutil.which("graphviz-pure", path=sysconfig.get_path("scripts"))}
    monkeypatch.setattr(shutil, "which", lambda name, path=None: programs.get(name))
    assert visualize.draw(GENOTYPES["NAG_FEW_PARAMS"].normal, tmp_path / "cell", "pdf").is_file()


def test_without_graphviz_the_sources_are_written_and_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(SystemExit) as exit:
        visualize.main(visualize.parse_args(["--arch", "NAG_HIGH_ACC", "--output_dir", str(tmp_path / "figures")]))
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install -r requirements.txt" in message
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["normal.gv", "reduction.gv"]


@pytest.mark.parametrize("arch", ["NAG_UNKNOWN", "broken.json"])
def test_bad_arch_gives_one_line_and_writes_nothing(tmp_path, arch):
    (tmp_path / "broken.json").write_text("{")
    result = run_script("--arch", arch, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"visualize\.py: error: --arch: .+\n", result.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = run_script("--arch", "NAG_HIGH_ACC", "--output_dir", "file/figures", cwd=tmp_path)
    assert result.returncode == 2
    assert re.fullmatch(r"visualize\.py: error: --output_dir: .+\n", result.stderr)
