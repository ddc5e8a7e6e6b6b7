"""Small pictures of cells: all vertices in a row from the inputs to the output, edges as arcs from left to right.

Arcs from the cell's inputs run below the row, those from ops above it, and an edge to the next vertex is a line: so no
edge crosses a vertex, however dense the cell, and vertices of different cells stand in the same places. An op is told
by its colour and by a short code (codes_of). Used by visualize.py, report.py and notebooks; report.html.j2 draws the
same strips in the browser.
"""

from html import escape
from itertools import permutations, product
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, PathPatch
from matplotlib.path import Path

from genotypes import CellSpec, Genotype, SearchSpace
from models.cost import genotype_cost
from models.ops import has_network

# A light and a dark tone for every two ops. Blue, amber, purple and green differ for the colour-blind, too, and black
# text can be read on each.
OP_COLORS = ("#b9d8f2", "#5fa8dd", "#f8d78f", "#e8924a", "#dcc3e6", "#ab85bd", "#c5e5d9", "#57b397")
INPUT_COLOR, OUTPUT_COLOR = "#eeeeee", "#bdbdbd"
EDGE_COLOR, TEXT_COLOR, FRAME_COLOR, UNUSED_COLOR = "#666666", "#111111", "#444444", "#767676"


# ------------------------------------------------------------------------------------------------ what is shown


def color_of(op: str, space: SearchSpace) -> str:
    """The colour of a vertex with this label."""
    if op == space.output:
        return OUTPUT_COLOR
    return INPUT_COLOR if op in space.inputs else OP_COLORS[space.ops.index(op) % len(OP_COLORS)]


def codes_of(space: SearchSpace) -> dict[str, str]:
    """Two characters for every label of a space: seqconv3x3 -> s3, identity -> i, input0 -> 0, output -> out.

    An op whose code another one has already is shown by its place among the ops.
    """
    codes = {name: str(i) for i, name in enumerate(space.inputs)}
    for place, op in enumerate(space.ops):
        digits = [c for c in op if c.isdigit()]
        code = (op[0] if op else "?") + (digits[0] if digits else "")
        codes[op] = str(place + len(space.inputs)) if code in codes.values() else code
    return codes | {space.output: "out"}


def describe(genotype: Genotype, known: dict) -> str:
    """What is known of a genotype, in words: "2.351 M parameters, 401.2 M MACs, class 2"."""
    words = [f"{known['params'] / 1e6:.3f} M parameters"] if known.get("params") else []
    words += [f"{known['macs'] / 1e6:.1f} M MACs"] if known.get("macs") else []
    if isinstance(known.get("accuracy"), float):
        words.append(f"accuracy {known['accuracy']:.4f}")
    words += [f"class {class_name(known['labels'])}"] if known.get("labels") else []
    return ", ".join(words) or f"{' and '.join(genotype.space.cells)} cell"


def class_name(labels) -> str:
    """(2, 0) -> "2,0"."""
    return ",".join(map(str, labels))


def cost_of(genotype: Genotype, known: dict) -> dict:
    """#params and MACs of the CIFAR network of the published size, where the file does not say them already."""
    if {"params", "macs"} <= known.keys() or not has_network(genotype.space) or not genotype.is_valid:
        return {}
    return dict(zip(("params", "macs"), genotype_cost(genotype), strict=True))


def best_of_each_class(entries: list[tuple[Genotype, dict]], most: int) -> dict[tuple, list]:
    """Class -> its first `most` entries as (index in the file, genotype, what is known of it), the highest class first.

    Genotype files of generate_archs.py hold the best of a class first. Entries without labels are one class, ().
    """
    classes: dict[tuple, list] = {}
    for i, (genotype, known) in enumerate(entries):
        labels = known.get("labels")
        classes.setdefault(tuple(labels) if isinstance(labels, (list, tuple)) else (), []).append((i, genotype, known))
    return {labels: classes[labels][:most] for labels in sorted(classes, reverse=True)}


# ---------------------------------------------------------------------------------------------------- the strip


class Vertex(NamedTuple):
    """x: of its middle. used: False for an input that nothing reads."""

    x: float
    text: str
    color: str
    used: bool


class Strip(NamedTuple):
    """A cell's picture in units of pixels: the row of vertices is at y = 0, y grows downwards.

    arcs: curves of four points (start, two control points, end); the straight lines among them too.
    half_width, half_height: of a vertex. top, bottom: of everything.
    """

    width: float
    top: float
    bottom: float
    half_width: float
    half_height: float
    vertices: list[Vertex]
    arcs: list[tuple[tuple[float, float], ...]]


