"""utils.py: checkpoints, run folders, flags and signals, each against damage that is done here."""

import argparse
import math
import multiprocessing
import os
import platform
import random
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import utils
from genotypes import read_genotypes

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")


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
    utils.save_checkpoint(tmp_path / "a.pt", "test", described(**declared))
    with pytest.raises(ValueError, match=rf"a\.pt is not a readable checkpoint: it declares {next(iter(declared))} "):
        utils.load_checkpoint(tmp_path / "a.pt", "test")


def test_flags_in_a_checkpoint_are_bounded_too_and_sizes_that_its_tensors_bear_out_are_not(tmp_path):
    for args, refused in (({"layers": 13}, True), ({"batch_size": 10**6, "layers": 12}, False)):
        utils.save_checkpoint(tmp_path / "a.pt", "test", described(layers=12, channels=256) | {"args": args})
        if refused:
            with pytest.raises(ValueError, match="it declares layers 13, expected 0 to 12"):
                utils.load_checkpoint(tmp_path / "a.pt", "test")
        else:
            assert utils.load_checkpoint(tmp_path / "a.pt", "test")["args"] == args


def test_a_tensor_that_claims_more_than_it_holds_and_a_knot_of_lists_are_refused_at_once(tmp_path):
    utils.save_checkpoint(tmp_path / "a.pt", "test", {"deep": [{"w": torch.zeros(1).expand(10**6, 10**6)}]})
    with pytest.raises(ValueError, match=r"a\.pt .*claims 1000000000000 elements"):
        utils.load_checkpoint(tmp_path / "a.pt", "test")
    knot = [torch.ones(2)]
    for _ in range(40):  # 2**40 ways to the tensor
        knot = [knot, knot]
    utils.save_checkpoint(tmp_path / "b.pt", "test", {"knot": knot})
    assert len(list(utils.tensors_in(utils.load_checkpoint(tmp_path / "b.pt", "test")))) == 1


# ----------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("content", ["x" * 10**7, "x y\n" * 10**6, "a/b " * 10**6])
def test_what_a_message_quotes_is_cut_to_a_line(content, capsys):
    with pytest.raises(SystemExit):
        utils.fail(f"--arch: /a/long/{'path/' * 60}a.json, genotype 3: unknown op {content}")
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "a.json, genotype 3: unknown op " in line and len(line) < 320 + 250
    assert line.endswith("...\n")


def test_a_message_of_usual_length_is_whole(capsys):
    text = f"--output_dir: {'/folder' * 30} holds another run; go on with that run by --resume {'/folder' * 30}"
    with pytest.raises(SystemExit):
        utils.fail(text)
    assert text in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------- locks, strict JSON

