"""Draw the cells of a genotype, compare two genotypes, or lay out the best cells of a file on a contact sheet.

    python visualize.py --arch NAG_HIGH_ACC
    python visualize.py --arch runs/demo/archs/genotypes.json:0 --format png
    python visualize.py --arch data/nasdata.jsonl:17                 # a cell of the NAS dataset
    python visualize.py --arch NAG_HIGH_ACC --format ascii           # in the terminal; writes no file
    python visualize.py --arch NAG_ENSEMBLE_A --compare NAG_HIGH_ACC # side by side, what only one has is marked
    python visualize.py --arch runs/demo/archs/genotypes.json --sheet

A cell is drawn as the network reads it, that is pruned: data flows from the outputs of the two previous cells (cell
k-2 and k-1, on the left) to this cell's output (cell k, on the right). An input that the cell does not use is dashed,
and so is an op that passes nothing on. Genotypes of any search space are drawn.
In a notebook, `visualize.show(genotype)` as the last line of a block shows both cells.

No Graphviz has to be installed: the package graphviz-pure lays out and draws, and svglib makes a PDF of its SVG. Where
graphviz-pure is missing, a system's `dot` takes its place. Without either, the .gv files are still written, one line
says what to install, and the exit status is 2.
"""

import argparse
import io
import logging
import os
import shutil
import subprocess
import sysconfig
from html import escape
from pathlib import Path

import graphviz

from generation.strips import (
    INPUT_COLOR,
    OUTPUT_COLOR,
    ascii_picture,
    best_of_each_class,
    color_of,
    cost_of,
    describe,
    match,
    sheet_figure,
    strip_svg,
)
from genotypes import CellSpec, Genotype, find_genotype, read_genotypes
from plumbing.console import keep_printing
from plumbing.files import atomic_file
from plumbing.flags import ArgumentParser
from plumbing.run_folder import output_folder
from plumbing.signals import signals
from utils import fail, user_input

PICTURES = ("svg", "png", "pdf")
PNG_DPI = 192

GRAPH = {"rankdir": "LR", "nodesep": "0.12", "ranksep": "0.4", "bgcolor": "white", "labelloc": "t"}
# Helvetica: a PDF needs no copy of it, and graphviz-pure carries a font of the same widths.
FONT = {"fontname": "Helvetica", "fontsize": "12"}
VERTEX = {"shape": "box", "style": "rounded,filled", "color": "#333333", "height": "0.4", "margin": "0.1,0.03", **FONT}
EDGE = {"color": "#555555", "arrowsize": "0.7"}
UNUSED = {"style": "rounded,dashed", "color": "#767676", "fontcolor": "#767676"}
MARKED = {"color": "#a3004f", "penwidth": "2.5"}  # what only one of two cells has


# ------------------------------------------------------------------------------------------------ one cell


def to_graphviz(cell: CellSpec, name: str, title: str = "") -> graphviz.Digraph:
    """The cell as a Graphviz graph; vertices carry their numbers in the pruned cell (an invalid cell is left whole).

    title: a line above the drawing, which the legend of ops follows; "" for neither.
    """
    cell = cell.prune() or cell
    label = {"label": _title_and_legend(title, cell)} if title else {}
    graph = graphviz.Digraph(name, graph_attr=GRAPH | FONT | label, node_attr=VERTEX, edge_attr=EDGE)
    _add_cell(graph, cell, "", set(), set())
    return graph


def _title_and_legend(title: str, cell: CellSpec) -> str:
    """An HTML-like label of Graphviz: the title, and below it the ops of the space in their colours."""
    ops = cell.space.ops
    colored = "".join(f'<td bgcolor="{color_of(op, cell.space)}">{escape(op)}</td>' for op in ops)
    heading = f'<td align="left" colspan="{len(ops) + 1}"><b>{escape(title)}</b></td>'
    table = f'<tr>{heading}</tr><tr><td align="left">ops: </td>{colored}</tr>'
    return f'<<table border="0" cellspacing="3" cellpadding="4">{table}</table>>'