def strip(cell: CellSpec, labels: bool = False) -> Strip:
    """The picture of a cell. labels: vertices as boxes with their whole names, not as small ones with codes."""
    gap, half_width, half_height, step = (80, 34, 11, 11) if labels else (21, 8.5, 8, 5)
    inputs, codes = cell.space.num_inputs, codes_of(cell.space)
    vertices = [
        Vertex(
            half_width + 1 + gap * v,
            op if labels else codes[op],
            color_of(op, cell.space),
            v >= inputs or any(cell.matrix[v]),
        )
        for v, op in enumerate(cell.ops)
    ]
    arcs, top, bottom = [], half_height, half_height
    for dst in range(cell.num_vertices):
        for src in cell.predecessors(dst):
            x0, x1, span = vertices[src].x, vertices[dst].x, dst - src
            if span == 1:
                start, end = (x0 + half_width, 0.0), (x1 - half_width, 0.0)
                arcs.append((start, start, end, end))
                continue
            side, height = (1 if src < inputs else -1), step * (0.5 + span - 1)
            x0, x1, y = x0 + 0.4 * half_width, x1 - 0.4 * half_width, side * half_height
            arcs.append(((x0, y), (x0, y + side * height * 4 / 3), (x1, y + side * height * 4 / 3), (x1, y)))
            top, bottom = (
                max(top, (side < 0) * (half_height + height)),
                max(bottom, (side > 0) * (half_height + height)),
            )
    width = 2 * (half_width + 1) + gap * (cell.num_vertices - 1)
    return Strip(width, -top - 2, bottom + 2, half_width, half_height, vertices, arcs)


def strip_svg(cell: CellSpec, labels: bool = False) -> str:
    """The strip of a pruned cell as an SVG element; its class names let a page choose other colours for edges."""
    picture = strip(cell, labels)
    w, h = picture.half_width, picture.half_height
    parts = []
    for (x0, y0), (x1, y1), (x2, y2), (x3, y3) in picture.arcs:
        parts.append(f'<path class="edge" d="M{x0:g} {y0:g}C{x1:g} {y1:g} {x2:g} {y2:g} {x3:g} {y3:g}"/>')
    size = 10 if labels else 8
    for x, text, color, used in picture.vertices:
        dashed = "" if used else ' stroke-dasharray="3 2"'
        box = f'x="{x - w:g}" y="{-h:g}" width="{2 * w:g}" height="{2 * h:g}" rx="{h:g}"'
        parts.append(f'<rect {box} fill="{color if used else "#ffffff"}" stroke="{FRAME_COLOR}"{dashed}/>')
        font = f'font-size="{_font_size(text, 2 * w, size):g}" font-family="Helvetica, Arial, sans-serif"'
        parts.append(
            f'<text x="{x:g}" y="{0.35 * size:g}" text-anchor="middle" {font} fill="{TEXT_COLOR}" stroke="none">'
            f"{escape(text)}</text>"
        )
    height = picture.bottom - picture.top
    view = f'viewBox="0 {picture.top:g} {picture.width:g} {height:g}" width="{picture.width:g}" height="{height:g}"'
    drawn = f'<g fill="none" stroke="{EDGE_COLOR}" stroke-width="1">{"".join(parts)}</g>'
    words = f'role="img" aria-label="{escape(in_words(cell))}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" class="strip" {view} {words}>{drawn}</svg>'


def _font_size(text: str, width: float, most: float) -> float:
    """So that a text fits into a box of that width; a letter is about 0.55 as wide as the font is high."""
    return round(min(most, (width - 2) / (0.64 * max(len(text), 1))), 1)


def in_words(cell: CellSpec) -> str:
    """A cell for those who do not see the picture: "2 seqconv3x3 of 0 1; 3 output of 0 2"."""
    reads = [f"{v} {op} of {' '.join(map(str, cell.predecessors(v)))}" for v, op in enumerate(cell.ops)]
    return "; ".join(reads[cell.space.num_inputs :])


def ascii_picture(cell: CellSpec, title: str) -> str:
    """The cell as text: a row for each vertex, with an o in the column of each vertex that it reads."""
    width = max(len(op) for op in cell.ops)
    lines = [title, " " * (width + 5) + " ".join(f"{v:<2d}" for v in range(cell.num_vertices - 1)).rstrip()]
    for v, op in enumerate(cell.ops):
        reads = "  ".join("o" if cell.matrix[src][v] else "." for src in range(v))
        lines.append(f"{v:3d} {op:<{width}} {reads}".rstrip())
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- two cells compared


