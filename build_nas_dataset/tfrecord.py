"""The file of NAS-Bench-101, read record by record: TFRecord, JSON and protobuf without TensorFlow or protobuf.

A TFRecord is a sequence of records: the length of the payload (8 bytes, little endian), the masked CRC-32C of these 8
bytes (4 bytes), the payload, and its masked CRC-32C. A payload of NAS-Bench-101 is a JSON list: hash of the cell,
number of epochs, adjacency row by row as characters 0 and 1, labels joined by commas, and, in base64, a protobuf
message with the measurements of one training:

    message ModelMetrics {                              message EvaluationData {
      repeated EvaluationData evaluation_data = 1;        double current_epoch = 1;  training_time = 2;
      int32 trainable_parameters = 2;                     double train_accuracy = 3;  validation_accuracy = 4;
      double total_time = 3;                              double test_accuracy = 5;  string checkpoint_path = 6;
    }                                                   }

A training is evaluated at the start, in the middle and at the end; the last evaluation counts.
"""

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import google_crc32c

MOST_BYTES = 2**16  # of a record; those of NAS-Bench-101 have about 350
EPOCHS = (4, 12, 36, 108)
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # the wire types of protobuf


class Measurement(NamedTuple):
    """One record of NAS-Bench-101: a training of a cell.

    hash: 16 bytes that stand for the cell. adjacency: V x V characters 0 and 1, [source][target]. labels: V of them.
    Accuracies are fractions. place: the number and the byte offset of the record, for messages.
    """

    hash: bytes
    epochs: int
    adjacency: str
    labels: list[str]
    params: int
    validation_accuracy: float
    test_accuracy: float
    place: str


def read_measurements(path: str | Path, digest=None) -> Iterator[Measurement]:
    """The records of a file, one after the other. digest: an object of hashlib, updated with the file.

    Raises ValueError naming the file, the number of the record (from 0) and its byte offset.
    """
    digest = hashlib.sha256() if digest is None else digest
    with open(path, "rb", buffering=2**20) as file:
        offset = count = 0
        while head := file.read(12):
            place = f"record {count} at byte {offset}"
            try:
                payload = _payload(file, head, digest)
                yield parse_record(payload, place)
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {error}") from None
            offset, count = offset + len(payload) + 16, count + 1


def masked_crc(data: bytes) -> int:
    """The CRC-32C as TFRecord stores it: rotated to the right by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _payload(file, head: bytes, digest) -> bytes:
    """The payload of the record that begins with these 12 bytes. Raises ValueError when it is not whole."""
    if len(head) < 12:
        raise ValueError("the file ends within a record; was it copied whole?")
    length, checksum = struct.unpack("<QI", head)
    if masked_crc(head[:8]) != checksum:
        raise ValueError("the checksum of the length is wrong; this is no TFRecord file, or it is damaged")
    if length > MOST_BYTES:
        raise ValueError(f"it has {length} bytes, more than {MOST_BYTES}, and is none of NAS-Bench-101")
    rest = file.read(length + 4)
    if len(rest) < length + 4:
        raise ValueError("the file ends within a record; was it copied whole?")
    payload = rest[:-4]
    if masked_crc(payload) != int.from_bytes(rest[-4:], "little"):
        raise ValueError("the checksum of the content is wrong; the file is damaged")
    digest.update(head)
    digest.update(rest)
    return payload


def parse_record(payload: bytes, place: str) -> Measurement:
    """The content of a record. Raises ValueError with what is wrong."""
    try:
        key, epochs, adjacency, labels, encoded = json.loads(payload)
        if not (isinstance(epochs, int) and all(isinstance(x, str) for x in (key, adjacency, labels, encoded))):
            raise ValueError
        metrics = base64.b64decode(encoded, validate=True)
    except (ValueError, TypeError, RecursionError, binascii.Error):
        raise ValueError("it is not the list [hash, epochs, adjacency, labels, metrics] of NAS-Bench-101") from None
    if len(key) != 32 or not set(key) <= set("0123456789abcdef"):
        raise ValueError(f"the hash must have 32 hexadecimal digits, got {key[:40]!r}")
    if epochs not in EPOCHS:
        raise ValueError(f"the number of epochs must be one of {', '.join(map(str, EPOCHS))}, got {epochs}")
    if set(adjacency) - {"0", "1"}:
        raise ValueError(f"an adjacency has characters 0 and 1 only, got {adjacency[:60]!r}")
    params, validation_accuracy, test_accuracy = parse_metrics(metrics)
    return Measurement(
        bytes.fromhex(key), epochs, adjacency, labels.split(","), params, validation_accuracy, test_accuracy, place
    )


def parse_metrics(data: bytes) -> tuple[int, float, float]:
    """#params, and validation and test accuracy of the last evaluation, of a message ModelMetrics.

    Raises ValueError when it is no such message.
    """
    params = last = None
    for number, wire_type, value in fields(data):
        if (number, wire_type) == (1, BYTES):
            last = value
        elif (number, wire_type) == (2, VARINT):
            params = value
    if last is None or params is None or params >= 2**31:
        raise ValueError("its metrics lack an evaluation or the number of trainable parameters")
    # protobuf leaves out a number that is 0
    found = {number: value for number, wire_type, value in fields(last) if wire_type == FIXED64}
    accuracies = [struct.unpack("<d", found.get(number, bytes(8)))[0] for number in (4, 5)]
    for accuracy in accuracies:
        if not 0 <= accuracy <= 1:
            raise ValueError(f"an accuracy must be from 0 to 1, got {accuracy}")
    return params, *accuracies


def fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """The fields of a protobuf message: number, wire type, and value (an int for varints, else the bytes).

    Raises ValueError when the message is malformed.
    """
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire_type = key & 7
        if wire_type == VARINT:
            value, position = _varint(data, position)
        else:
            if wire_type == BYTES:
                length, position = _varint(data, position)
            elif wire_type in (FIXED64, FIXED32):
                length = 8 if wire_type == FIXED64 else 4
            else:
                raise ValueError(f"its metrics are no protobuf message (wire type {wire_type})")
            value, position = data[position : position + length], position + length
            if position > len(data):
                raise ValueError("its metrics are cut off")
        yield key >> 3, wire_type, value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number of seven bits a byte, lowest first, at a position, and the position after it."""
    value = 0
    for i in range(10):
        if position + i >= len(data):
            raise ValueError("its metrics are cut off")
        byte = data[position + i]
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    raise ValueError("its metrics hold a number of more than ten bytes")