def _add_cell(graph: graphviz.Digraph, cell: CellSpec, prefix: str, vertices: set[int], edges: set) -> None:
    """Add a pruned cell to a graph. prefix: of the names of its vertices. vertices, edges: those to be marked."""
    inputs, output = cell.space.num_inputs, cell.num_vertices - 1
    with graph.subgraph(graph_attr={"rank": "same" if prefix else "source"}) as sources:  # no source within a frame
        for v in range(inputs):
            used = {"fillcolor": INPUT_COLOR} if any(cell.matrix[v]) else UNUSED
            sources.node(f"{prefix}{v}", rf"{cell.ops[v]}\ncell k-{inputs - v}", **used)
        for v in range(1, inputs):  # in their order from top to bottom, in every picture
            pair = (f"{prefix}{v - 1}", f"{prefix}{v}")
            sources.edge(*(reversed(pair) if prefix else pair), style="invis")  # frames stack them the other way round
    for v, op in enumerate(cell.ops[inputs:-1], start=inputs):
        look = UNUSED if op == cell.space.none_op else {"fillcolor": color_of(op, cell.space)}
        graph.node(f"{prefix}{v}", op, **(look | (MARKED if v in vertices else {})))
    graph.node(f"{prefix}{output}", rf"{cell.space.output}\ncell k", fillcolor=OUTPUT_COLOR)
    for dst in range(cell.num_vertices):
        for src in cell.predecessors(dst):
            marks = MARKED if (src, dst) in edges else {}
            graph.edge(f"{prefix}{src}", f"{prefix}{dst}", **marks)


def write_source(cell: CellSpec, path: str | Path, title: str = "") -> Path:
    """Write `path`.gv. Returns its name."""
    return _write_graph(to_graphviz(cell, Path(path).name, title), path)


def _write_graph(graph: graphviz.Digraph, path: str | Path) -> Path:
    path = Path(path)
    source = path.with_name(path.name + ".gv")
    with atomic_file(source) as file:
        file.write(graph.source)
    return source


def render(source: Path, format: str) -> Path:
    """Draw a .gv file as svg, png or pdf, beside it. Returns the picture's name.

    Raises OSError, saying what to install, when there is nothing to draw it with.
    """
    picture = _svg_to_pdf(_run_dot(source, "svg")) if format == "pdf" else _run_dot(source, format)
    target = source.with_suffix(f".{format}")
    with atomic_file(target, "wb") as file:
        file.write(picture)
    return target


def draw(cell: CellSpec, path: str | Path, format: str = "svg") -> Path:
    """Write `path`.gv and draw it as `path`.svg, .png or .pdf. Returns the picture's name; raises as `render` does."""
    return render(write_source(cell, path), format)


def _run_dot(source: Path, format: str) -> bytes:
    # The folder of this interpreter's scripts comes first: its virtual environment need not be activated.
    folders = os.pathsep.join([sysconfig.get_path("scripts"), *os.get_exec_path()])
    program = shutil.which("graphviz-pure", path=folders) or shutil.which("dot", path=folders)
    if program is None:
        raise OSError(
            f"{source} is written, but there is no Graphviz to draw it: pip install -r requirements.txt, "
            "or install Graphviz (https://graphviz.org/download)"
        )
    command = [program, f"-T{format}", str(source)] + [f"-Gdpi={PNG_DPI}"] * (format == "png")
    result = subprocess.run(command, capture_output=True)
    if result.returncode:
        raise OSError(f"{Path(program).name} cannot draw {source}: {result.stderr.decode(errors='replace')}")
    return result.stdout


def _svg_to_pdf(svg: bytes) -> bytes:
    """The vector drawing as a one-page PDF of the same size; the same bytes for the same drawing."""
    try:
        from reportlab.graphics import renderPDF
        from svglib.svglib import svg2rlg
    except ImportError as error:
        raise OSError(f"PDF needs {error.name}: pip install -r requirements.txt") from None
    logging.getLogger("svglib").setLevel(logging.ERROR)  # it warns of every <title>, which a PDF has no use for
    return renderPDF.drawToString(svg2rlg(io.BytesIO(svg)), invariant=1)


# --------------------------------------------------------------------------------------- two cells, many, notebooks


def compare_graph(a: CellSpec, b: CellSpec, name: str, titles: tuple[str, str]) -> graphviz.Digraph:
    """Two cells, one above the other; ops and edges that only one of them has are drawn thick and in another colour."""
    a, b = a.prune() or a, b.prune() or b
    legend = _title_and_legend(f"{name} cells; thick: what only one of the two has", a)
    graph = graphviz.Digraph(name, graph_attr=GRAPH | FONT | {"label": legend}, node_attr=VERTEX, edge_attr=EDGE)
    pairs = match(a, b)
    for cell, other, own, prefix, title in (
        (b, a, {v: u for u, v in pairs.items()}, "b", titles[1]),  # first drawn, lowest
        (a, b, pairs, "a", titles[0]),
    ):
        vertices = set(range(cell.num_vertices)) - own.keys()
        edges = {
            (src, dst)
            for dst in range(cell.num_vertices)
            for src in cell.predecessors(dst)
            if not (src in own and dst in own and other.matrix[own[src]][own[dst]])
        }
        frame = {"label": title, "color": "#bbbbbb", "labelloc": "t", "labeljust": "l", **FONT}
        with graph.subgraph(name=f"cluster_{prefix}", graph_attr=frame) as part:
            _add_cell(part, cell, prefix, vertices, edges)
    return graph