HOLD = "import utils, time, sys; utils.hold_folder(utils.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def other_process(folder) -> subprocess.Popen:
    """Another process that holds the lock of a folder, for a minute at most."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    return other


def test_a_folder_in_use_is_refused_with_its_holder_until_that_one_is_killed(tmp_path, capsys):
    args = argparse.Namespace(seed=1)
    with other_process(tmp_path) as other:
        for step in (None, 3):
            with pytest.raises(SystemExit) as error:
                utils.RunLog(tmp_path, args, CPU, step)
            assert error.value.code == 2
            line = capsys.readouterr().err
            assert f"{'--resume' if step else '--output_dir'}: {tmp_path} is in use" in line
            assert f"process {other.pid} on {platform.node()}, since 20" in line
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
        other.kill()
    log = utils.RunLog(tmp_path, args, CPU)
    log.close()


def test_a_forked_process_does_not_hold_the_lock_beyond_the_end_of_the_run(tmp_path):
    utils.hold_folder(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    utils.release_folder(tmp_path)
    other = other_process(tmp_path)  # the lock is free, though the child lives
    assert child.is_alive()
    assert f"process {other.pid} on" in (tmp_path / "run.lock").read_text()
    other.kill()
    child.kill()


def test_what_killed_processes_left_is_cleared_when_a_run_goes_on(tmp_path):
    (tmp_path / "weights").mkdir()
    for path in (tmp_path / ".checkpoint.pt.1.tmp", tmp_path / "weights" / ".a.pt.77.tmp"):
        path.write_text("")
    log = utils.RunLog(tmp_path, argparse.Namespace(), CPU, 1)
    log.close()
    assert not list(tmp_path.rglob("*.tmp"))


def test_numbers_that_json_does_not_have_become_null_and_are_refused_by_readers(tmp_path):
    log = utils.RunLog(tmp_path, argparse.Namespace(x=math.inf), CPU)
    log.log(1, tau=math.nan, nested={"a": [1.5, -math.inf, None, "NaN", (math.nan, 2)]})
    log.close()
    line = utils.from_json((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "tau": None, "nested": {"a": [1.5, None, None, "NaN", [None, 2]]}}
    assert utils.from_json((tmp_path / "config.json").read_text())["args"] == {"x": None}
    for text in ("NaN", '{"a": [Infinity]}', "-Infinity"):
        with pytest.raises(ValueError, match="is not JSON"):
            utils.from_json(text)
        (tmp_path / "genotypes.json").write_text(text)
        with pytest.raises(ValueError, match=r"genotypes\.json is not a JSON file: .*is not JSON"):
            read_genotypes(tmp_path / "genotypes.json")


def git(folder, *words):
    """Run git in a folder. Returns its output."""
    someone = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *someone, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_run_records_the_commit_of_the_code_and_whether_its_files_were_changed(tmp_path, monkeypatch):
    unknown = {"commit": None, "clean": None}
    outer, code = tmp_path / "outer", tmp_path / "outer" / "a folder: of the code"
    code.mkdir(parents=True)
    monkeypatch.setattr(utils, "HOME", code)
    git(outer, "init", "-q")
    git(outer, "commit", "-q", "--allow-empty", "-m", "not of the code")
    assert utils.code_version() == unknown  # another repository lies around it, with a commit that says nothing
    git(code, "init", "-q")
    assert utils.code_version() == unknown  # no commit yet
    (code / "gan.py").write_text("1\n")
    git(code, "add", "gan.py")
    git(code, "commit", "-q", "-m", "first")
    commit = git(code, "rev-parse", "HEAD")
    (code / "notes.txt").write_text("not tracked")
    os.utime(code / "gan.py", (1, 1))  # git would look at the file again, and write to its index
    before = {path: path.stat().st_mtime_ns for path in (code / ".git").rglob("*")}
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a hook
    assert utils.code_version() == {"commit": commit, "clean": True}
    assert {path: path.stat().st_mtime_ns for path in (code / ".git").rglob("*")} == before
    if os.geteuid() == 0:  # a checkout that belongs to another user
        for path in (code, *code.rglob("*")):
            os.chown(path, 12345, 12345)
        assert utils.code_version() == {"commit": commit, "clean": True}
    (code / "gan.py").write_text("2\n")
    utils.write_config(tmp_path, argparse.Namespace(), CPU)
    config = utils.from_json((tmp_path / "config.json").read_text())
    assert (config["commit"], config["clean"]) == (commit, False)
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert utils.code_version() == unknown


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_record_of_an_older_version_with_nan_is_read_to_its_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tau": NaN}\n{"step": 2}\n{"step": 2, "tau": 1}\n{"st')
    assert utils.whole_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "tau": None},
        {"step": 2},
        {"step": 2, "tau": 1},
    ]
    utils.RunLog(tmp_path, argparse.Namespace(), CPU, 2, most=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "tau": null}\n{"step": 2}\n'


# ------------------------------------------------------------------------------------------ full disks, lost folders


def test_a_limit_of_file_sizes_ends_a_run_with_one_line_and_leaves_the_checkpoint_whole(tmp_path):
    utils.save_checkpoint(tmp_path / "checkpoint.pt", "test", {"epoch": 1})
    code = """if True:
        import resource, sys, torch, utils
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        utils.save_checkpoint(sys.argv[1], "test", {"weights": torch.zeros(10**6)})
    """
    command = [sys.executable, "-c", code, tmp_path / "checkpoint.pt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1 and "File too large" in result.stderr
    assert utils.load_checkpoint(tmp_path, "test")["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_folder_that_is_removed_ends_a_run_with_one_line_and_is_not_made_anew(tmp_path, capsys):
    folder = tmp_path / "run"
    log = utils.RunLog(folder, argparse.Namespace(), CPU)
    shutil.rmtree(folder)
    for write in (
        lambda: log.log(1, loss=0.5),
        lambda: utils.save_checkpoint(folder / "checkpoint.pt", "test", {}),
        lambda: utils.write_json(folder / "samples" / "result.json", {}),
    ):
        with pytest.raises(SystemExit) as error:
            write()
        assert error.value.code == 2
        assert f"cannot write {folder}" in capsys.readouterr().err
    assert not folder.exists()
    utils.release_folder(folder)
