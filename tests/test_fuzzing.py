"""Fuzzing of every reader: whatever bytes a file holds, it is read or refused by ValueError or OSError, in bounds.

READERS is a table, name -> Reader(make, read, suffix): `make` gives the bytes of small valid files, `read` reads one.
Each input is a valid file with a few random changes, all from the seed (name, number), so that a failure is named by
them and can be repeated: what has failed once is kept in FAILED.
"""

import gzip
import io
import json
import math
import random
import resource
import signal
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, read_records, write_records
from build_nas_dataset.tabular import read_nasbench101, read_nasbench201
from build_nas_dataset.tfrecord import parse_metrics, parse_record
from genotypes import NAG_SPACE, read_genotypes
from models.generator import Generator
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from tests.test_tabular import PAIR, STRINGS, csv_of, metrics, payload, tfrecord
from training.image_decoding import decode_image, without_pil_warnings
from training.image_files import decode, list_part

SECONDS = 20  # of one input, on a busy machine
MEMORY = 2**30  # bytes by which the process may grow over all inputs of a reader
INTERESTING = (b"\0", b"\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\0\0\0\0", b"PK\1\2", b"1e999", b"[" * 50)


class Reader(NamedTuple):
    """make: an empty folder -> the bytes of valid files. read: reads a file. suffix: what its name ends in."""

    make: Callable[[Path], list[bytes]]
    read: Callable[[Path], object]
    suffix: str


class Hung(BaseException):
    """An input took longer than SECONDS. No Exception, so that no reader takes it for a damaged file."""


# ------------------------------------------------------------------------------------------------------ valid files


