"""plumbing/run_folder.py, locks.py and files.py: whose a run folder is, and what it records."""

import argparse
import math
import multiprocessing
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_training import other_process

from genotypes import read_genotypes
from plumbing import run_folder
from plumbing.checkpoint_files import save_checkpoint
from plumbing.files import from_json, whole_lines, write_json
from plumbing.locks import hold_folder, release_folder
from plumbing.run_folder import RunLog, code_version, write_config

ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")


def test_a_folder_in_use_is_refused_with_its_holder_until_that_one_is_killed(tmp_path, capsys):
    args = argparse.Namespace(seed=1)
    with other_process(tmp_path) as other:
        for step in (None, 3):
            with pytest.raises(SystemExit) as error:
                RunLog(tmp_path, args, CPU, step)
            assert error.value.code == 2
            line = capsys.readouterr().err
            assert f"{'--resume' if step else '--output_dir'}: {tmp_path} is in use" in line
            assert f"process {other.pid} on {platform.node()}, since 20" in line
        assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    log = RunLog(tmp_path, args, CPU)
    log.close()


def test_a_forked_process_does_not_hold_the_lock_beyond_the_end_of_the_run(tmp_path):
    hold_folder(tmp_path)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    child.start()
    release_folder(tmp_path)
    with other_process(tmp_path) as other:  # the lock is free, though the child lives
        assert child.is_alive()
        assert f"process {other.pid} on" in (tmp_path / "run.lock").read_text()
    child.kill()


def test_what_killed_processes_left_is_cleared_when_a_run_goes_on(tmp_path):
    (tmp_path / "weights").mkdir()
    for path in (tmp_path / ".checkpoint.pt.1.tmp", tmp_path / "weights" / ".a.pt.77.tmp"):
        path.write_text("")
    log = RunLog(tmp_path, argparse.Namespace(), CPU, 1)
    log.close()
    assert not list(tmp_path.rglob("*.tmp"))


def test_numbers_that_json_does_not_have_become_null_and_are_refused_by_readers(tmp_path):
    log = RunLog(tmp_path, argparse.Namespace(x=math.inf), CPU)
    log.log(1, tau=math.nan, nested={"a": [1.5, -math.inf, None, "NaN", (math.nan, 2)]})
    log.close()
    line = from_json((tmp_path / "metrics.jsonl").read_text())
    assert line == {"step": 1, "tau": None, "nested": {"a": [1.5, None, None, "NaN", [None, 2]]}}
    assert from_json((tmp_path / "config.json").read_text())["args"] == {"x": None}
    for text in ("NaN", '{"a": [Infinity]}', "-Infinity"):
        with pytest.raises(ValueError, match="is not JSON"):
            from_json(text)
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
    monkeypatch.setattr(run_folder, "HOME", code)
    git(outer, "init", "-q")
    git(outer, "commit", "-q", "--allow-empty", "-m", "not of the code")
    assert code_version() == unknown  # another repository lies around it, with a commit that says nothing
    git(code, "init", "-q")
    assert code_version() == unknown  # no commit yet
    (code / "gan.py").write_text("1\n")
    git(code, "add", "gan.py")
    git(code, "commit", "-q", "-m", "first")
    commit = git(code, "rev-parse", "HEAD")
    (code / "notes.txt").write_text("not tracked")
    os.utime(code / "gan.py", (1, 1))  # git would look at the file again, and write to its index
    before = {path: path.stat().st_mtime_ns for path in (code / ".git").rglob("*")}
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))  # as in a hook
    assert code_version() == {"commit": commit, "clean": True}
    assert {path: path.stat().st_mtime_ns for path in (code / ".git").rglob("*")} == before
    if os.geteuid() == 0:  # a checkout that belongs to another user
        for path in (code, *code.rglob("*")):
            os.chown(path, 12345, 12345)
        assert code_version() == {"commit": commit, "clean": True}
    (code / "gan.py").write_text("2\n")
    write_config(tmp_path, argparse.Namespace(), CPU)
    config = from_json((tmp_path / "config.json").read_text())
    assert (config["commit"], config["clean"]) == (commit, False)
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert code_version() == unknown


def test_a_record_of_an_older_version_with_nan_is_read_to_its_end(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tau": NaN}\n{"step": 2}\n{"step": 2, "tau": 1}\n{"st')
    assert whole_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "tau": None},
        {"step": 2},
        {"step": 2, "tau": 1},
    ]
    RunLog(tmp_path, argparse.Namespace(), CPU, 2, most=2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "tau": null}\n{"step": 2}\n'


def test_a_folder_that_is_removed_ends_a_run_with_one_line_and_is_not_made_anew(tmp_path, capsys):
    folder = tmp_path / "run"
    log = RunLog(folder, argparse.Namespace(), CPU)
    shutil.rmtree(folder)
    for write in (
        lambda: log.log(1, loss=0.5),
        lambda: save_checkpoint(folder / "checkpoint.pt", "test", {}),
        lambda: write_json(folder / "samples" / "result.json", {}),
    ):
        with pytest.raises(SystemExit) as error:
            write()
        assert error.value.code == 2
        assert f"cannot write {folder}" in capsys.readouterr().err
    assert not folder.exists()
    release_folder(folder)
