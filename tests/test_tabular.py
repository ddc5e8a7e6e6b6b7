"""The readers of NAS-Bench-101 and NAS-Bench-201, on small files that are written here."""

import base64
import gzip
import itertools
import json
import struct

import google_crc32c
import numpy as np
import pytest

from build_nas_dataset import tabular
from build_nas_dataset.records import read_header, read_records
from build_nas_dataset.tabular import read_nasbench101, read_nasbench201
from build_nas_dataset.tfrecord import fields, masked_crc, parse_metrics
from genotypes import NASBENCH101, NASBENCH201, to_nasbench201
from tests.small_training import refused

CHAIN = ("0" * 32, "0110" + "0010" + "0001" + "0000", "input,maxpool3x3,conv3x3-bn-relu,output")
PAIR = ("f" * 32, "010" + "001" + "000", "input,conv1x1-bn-relu,output")


# -------------------------------------------------------------------------------------- writing NAS-Bench-101


def varint(value: int) -> bytes:
    more = value >> 7
    return bytes([value & 127 | 128]) + varint(more) if more else bytes([value])


def evaluation(valid: float, test: float) -> bytes:
    numbers = {1: 4.0, 2: 9.5, 3: 0.99, 4: valid, 5: test}
    doubles = b"".join(varint(number << 3 | 1) + struct.pack("<d", x) for number, x in numbers.items() if x)
    return doubles + varint(6 << 3 | 2) + varint(3) + b"abc"


def metrics(params: int, valid: float, test: float) -> bytes:
    """ModelMetrics as the benchmark writes it: three evaluations, of which the last is the result."""
    parts = [evaluation(0.1, 0.1), evaluation(0.3, 0.3), evaluation(valid, test)]
    message = b"".join(varint(1 << 3 | 2) + varint(len(part)) + part for part in parts)
    return message + varint(2 << 3) + varint(params) + varint(3 << 3 | 1) + struct.pack("<d", 99.0)


def payload(cell=CHAIN, epochs=4, params=1000, valid=0.5, test=0.4) -> bytes:
    key, adjacency, labels = cell
    encoded = base64.b64encode(metrics(params, valid, test)).decode()
    return json.dumps([key, epochs, adjacency, labels, encoded]).encode()


def tfrecord(*payloads: bytes) -> bytes:
    """Written from the description of the format, with the checksum rotated by arithmetic of its own."""

    def crc(data: bytes) -> bytes:
        bits = f"{google_crc32c.value(data):032b}"
        return struct.pack("<I", (int(bits[-15:] + bits[:-15], 2) + 0xA282EAD8) % 2**32)

    lengths = [struct.pack("<Q", len(one)) for one in payloads]
    return b"".join(n + crc(n) + one + crc(one) for n, one in zip(lengths, payloads, strict=True))


def refusal(capsys, tmp_path, content: bytes, *flags, flag="--nasbench101") -> str:
    """The line of a run that must be refused and must write nothing."""
    source, out = tmp_path / "source", tmp_path / "nas.jsonl"
    source.write_bytes(content)
    message = refused(capsys, tabular, [flag, source, "--out", out, *flags])
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    return message.replace(str(source), "FILE")


# ---------------------------------------------------------------------------------------------- NAS-Bench-101


def test_the_checksum_is_crc32c_masked():
    assert google_crc32c.value(b"123456789") == 0xE3069283  # the check value of CRC-32C
    assert masked_crc(bytes(8)) == (((0x8C28B28A >> 15) | (0x8C28B28A << 17) & 0xFFFFFFFF) + 0xA282EAD8) % 2**32


def test_protobuf_fields_of_all_wire_types():
    message = varint(300 << 3) + varint(2**40) + varint(2 << 3 | 5) + b"1234" + varint(7 << 3 | 2) + varint(0)
    assert list(fields(message)) == [(300, 0, 2**40), (2, 5, b"1234"), (7, 2, b"")]
    assert parse_metrics(metrics(2**31 - 1, 0.25, 0.0)) == (2**31 - 1, 0.25, 0.0)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\x80",
        b"\x0b",
        b"\xff" * 11,
        varint(1 << 3 | 2) + varint(9) + b"short",
        metrics(2**31, 0.5, 0.5),
        metrics(5, float("nan"), 0.5),
        metrics(5, 0.5, 1.5),
    ],
)
def test_a_malformed_protobuf_is_refused(message):
    with pytest.raises(ValueError):
        parse_metrics(message)


