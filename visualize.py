"""Draw the cells of a genotype with Graphviz: one picture a cell, and its .gv source beside it.

    python visualize.py --arch NAG_HIGH_ACC
    python visualize.py --arch NAG_HIGH_ACC --output_dir figures --format pdf
    python visualize.py --arch runs/demo/archs/genotypes.json:0 --format png

A cell is drawn as the network reads it, that is pruned: data flows from the outputs of the two previous cells (cell
k-2 and k-1, on the left) to this cell's output (cell k, on the right). An input that the cell does not use is dashed,
and so is an op that passes nothing on. Genotypes of any search space are drawn.

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
from pathlib import Path

import graphviz

import utils
from genotypes import CellSpec, load_genotype

FORMATS = ("svg", "png", "pdf")
PNG_DPI = 192

GRAPH = {"rankdir": "LR", "nodesep": "0.2", "ranksep": "0.5", "bgcolor": "white"}
# Helvetica: a PDF needs no copy of it, and graphviz-pure carries a font of the same widths.
VERTEX = {"shape": "box", "style": "rounded,filled", "color": "#333333", "fontname": "Helvetica", "fontsize": "12"}
EDGE = {"color": "#555555", "arrowsize": "0.7"}

# A light and a dark tone for every two ops (ColorBrewer, sequential): kernel sizes, kinds of pooling.
OP_COLORS = ("#c6dbef", "#6baed6", "#c7e9c0", "#74c476", "#fdd0a2", "#fd8d3c", "#dadaeb", "#9e9ac8")
INPUT_COLOR, OUTPUT_COLOR = "#eeeeee", "#bdbdbd"
UNUSED = {"style": "rounded,dashed", "color": "#999999", "fontcolor": "#999999"}


def to_graphviz(cell: CellSpec, name: str) -> graphviz.Digraph:
    """The cell as a Graphviz graph; vertices carry their numbers in the pruned cell (an invalid cell is left whole)."""
    cell = cell.prune() or cell
    inputs, ops = cell.space.num_inputs, cell.space.ops
    graph = graphviz.Digraph(name, graph_attr=GRAPH, node_attr=VERTEX, edge_attr=EDGE)
    with graph.subgraph(graph_attr={"rank": "source"}) as sources:
        for v in range(inputs):
            used = {"fillcolor": INPUT_COLOR} if any(cell.matrix[v]) else UNUSED
            sources.node(str(v), rf"{cell.ops[v]}\ncell k-{inputs - v}", **used)
    for v, op in enumerate(cell.ops[inputs:-1], start=inputs):
        look = UNUSED if op == cell.space.none_op else {"fillcolor": OP_COLORS[ops.index(op) % len(OP_COLORS)]}
        graph.node(str(v), op, **look)
    graph.node(str(cell.num_vertices - 1), rf"{cell.space.output}\ncell k", fillcolor=OUTPUT_COLOR)
    for dst in range(cell.num_vertices):
        for src in cell.predecessors(dst):
            graph.edge(str(src), str(dst))
    return graph


def write_source(cell: CellSpec, path: str | Path) -> Path:
    """Write `path`.gv. Returns its name."""
    path = Path(path)
    source = path.with_name(path.name + ".gv")
    with utils.atomic_file(source) as file:
        file.write(to_graphviz(cell, path.name).source)
    return source


def render(source: Path, format: str) -> Path:
    """Draw a .gv file as svg, png or pdf, beside it. Returns the picture's name.

    Raises OSError, saying what to install, when there is nothing to draw it with.
    """
    picture = _svg_to_pdf(_run_dot(source, "svg")) if format == "pdf" else _run_dot(source, format)
    target = source.with_suffix(f".{format}")
    with utils.atomic_file(target, "wb") as file:
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


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = utils.ArgumentParser(__doc__)
    parser.add_argument("--arch", required=True, help="a published genotype's name, FILE.json or FILE.json:INDEX")
    parser.add_argument("--format", choices=FORMATS, default="svg", help="of the pictures")
    parser.add_argument("--output_dir", help="folder for the pictures (default: runs/visualize-<time>-<pid>)")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    utils.signals.listen()
    utils.keep_printing()
    with utils.user_input("--arch"):
        genotype = load_genotype(args.arch)
    folder = utils.output_folder(args)
    with utils.user_input("--output_dir"):
        cells = zip(genotype.space.cells, genotype.cells, strict=True)
        sources = [write_source(cell, folder / name) for name, cell in cells]
    with utils.user_input("--format"):
        for source in sources:
            print(render(source, args.format))


if __name__ == "__main__":
    main(parse_args())
