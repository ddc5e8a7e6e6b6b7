"""Checkpoints within an epoch, signals, and what is printed to nobody; tests/test_faults.py has whole runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import ROOT, TINY, TWO_PROCESSES, make_images, threads, words

import train_cifar
from plumbing.checkpoint_files import load_checkpoint
from plumbing.console import Tolerant
from plumbing.signals import signals
from training import checkpoints as checkpoints_module
from training.checkpoints import Checkpoints

CPU = torch.device("cpu")
FLAGS = "--data IMAGES --epochs 2 --holdout 8 --output_dir OUT"

HANDLERS = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


@pytest.fixture(autouse=True)
def handlers():
    """Signals are handled as before after a test; one thread, so that sums are rounded alike."""
    with threads(1):
        yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)
    signals.__init__()


def after_steps(monkeypatch, n: int, action) -> None:
    """Call action() after the n-th step of training from now on."""
    after_step, done = Checkpoints.after_step, []

    def counted(self, steps):
        done.append(steps)
        if len(done) == n:
            action()
        after_step(self, steps)

    monkeypatch.setattr(Checkpoints, "after_step", counted)


def train(*flags) -> None:
    train_cifar.main(train_cifar.parse_args(list(map(str, flags))))


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def same_run(a: Path, b: Path) -> bool:
    ours, theirs = (load_checkpoint(folder, "cifar")["network"] for folder in (a, b))
    return metrics(a) == metrics(b) and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    with threads(1):
        train(*TINY, *words(FLAGS, IMAGES=images, OUT=folder))
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("n", [2, pytest.param(5, marks=pytest.mark.slow), 9])  # of five steps an epoch
def test_a_signal_ends_a_run_after_the_step_and_it_goes_on_within_the_epoch(
    whole, images, tmp_path, monkeypatch, capsys, number, status, n
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        after_steps(patch, n, lambda: os.kill(os.getpid(), number))
        train(*TINY, *words(FLAGS, IMAGES=images, OUT=tmp_path))
    assert error.value.code == status
    (line,) = capsys.readouterr().err.splitlines()
    assert f"ended by {signal.Signals(number).name}; go on with: python " in line
    assert line.endswith(f" --resume {tmp_path}")
    state = load_checkpoint(tmp_path, "cifar")
    assert (state["epoch"], state["within"]["steps"]) == ((n - 1) // 5, (n - 1) % 5 + 1)
    train("--resume", tmp_path)
    assert same_run(whole, tmp_path)
    assert "within" not in load_checkpoint(tmp_path, "cifar")


def test_sigusr1_saves_and_the_run_goes_on_with_the_same_numbers(whole, images, tmp_path, monkeypatch):
    saved, save = [], train_cifar.save
    monkeypatch.setattr(train_cifar, "save", lambda *args: saved.append(args[3].get("within")) or save(*args))
    after_steps(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    train(*TINY, *words(FLAGS, IMAGES=images, OUT=tmp_path))
    assert [within and within["steps"] for within in saved] == [3, None, None]
    assert same_run(whole, tmp_path)


def test_a_signal_in_an_evaluation_saves_the_epoch_and_repeats_the_evaluation(whole, images, tmp_path, monkeypatch):
    def stopped(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the evaluation went on")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(train_cifar, "accuracy", stopped)
        train(*TINY, *words(FLAGS, IMAGES=images, OUT=tmp_path))
    assert error.value.code == 143
    assert load_checkpoint(tmp_path, "cifar")["within"]["steps"] == 5
    train("--resume", tmp_path)
    assert same_run(whole, tmp_path)


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint():
    network, saved = torch.nn.Linear(2, 1), []
    checkpoints = Checkpoints(0, network, saved.append)
    checkpoints.begin(0)
    checkpoints.after_step(1)
    network.weight.data[0, 0] = torch.nan
    checkpoints.after_step(2)
    assert [part["within"]["steps"] for part in saved] == [1]


def test_checkpoints_are_as_far_apart_as_asked_for(monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: clock[0])
    checkpoints = Checkpoints(10, torch.nn.Linear(2, 1), saved.append)
    checkpoints.begin(0)
    for step in range(1, 61):
        clock[0] = 31.0 * step
        checkpoints.after_step(step)
    assert [part["within"]["steps"] for part in saved] == [20, 40, 60]


def test_a_run_stopped_within_an_epoch_of_two_processes_is_not_gone_on_with_by_one(capsys):
    state = {"within": {"steps": 1, "seconds": 0.0, "processes": [{}, {}]}}
    with pytest.raises(SystemExit) as error:
        Checkpoints(10, torch.nn.Linear(2, 1), print, state)
    assert error.value.code == 2
    assert "--resume" in (line := capsys.readouterr().err) and "2 processes" in line


def test_the_second_signal_ends_at_once_but_not_one_that_was_sent_twice(monkeypatch):
    clock, killed = [5.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    signals.listen()
    with monkeypatch.context() as patch, pytest.raises(SystemExit), signals.held():
        os.kill(os.getpid(), signal.SIGTERM)
        patch.setattr(os, "kill", lambda *args: killed.append(args))
        signals._stop(signal.SIGTERM, None)
        assert not killed
        clock[0] = 7.0
        signals._stop(signal.SIGTERM, None)
        assert killed == [(os.getpid(), signal.SIGTERM)]


def test_what_the_parent_ignores_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signals.listen()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN == signal.getsignal(signal.SIGHUP)


def test_what_nobody_reads_is_dropped():
    reading, writing = os.pipe()
    file = Tolerant(writing, "w")
    assert file.write(b"one") == 3 and os.read(reading, 3) == b"one"
    os.close(reading)
    assert file.write(b"two") == 3
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb", buffering=0) as full:
            assert Tolerant(full.fileno(), "w", closefd=False).write(b"three") == 5


# ------------------------------------------------------------------------------------------ as a user starts them


def shell(line: str, **paths) -> subprocess.CompletedProcess:
    """Run a line of bash in which the names of paths stand for them; its exit status is that of the first command."""
    for name, path in {"PYTHON": sys.executable, **paths}.items():
        line = line.replace(name, str(path))
    line = f"set -o pipefail; {line}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_a_closed_stdout_does_not_end_a_run(whole, images, tmp_path):
    flags = " ".join([*TINY, FLAGS.replace("OUT", str(tmp_path / "run"))])
    result = shell(f"PYTHON train_cifar.py {flags} | head -1", IMAGES=images)
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1 and not result.stderr, result.stderr
    assert same_run(whole, tmp_path / "run") and (tmp_path / "run" / "result.json").exists()
    draw = "PYTHON generate_archs.py --num_archs 5 --output_dir OUT"
    for where in ("| head -1", "| true", ">/dev/full", "2>&1 | true", ">&-"):
        folder = tmp_path / "".join(filter(str.isalnum, where))
        result = shell(f"{draw} {where}", OUT=folder)
        assert result.returncode == 0 and not result.stderr, result.stderr
        assert len(json.loads((folder / "genotypes.json").read_text())) == 15
    assert shell("PYTHON generate_archs.py --help | true").stderr == ""


STOPPED = """# runs a script of which process 1 sends itself SIGTERM after its ninth step
import os, runpy, signal, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook

def stop(*_):
    steps.append(True)
    if len(steps) == 9 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)

steps = []
register_optimizer_step_post_hook(stop)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_processes_stop_after_the_same_step_when_one_receives_a_signal(images, tmp_path):
    """The running statistics of batch norms, of which each process has its own, are those of a run without a stop."""
    flags = [*TINY, *words("--data IMAGES --epochs 2", IMAGES=images)]
    (tmp_path / "stopped.py").write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *TWO_PROCESSES[:-2], *map(str, words)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)

    assert run("train_cifar.py", *flags, "--output_dir", tmp_path / "whole").returncode == 0
    stopped = run(tmp_path / "stopped.py", "train_cifar.py", *flags, "--output_dir", tmp_path / "run")
    assert stopped.returncode
    assert stopped.stderr.count("ended by SIGTERM; go on with: torchrun --standalone --nproc_per_node=2") == 1
    state = load_checkpoint(tmp_path / "run", "cifar")
    assert (state["epoch"], state["within"]["steps"], len(state["within"]["processes"])) == (1, 3, 2)
    resumed = run("train_cifar.py", "--resume", tmp_path / "run")
    assert resumed.returncode == 0, resumed.stderr
    assert same_run(tmp_path / "whole", tmp_path / "run")
