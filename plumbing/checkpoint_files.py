"""Checkpoint files: written with a digest, read without running any code, and refused by name when not whole."""

import contextlib
import hashlib
import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from plumbing.files import atomic_file
from utils import one_line, writes

CHECKPOINT_VERSION = 2
DIGEST = b"sha256:"  # a checkpoint ends with this and the hash of what stands before


def save_checkpoint(path: str | Path, kind: str, state: dict) -> None:
    """Write a dict of tensors and builtins and the digest of the file. kind: what it is of ("gan", "cifar", ...)."""
    with writes(path), atomic_file(path, "wb") as file:
        hashed = HashedFile(file)
        torch.save({"kind": kind, "version": CHECKPOINT_VERSION, **state}, hashed)
        comment = DIGEST + hashed.hash.hexdigest().encode()
        file.seek(-2, os.SEEK_END)  # a zip file ends with the length of its comment, here 0, and the comment
        file.write(struct.pack("<H", len(comment)) + comment)


class HashedFile:
    """A file that is written from its start to its end, with the SHA-256 hash of what was written so far."""

    def __init__(self, file: BinaryIO):
        self.file, self.hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def check_whole(content: bytes) -> None:
    """Raise ValueError when the content of a checkpoint file is not what save_checkpoint wrote: a bit may have flipped.

    Files without a digest, of other programs or older versions, are checked by the checksums of their parts. In any
    file, a part that is compressed is refused: torch compresses nothing, and a few bytes could stand for gigabytes.
    """
    end = content.rfind(DIGEST, -len(DIGEST) - 64)
    has_digest = end > 2 and content[end - 2 : end] == struct.pack("<H", len(content) - end)
    if has_digest:
        found = hashlib.sha256(memoryview(content)[: end - 2])
        found.update(b"\0\0")
        if found.hexdigest().encode() != content[end + len(DIGEST) :]:
            raise ValueError("its content is not what was written: a bit has flipped")
    if not zipfile.is_zipfile(io.BytesIO(content)):  # torch says what is wrong
        return
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if packed := [part.filename for part in archive.infolist() if part.compress_type != zipfile.ZIP_STORED]:
            raise ValueError(f"its part {packed[0]} is compressed, which torch never does")
        if sum(part.file_size for part in archive.infolist()) > len(content):
            raise ValueError("its parts are larger than the file")
        if not has_digest and (damaged := archive.testzip()):
            raise ValueError(f"the checksum of its part {damaged} is wrong: a bit has flipped")


MOST_LAYERS = 1000  # of a network, by a flag
LARGEST = 10**6  # width of a layer, by a flag
WIDTHS = re.compile("channels|latent_dim|.*(emb|hidden|embedding|vertex|graph|label)_sizes?")


def tensors_in(value) -> Iterator[torch.Tensor]:
    """All tensors in nested dictionaries, lists and tuples, each once."""
    seen, waiting = set(), [value]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, torch.Tensor):
            yield part
        elif isinstance(part, (dict, list, tuple)):
            waiting += part.values() if isinstance(part, dict) else part


def check_tensors(value) -> None:
    """Raise ValueError when a tensor, anywhere in what a file held, claims more elements than the file has for it."""
    for tensor in tensors_in(value):
        if tensor.layout != torch.strided or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"a tensor in it claims {tensor.numel()} elements, which it does not hold")


def check_declared(state: dict) -> None:
    """Raise ValueError when a checkpoint declares networks that it cannot hold, before anything is built.

    state: its content. The numbers in its flags, its settings and its dictionaries ..._config are looked at: there is a
    tensor for each layer, beyond 10; and a width w, beyond 256, takes matrices of the order of w x w numbers.
    """
    described = {key: value for key, value in state.items() if isinstance(value, dict) and str(key).endswith("_config")}
    held = {tensor.untyped_storage().data_ptr(): tensor.numel() for tensor in tensors_in(state)} if described else {}
    sizes = list(held.values())
    layers = min(MOST_LAYERS, max(10, len(sizes))) if described else MOST_LAYERS
    width = max(256, math.isqrt(16 * sum(sizes))) if described else LARGEST
    described |= {key: state[key] for key in ("args", "settings") if isinstance(state.get(key), dict)}
    for name, value in ((str(name), value) for declared in described.values() for name, value in declared.items()):
        high = layers if name.endswith("layers") else width if WIDTHS.fullmatch(name) else math.inf
        high = max(256, *sizes) if name == "num_classes" and sizes else high
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(number, (int, float)) and not 0 <= number <= high:
                raise ValueError(f"it declares {name[:40]} {str(number)[:40]}, expected 0 to {high:g}")


def load_checkpoint(path: str | Path, kind: str, keys: tuple[str, ...] = ()) -> dict:
    """Read a checkpoint onto the CPU, without running any code from it.

    path: the file, or a run folder that holds checkpoint.pt.
    keys: what it has to hold.
    Raises ValueError naming the file when it is not a whole checkpoint of that kind and of this version.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no such checkpoint: {path}")
    try:
        content = path.read_bytes()
        check_whole(content)
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        check_tensors(state)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is not a readable checkpoint (it holds more than tensors and plain data)") from None
    except Exception as error:  # truncated or foreign files: torch raises all sorts
        reason = "truncated, or not a torch file"
        if not isinstance(error, (RuntimeError, EOFError)):
            reason = " ".join(str(error).split())[:120]  # it may quote what the file holds
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from None
    if not isinstance(state, dict) or "kind" not in state:
        raise ValueError(f"{path} is not a checkpoint of this project")
    if state["kind"] != kind:
        raise ValueError(f"{path} is a checkpoint of kind {str(state['kind'])[:80]}, expected kind {kind}")
    if state.get("version") != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} has format version {str(state.get('version'))[:80]}, this code reads {CHECKPOINT_VERSION}"
        )
    try:
        check_declared(state)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from None
    if missing := [key for key in keys if key not in state]:
        raise ValueError(f"{path} is not a whole {kind} checkpoint: it lacks {', '.join(missing)}")
    return state


@contextlib.contextmanager
def of_this_version(path: str | Path) -> Iterator[None]:
    """Within it, networks are built and filled from a checkpoint. Raises ValueError when they have other parts now."""
    try:
        yield
    except (RuntimeError, TypeError, ArithmeticError) as error:
        raise ValueError(f"{path} is of another version of these networks ({one_line(error, 120)})") from None