def match(a: CellSpec, b: CellSpec) -> dict[int, int]:
    """Vertices of cell a -> those of cell b with the same op, so that the two have as many edges in common as can be.

    Inputs and outputs belong together. Exact: all assignments of equal ops are tried, 5,040 at most in ten vertices.
    """
    inputs = a.space.num_inputs
    fixed = {v: v for v in range(inputs)} | {a.num_vertices - 1: b.num_vertices - 1}
    edges = [(src, dst) for dst in range(a.num_vertices) for src in a.predecessors(dst)]
    choices = []
    for op in sorted({*a.ops[inputs:-1]} & {*b.ops[inputs:-1]}):
        of_a = [v for v in range(inputs, a.num_vertices - 1) if a.ops[v] == op]
        of_b = [v for v in range(inputs, b.num_vertices - 1) if b.ops[v] == op]
        if len(of_a) <= len(of_b):
            choices.append([dict(zip(of_a, chosen, strict=True)) for chosen in permutations(of_b, len(of_a))])
        else:
            choices.append([dict(zip(chosen, of_b, strict=True)) for chosen in permutations(of_a, len(of_b))])

    def common(pairs: dict[int, int]) -> int:
        both = ((pairs[src], pairs[dst]) for src, dst in edges if src in pairs and dst in pairs)
        return sum(src < dst and b.matrix[src][dst] for src, dst in both)

    assignments = ({k: v for part in chosen for k, v in part.items()} | fixed for chosen in product(*choices))
    return max(assignments, key=common)


# ------------------------------------------------------------------------------------------------- contact sheet

COLUMN, GUTTER, LINE = 220, 14, 13  # width of a cell's column and space between columns; height of a line of text
COLUMNS = 4


def sheet_figure(classes: dict[tuple, list]) -> Figure:
    """A contact sheet: cells in columns below a heading for each class, and a legend of the ops on top.

    classes: as best_of_each_class returns them, at least one cell.
    """
    space = next(iter(classes.values()))[0][1].space
    width = COLUMNS * (COLUMN + GUTTER) + GUTTER
    drawn, y = [], 40.0  # (function, its arguments) below each other: the height is known at the end
    for labels, entries in classes.items():
        drawn.append((_text, (GUTTER, y, f"class {class_name(labels)}" if labels else "cells", 11, "bold")))
        y += 10
        for start in range(0, len(entries), COLUMNS):
            row = entries[start : start + COLUMNS]
            heights = [_height(genotype) for _, genotype, _ in row]
            for column, entry in enumerate(row):
                drawn.append((_draw_entry, (GUTTER + column * (COLUMN + GUTTER), y, *entry)))
            y += max(heights) + 10
        y += 22
    figure = Figure(figsize=(width / 72, y / 72))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(y, 0))
    axes.axis("off")
    _draw_legend(axes, space)
    for function, arguments in drawn:
        function(axes, *arguments)
    return figure


def _text(axes, x: float, y: float, text: str, size: float = 8, weight: str = "normal", align: str = "left") -> None:
    font = {"fontsize": size, "fontweight": weight, "color": TEXT_COLOR}
    axes.text(x, y, text, ha=align, va="center", parse_math=False, **font)


def _height(genotype: Genotype) -> float:
    """The height that a genotype takes on the sheet."""
    strips = [strip(cell.prune() or cell) for cell in genotype.cells]
    return sum(s.bottom - s.top + 6 for s in strips) + 2 * LINE


def _draw_entry(axes, x: float, y: float, index: int, genotype: Genotype, known: dict) -> None:
    """One genotype: its index, #params and MACs, and the strips of its cells below each other."""
    known = known | cost_of(genotype, known)
    _text(axes, x, y + LINE, f"{index}: {describe(genotype, {**known, 'labels': None})}", 7)
    y += 2 * LINE
    for cell in genotype.cells:
        picture = strip(cell.prune() or cell)
        y -= picture.top
        _draw_strip(axes, picture, x, y)
        y += picture.bottom + 6


def _draw_strip(axes, picture: Strip, x: float, y: float) -> None:
    curve = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]
    for points in picture.arcs:
        path = Path([(x + a, y + b) for a, b in points], curve)
        axes.add_patch(PathPatch(path, fill=False, edgecolor=EDGE_COLOR, linewidth=0.7))
    for vertex in picture.vertices:
        style = "-" if vertex.used else ":"
        face = vertex.color if vertex.used else "#ffffff"
        size = (2 * picture.half_width, 2 * picture.half_height)
        axes.add_patch(
            Ellipse((x + vertex.x, y), *size, facecolor=face, edgecolor=FRAME_COLOR, linewidth=0.7, linestyle=style)
        )
        axes.text(
            x + vertex.x, y, vertex.text, fontsize=6, color=TEXT_COLOR, ha="center", va="center", parse_math=False
        )


def _draw_legend(axes, space: SearchSpace) -> None:
    x = GUTTER
    for op, code in codes_of(space).items():
        axes.add_patch(
            Ellipse((x + 8.5, 16), 17, 16, facecolor=color_of(op, space), edgecolor=FRAME_COLOR, linewidth=0.7)
        )
        axes.text(x + 8.5, 16, code, fontsize=6, color=TEXT_COLOR, ha="center", va="center", parse_math=False)
        _text(axes, x + 21, 16, op)
        x += 34 + 5.2 * len(op)