def saved(kind: str, mode: str = "RGB", **options) -> bytes:
    """A small picture in a format."""
    file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (6, 7, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


IMAGES = {  # the modes and options of each format that take other ways through its decoder
    "JPEG": [{"exif": turned()}, {"mode": "L", "progressive": True}, {"mode": "CMYK"}],
    "PNG": [{"mode": "RGBA", "exif": turned()}, {"mode": "P", "transparency": 0}, {"mode": "1"}],
    "BMP": [{}, {"mode": "RGBA"}, {"mode": "P"}],
    "WEBP": [{"exif": turned()}, {"mode": "RGBA", "lossless": True}],
    "TIFF": [{"exif": turned()}, {"compression": "tiff_lzw"}, {"mode": "L", "compression": "jpeg"}],
    "PPM": [{}, {"mode": "L"}, {"mode": "1"}],
}


def image_reader(kind: str) -> Reader:
    def read(path: Path):
        with without_pil_warnings():
            decode_image(path.read_bytes(), 8)

    return Reader(lambda folder: [saved(kind, **options) for options in IMAGES[kind]], read, f".{kind.lower()}")


def zips(folder: Path) -> list[bytes]:
    """Archives of two classes, stored and deflated, with dots before the names and without."""
    contents = []
    for compression, top in ((zipfile.ZIP_STORED, ""), (zipfile.ZIP_DEFLATED, "./train/")):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name in ("cat/0.png", "cat/1.bmp", "dog/\N{LATIN SMALL LETTER E WITH ACUTE}.png"):
                archive.writestr(top + name, saved("BMP" if name.endswith("bmp") else "PNG"))
            archive.writestr(f"{top}dog/", b"")
        contents.append(file.getvalue())
    return contents


def genotype_files(folder: Path) -> list[bytes]:
    one, two = (genotype.to_dict() for genotype in random_pool(2, seed=1))
    return [json.dumps(one).encode(), json.dumps([one, two | {"params": 5}], indent=1).encode()]


def nas_dataset(folder: Path) -> list[bytes]:
    records = [Record(i, genotype, 0.1 + i / 10, 7, 9) for i, genotype in enumerate(random_pool(3, seed=2))]
    write_records(folder / "valid", records, {"settings": {}})
    return [(folder / "valid").read_bytes()]


def reference_dataset(folder: Path) -> list[bytes]:
    """A torch file as the reference writes it."""
    entries, file = [], io.BytesIO()
    for genotype in random_pool(2, seed=3):
        entry = {"perf": torch.tensor(40.0), "params": torch.tensor(1.0)}
        for name, cell in zip(("conv", "reduc"), genotype.cells, strict=True):
            size = len(cell.ops)
            edges, nodes = torch.zeros(10, 10), torch.zeros(10, len(NAG_SPACE.tokens))
            edges[:size, :size] = torch.tensor(cell.matrix).float().T
            nodes[torch.arange(size), [NAG_SPACE.tokens.index(op) for op in cell.ops]] = 1
            entry |= {f"{name}_edge": edges, f"{name}_node": nodes, f"{name}_n": torch.tensor(size)}
        entries.append(entry)
    torch.save(entries, file)
    return [file.getvalue()]


def checkpoint(folder: Path) -> list[bytes]:
    save_checkpoint(folder / "valid", "gan", {"args": {"seed": 1}, "weights": {"w": torch.ones(3, 2)}, "epoch": 4})
    return [(folder / "valid").read_bytes()]


def records_of_nasbench101(folder: Path) -> list[bytes]:
    """What stands between the checksums of a record."""
    return [payload(), payload(PAIR, epochs=108)]


def tables_of_nasbench201(folder: Path) -> list[bytes]:
    text = "\n".join(csv_of(STRINGS[:8])).encode()
    return [text, gzip.compress(text)]


def read_some_of_nasbench201(path: Path) -> None:
    """The files here have a few of the 15,625 rows."""
    try:
        read_nasbench201(path)
    except ValueError as error:
        if "rows are missing" not in str(error):
            raise


READERS = {
    "genotypes": Reader(genotype_files, read_genotypes, ".json"),
    "nas_dataset": Reader(nas_dataset, read_records, ".jsonl"),
    "reference_dataset": Reader(reference_dataset, read_records, ".pt"),
    "checkpoint": Reader(checkpoint, lambda path: load_checkpoint(path, "gan", ("args",)), ".pt"),
    "zip": Reader(zips, lambda path: decode(list_part(path), 8, skip_bad=False), ".zip"),
    "nasbench101": Reader(lambda folder: [tfrecord(payload(), payload(PAIR))], read_nasbench101, ".tfrecord"),
    "nasbench101_record": Reader(
        records_of_nasbench101, lambda path: parse_record(path.read_bytes(), "record 0"), ".json"
    ),
    "nasbench101_metrics": Reader(
        lambda folder: [metrics(1000, 0.5, 0.25)], lambda path: parse_metrics(path.read_bytes()), ".bin"
    ),
    "nasbench201": Reader(tables_of_nasbench201, read_some_of_nasbench201, ".csv"),
    **{kind.lower(): image_reader(kind) for kind in IMAGES},
}

FAILED = (("zip", 904), ("checkpoint", 5905))  # inputs that a reader has failed on: (name, number)


# ---------------------------------------------------------------------------------------------------------- fuzzing


def changed(content: bytes, draw: random.Random) -> bytes:
    """A file with 1 to 8 changes: bits turned, bytes overwritten, parts left out, doubled, moved, or an end cut off."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4, 8))):
        at, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 16, 100))
        kind = draw.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            new = draw.choice(INTERESTING)
            data[at : at + len(new)] = new
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[at : at + length] * draw.choice((1, 1, 50))
        elif kind == 5:
            source = draw.randrange(len(data) + 1)
            data[at : at + length] = data[source : source + length]
        elif draw.random() < 0.2:
            del data[at:]
    return bytes(data)


def input_of(name: str, number: int, valid: list[bytes]) -> bytes:
    """The fuzzed input of a reader with this number. Of PNG files, every second one has its checksums put right."""
    draw = random.Random(f"{name} {number}")
    data = changed(draw.choice(valid), draw)
    return with_checksums(data) if name == "png" and number % 2 else data


def with_checksums(png: bytes) -> bytes:
    """A PNG file whose chunks have the right checksums, so that damage reaches the decoder."""
    data, at = bytearray(png), 8
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4, "big")
        at = end + 4
    return bytes(data)


def fault_of(read: Callable[[Path], object], path: Path) -> str:
    """What is wrong with how a file is read; "" when it is read, or refused in one line."""
    signal.alarm(SECONDS)
    try:
        read(path)
    except (ValueError, OSError) as error:
        longest = len(str(path)) + 200
        return f"more than a line: {str(error)[:150]!r}" if "\n" in str(error) or len(str(error)) > longest else ""
    except (Exception, Hung) as error:
        return f"{type(error).__name__} {str(error)[:150]}"
    finally:
        signal.alarm(0)
    return ""


def fuzz(name: str, numbers: Iterable[int], folder: Path) -> list[str]:
    """Read the inputs of these numbers. Returns a line for each that was neither read nor refused as it should be."""

    def hung(signum, frame):
        raise Hung

    reader, path = READERS[name], folder / f"fuzzed{READERS[name].suffix}"
    valid = reader.make(folder)
    for content in valid:
        path.write_bytes(content)
        reader.read(path)
    faults, before, memory = [], signal.signal(signal.SIGALRM, hung), peak_memory()
    try:
        for number in numbers:
            path.write_bytes(input_of(name, number, valid))
            if fault := fault_of(reader.read, path):
                faults.append(f"{name} {number}: {fault}")
    finally:
        signal.signal(signal.SIGALRM, before)
    if peak_memory() - memory > MEMORY:
        faults.append(f"{name}: {(peak_memory() - memory) / 2**20:.0f} MiB of memory")
    return faults


def peak_memory() -> int:
    """The most memory that this process has had so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(autouse=True)
def silence():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name, tmp_path):
    assert fuzz(name, range(200), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_ten_thousand_damaged_files_are_read_or_refused(name, tmp_path):
    assert fuzz(name, range(200, 10_200), tmp_path) == []


LONG = 10**6  # characters


@pytest.mark.parametrize("name", ["genotypes", "nas_dataset"])
@pytest.mark.parametrize("key", ["ops", "matrix", "accuracy", "params", "id", "format", "version"])
def test_a_value_of_a_megabyte_is_not_quoted_whole(name, key, tmp_path):
    """In the place of every value of a valid file that has this key: a label, a number of any length, a list."""
    reader = READERS[name]
    lines = reader.make(tmp_path)[0].decode().splitlines()
    for long in ("x" * LONG, ["x" * (LONG // 4)] * 4, [[0] * n for n in range(200)], 10**4000):
        changed = [json.dumps(replaced(json.loads(line), key, long)) for line in lines]
        path = tmp_path / f"long{reader.suffix}"
        path.write_text("\n".join(changed))
        assert fault_of(reader.read, path) == ""


def replaced(data, key: str, value):
    """Nested dictionaries and lists with the value in the place of what has the key."""
    if isinstance(data, dict):
        return {k: value if k == key else replaced(v, key, value) for k, v in data.items()}
    return [replaced(v, key, value) for v in data] if isinstance(data, list) else data


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("conv_n", torch.tensor(math.inf)),
        ("reduc_n", torch.tensor(math.nan)),
        ("conv_n", torch.tensor(10**12)),
        ("perf", torch.tensor(math.nan)),
        ("perf", "x" * LONG),
        ("conv_node", torch.zeros(1).expand(10**5, 10**6)),
        ("conv_edge", torch.zeros(1).expand(10**6, 10**6)),
        ("conv_edge", torch.full((10, 10), math.inf)),
    ],
)
def test_numbers_of_the_reference_that_no_cell_has_are_refused(name, value, tmp_path):
    entries = torch.load(io.BytesIO(reference_dataset(tmp_path)[0]), weights_only=True)
    entries[1][name] = value
    torch.save(entries, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=r"theirs\.pt") as error:
        read_records(tmp_path / "theirs.pt")
    assert len(str(error.value)) <= len(str(tmp_path / "theirs.pt")) + 200


def test_checkpoints_that_declare_any_sizes_are_built_or_refused_in_bounds(tmp_path):
    generator = Generator(latent_dim=4, vertex_size=6, graph_size=4)
    whole = {"generator": generator.state_dict(), "generator_config": asdict(generator.config)}
    draw, memory = random.Random(0), peak_memory()
    numbers = [name for name, value in whole["generator_config"].items() if not isinstance(value, (str, bool))]
    for _ in range(60):
        config = dict(whole["generator_config"])
        name, value = draw.choice(numbers), draw.choice([0, -1, 3, 50, 10**5, 10**12, math.inf, 0.5, "7", None])
        config[name] = (value,) * draw.choice((1, 2)) if isinstance(config[name], tuple) else value
        save_checkpoint(tmp_path / "g.pt", "gan", {**whole, "generator_config": config})
        assert fault_of(Generator.from_checkpoint, tmp_path / "g.pt") == "", config
    assert peak_memory() - memory < MEMORY / 2


@pytest.mark.parametrize(("name", "number"), FAILED)
def test_inputs_that_have_failed_do_so_no_more(name, number, tmp_path):
    assert fuzz(name, [number], tmp_path) == []