def test_repeats_are_averaged_and_epochs_chosen(tmp_path):
    trainings = [(CHAIN, 4, 0.5, 0.1), (CHAIN, 4, 0.7, 0.2), (PAIR, 4, 0.4, 0.3), (CHAIN, 108, 0.9, 0.80)]
    trainings += [(PAIR, 108, 0.8, 0.6), (CHAIN, 4, 0.9, 0.3), (CHAIN, 108, 0.8, 0.90), (PAIR, 108, 0.8, 0.8)]
    path, out = tmp_path / "source", tmp_path / "nas.jsonl"
    path.write_bytes(tfrecord(*(payload(cell, n, len(cell[1]), a, b) for cell, n, a, b in trainings)))
    benchmark = read_nasbench101(path)
    assert (benchmark.epochs, benchmark.truth_epochs, benchmark.space) == (4, 108, NASBENCH101)
    assert [row.signal for row in benchmark.rows] == pytest.approx([0.7, 0.4])
    assert benchmark.noise == pytest.approx(np.std([0.5, 0.7, 0.9], ddof=1))
    assert [row.signal for row in read_nasbench101(path, 108).rows] == pytest.approx([0.85, 0.8])

    tabular.main(tabular.parse_args(["--nasbench101", str(path), "--epochs", "4", "--out", str(out)]))
    first, second = read_records(out)
    assert first.genotype["cell"].ops == tuple(CHAIN[2].split(","))
    assert first.genotype["cell"].matrix == ((0, 1, 1, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0))
    assert (first.accuracy, first.params, first.macs) == (pytest.approx(0.7), 16, None)
    assert second.columns == {"test_accuracy": pytest.approx(0.7)}
    assert read_header(out)["test_accuracy"] == "CIFAR-10 test accuracy after 108 epochs"


BAD_CELLS = {
    "unknown op 'conv7x7'": (PAIR[0], PAIR[1], "input,conv7x7,output"),
    "got 8": (PAIR[0], "01001000", PAIR[2]),
    "ops must name each of the 3": (PAIR[0], PAIR[1], "input,output"),
    "characters 0 and 1": (PAIR[0], "020001000", PAIR[2]),
    "no path": (PAIR[0], "0" * 9, PAIR[2]),
    "32 hexadecimal": ("xyz", *PAIR[1:]),
    "strictly upper": (PAIR[0], "010" + "101" + "000", PAIR[2]),
}


@pytest.mark.parametrize("message", BAD_CELLS)
def test_a_bad_cell_is_refused_by_record_and_offset(capsys, tmp_path, message):
    first = payload()
    line = refusal(capsys, tmp_path, tfrecord(first, payload(BAD_CELLS[message])))
    assert f"--nasbench101: FILE, record 1 at byte {len(first) + 16}: " in line
    assert message in line


def test_a_truncated_or_damaged_file_is_refused_by_record_and_offset(capsys, tmp_path):
    whole, size = tfrecord(payload(), payload(PAIR)), len(payload()) + 16
    for end in (size + 5, size + 100, len(whole) - 1):
        assert f"record 1 at byte {size}: the file ends" in refusal(capsys, tmp_path, whole[:end])
    for place, part in ((2, "length"), (9, "length"), (50, "content"), (size - 1, "content")):
        flipped = bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]])
        assert f"record 0 at byte 0: the checksum of the {part} is wrong" in refusal(capsys, tmp_path, flipped)
    for content in (b"{}", b"[1,2,3,4,5]", b"[" * 5000, b"\xff", json.dumps(["0" * 32, 4, "0", "input", "!"]).encode()):
        assert "record 0 at byte 0: it is not the list" in refusal(capsys, tmp_path, tfrecord(content))
    assert "65537 bytes, more than 65536" in refusal(capsys, tmp_path, tfrecord(bytes(65537)))
    assert "holds no records" in refusal(capsys, tmp_path, b"")
    assert "one of 4, 12, 36, 108, got 5" in refusal(capsys, tmp_path, tfrecord(payload(epochs=5)))


