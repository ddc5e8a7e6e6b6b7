"""Read NAS-Bench-101 and NAS-Bench-201, and write them as NAS datasets.

    python -m build_nas_dataset.tabular --nasbench101 nasbench_full.tfrecord --epochs 4 --sample 1000 --out nas.jsonl
    python -m build_nas_dataset.tabular --nasbench201 accuracies.csv.gz --out nas.jsonl

The signal, the validation accuracy after --epochs epochs, becomes the accuracy of a record. Its column test_accuracy is
the truth: the test accuracy after the largest number of epochs that the file has. NAS-Bench-101's number of trainable
parameters becomes params. Means are taken over the repeated trainings of a cell.

NAS-Bench-101 is read without TensorFlow and protobuf, see tfrecord.py, record by record, so that its 2 GB need little
memory. NAS-Bench-201 is read from a CSV file (.csv or .csv.gz) with the columns `cell`, the benchmark's string of an
architecture, and cifar10_val_N and cifar10_test_N, accuracies in per cent after N epochs. Cells without a path from the
input to the output are cells of the benchmark, but not of a NAS dataset: they are left out there.
"""

import argparse
import csv
import gzip
import hashlib
import math
import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from build_nas_dataset.records import Record, write_records
from build_nas_dataset.tfrecord import EPOCHS, Measurement, read_measurements
from genotypes import NASBENCH101, NASBENCH201, CellSpec, Genotype, SearchSpace, from_nasbench201
from plumbing.flags import ArgumentParser, add_common_flags, number
from utils import fail, shown, user_input, writes

MOST_CSV_BYTES = 2**28  # unpacked, so that a small .gz cannot fill the memory
PER_CELL = 4 * len(EPOCHS)  # numbers that are kept of a cell
TOKENS = {label: i for i, label in enumerate(NASBENCH101.tokens)}


@dataclass(frozen=True, slots=True)
class Row:
    """What a benchmark says of one cell. Accuracies are fractions; they are means over repeated trainings.

    cell: the cell in few bytes, see Benchmark.genotype. repeats: trainings that the signal is the mean of.
    spread: the unbiased variance of the signal between repeats; 0 where there is one.
    """

    cell: bytes
    signal: float
    truth: float
    params: int | None = None
    repeats: int = 1
    spread: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """A tabular benchmark: every cell of it, with its accuracies.

    epochs, truth_epochs: after which the signal and the truth were measured. sha256: of the file.
    """

    space: SearchSpace
    rows: list[Row]
    epochs: int
    truth_epochs: int
    sha256: str

    def genotype(self, row: int) -> Genotype:
        """The genotype of a row: bytes are the token ids of its vertices and, where edges are free, its matrix."""
        packed, space = self.rows[row].cell, self.space
        size = space.max_vertices if space.wiring else _vertices_of(packed)
        ops = [space.tokens[i] for i in packed[:size]]
        bits = packed[size:]
        matrix = space.wiring or [list(bits[i : i + size]) for i in range(0, len(bits), size)]
        return Genotype(CellSpec(matrix, ops, space), space=space)

    def valid_rows(self) -> Iterator[int]:
        """The rows whose cell has a path from the input to the output; of NAS-Bench-101, others are not read at all."""
        fixed = self.space.wiring is not None
        return (row for row in range(len(self.rows)) if not fixed or self.genotype(row).is_valid)

    @property
    def noise(self) -> float | None:
        """The standard deviation of the signal between trainings of a cell, pooled; None: no cell has two."""
        weights = [row.repeats - 1 for row in self.rows]
        if not any(weights):
            return None
        return math.sqrt(sum(w * row.spread for w, row in zip(weights, self.rows, strict=True)) / sum(weights))

    def header(self, file: str) -> dict:
        """What the header of a NAS dataset says of it."""
        source = {"benchmark": self.space.name, "file": file, "sha256": self.sha256}
        accuracy = f"CIFAR-10 validation accuracy after {self.epochs} epochs"
        truth = f"CIFAR-10 test accuracy after {self.truth_epochs} epochs"
        return {"source": source, "accuracy": accuracy, "test_accuracy": truth, "noise_of_accuracy": self.noise}


def _vertices_of(packed: bytes) -> int:
    """V, of V token ids and V x V entries of a matrix."""
    return math.isqrt(len(packed) + 1)  # V * V + V lies between V squared and V + 1 squared


# ----------------------------------------------------------------------------------------------- NAS-Bench-101


