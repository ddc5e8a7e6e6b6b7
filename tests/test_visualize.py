"""Drawings of cells: every format, faithful sources, and what a user sees when something is wrong."""

import json
import random
import re
import shutil
import sysconfig
from pathlib import Path

import pytest

import visualize
from generation.strips import ascii_picture, codes_of, match, strip
from genotypes import GENOTYPES, NAG_SPACE, CellSpec, Genotype, SearchSpace
from tests.small_training import refused
from tests.starting import Done, start

ROOT = Path(__file__).parent.parent
MAGIC = {"svg": b"<?xml", "png": b"\x89PNG\r\n\x1a\n", "pdf": b"%PDF-"}


def run_script(*arguments, cwd) -> Done:
    return start(ROOT / "visualize.py", *arguments, cwd=cwd)


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
    edges = re.findall(r"(\d+) -> (\d+)(?! \[style=invis\])", source)
    return labels, {(int(src), int(dst)) for src, dst in edges}


@pytest.mark.parametrize("format", visualize.PICTURES)
def test_script_writes_a_picture_and_a_source_for_each_cell(tmp_path, format):
    result = run_script("--arch", "NAG_HIGH_ACC", "--output_dir", "figures", "--format", format, cwd=tmp_path)
    assert (result.status, result.err) == (0, "")
    written = {path.name for path in (tmp_path / "figures").iterdir()}
    assert written == {"normal.gv", f"normal.{format}", "reduction.gv", f"reduction.{format}"}
    for name in ("normal", "reduction"):
        picture = (tmp_path / "figures" / f"{name}.{format}").read_bytes()
        assert picture.startswith(MAGIC[format])
        assert len(picture) > 1000


