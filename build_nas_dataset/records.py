"""The NAS dataset: records of (genotype, accuracy, #params, MACs, further columns).

A file is JSON lines: a header object, then one object a record. The reference's torch files can be read too.

    >>> records = read_records("data/nasdata.jsonl")
    >>> boundaries = class_boundaries([record.accuracy for record in records], num_classes=3)
    >>> class_of(0.49, boundaries)
    2
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch

from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace, find_space, read_genotypes
from models.cost import genotype_cost
from plumbing.checkpoint_files import check_tensors
from plumbing.files import atomic_file, from_json, to_json
from utils import one_line, writes

FORMAT, VERSION = "nas-dataset", 1
COLUMNS = ("id", "space", "accuracy", "params", "macs")  # those that a Record has a place for, besides the cells
TORCH_MAGIC = b"PK\x03\x04", b"\x80"  # how torch's files begin: a zip archive, or a pickle (torch before 1.6)


@dataclass(frozen=True)
class Record:
    """What is known of one genotype.

    accuracy: fraction 0..1, by the supernet or the benchmark of the header, or the column that was asked for. params,
    macs: of the stand-alone CIFAR-10 network with 6 layers, 36 channels, 32x32 pixels, or of the benchmark's; None: not
    known. columns: what else the line says, such as {"test_accuracy": 0.93}; kept on reading and writing.
    """

    id: int
    genotype: Genotype
    accuracy: float
    params: int | None = None
    macs: int | None = None
    columns: dict = field(default_factory=dict, hash=False)

    def to_dict(self) -> dict:
        numbers = {"accuracy": self.accuracy, "params": self.params, "macs": self.macs}
        known = {name: number for name, number in numbers.items() if number is not None}
        return {"id": self.id, **self.genotype.to_dict(), **known, **self.columns}


def write_records(path: str | Path, records: Iterable[Record], header: dict) -> None:
    """Write a NAS dataset, whole or not at all. header: how the accuracies came about; the search space is added."""
    records = iter(records)  # they need not fit in the memory
    first = list(islice(records, 1))
    space = {"search_space": first[0].genotype.space.name} if first else {}
    with writes(path), atomic_file(path) as file:
        file.write(to_json({"format": FORMAT, "version": VERSION, **space, **header}) + "\n")
        for record in chain(first, records):
            file.write(to_json(record.to_dict()) + "\n")


def read_header(path: str | Path) -> dict:
    """The header of a NAS dataset of JSON lines. Raises ValueError when it is none."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        header = _parse_line(path, 1, file.readline())
    if header.get("format") != FORMAT:
        raise ValueError(f'{path}, line 1: expected a header with "format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise ValueError(f"{path} has format version {header.get('version')!s:.60}, this code reads {VERSION}")
    _check_columns(path, header)
    return header


def _check_columns(path: str | Path, header: dict) -> None:
    """Raise ValueError when the header describes accuracies on images of different classes, or not as expected."""
    described = header.get("columns", {})
    if not isinstance(described, dict) or not all(isinstance(about, dict) for about in described.values()):
        raise ValueError(f'{path}, line 1: expected "columns" to be an object with an object for each column')
    of_whole = {"the file": header} | {f"the column {name}": about for name, about in described.items()}
    classes = {name: about["classes"] for name, about in of_whole.items() if about.get("classes")}
    for name, own in classes.items():
        if own != (first := next(iter(classes.items())))[1]:
            raise ValueError(
                f"{path}, line 1: {first[0]} has accuracies on images of {first[1]!s:.60}, {name} of {own!s:.60}"
            )


def read_space(path: str | Path) -> SearchSpace:
    """The search space that the header of a NAS dataset names; the published one if it names none."""
    with open(path, "rb") as file:
        if file.read(4).startswith(TORCH_MAGIC):
            return NAG_SPACE
    header = read_header(path)
    try:
        return find_space(header.get("search_space", NAG_SPACE.name))
    except ValueError as error:
        raise ValueError(f"{path}, line 1: {error}") from None


def read_records(path: str | Path, space: SearchSpace | None = None, accuracy_column: str = "accuracy") -> list[Record]:
    """The records of a NAS dataset (JSON lines, or a torch file of the reference).

    space: that the file must be of; None: whichever its header names. accuracy_column: the column that becomes the
    accuracy of the records, which all of them must have.
    Raises ValueError naming the file, the line and what is wrong; OSError when it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such NAS dataset: {path}{' is a folder' if path.is_dir() else ''}")
    named = read_space(path)
    if space is not None and space.name != named.name:
        raise ValueError(f"{path} is a NAS dataset of the space {named.name}, expected one of {space.name}")
    with open(path, "rb") as file:
        if file.read(4).startswith(TORCH_MAGIC):
            if accuracy_column != "accuracy":
                raise ValueError(f"{path} is a file of the reference, which has no column {accuracy_column}")
            return _read_reference(path)
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = enumerate(file, 1)
        next(lines)
        filled = ((number, line) for number, line in lines if line.strip())
        records = [_parse_record(path, number, line, space or named, accuracy_column) for number, line in filled]
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def _parse_line(path: Path, number: int, line: str) -> dict:
    try:
        data = from_json(line.rstrip())
    except json.JSONDecodeError as error:
        what = "is empty" if not line.strip() else f"is not JSON ({error.msg} at column {error.colno})"
        raise ValueError(f"{path}, line {number} {what}") from None
    except (ValueError, RecursionError):  # NaN, thousands of digits or brackets
        raise ValueError(f"{path}, line {number} holds a number or a nesting that is no genotype's") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}, line {number}: expected a JSON object")
    return data


def _parse_record(path: Path, number: int, line: str, space: SearchSpace, accuracy_column: str) -> Record:
    data = _parse_line(path, number, line)
    try:
        genotype = Genotype.from_dict(data, space).prune()
        if genotype is None:
            raise ValueError(f"a cell has no path from an input to the output{_or_too_many_edges(space)}")
        accuracy = data.get(accuracy_column)
        if accuracy_column != "accuracy" and accuracy is None:
            raise ValueError(f"record {data.get('id', number - 2)!s:.20} has no {accuracy_column}")
        if not _is_number(accuracy) or not 0 <= accuracy <= 1:
            raise ValueError(f"{accuracy_column} must be a fraction from 0 to 1, got {accuracy!r:.60}")
        for name in ("params", "macs"):
            if name in data and (not _is_number(data[name], int) or not 0 <= data[name] < 1e15):
                raise ValueError(f"{name} must be a whole number from 0 to 1e15, got {data.get(name)!r:.60}")
        identity = data.get("id", number - 2)
        if not _is_number(identity, int):
            raise ValueError(f"id must be a whole number, got {identity!r:.60}")
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: {error}") from None
    others = {name: value for name, value in data.items() if name not in (*COLUMNS, *space.cells)}
    return Record(identity, genotype, float(accuracy), data.get("params"), data.get("macs"), others)


def check_held_out(records: Sequence[Record], path: str | Path, cells: str | Path) -> None:
    """Raise ValueError when a cell that is to be held out is among the records of a NAS dataset, in any drawing of it.

    path: of the NAS dataset, for the message. cells: a genotype file of the same search space, such as a truth set.
    Raises ValueError for other files too, OSError when it cannot be read.
    """
    held_out = enumerate(read_genotypes(cells, records[0].genotype.space))
    places = {genotype.canonical(): i for i, (genotype, _) in held_out}
    for record in records:
        if (place := places.get(record.genotype.canonical())) is not None:
            raise ValueError(f"record {record.id} of {path} is cell {place} of {cells}, which is held out")


def _or_too_many_edges(space: SearchSpace) -> str:
    return "" if space.max_edges is None else f", or more than {space.max_edges} edges"


def _is_number(value, kinds: type | tuple = (int, float)) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _read_reference(path: Path) -> list[Record]:
    """The reference's format: a list of dicts of tensors, in torch's zip format or in its older pickle format.

    Edges have the target in the row; accuracies are percentages; #params are not to be trusted and counted anew.
    Records with a cell that is not valid, or whose inputs cannot be told, are left out, and how many is printed.
    """
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(data)
    except Exception as error:  # foreign or truncated files raise all sorts
        reason = one_line(error, 120)
        raise ValueError(f"{path} is neither JSON lines nor a torch file of tensors ({reason})") from None
    if not isinstance(data, list):
        raise ValueError(f"{path}: expected a list of records, got {type(data).__name__}")
    records, completed = [], 0
    for i, entry in enumerate(data):
        try:
            cells = [_reference_cell(entry, name) for name in ("conv", "reduc")]
            accuracy = float(entry["perf"]) / 100
            if not 0 <= accuracy <= 1:
                raise ValueError(f"perf must be a percentage from 0 to 100, got {100 * accuracy}")
            genotype = None if None in cells else Genotype(*(_completed(*cell) for cell in cells)).prune()
        except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, OverflowError, ValueError) as error:
            raise ValueError(f"{path}, record {i}: {type(error).__name__} {one_line(error, 120)}") from None
        if genotype is not None:
            records.append(Record(i, genotype, accuracy, *genotype_cost(genotype)))
            completed += any(len(_missing_inputs(ops)) > 0 for _, ops in cells)
    if not records:
        raise ValueError(f"{path} holds no valid records")
    if completed:
        print(f"{path}: {completed} of {len(data)} records lacked an unused input of a cell, which was put back")
    if len(data) > len(records):
        print(f"{path}: {len(data) - len(records)} of {len(data)} records were left out, their cells are not valid")
    return records


def _reference_cell(entry: dict, name: str) -> tuple[list[list[int]], list[str]] | None:
    """Matrix and labels of one cell ("conv" or "reduc") as they stand in a record of the reference.

    None when its inputs cannot be put back: it has neither, or it lacks one and has no place left for it.
    """
    size, most = int(entry[f"{name}_n"]), NAG_SPACE.max_vertices
    if not 1 <= size <= most:
        raise ValueError(f"{name}_n must be from 1 to {most}, got {size}")
    matrix = entry[f"{name}_edge"].T[:size, :size].round().int().tolist()
    ops = [NAG_SPACE.tokens[i] for i in entry[f"{name}_node"][:size].argmax(-1).tolist()]
    missing = len(_missing_inputs(ops))
    return None if missing == NAG_SPACE.num_inputs or size + missing > most else (matrix, ops)


def _missing_inputs(ops: list[str]) -> list[str]:
    """The inputs that a cell with these labels lacks."""
    return [name for name in NAG_SPACE.inputs if name not in ops]


def _completed(matrix: list[list[int]], ops: list[str]) -> CellSpec:
    """A cell of the reference with the input that it lacks.

    The reference's pruning deletes an input that leads nowhere, as if it were an op. The labels tell which one is
    missing; it gets back its place, without an edge.
    """
    for name in _missing_inputs(ops):
        place = NAG_SPACE.inputs.index(name)
        rows = [[*row[:place], 0, *row[place:]] for row in matrix]
        matrix = [*rows[:place], [0] * (len(matrix) + 1), *rows[place:]]
        ops = [*ops[:place], name, *ops[place:]]
    return CellSpec(matrix, ops)