class _Cells:
    """What has been read of each cell, in arrays: 423,624 cells as objects would take more than a gigabyte.

    numbers: a cell's place in the others, by its hash. packed: see Benchmark.genotype. forms: hashes of adjacency,
    labels and #params as the file has them. sums: for each cell and each of EPOCHS, of its trainings, their number and
    the sums of validation accuracies, of their squares, and of test accuracies.
    """

    def __init__(self):
        self.numbers: dict[bytes, int] = {}
        self.packed: list[bytes] = []
        self.params, self.forms, self.sums = array("q"), array("q"), array("d")

    def add(self, one: Measurement) -> None:
        """Raises ValueError for a cell that is none, or that was another one before."""
        form = hash((one.adjacency, *one.labels, one.params))
        number = self.numbers.setdefault(one.hash, len(self.packed))
        if number == len(self.packed):
            self.packed.append(_pack(one))
            self.params.append(one.params)
            self.forms.append(form)
            self.sums.extend([0.0] * PER_CELL)
        elif self.forms[number] != form:
            raise ValueError(f"the cell {one.hash.hex()} had another form or number of parameters before")
        place, accuracy = number * PER_CELL + 4 * EPOCHS.index(one.epochs), one.validation_accuracy
        for i, value in enumerate((1.0, accuracy, accuracy**2, one.test_accuracy)):
            self.sums[place + i] += value

    def rows(self, epochs: int, truth_epochs: int) -> Iterator[Row]:
        """Raises ValueError when a cell has no training of so many epochs."""
        keys = list(self.numbers)
        for index, packed in enumerate(self.packed):
            place = index * PER_CELL
            signal, truth = (place + 4 * EPOCHS.index(wanted) for wanted in (epochs, truth_epochs))
            for at, wanted in ((signal, epochs), (truth, truth_epochs)):
                if not self.sums[at]:
                    raise ValueError(f"rows are missing: the cell {keys[index].hex()} has no record of {wanted} epochs")
            n, total, squares, _ = self.sums[signal : signal + 4]
            spread = max(0.0, squares - total**2 / n) / (n - 1) if n > 1 else 0.0
            test = self.sums[truth + 3] / self.sums[truth]
            yield Row(packed, total / n, test, self.params[index], int(n), spread)


def _pack(one: Measurement) -> bytes:
    """The cell of a record in few bytes. Raises ValueError when it is no valid cell of NAS-Bench-101."""
    size = math.isqrt(len(one.adjacency))
    if size * size != len(one.adjacency):
        raise ValueError(f"an adjacency has V x V characters, got {len(one.adjacency)}")
    matrix = [[int(c) for c in one.adjacency[i * size : (i + 1) * size]] for i in range(size)]
    cell = CellSpec(matrix, one.labels, NASBENCH101)
    if not cell.is_valid:
        raise ValueError("the cell has no path from the input to the output, or more than 9 edges")
    return bytes([*(TOKENS[label] for label in cell.ops), *(entry for row in cell.matrix for entry in row)])


