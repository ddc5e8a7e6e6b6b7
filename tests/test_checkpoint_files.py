"""plumbing/checkpoint_files.py: checkpoints come back as they were written, or are refused by name."""

import hashlib
import math
import multiprocessing
import random
import resource
import struct
import time
import zipfile

import pytest
import torch

from plumbing.checkpoint_files import (
    CHECKPOINT_VERSION,
    DIGEST,
    check_whole,
    load_checkpoint,
    save_checkpoint,
    tensors_in,
)


def state_of_size(megabytes: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"weights": [torch.randn(10_000, generator=generator) for _ in range(round(megabytes * 25))]}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint file with a digest, and the same as older versions wrote it, with checksums only."""
    state = {"kind": "test", "version": CHECKPOINT_VERSION, **state_of_size(0.1)}
    save_checkpoint(tmp_path / "new.pt", "test", state)
    torch.save(state, tmp_path / "old.pt")
    return tmp_path / "new.pt", tmp_path / "old.pt"


def test_a_checkpoint_comes_back_with_and_without_a_digest(saved):
    new, old = (load_checkpoint(path, "test") for path in saved)
    assert all(map(torch.equal, new["weights"], old["weights"]))
    assert DIGEST in saved[0].read_bytes() and DIGEST not in saved[1].read_bytes()
    assert torch.load(saved[0], weights_only=True)["kind"] == "test"  # torch alone reads it too


def test_no_flipped_bit_goes_unnoticed(saved, tmp_path):
    """Whatever bit of a file with a digest is flipped: the file is refused by name, or it holds the same state."""
    content, rng, refusals = saved[0].read_bytes(), random.Random(0), 0
    expected = load_checkpoint(saved[0], "test")["weights"]
    places = [
        *(rng.randrange(8 * len(content)) for _ in range(60)),
        *range(8 * len(content) - 8 * 73, 8 * len(content), 7),
    ]
    for bit in places:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            found = load_checkpoint(tmp_path / "damaged.pt", "test")["weights"]
            assert all(map(torch.equal, found, expected)), bit
        except ValueError as error:
            assert str(tmp_path / "damaged.pt") in str(error)
            refusals += 1
    assert refusals >= 60  # all within what the digest covers


def test_a_flipped_bit_of_a_weight_is_noticed_without_a_digest_too(saved):
    content = bytearray(saved[1].read_bytes())
    content[len(content) // 3] ^= 1  # within the first weights
    saved[1].write_bytes(content)
    with pytest.raises(ValueError, match=r"old.pt .*a bit has flipped"):
        load_checkpoint(saved[1], "test")


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(saved, tmp_path):
    with zipfile.ZipFile(saved[1]) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, b"\0" * 10**8 if part.endswith("data/0") else old.read(part))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**6
    with pytest.raises(ValueError, match="is compressed"):
        load_checkpoint(tmp_path / "bomb.pt", "test")
    content = (tmp_path / "bomb.pt").read_bytes()[:-2]  # a digest is no signature: anyone can add the right one
    comment = DIGEST + hashlib.sha256(content + b"\0\0").hexdigest().encode()
    (tmp_path / "with_digest.pt").write_bytes(content + struct.pack("<H", len(comment)) + comment)
    with pytest.raises(ValueError, match="is compressed"):
        load_checkpoint(tmp_path / "with_digest.pt", "test")


def test_checking_takes_a_small_part_of_loading(tmp_path):
    save_checkpoint(tmp_path / "large.pt", "test", state_of_size(20))
    content = (tmp_path / "large.pt").read_bytes()
    times = {"check": [], "load": []}
    for _ in range(3):
        for name, call in (
            ("check", lambda: check_whole(content)),
            ("load", lambda: load_checkpoint(tmp_path / "large.pt", "test")),
        ):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    assert min(times["check"]) < min(times["load"])


def described(**declared) -> dict:
    """The content of a checkpoint of a network of 12 tensors with 1,200 numbers in all, which declares these sizes."""
    return {"net_config": declared, "net": {str(i): torch.zeros(10, 10) for i in range(12)}}


@pytest.mark.parametrize(
    "declared",
    [
        {"layers": 100_000},
        {"num_layers": 13},
        {"mlp_layers": -1},
        {"vertex_size": 257},
        {"label_sizes": (10, 10**9)},
        {"channels": math.nan},
        {"num_classes": 10**6},
    ],
)
def test_a_checkpoint_that_declares_more_than_it_holds_is_refused_before_anything_is_built(tmp_path, declared):
    save_checkpoint(tmp_path / "a.pt", "test", described(**declared))
    with pytest.raises(ValueError, match=rf"a\.pt is not a readable checkpoint: it declares {next(iter(declared))} "):
        load_checkpoint(tmp_path / "a.pt", "test")


def test_flags_in_a_checkpoint_are_bounded_too_and_sizes_that_its_tensors_bear_out_are_not(tmp_path):
    for args, refused in (({"layers": 13}, True), ({"batch_size": 10**6, "layers": 12}, False)):
        save_checkpoint(tmp_path / "a.pt", "test", described(layers=12, channels=256) | {"args": args})
        if refused:
            with pytest.raises(ValueError, match="it declares layers 13, expected 0 to 12"):
                load_checkpoint(tmp_path / "a.pt", "test")
        else:
            assert load_checkpoint(tmp_path / "a.pt", "test")["args"] == args


def test_a_tensor_that_claims_more_than_it_holds_and_a_knot_of_lists_are_refused_at_once(tmp_path):
    save_checkpoint(tmp_path / "a.pt", "test", {"deep": [{"w": torch.zeros(1).expand(10**6, 10**6)}]})
    with pytest.raises(ValueError, match=r"a\.pt .*claims 1000000000000 elements"):
        load_checkpoint(tmp_path / "a.pt", "test")
    knot = [torch.ones(2)]
    for _ in range(40):  # 2**40 ways to the tensor
        knot = [knot, knot]
    save_checkpoint(tmp_path / "b.pt", "test", {"knot": knot})
    assert len(list(tensors_in(load_checkpoint(tmp_path / "b.pt", "test")))) == 1


def test_a_limit_of_file_sizes_ends_a_run_with_one_line_and_leaves_the_checkpoint_whole(tmp_path, capfd):
    def save_beyond_the_limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save_checkpoint(tmp_path / "checkpoint.pt", "test", {"weights": torch.zeros(10**6)})

    save_checkpoint(tmp_path / "checkpoint.pt", "test", {"epoch": 1})
    child = multiprocessing.get_context("fork").Process(target=save_beyond_the_limit)
    child.start()
    child.join(60)
    assert child.exitcode == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "File too large" in line
    assert load_checkpoint(tmp_path, "test")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