def test_default_folder_is_a_run_folder(tmp_path):
    result = run_script("--arch", "NAG_FEW_PARAMS", cwd=tmp_path)
    assert result.status == 0, result.err
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
    for format in visualize.PICTURES:
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
def test_bad_arch_gives_one_line_and_writes_nothing(tmp_path, arch, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "error: --arch: " in refused(capsys, visualize, ["--arch", arch])
    assert [path.name for path in tmp_path.iterdir()] == ["broken.json"]


def test_a_folder_that_cannot_be_made_gives_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    flags = ["--arch", "NAG_HIGH_ACC", "--output_dir", tmp_path / "file" / "figures"]
    assert "error: --output_dir: " in refused(capsys, visualize, flags)


def drawn(tmp_path, *arguments) -> Path:
    """The folder of the pictures that visualize.py makes."""
    visualize.main(visualize.parse_args([*map(str, arguments), "--output_dir", str(tmp_path / "figures")]))
    return tmp_path / "figures"


def test_title_says_size_and_class_and_the_legend_has_every_op(tmp_path):
    entry = {**GENOTYPES["NAG_FEW_PARAMS"].to_dict(), "labels": [2], "params": 1_086_022, "macs": 190_000_000}
    (tmp_path / "cells.json").write_text(json.dumps([entry]))
    svg = (drawn(tmp_path, "--arch", tmp_path / "cells.json:0") / "normal.svg").read_text()
    assert "1.086 M parameters, 190.0 M MACs, class 2</text>" in svg
    for op in NAG_SPACE.ops:
        assert svg.count(f">{op}</text>") == 1 + GENOTYPES["NAG_FEW_PARAMS"].normal.ops.count(op)


@pytest.mark.parametrize("seed", range(3))
def test_inputs_keep_their_places(tmp_path, seed):
    """input0 is above input1, whatever the cell and also where two cells are compared."""
    cell = random_cell(seed)
    visualize.write_source(cell, tmp_path / "one")
    graph = visualize.compare_graph(cell, random_cell(seed + 10), "two", ("a", "b"))
    (tmp_path / "two.gv").write_text(graph.source)
    for name, inputs in (("one", 1), ("two", 2)):
        svg = visualize.render(tmp_path / f"{name}.gv", "svg").read_text()
        heights = {i: re.findall(rf'<text [^>]* y="([-.\d]+)"[^>]*>input{i}</text>', svg) for i in (0, 1)}
        assert len(heights[0]) == len(heights[1]) == inputs
        assert all(float(a) < float(b) for a, b in zip(*heights.values(), strict=True))


def test_compared_cells_mark_exactly_what_only_one_has():
    a, b = GENOTYPES["NAG_ENSEMBLE_B"].normal, GENOTYPES["NAG_ENSEMBLE_B"].reduction
    assert "#a3004f" not in visualize.compare_graph(a, a, "same", ("a", "a")).source
    source = visualize.compare_graph(a, b, "other", ("a", "b")).source  # seqconv3x3 is in both, avgpool3x3 in one
    marked = {line.split(" [")[0].strip() for line in source.splitlines() if "#a3004f" in line}
    assert marked == {"a3", "a0 -> a3", "a2 -> a3", "a3 -> a4", "b2 -> b3"}


def test_matching_finds_every_edge_in_a_relabelled_cell():
    cell = GENOTYPES["NAG_HIGH_ACC"].normal
    twin = cell.canonical()
    assert twin != cell
    pairs = match(cell, twin)
    assert len(pairs) == cell.num_vertices
    for dst in range(cell.num_vertices):
        assert all(twin.matrix[pairs[src]][pairs[dst]] for src in cell.predecessors(dst))


def test_ascii_shows_every_edge(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    visualize.main(visualize.parse_args(["--arch", "NAG_HIGH_ACC", "--format", "ascii"]))
    out = capsys.readouterr().out
    assert out.isascii() and "4.274 M parameters" in out
    assert list(tmp_path.iterdir()) == []
    for cell in GENOTYPES["NAG_HIGH_ACC"].cells:
        rows = ascii_picture(cell, "title").splitlines()[2:]
        found = [[mark == "o" for mark in row.split()[2:]] for row in rows]
        assert found == [[bool(cell.matrix[src][v]) for src in range(v)] for v in range(cell.num_vertices)]
        assert "\n".join(rows) in out


def test_a_cell_of_the_nas_dataset_and_the_best_of_a_run_can_be_drawn(tmp_path, capsys):
    nas_dataset = ROOT / "data" / "nasdata.jsonl"
    record = json.loads(nas_dataset.read_text().splitlines()[18])  # the header is the first line
    svg = (drawn(tmp_path / "a", "--arch", f"{nas_dataset}:17") / "normal.svg").read_text()
    assert f"accuracy {record['accuracy']:.4f}</text>" in svg
    cells = [{**GENOTYPES[name].to_dict(), "labels": labels} for name, labels in (("NAG_ENSEMBLE_A", [0]),
             ("NAG_ENSEMBLE_B", [2]), ("NAG_ENSEMBLE_C", [2]))]  # fmt: skip
    (tmp_path / "genotypes.json").write_text(json.dumps(cells))
    svg = (drawn(tmp_path / "b", "--arch", tmp_path) / "normal.svg").read_text()
    assert "1.086 M parameters" in svg and "class 2" in svg
    for arch in (f"{nas_dataset}:4000", nas_dataset, tmp_path / "a"):
        assert str(arch).partition(".jsonl:")[0] in refused(capsys, visualize, ["--arch", arch])


@pytest.mark.parametrize("format", visualize.PICTURES)
def test_a_sheet_shows_the_first_cells_of_each_class(tmp_path, format):
    cells = [
        {**Genotype(random_cell(i), random_cell(i + 50)).to_dict(), "labels": [i % 2], "params": i} for i in range(30)
    ]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    folder = drawn(tmp_path, "--arch", tmp_path / "cells.json", "--sheet", "--format", format)
    picture = (folder / f"sheet.{format}").read_bytes()
    assert picture.startswith(MAGIC[format])
    if format == "svg":
        shown = [int(i) for i in re.findall(r"<!-- (\d+): \d", picture.decode())]
        assert sorted(shown) == list(range(24))


def test_a_strip_stays_within_its_frame_and_codes_differ():
    for seed in range(20):
        picture = strip(random_cell(seed))
        xs = [vertex.x for vertex in picture.vertices]
        assert min(xs) - picture.half_width >= 0 and max(xs) + picture.half_width <= picture.width
        for arc in picture.arcs:
            middle = (arc[0][1] + 3 * arc[1][1] + 3 * arc[2][1] + arc[3][1]) / 8  # of the curve
            assert picture.top <= middle <= picture.bottom
    clash = SearchSpace("clash", ("cell",), ("in",), ("conv3x3", "c3", "identity"), 7)
    for space in (NAG_SPACE, clash):
        assert len(set(codes_of(space).values())) == len(space.tokens)
