"""utils.py: checkpoints, run folders, flags and signals, each against damage that is done here."""

import random
import time
import zipfile

import pytest
import torch

import utils


def state_of_size(megabytes: float) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {"weights": [torch.randn(10_000, generator=generator) for _ in range(round(megabytes * 25))]}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint file with a digest, and the same as older versions wrote it, with checksums only."""
    state = {"kind": "test", "version": utils.CHECKPOINT_VERSION, **state_of_size(0.1)}
    utils.save_checkpoint(tmp_path / "new.pt", "test", state)
    torch.save(state, tmp_path / "old.pt")
    return tmp_path / "new.pt", tmp_path / "old.pt"


# --------------------------------------------------------------------------------------------- damaged checkpoints


def test_a_checkpoint_comes_back_with_and_without_a_digest(saved):
    new, old = (utils.load_checkpoint(path, "test") for path in saved)
    assert all(map(torch.equal, new["weights"], old["weights"]))
    assert utils.DIGEST in saved[0].read_bytes() and utils.DIGEST not in saved[1].read_bytes()
    assert torch.load(saved[0], weights_only=True)["kind"] == "test"  # torch alone reads it too


def test_no_flipped_bit_goes_unnoticed(saved, tmp_path):
    """Whatever bit of a file with a digest is flipped: the file is refused by name, or it holds the same state."""
    content, rng, refusals = saved[0].read_bytes(), random.Random(0), 0
    expected = utils.load_checkpoint(saved[0], "test")["weights"]
    places = [
        *(rng.randrange(8 * len(content)) for _ in range(60)),
        *range(8 * len(content) - 8 * 73, 8 * len(content), 7),
    ]
    for bit in places:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            found = utils.load_checkpoint(tmp_path / "damaged.pt", "test")["weights"]
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
        utils.load_checkpoint(saved[1], "test")


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(saved, tmp_path):
    with zipfile.ZipFile(saved[1]) as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, b"\0" * 10**8 if part.endswith("data/0") else old.read(part))
    assert (tmp_path / "bomb.pt").stat().st_size < 10**6
    with pytest.raises(ValueError, match="is compressed"):
        utils.load_checkpoint(tmp_path / "bomb.pt", "test")


def test_checking_takes_a_small_part_of_loading(tmp_path):
    utils.save_checkpoint(tmp_path / "large.pt", "test", state_of_size(20))
    content = (tmp_path / "large.pt").read_bytes()
    times = {"check": [], "load": []}
    for _ in range(3):
        for name, call in (
            ("check", lambda: utils.check_whole(content)),
            ("load", lambda: utils.load_checkpoint(tmp_path / "large.pt", "test")),
        ):
            started = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - started)
    assert min(times["check"]) < min(times["load"])