def test_rows_that_are_missing_or_differ_and_epochs_that_are_not_there_are_refused(capsys, tmp_path):
    whole = tfrecord(payload(), payload(epochs=108), payload(PAIR))
    assert "rows are missing: the cell " + "f" * 32 + " has no record of 108 epochs" in refusal(capsys, tmp_path, whole)
    line = refusal(capsys, tmp_path, whole, "--epochs", 12)
    assert "has no accuracies after 12 epochs, only after 4, 108" in line
    assert "another form" in refusal(capsys, tmp_path, tfrecord(payload(), payload((CHAIN[0], *PAIR[1:]))))
    assert "--sample: FILE has 1 cells, got 2" in refusal(capsys, tmp_path, tfrecord(payload()), "--sample", 2)


# ---------------------------------------------------------------------------------------------- NAS-Bench-201

STRINGS = [
    f"|{a}~0|+|{b}~0|{c}~1|+|{d}~0|{e}~1|{f}~2|" for a, b, c, d, e, f in itertools.product(NASBENCH201.ops, repeat=6)
]


def csv_of(strings: list[str]) -> list[str]:
    lines = [f"{i},{text},{i / 200},{i / 300},{i / 250}" for i, text in enumerate(strings)]
    return ["index,cell,cifar10_val_12,cifar10_test_12,cifar10_test_200", *lines]


def test_nasbench201_is_read_whole(tmp_path):
    path, out = tmp_path / "table.csv.gz", tmp_path / "nas.jsonl"
    path.write_bytes(gzip.compress("\n".join(csv_of(STRINGS)).encode()))
    benchmark = read_nasbench201(path)
    assert [to_nasbench201(benchmark.genotype(i)) for i in (0, 777, 15624)] == [STRINGS[i] for i in (0, 777, 15624)]
    assert (benchmark.rows[777].signal, benchmark.rows[777].truth) == pytest.approx((0.03885, 0.03108))
    assert len(list(benchmark.valid_rows())) == 15625 - 341

    tabular.main(tabular.parse_args(["--nasbench201", str(path), "--sample", "50", "--out", str(out)]))
    records = read_records(out, NASBENCH201)
    assert len({STRINGS.index(to_nasbench201(record.genotype)) for record in records}) == 50
    for record in records:
        i = STRINGS.index(to_nasbench201(record.genotype))
        assert (record.accuracy, record.params) == (pytest.approx(i / 20000), None)
        assert record.columns == {"test_accuracy": pytest.approx(i / 25000)}


def test_a_bad_table_of_nasbench201_is_refused_by_its_line(capsys, tmp_path):
    lines = csv_of(STRINGS[:20])
    changes = {
        "line 3: unknown op": (2, lines[2].replace("none", "conv", 1)),
        "line 3: expected an architecture as": (2, "1,|none~0|,1,2,3"),
        "line 4: the architecture": (3, lines[2]),
        "line 5: expected 5 columns, got 3": (4, "4,|none~0|+|none~0|none~1|+|none~0|none~1|none~2|,5"),
        "line 6: an accuracy must be a number from 0 to 100 %, got 'nan'": (5, lines[5].rpartition(",")[0] + ",nan"),
        "line 1: expected the columns cell, cifar10_val_N": (0, "index,cell"),
        "rows are missing: it has 20 of the 15625": (0, lines[0]),
    }
    for message, (number, line) in changes.items():
        text = "\n".join([*lines[:number], line, *lines[number + 1 :]])
        assert message in refusal(capsys, tmp_path, text.encode(), flag="--nasbench201")
    long = f'"{"x" * 200_000}"'.encode()
    assert "line 1: field larger than" in refusal(capsys, tmp_path, long, flag="--nasbench201")
    packed = gzip.compress("\n".join(lines).encode())
    assert "is not a whole gzip file" in refusal(capsys, tmp_path, packed[:100], flag="--nasbench201")
    assert "is not a text file" in refusal(capsys, tmp_path, b"\xff\xff", flag="--nasbench201")
    assert "only after 12" in refusal(
        capsys, tmp_path, "\n".join(lines).encode(), "--epochs", 200, flag="--nasbench201"
    )
