"""The pieces that a page is made of, and what several sections read: NAS datasets, generators' checkpoints, cells.

A section says what one run, or one NAS dataset, shows. It holds plain data and SVG; page.html.j2 lays it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from build_nas_dataset.objectives import Objective, objectives_of
from build_nas_dataset.records import Record, read_header, read_records
from generation.figures import in_view, svg
from generation.strips import codes_of, color_of, strip_svg
from genotypes import CellSpec, Genotype
from models.predictor import Predictor
from plumbing.checkpoint_files import load_checkpoint

MOST_POINTS = 5000  # cells of a NAS dataset that are drawn


@dataclass
class Shown:
    """A figure on the page.

    points: (x, y in its viewBox, number of the cell on the page) of those that can be named. heat: whether its colours
    are numbers, which a dark page must not change.
    """

    name: str
    title: str
    caption: str
    svg: Markup
    points: list[list]
    heat: bool = False


@dataclass
class Number:
    """A number as a file holds it, and as the page shows it."""

    name: str
    value: float | int
    text: str


@dataclass
class Section:
    """What is said of one run. next: a command. sheet, samples, images: see cells.py and trained.py."""

    kind: str
    title: str
    run: str
    verdict: str = ""
    next: str = ""
    paragraphs: list[str] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    figures: list[Shown] = field(default_factory=list)
    sheet: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    images: list[dict] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    id: str = ""

    def number(self, name: str, value, digits: int = 3, unit: float = 1, suffix: str = "") -> None:
        """Add a number to the table; None, which stands for one that is not known, is left out."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            text = f"{value / unit:,.{digits}f}" if isinstance(value, float) or unit != 1 else f"{value:,}"
            self.numbers.append(Number(name, value, text + suffix))


class Page:
    """What sections of one page share: the cells that can be shown, and files that several of them read."""

    def __init__(self):
        self.cells: list[list] = []  # [what is known of it, number of its space, packed cell, packed cell ...]
        self.spaces: list = []
        self.figures = 0
        self._datasets: dict[tuple[Path, str], NasDataset] = {}
        self._generators: dict[Path, TrainedGenerator] = {}

    def cell(self, text: str, genotype: Genotype) -> int:
        """Put a genotype on the page. Returns its number."""
        if genotype.space not in self.spaces:
            self.spaces.append(genotype.space)
        packed = [pack(cell.prune() or cell) for cell in genotype.cells]
        self.cells.append([text, self.spaces.index(genotype.space), *packed])
        return len(self.cells) - 1

    def figure(self, figure: Figure, title: str, caption: str, points: tuple = ()) -> Shown:
        """A figure as the page holds it. points: x, y in the figure's units and numbers of cells."""
        self.figures += 1
        name, places = f"f{self.figures}", []
        if points:
            at = in_view(figure, *points[:2]).round(1)
            places = [[*map(float, xy), int(n)] for xy, n in zip(at, points[2], strict=True) if not np.isnan(xy).any()]
        return Shown(
            name, title, caption, Markup(svg(figure, name)), places, len(figure.axes) > 1
        )  # matplotlib escapes text

    def data(self) -> dict:
        """What the page's script reads: cells, and how the ops of their spaces look."""
        spaces = [
            {
                "cells": space.cells,
                "inputs": space.inputs,
                "ops": [[op, codes_of(space)[op], color_of(op, space)] for op in space.ops],
                "output": space.output,
            }
            for space in self.spaces
        ]
        return {"spaces": spaces, "cells": self.cells}

    def dataset(self, path: str | Path, accuracy_column: str = "accuracy") -> "NasDataset":
        """A NAS dataset, read once for each column. Raises ValueError and OSError as read_records does."""
        key = Path(path).resolve(), accuracy_column
        if key not in self._datasets:
            self._datasets[key] = NasDataset(Path(path), self, accuracy_column)
        return self._datasets[key]

    def generator(self, path: str | Path) -> "TrainedGenerator":
        """A generator's checkpoint, read once. Raises ValueError and OSError as load_checkpoint does."""
        key = Path(path).resolve()
        if key not in self._generators:
            self._generators[key] = TrainedGenerator(path)
        return self._generators[key]