def read_nasbench101(path: str | Path, epochs: int | None = None) -> Benchmark:
    """NAS-Bench-101 from the benchmark's file. epochs: of the signal; None: the fewest that there are.

    Cells are told apart by the hash that the file gives them. Raises ValueError naming the record and its place in the
    file, or the epochs that there are, or the cell that lacks a record.
    """
    cells, present, digest = _Cells(), set(), hashlib.sha256()
    for one in read_measurements(path, digest):
        try:
            cells.add(one)
        except ValueError as error:
            raise ValueError(f"{path}, {one.place}: {error}") from None
        present.add(one.epochs)
    epochs = _check_epochs(path, epochs, present)
    try:
        rows = list(cells.rows(epochs, max(present)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Benchmark(NASBENCH101, rows, epochs, max(present), digest.hexdigest())


def _check_epochs(path: str | Path, epochs: int | None, present: set[int]) -> int:
    """The epochs of the signal. Raises ValueError when the file does not have those asked for."""
    if not present:
        raise ValueError(f"{path} holds no records")
    if epochs is not None and epochs not in present:
        raise ValueError(
            f"{path} has no accuracies after {epochs} epochs, only after {', '.join(map(str, sorted(present)))}"
        )
    return min(present) if epochs is None else epochs


# ----------------------------------------------------------------------------------------------- NAS-Bench-201


def read_nasbench201(path: str | Path, epochs: int | None = None) -> Benchmark:
    """NAS-Bench-201 from a CSV file. epochs: of the signal; None: the fewest that there are.

    All 15,625 architectures must be there once. Raises ValueError naming the line and what is wrong.
    """
    digest, rows = hashlib.sha256(), {}
    lines = _rows_of(path, digest)
    _, head = next(lines, (1, []))
    columns = {name.strip(): i for i, name in enumerate(head)}
    found = {int(match[1]) for name in columns if (match := re.fullmatch(r"cifar10_val_(\d{1,4})", name))}
    after = {int(match[1]) for name in columns if (match := re.fullmatch(r"cifar10_test_(\d{1,4})", name))}
    if "cell" not in columns or not found or not after:
        raise ValueError(f"{path}, line 1: expected the columns cell, cifar10_val_N and cifar10_test_N")
    epochs = _check_epochs(path, epochs, found)
    names = ("cell", f"cifar10_val_{epochs}", f"cifar10_test_{max(after)}")
    for row, line in lines:
        try:
            text, *accuracies = (line[columns[name]] for name in names)
            ops = from_nasbench201(text)["cell"].ops
            packed = bytes(map(NASBENCH201.token_id.__getitem__, ops))
            if packed in rows:
                raise ValueError(f"the architecture {text} is there twice")
            rows[packed] = Row(packed, *map(_fraction, accuracies))
        except IndexError:
            raise ValueError(f"{path}, line {row}: expected {len(columns)} columns, got {len(line)}") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {row}: {error}") from None
    wanted = len(NASBENCH201.ops) ** 6
    if len(rows) < wanted:
        raise ValueError(f"{path}: rows are missing: it has {len(rows)} of the {wanted} architectures")
    return Benchmark(NASBENCH201, list(rows.values()), epochs, max(after), digest.hexdigest())


def _rows_of(path: str | Path, digest) -> Iterator[tuple[int, list[str]]]:
    """The number of each line and its entries, without empty lines. Raises ValueError where it is no CSV file."""
    lines = csv.reader(_lines_of(path, digest))
    try:
        yield from ((lines.line_num, line) for line in lines if line)
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from None


def _lines_of(path: str | Path, digest) -> Iterator[str]:
    """The lines of a text file, perhaps packed by gzip. digest: is updated with the file."""
    try:
        content = Path(path).read_bytes()
        digest.update(content)
        if content.startswith(b"\x1f\x8b"):
            with gzip.open(path) as file:
                content = file.read(MOST_CSV_BYTES + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error})") from None
    if len(content) > MOST_CSV_BYTES:
        raise ValueError(f"{path} is larger than {MOST_CSV_BYTES >> 20} MiB")
    try:
        yield from content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None


def _fraction(text: str) -> float:
    """A percentage as a fraction."""
    value = float(text) / 100
    if not 0 <= value <= 1:
        raise ValueError(f"an accuracy must be from 0 to 100 %, got {text[:40]!r}")
    return value


READERS = {NASBENCH101.name: read_nasbench101, NASBENCH201.name: read_nasbench201}


# ------------------------------------------------------------------------------------------------------- script


def records_of(benchmark: Benchmark, rows: list[int]) -> Iterator[Record]:
    """Records of some rows, one after the other; all at once would fill the memory."""
    for number_, row in enumerate(rows):
        one, genotype = benchmark.rows[row], benchmark.genotype(row).prune()
        yield Record(number_, genotype, one.signal, one.params, None, {"test_accuracy": one.truth})


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    group = parser.add_argument_group("benchmark")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--nasbench101", metavar="FILE", help="nasbench_full.tfrecord, nasbench_only108.tfrecord, or alike"
    )
    which.add_argument("--nasbench201", metavar="FILE", help="CSV file, see above")
    text = "of the accuracy that records get; default: the fewest that the file has"
    group.add_argument("--epochs", type=number(int, 1), help=text)
    group.add_argument("--sample", type=number(int, 1), help="write so many cells, drawn at random; default: all")
    group.add_argument("--out", required=True, help="the NAS dataset to write")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    name = NASBENCH101.name if args.nasbench101 else NASBENCH201.name
    path, flag = getattr(args, name), f"--{name}"
    with user_input(flag):
        benchmark = READERS[name](path, args.epochs)
    rows = list(benchmark.valid_rows())
    left_out = len(benchmark.rows) - len(rows)
    if args.sample is not None:
        if args.sample > len(rows):
            fail(f"--sample: {path} has {len(rows)} cells, got {args.sample}")
        chosen = np.random.default_rng(args.seed).choice(len(rows), args.sample, replace=False)
        rows = [rows[i] for i in sorted(chosen)]
    with writes(args.out):
        write_records(args.out, records_of(benchmark, rows), benchmark.header(Path(path).name))
    print(f"{shown(args.out)}: {len(rows)} of the {len(benchmark.rows)} cells of {path}; "
          f"{left_out} have no path from the input to the output")  # fmt: skip
    noise = (
        "" if benchmark.noise is None else f" (standard deviation between trainings of a cell: {benchmark.noise:.4f})"
    )
    print(f"accuracy: validation accuracy after {benchmark.epochs} epochs{noise}; "
          f"test_accuracy: after {benchmark.truth_epochs} epochs")  # fmt: skip


if __name__ == "__main__":
    main(parse_args())
