"""A tabular benchmark as a place to search in: which cells there are, which are next to each other, what each is worth.

    table = SearchTable(read_nasbench201("accuracies.csv.gz"))
    table.signal[row], table.truth[row], table.neighbours(row)

A row is a cell of the benchmark. Where the wiring is fixed, each of the benchmark's strings is a row of its own, also
when another one computes the same function: a search may query both, and both look-ups count.
"""

from itertools import combinations

import numpy as np

from build_nas_dataset.tabular import Benchmark
from genotypes import CellSpec, Genotype, SearchSpace


class SearchTable:
    """The rows of a benchmark by number, with what a search may know (signal) and what it is judged by (truth).

    signal, truth: (rows,) accuracies as fractions. genotypes: of the rows. max_vertices: of the largest.
    """

    def __init__(self, benchmark: Benchmark):
        self.benchmark, self.space = benchmark, benchmark.space
        self.signal = np.array([row.signal for row in benchmark.rows])
        self.truth = np.array([row.truth for row in benchmark.rows])
        self.genotypes = [benchmark.genotype(row) for row in range(len(benchmark.rows))]
        self.max_vertices = max(genotype["cell"].num_vertices for genotype in self.genotypes)
        self._rows = {self._key(genotype["cell"]): row for row, genotype in enumerate(self.genotypes)}
        self._neighbours = {}

    def __len__(self) -> int:
        return len(self.signal)

    def _key(self, cell: CellSpec):
        return cell.ops if self.space.wiring is not None else cell.canonical()

    def row_of(self, genotype: Genotype | None) -> int | None:
        """The row of a genotype; None when the benchmark does not have it."""
        return None if genotype is None else self._rows.get(self._key(genotype["cell"]))

    def neighbours(self, row: int) -> list[int]:
        """The rows that one change leads to, see changed_cells, in ascending order."""
        if row not in self._neighbours:
            changed = changed_cells(self.genotypes[row]["cell"])
            rows = {self._rows.get(self._key(cell)) for cell in changed} - {None, row}
            self._neighbours[row] = sorted(rows)
        return self._neighbours[row]

    def figure(self, rows: list[int]) -> np.ndarray:
        """The truth of the best row by the signal among the first n queried ones, for every n from 1 (queries,)."""
        signal = self.signal[rows]
        first_best = np.flatnonzero(signal > np.maximum.accumulate(np.append(-np.inf, signal))[:-1])
        best = np.searchsorted(first_best, np.arange(len(rows)), side="right") - 1
        return self.truth[np.asarray(rows)[first_best[best]]]


def changed_cells(cell: CellSpec) -> list[CellSpec]:
    """The cells that one change makes of a cell, pruned; some may be the same.

    A change gives a vertex another op; where edges are free it can also add or remove an edge, or put a new vertex
    between two vertices. What is then on no path from the input to the output falls out.
    """
    space, size = cell.space, cell.num_vertices
    interior = range(space.num_inputs, size - 1)
    found = [
        CellSpec(cell.matrix, (*cell.ops[:v], op, *cell.ops[v + 1 :]), space)
        for v in interior
        for op in space.ops
        if op != cell.ops[v]
    ]
    if space.wiring is not None:
        return found
    for src, dst in _possible_edges(size, space):
        matrix = [list(row) for row in cell.matrix]
        matrix[src][dst] ^= 1
        found.append(CellSpec(matrix, cell.ops, space).prune())
    if size < space.max_vertices:
        for src, dst in _possible_edges(size, space):
            for op in space.ops:
                found.append(_with_vertex(cell, src, dst, op).prune())
    return [changed for changed in found if changed is not None]


def _possible_edges(size: int, space: SearchSpace) -> list[tuple[int, int]]:
    return [(src, dst) for src, dst in combinations(range(size), 2) if dst >= space.num_inputs]


def _with_vertex(cell: CellSpec, src: int, dst: int, op: str) -> CellSpec:
    """The cell with a new vertex in the place of dst, which reads src and is read by dst."""
    place = max(dst, cell.space.num_inputs)
    matrix = [[*row[:place], 0, *row[place:]] for row in cell.matrix]
    matrix.insert(place, [0] * (cell.num_vertices + 1))
    matrix[src][place] = matrix[place][dst + 1] = 1
    return CellSpec(matrix, (*cell.ops[:place], op, *cell.ops[place:]), cell.space)