class NasDataset:
    """A NAS dataset: its header and records, and its cells as numbers on the page."""

    def __init__(self, path: Path, page: Page, accuracy_column: str = "accuracy"):
        self.path, self.page, self.shown = path, page, False
        self.records = read_records(path, accuracy_column=accuracy_column)
        self.header = read_header(path) if path.suffix == ".jsonl" else {}

    def column(self, name: str) -> np.ndarray:
        """A number of every record (N,); NaN where it is not known."""
        values = [getattr(record, name) for record in self.records]
        return np.array([np.nan if value is None else value for value in values], float)

    def objectives(self, classes: int = 3) -> list[Objective]:
        """Accuracy cut into that many classes, as gan.py does; [] where there are too few records."""
        try:
            return objectives_of(self.records, {"accuracy": classes})
        except ValueError:
            return []

    @cached_property
    def drawn(self) -> np.ndarray:
        """Which records are drawn: all, or 5,000 of them."""
        n = len(self.records)
        return np.arange(n) if n <= MOST_POINTS else np.sort(np.random.default_rng(0).choice(n, MOST_POINTS, False))

    @cached_property
    def numbers(self) -> list[int]:
        """The numbers on the page of the drawn records."""
        return [self.page.cell(real_text(self.records[i]), self.records[i].genotype) for i in self.drawn]


class TrainedGenerator:
    """What a gan checkpoint says of the objectives and of the predictor. Its NAS dataset: nasbench_data."""

    def __init__(self, path: str | Path):
        state = load_checkpoint(path, "gan", ("args", "objectives", "predictor_tau"))
        self.path, self.args = Path(path), state["args"]
        self.objectives = [Objective.from_dict(objective) for objective in state["objectives"]]
        self.tau = state["predictor_tau"]
        self.predictor = Predictor.from_checkpoint(path)

    @property
    def nasbench_data(self) -> str:
        return self.args["nasbench_data"]

    @property
    def accuracy_column(self) -> str:
        return self.args.get("accuracy_column", "accuracy")


def real_text(record: Record) -> str:
    """What is known of a record, in words."""
    costs = [f"{record.params / 1e6:.3f} M parameters"] if record.params is not None else []
    costs += [f"{record.macs / 1e6:.1f} M MACs"] if record.macs is not None else []
    return ", ".join([f"real cell {record.id}: accuracy {record.accuracy:.4f}", *costs])


def pack(cell: CellSpec) -> str:
    """A cell in few characters: its ops as digits of base 36, a colon, and its edges, row by row above the diagonal.

    The edges are bits of a hexadecimal number: the first bit is the highest of the first digit.
    """
    inputs = cell.space.num_inputs
    ops = "".join(np.base_repr(cell.space.ops.index(op), 36) for op in cell.ops[inputs:-1])
    size = cell.num_vertices
    bits = "".join(str(cell.matrix[src][dst]) for src in range(size) for dst in range(src + 1, size))
    bits += "0" * (-len(bits) % 4)
    return ops + ":" + "".join(f"{int(bits[i : i + 4], 2):x}" for i in range(0, len(bits), 4))


def strips_of(genotype: Genotype) -> list[tuple[str, Markup]]:
    """(name of a cell, its small picture) of a genotype."""
    cells = zip(genotype.space.cells, genotype.cells, strict=True)
    return [(name, Markup(strip_svg(cell.prune() or cell))) for name, cell in cells]  # which escapes text


def outside(x: Sequence[float], low: float, high: float) -> int:
    """How many values are not within limits."""
    return int(sum(not low <= value <= high for value in x))
