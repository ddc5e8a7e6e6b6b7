"""Cells, genotypes and the search spaces they live in; the published cells.

    >>> genotype = load_genotype("NAG_FEW_PARAMS")
    >>> genotype.normal.ops
    ('input0', 'input1', 'seqconv3x3', 'avgpool3x3', 'output')
    >>> genotype.normal.prune() == genotype.normal
    True

No torch here: a cell is plain data that can be read, compared and drawn without it.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from operator import and_, itemgetter
from pathlib import Path


@dataclass(frozen=True)
class SearchSpace:
    """What cells may look like. Everything that knows about vertices, ops or cells takes one of these.

    name: for messages and files.
    cells: names of the cells of one genotype, in order.
    inputs: labels of a cell's first vertices (outputs of earlier cells), never connected among themselves.
    ops: labels an interior vertex may carry.
    max_vertices: inputs, interior vertices and output together.
    max_edges: a cell with more edges after pruning is invalid; None = no limit.
    wiring: the matrix that every cell has, of max_vertices rows: only the ops differ then. None: edges are free.
    none_op: the op that passes nothing on. skip_op: the op that passes on what it reads. None: there is no such op.

    Two cells of free wiring are the same when they are isomorphic, two of a fixed wiring when they compute the same
    function (`same_by`). Raises ValueError for limits that contradict each other.
    """

    name: str
    cells: tuple[str, ...]
    inputs: tuple[str, ...]
    ops: tuple[str, ...]
    max_vertices: int
    max_edges: int | None = None
    wiring: tuple[tuple[int, ...], ...] | None = None
    none_op: str | None = None
    skip_op: str | None = None

    output = "output"

    def __post_init__(self):
        for name in ("cells", "inputs", "ops"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not (self.cells and self.inputs and self.ops):
            raise ValueError(f"the space {self.name} needs a cell, an input and an op at least")
        for names in (self.cells, self.tokens):
            if len(set(names)) < len(names):
                raise ValueError(f"the space {self.name} has a name twice: {', '.join(names)}")
        if not {self.none_op, self.skip_op} <= {None, *self.ops}:
            raise ValueError(f"none_op and skip_op of the space {self.name} must be among its ops")
        if self.max_vertices <= self.num_inputs:
            raise ValueError(
                f"the space {self.name} has {self.num_inputs} inputs and max_vertices = {self.max_vertices}"
            )
        if self.max_edges is not None and self.max_edges < 1:
            raise ValueError(f"the space {self.name} needs an edge at least, got max_edges = {self.max_edges}")
        if self.wiring is not None:
            object.__setattr__(self, "wiring", tuple(map(tuple, self.wiring)))
            _check_wiring(self)

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Every vertex label; a label's position is its token id."""
        return (self.output, *self.inputs, *self.ops)

    @cached_property
    def token_id(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def min_vertices(self) -> int:
        return self.num_inputs + 1 if self.wiring is None else self.max_vertices

    @staticmethod
    def of(data: "SearchSpace | dict") -> "SearchSpace":
        """A space from what dataclasses.asdict made of it, or the space itself. Raises ValueError and TypeError."""
        space = data if isinstance(data, SearchSpace) else SearchSpace(**data)
        return next((known for known in SPACES.values() if known == space), space)

    @property
    def same_by(self) -> str:
        """What makes two cells the same: "isomorphism" or "function"."""
        return "isomorphism" if self.wiring is None else "function"


def _check_wiring(space: SearchSpace) -> None:
    """Raise ValueError for a fixed wiring that no cell of the space could have."""
    wiring, what = space.wiring, f"the wiring of the space {space.name}"
    if len(wiring) != space.max_vertices:
        raise ValueError(f"{what} has {len(wiring)} rows, its cells have {space.max_vertices} vertices")
    labels = [*space.inputs, *[space.ops[0]] * (len(wiring) - space.num_inputs - 1), space.output]
    try:
        cell = CellSpec(wiring, labels, replace(space, wiring=None, none_op=None))
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not cell.is_valid:
        raise ValueError(f"{what} has no path from an input to the output, or more than max_edges edges")


# METHOD: the published search space (NAG paper, section 3.1); the token order is that of the reference.
NAG_SPACE = SearchSpace(
    name="nag",
    cells=("normal", "reduction"),
    inputs=("input0", "input1"),
    ops=("seqconv3x3", "seqconv5x5", "avgpool3x3", "maxpool3x3", "identity"),
    max_vertices=10,
)


@dataclass(frozen=True)
class CellSpec:
    """A cell: a DAG over V vertices, given by a strictly upper-triangular matrix and V labels.

        input0 --> seqconv3x3 --+             0 1 2 3
        input1 -------^         +--> output   0 . 1 .   CellSpec([[0, 0, 1, 0],
                                              1 . 1 .             [0, 0, 1, 0],
                                              2 . . 1             [0, 0, 0, 1],
                                              3 . . .             [0, 0, 0, 0]],
                                                                 ["input0", "input1", "seqconv3x3", "output"])

    matrix: (V, V) of 0/1, `matrix[source][target]`; anything nested and indexable, stored as tuples.
    ops: V labels, the inputs' and the output's included.

    Raises ValueError, with the reason, for anything that is not such a cell.
    """

    matrix: tuple[tuple[int, ...], ...]
    ops: tuple[str, ...]
    space: SearchSpace = field(default=NAG_SPACE, repr=False)

    def __post_init__(self):
        try:
            rows = tuple(map(tuple, self.matrix))
            matrix = tuple(tuple(map(int, row)) for row in rows)
        except (TypeError, ValueError, OverflowError):
            raise ValueError("matrix must be a nested list of 0 and 1") from None
        ops, space, size = tuple(self.ops), self.space, len(matrix)
        if matrix != rows or not {0, 1}.issuperset(chain(*matrix)):
            raise ValueError("matrix may hold only 0 and 1")
        if any(len(row) != size for row in matrix):
            raise ValueError(
                f"matrix must be square, got {size} rows of {str(sorted({len(row) for row in matrix}))[:60]} entries"
            )
        if not space.min_vertices <= size <= space.max_vertices:
            raise ValueError(f"a cell has {space.min_vertices} to {space.max_vertices} vertices, got {size}")
        if any(1 in row[: src + 1] for src, row in enumerate(matrix)):
            raise ValueError("matrix must be strictly upper triangular (edges run from lower to higher vertices)")
        if any(1 in row[: space.num_inputs] for row in matrix):
            raise ValueError("matrix has an edge between two inputs")
        if len(ops) != size:
            raise ValueError(f"ops must name each of the {size} vertices, got {len(ops)} labels")
        if ops[: space.num_inputs] != space.inputs or ops[-1] != space.output:
            raise ValueError(f"ops must start with {', '.join(space.inputs)} and end with {space.output}")
        unknown = [op for op in ops[space.num_inputs : -1] if op not in space.ops]
        if unknown:
            raise ValueError(f"unknown op {unknown[0]!r:.60}; known: {', '.join(space.ops)}")
        if space.wiring not in (None, matrix):
            raise ValueError(f"matrix must be the wiring of the space {space.name}")
        object.__setattr__(self, "matrix", matrix)
        object.__setattr__(self, "ops", ops)

    @property
    def num_vertices(self) -> int:
        return len(self.ops)

    @property
    def num_edges(self) -> int:
        return sum(map(sum, self.matrix))

    @property
    def density(self) -> float:
        """Share of the allowed edges that are there (edges between inputs are not allowed)."""
        inputs = self.space.num_inputs
        return self.num_edges / (self.num_vertices * (self.num_vertices - 1) // 2 - inputs * (inputs - 1) // 2)

    def predecessors(self, vertex: int) -> list[int]:
        return [src for src in range(vertex) if self.matrix[src][vertex]]

    def prune(self) -> "CellSpec | None":
        """The cell without the interior vertices that lie on no path from an input to the output.

        Inputs and output always stay, connected or not: dropping an unused input would turn the vertex after it
        into that input (the reference does). Where the wiring is fixed, every vertex stays. None when the cell is
        invalid.
        """
        size, inputs, none_op = self.num_vertices, self.space.num_inputs, self.space.none_op
        reached = [v < inputs for v in range(size)]  # from an input
        for dst, column in enumerate(zip(*self.matrix, strict=True)):
            reached[dst] = reached[dst] or (self.ops[dst] != none_op and any(map(and_, column, reached)))
        needed = [v == size - 1 for v in range(size)]  # by the output
        for src in reversed(range(size - 1)):
            needed[src] = self.ops[src] != none_op and any(map(and_, self.matrix[src], needed))
        if not reached[-1]:
            return None
        if self.space.wiring is not None:
            return self
        keep = [v for v in range(size) if v < inputs or (reached[v] and needed[v])]
        pruned = self if len(keep) == size else self._take(keep)
        if self.space.max_edges is not None and pruned.num_edges > self.space.max_edges:
            return None
        return pruned

    @property
    def is_valid(self) -> bool:
        """True when at least one path leads from an input to the output (and the space's other limits hold)."""
        return self.prune() is not None

    def canonical(self) -> "CellSpec | tuple | None":
        """Something hashable that is equal exactly for cells that are the same; None when the cell is invalid.

        Where the wiring is fixed it is the cell's function. Elsewhere it is a cell, the same one for every relabelling
        of the interior vertices, and exact, not a hash: colour refinement of the pruned cell, with a search over the
        vertices that refinement cannot tell apart. Depth (longest path from an input) is the first colour, so the order
        of the colours is a topological one and the result is a cell again.
        """
        cell = self.prune()
        if cell is None:
            return None
        if self.space.wiring is not None:
            return cell.function()
        size = cell.num_vertices
        depth, neighbours = [0] * size, [[] for _ in range(size)]
        for src, row in enumerate(cell.matrix):
            for dst, edge in enumerate(row):
                if edge:
                    depth[dst] = max(depth[dst], depth[src] + 1)
                    neighbours[src].append(dst)
                    neighbours[dst].append(src)
        token_id = self.space.token_id
        colours = _rank([(depth[v], token_id[op]) for v, op in enumerate(cell.ops)])
        orders = map(_order, _discrete_colourings(colours, neighbours))
        return cell._take(min(orders, key=lambda order: _induced(cell.matrix, order)))

    def function(self) -> tuple:
        """What the output computes, as nested tuples: equal for cells that compute the same whatever their weights.

        A vertex reads a sum of terms: an input, ("input",), or an op and the terms that it is applied to. The order of
        the terms does not matter. What none_op passes on, or an op that reads nothing, is no term; what skip_op passes
        on are the terms that it reads.
        """
        passed_on = [((label,),) for label in self.space.inputs]  # the terms of every vertex
        for v in range(self.space.num_inputs, self.num_vertices):
            terms, op = tuple(sorted(chain(*(passed_on[src] for src in self.predecessors(v))))), self.ops[v]
            if op == self.space.none_op or not terms:
                terms = ()
            elif op not in (self.space.skip_op, self.space.output):
                terms = ((op, terms),)
            passed_on.append(terms)
        return passed_on[-1]

    def _take(self, vertices: Sequence[int]) -> "CellSpec":
        """The cell induced by `vertices`, in that order."""
        return CellSpec(_induced(self.matrix, vertices), [self.ops[v] for v in vertices], self.space)

    def to_dict(self) -> dict:
        return {"matrix": [list(row) for row in self.matrix], "ops": list(self.ops)}

    @staticmethod
    def from_dict(data: dict, space: SearchSpace = NAG_SPACE) -> "CellSpec":
        """Inverse of `to_dict`. Raises ValueError with the reason."""
        if not isinstance(data, dict) or not {"matrix", "ops"} <= data.keys():
            raise ValueError('a cell must be an object with "matrix" and "ops"')
        if not isinstance(data["ops"], (list, tuple)):
            raise ValueError("ops must be a list of labels")
        return CellSpec(data["matrix"], data["ops"], space)


def _induced(matrix: tuple[tuple[int, ...], ...], vertices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The adjacency matrix of two or more vertices, in that order."""
    take = itemgetter(*vertices)
    return tuple(map(take, take(matrix)))


def _rank(keys: list) -> list[int]:
    """Replace each key by the number of smaller ones."""
    position = dict(zip(sorted(keys, reverse=True), reversed(range(len(keys))), strict=True))
    return [position[key] for key in keys]


def _order(colours: list[int]) -> list[int]:
    return sorted(range(len(colours)), key=colours.__getitem__)


def _discrete_colourings(colours: list[int], neighbours: list[list[int]]) -> Iterable[list[int]]:
    """All ways to refine `colours` until every vertex has its own, up to exchanging twins.

    Edges run from lower to higher colours, so that neighbours need not be told apart as predecessors and successors.
    """
    size, count = len(colours), len(set(colours))
    bits = size.bit_length()
    while count < size:
        # A number with, from the top, the vertex's own colour and how many neighbours it has of every colour.
        unit = [1 << bits * c for c in colours].__getitem__
        keys = [sum(map(unit, near), c << bits * size) for c, near in zip(colours, neighbours, strict=True)]
        before, count = count, len(set(keys))
        if count == before:
            break
        colours = _rank(keys)
    if count == size:
        yield colours
        return
    ambiguous = min(c for c in colours if colours.count(c) > 1)
    # Vertices with the same neighbours are exchanged by an automorphism: one order of them is as good as another.
    groups = {}
    for v in range(size):
        if colours[v] == ambiguous:
            groups.setdefault(tuple(neighbours[v]), []).append(v)
    for twins in groups.values():  # first in turn, before the others of their colour
        individualised = [c + len(twins) * (c == ambiguous) for c in colours]
        for i, v in enumerate(twins):
            individualised[v] = ambiguous + i
        yield from _discrete_colourings(individualised, neighbours)


@dataclass(frozen=True, init=False)
class Genotype:
    """One cell for each of the space's cell names: for NAG, a normal and a reduction cell."""

    cells: tuple[CellSpec, ...]
    space: SearchSpace = field(repr=False)

    def __init__(self, *cells: CellSpec, space: SearchSpace = NAG_SPACE):
        if len(cells) != len(space.cells):
            raise ValueError(f"a genotype has {len(space.cells)} cells ({', '.join(space.cells)}), got {len(cells)}")
        object.__setattr__(self, "cells", tuple(cells))
        object.__setattr__(self, "space", space)

    def __getitem__(self, name: str) -> CellSpec:
        if name not in self.space.cells:
            raise ValueError(f"a genotype of the space {self.space.name} has no {name} cell")
        return self.cells[self.space.cells.index(name)]

    @property
    def normal(self) -> CellSpec:
        return self["normal"]

    @property
    def reduction(self) -> CellSpec:
        return self["reduction"]

    @property
    def is_valid(self) -> bool:
        return all(cell.is_valid for cell in self.cells)

    def prune(self) -> "Genotype | None":
        """Every cell pruned; None when one of them is invalid."""
        return self._each(CellSpec.prune)

    def canonical(self) -> "Genotype | None":
        """Every cell in canonical form, for comparison; None when one of them is invalid."""
        return self._each(CellSpec.canonical)

    def _each(self, change) -> "Genotype | None":
        cells = [change(cell) for cell in self.cells]
        return None if None in cells else Genotype(*cells, space=self.space)

    def to_dict(self) -> dict:
        """The cells by their names; and "space", the name of the space, unless it is the published one."""
        cells = {name: cell.to_dict() for name, cell in zip(self.space.cells, self.cells, strict=True)}
        return cells if self.space.name == NAG_SPACE.name else {"space": self.space.name, **cells}

    @staticmethod
    def from_dict(data: dict, space: SearchSpace | None = None) -> "Genotype":
        """Inverse of `to_dict`; other keys are ignored. Raises ValueError with the reason.

        space: of the genotype, if it names none; by default the published one.
        """
        if not isinstance(data, dict):
            names = " and ".join((space or NAG_SPACE).cells)
            raise ValueError(f"a genotype must be an object with {names}")
        if "space" in data:
            named = find_space(data["space"]) if space is None or data["space"] != space.name else space
            if space is not None and named != space:
                raise ValueError(f"the genotype is of the space {named.name}, expected one of {space.name}")
            space = named
        space = space or NAG_SPACE
        cells = []
        for name in space.cells:
            if name not in data:
                raise ValueError(f"the genotype has no {name} cell")
            try:
                cells.append(CellSpec.from_dict(data[name], space))
            except ValueError as error:
                raise ValueError(f"{name} cell: {error}") from None
        return Genotype(*cells, space=space)


def _matrix(size: int, edges: str) -> tuple[tuple[int, ...], ...]:
    """The matrix of a cell of that many vertices with the edges "0>2 1>2 ..."."""
    pairs = {tuple(map(int, edge.split(">"))) for edge in edges.split()}
    return tuple(tuple(int((src, dst) in pairs) for dst in range(size)) for src in range(size))


# NAS-Bench-101 (Ying et al. 2019): 423,624 different cells.
NASBENCH101 = SearchSpace(
    name="nasbench101",
    cells=("cell",),
    inputs=("input",),
    ops=("conv3x3-bn-relu", "conv1x1-bn-relu", "maxpool3x3"),
    max_vertices=7,
    max_edges=9,
)

# NAS-Bench-201 (Dong and Yang 2020): four nodes, an op on each of the six edges between them. The ops are the vertices
# here, in the order of the edges 0>1, 0>2, 1>2, 0>3, 1>3, 2>3; each reads the ops on the edges into its first node.
NASBENCH201 = SearchSpace(
    name="nasbench201",
    cells=("cell",),
    inputs=("input",),
    ops=("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3"),
    max_vertices=8,
    wiring=_matrix(8, "0>1 0>2 0>4 1>3 1>5 2>6 3>6 4>7 5>7 6>7"),
    none_op="none",
    skip_op="skip_connect",
)

SPACES = {space.name: space for space in (NAG_SPACE, NASBENCH101, NASBENCH201)}


def find_space(name: str) -> SearchSpace:
    """The entry of SPACES with that name. Raises ValueError with the names that there are."""
    if not isinstance(name, str) or name not in SPACES:
        raise ValueError(f"unknown search space {name!r}; known: {', '.join(SPACES)}")
    return SPACES[name]


def from_nasbench201(text: str) -> Genotype:
    """The genotype of an architecture of NAS-Bench-201 as the benchmark writes it, |op~0|+|op~0|op~1|+|op~0|op~1|op~2|.

    Raises ValueError with the reason.
    """
    nodes = [node.strip("|").split("|") for node in text.strip().split("+")]
    edges = [edge.partition("~") for node in nodes for edge in node]
    if [len(node) for node in nodes] != [1, 2, 3] or "".join(source for _, _, source in edges) != "001012":
        raise ValueError(f"expected an architecture as |op~0|+|op~0|op~1|+|op~0|op~1|op~2|, got {text[:80]!r}")
    labels = [*NASBENCH201.inputs, *(op for op, _, _ in edges), NASBENCH201.output]
    return Genotype(CellSpec(NASBENCH201.wiring, labels, NASBENCH201), space=NASBENCH201)


def to_nasbench201(genotype: Genotype) -> str:
    """Inverse of from_nasbench201."""
    ops = iter(genotype["cell"].ops[1:])
    return "+".join("|" + "".join(f"{next(ops)}~{source}|" for source in range(node)) for node in (1, 2, 3))


def _cell(edges: str, ops: str) -> CellSpec:
    """A cell in the notation of the tables: edges as "0>2 1>2 ...", interior ops in vertex order."""
    labels = [*NAG_SPACE.inputs, *ops.split(), NAG_SPACE.output]
    return CellSpec(_matrix(len(labels), edges), labels)


# The cells of the NAG paper (figures of sections 4.2 and 4.3).
GENOTYPES = {
    "NAG_HIGH_ACC": Genotype(
        _cell(
            "0>2 0>6 0>8 1>2 1>3 1>4 1>5 1>7 1>8 2>7 2>8 3>4 3>5 3>6 3>8 4>5 4>6 4>8 5>7 6>7 7>8",
            "seqconv3x3 seqconv5x5 maxpool3x3 seqconv5x5 seqconv5x5 seqconv5x5",
        ),
        _cell("0>2 0>3 0>5 1>2 1>3 1>4 1>5 2>3 2>5 3>5 4>5", "seqconv5x5 seqconv3x3 seqconv5x5"),
    ),
    "NAG_ENSEMBLE_A": Genotype(
        _cell(
            "0>2 0>3 0>4 0>6 1>2 1>3 1>4 1>5 2>3 2>5 2>6 3>4 3>6 3>7 4>6 4>7 5>6 6>7",
            "seqconv3x3 avgpool3x3 maxpool3x3 maxpool3x3 maxpool3x3",
        ),
        _cell("0>2 1>2 2>3", "maxpool3x3"),
    ),
    "NAG_ENSEMBLE_B": Genotype(
        _cell("0>2 0>3 0>4 1>2 2>3 3>4", "seqconv3x3 avgpool3x3"),
        _cell("0>2 0>3 1>2 2>3", "seqconv3x3"),
    ),
    "NAG_ENSEMBLE_C": Genotype(
        _cell(
            "0>2 0>5 1>2 1>3 1>4 1>5 1>6 1>7 2>3 2>4 2>5 2>6 2>7 3>5 4>5 5>6 5>7 6>7",
            "maxpool3x3 identity seqconv5x5 maxpool3x3 seqconv5x5",
        ),
        _cell("0>2 0>3 0>4 1>2 1>3 2>3 2>4 3>4", "maxpool3x3 maxpool3x3"),
    ),
}
GENOTYPES["NAG_FEW_PARAMS"] = GENOTYPES["NAG_ENSEMBLE_B"]


def _refuse_constant(name: str):
    """Python would read NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not JSON; null stands for a number that is not known")


def read_genotypes(path: str | Path, space: SearchSpace | None = None) -> list[tuple[Genotype, dict]]:
    """Read a genotype file: one genotype object or a list of them.

    Returns (genotype, the object it came from) pairs, so that whatever else the file knows of each stays at hand.
    space: that they must be of; None: the one that each names, and the published one where it names none.
    Raises ValueError naming the file and what is wrong with it, OSError when it cannot be read.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # also of numbers of thousands of digits
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    entries = data if isinstance(data, list) else [data]
    genotypes = []
    for i, entry in enumerate(entries):
        try:
            genotypes.append((Genotype.from_dict(entry, space), entry))
        except ValueError as error:
            raise ValueError(f"{path}, genotype {i}: {error}") from None
    return genotypes


def load_genotype(name: str) -> Genotype:
    """The genotype called `name`, see find_genotype. Raises ValueError saying what was expected."""
    return find_genotype(name)[0]


def find_genotype(name: str) -> tuple[Genotype, dict]:
    """The genotype called `name`, and what its file says of it: {} where there is no file.

    name: a key of GENOTYPES; "FILE.json", or "FILE.json:INDEX" for an entry of a list; "FILE.jsonl:INDEX" for a record
    of a NAS dataset, counted from 0; or a run folder for its best: best.json, else the first of the highest class in
    genotypes.json, else the genotype of result.json.
    Raises ValueError saying what was expected.
    """
    if name in GENOTYPES:
        return GENOTYPES[name], {}
    path, _, index = name.rpartition(":") if name.rpartition(":")[2].isdecimal() else (name, "", None)
    if index is None and Path(path).is_dir():
        return _best_of_run(Path(path))
    if not path.endswith((".json", ".jsonl")):
        known = ", ".join(GENOTYPES)
        raise ValueError(
            f"unknown genotype {name!r}; known: {known}, or FILE.json, FILE.json:INDEX, FILE.jsonl:INDEX, a run folder"
        )
    if not Path(path).is_file():
        raise ValueError(f"no such genotype file: {path}")
    if path.endswith(".jsonl"):
        return _record_of(path, index)
    genotypes = read_genotypes(path)
    if not genotypes:
        raise ValueError(f"{path} holds no genotypes")
    if index is None and len(genotypes) > 1:
        raise ValueError(f"{path} holds {len(genotypes)} genotypes: choose one with {path}:INDEX")
    if int(index or 0) >= len(genotypes):
        raise ValueError(f"{path} holds genotypes 0 to {len(genotypes) - 1}, not {index}")
    return genotypes[int(index or 0)]


def _record_of(path: str, index: str | None) -> tuple[Genotype, dict]:
    """A record of a NAS dataset of JSON lines, from 0; the first line of the file is its header."""
    if index is None:
        raise ValueError(f"{path} is a NAS dataset: choose a record with {path}:INDEX")
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = [line for _, line in zip(range(int(index) + 2), filter(str.strip, file), strict=False)]
    if len(lines) < int(index) + 2:
        raise ValueError(f"{path} holds records 0 to {len(lines) - 2}, not {index}")
    try:
        header, entry = (json.loads(line, parse_constant=_refuse_constant) for line in (lines[0], lines[-1]))
        if not isinstance(header, dict) or header.get("format") != "nas-dataset":
            raise ValueError('its first line is no header with "format": "nas-dataset"')
        return Genotype.from_dict(entry), entry
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, record {index}: {error}") from None


def _best_of_run(folder: Path) -> tuple[Genotype, dict]:
    """The best genotype of a run folder, see find_genotype."""
    for name in ("best.json", "genotypes.json"):
        if (folder / name).is_file() and (found := read_genotypes(folder / name)):
            return max(found, key=lambda pair: pair[1].get("labels") or [])  # the first of equal ones
    if (folder / "result.json").is_file():
        try:
            result = json.loads((folder / "result.json").read_text(encoding="utf-8-sig"))
            return Genotype.from_dict(result.get("genotype")), result
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{folder / 'result.json'} holds no genotype: {error}") from None
    raise ValueError(f"{folder} is no run folder with genotypes: it has no best.json, genotypes.json or result.json")