def sheet(path: str | Path, target: Path, format: str, most: int = 12) -> Path:
    """Draw the first `most` cells of each class of a genotype file as `target`.format. Returns the picture's name.

    Raises ValueError when the file holds no genotypes.
    """
    entries = read_genotypes(path)
    if not entries:
        raise ValueError(f"{path} holds no genotypes")
    target = target.with_name(f"{target.name}.{format}")
    figure = sheet_figure(best_of_each_class(entries, most))
    with atomic_file(target, "wb") as file:
        undated = {"Date": None} if format == "svg" else {"CreationDate": None} if format == "pdf" else {}
        figure.savefig(file, format=format, metadata=undated, dpi=PNG_DPI)
    return target


class Picture:
    """What a notebook shows of a genotype: see `show`."""

    def __init__(self, genotype: Genotype):
        self.genotype = genotype

    def _repr_html_(self) -> str:
        rows = []
        for name, cell in zip(self.genotype.space.cells, self.genotype.cells, strict=True):
            style = "background:#fff;color:#222;padding:4px;max-width:100%"
            rows.append(f'<div style="{style}"><b>{escape(name)} cell</b><br>{strip_svg(cell, labels=True)}</div>')
        return "".join(rows)

    def __repr__(self) -> str:
        pairs = zip(self.genotype.space.cells, self.genotype.cells, strict=True)
        return "\n".join(ascii_picture(cell, f"{name} cell") for name, cell in pairs)


def show(genotype: Genotype) -> Picture:
    """The cells of a genotype as a notebook shows them; where there are no pictures, as text."""
    return Picture(genotype)


# ------------------------------------------------------------------------------------------------------ script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    of_one = "a published genotype's name, FILE.json, FILE.json:INDEX, FILE.jsonl:INDEX, or a run folder (its best)"
    parser.add_argument("--arch", required=True, help=of_one)
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--compare", metavar="ARCH", help="draw this genotype beside it, with the difference marked")
    either.add_argument("--sheet", action="store_true", help="of FILE.json: the 12 first of each class on one page")
    parser.add_argument(
        "--format", choices=(*PICTURES, "ascii"), default="svg", help="of the pictures; ascii: text, printed only"
    )
    parser.add_argument("--output_dir", help="folder for the pictures (default: runs/visualize-<time>-<pid>)")
    args = parser.parse_args(argv)
    if args.sheet and not args.arch.endswith(".json"):
        parser.error(f"argument --sheet: expected --arch FILE.json, got {args.arch}")
    if args.sheet and args.format == "ascii":
        parser.error("argument --sheet: expected --format svg, png or pdf")
    return args


def print_ascii(found: list[tuple[str, Genotype, dict]]) -> None:
    """Print the cells of each of the genotypes; found: (what it is called, genotype, what its file says of it)."""
    for name, genotype, known in found:
        for cell_name, cell in zip(genotype.space.cells, genotype.cells, strict=True):
            print(ascii_picture(cell.prune() or cell, f"{cell_name} cell of {name}: {describe(genotype, known)}"))
            print()


def sources_of(found: list[tuple[str, Genotype, dict]], folder: Path) -> list[Path]:
    """Write a .gv file for each cell of a genotype, or for each pair of cells of two. Returns their names."""
    (name, genotype, known), *others = found
    sources = []
    for i, cell_name in enumerate(genotype.space.cells):
        title = f"{cell_name} cell of {name}: {describe(genotype, known)}"
        if others:
            ((other_name, other, of_other),) = others
            titles = (f"{name}: {describe(genotype, known)}", f"{other_name}: {describe(other, of_other)}")
            graph = compare_graph(genotype.cells[i], other.cells[i], cell_name, titles)
        else:
            graph = to_graphviz(genotype.cells[i], cell_name, title)
        sources.append(_write_graph(graph, folder / cell_name))
    return sources


def main(args: argparse.Namespace) -> None:
    signals.listen()
    keep_printing()
    folder = output_folder(args)
    if args.sheet:
        with user_input("--arch"):
            print(sheet(args.arch, folder / "sheet", args.format))
        return
    found = []
    for flag, name in (("--arch", args.arch), ("--compare", args.compare)):
        if name:
            with user_input(flag):
                genotype, known = find_genotype(name)
                found.append((name, genotype, cost_of(genotype, known) | known))
    if args.compare and found[0][1].space != found[1][1].space:
        fail(f"--compare: expected a genotype of the space {found[0][1].space.name}")
    if args.format == "ascii":
        print_ascii(found)
        return
    with user_input("--output_dir"):
        sources = sources_of(found, folder)
    with user_input("--format"):
        for source in sources:
            print(render(source, args.format))


if __name__ == "__main__":
    main(parse_args())
