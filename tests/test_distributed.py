"""distributed.py with one process; several are tested through train_cifar.py and eval_archs."""

import contextlib
import socket
from datetime import timedelta

import pytest
import torch
from small_training import as_by_torchrun

import train_cifar
from benchmarks.house import ROOT, python_files
from models.ops import FactorizedReduce
from plumbing.files import from_json
from plumbing.run_folder import write_config
from plumbing.start import prepare
from training import distributed
from utils import LAUNCHER_VARIABLES, Process, fail, this_process, user_input

CPU = torch.device("cpu")


def clear(patch: pytest.MonkeyPatch) -> None:
    """Remove what a launcher may have set."""
    for name in (*LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE"):
        patch.delenv(name, raising=False)


def test_a_script_started_by_hand_is_process_0_of_1(monkeypatch):
    clear(monkeypatch)
    assert distributed.start(CPU) == CPU
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.planned_world() == 1
    assert not torch.distributed.is_initialized()
    total = torch.tensor([3.0])
    assert distributed.sum_over_ranks(total) is total and total.item() == 3
    assert distributed.same_everywhere("name") == "name"
    distributed.finish()


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_disjoint_and_together_everything(monkeypatch, world):
    monkeypatch.setattr(distributed, "world", lambda: world)
    for n in (0, 1, 5, 12, 100):
        taken = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            taken.append(list(range(n))[distributed.share(n)])
        assert [i for part in taken for i in part] == list(range(n))
        assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_within_alone_a_process_is_0_of_1_even_when_something_fails(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(KeyError), distributed.alone():
        assert (distributed.rank(), distributed.world()) == (0, 1)
        with distributed.alone():
            pass
        assert distributed.world() == 1  # leaving the inner one changes nothing
        raise KeyError
    assert (distributed.rank(), distributed.world()) == (1, 2)


def test_running_statistics_become_the_mean_of_all_processes(monkeypatch):
    """The other process has statistics that are 2 higher."""
    network = FactorizedReduce(4, 4)
    network(torch.randn(3, 4, 8, 8))
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda own: own + (own + 2))
    distributed.average_buffers(network)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, before[name] + (1 if buffer.is_floating_point() else 0))


def test_the_first_process_goes_first_and_ends_the_others_when_it_fails(monkeypatch):
    """test_train_cifar.py has the same with two processes, among the slow tests."""
    told = []
    monkeypatch.setattr(distributed, "same_everywhere", lambda value: told.append(value) or value)
    with distributed.first_process_first():
        assert not told  # the others wait
    with pytest.raises(ValueError, match="what went wrong"), distributed.first_process_first():
        raise ValueError("what went wrong")
    assert told == [True, False]

    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for ready in (True, False):
        monkeypatch.setattr(distributed, "same_everywhere", lambda value, ready=ready: ready)
        done = []
        with contextlib.suppress(SystemExit), distributed.first_process_first():
            done.append("found the files")
        assert bool(done) == ready


@pytest.mark.parametrize(("rank", "lines"), [(0, 1), (1, 0)])
def test_bad_input_is_told_once(monkeypatch, capsys, rank, lines):
    as_by_torchrun(monkeypatch, rank, world=2)
    with pytest.raises(SystemExit) as error:
        fail("something")
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(("rank", "everywhere", "speaks"), [(0, False, True), (1, False, False), (1, True, True)])
def test_bad_input_is_said_once_or_by_each_process_that_met_it(monkeypatch, capsys, rank, everywhere, speaks):
    as_by_torchrun(monkeypatch, rank, world=2)
    with pytest.raises(SystemExit) as error, user_input("--data", everywhere):
        raise ValueError("cannot read a.jpg")
    assert error.value.code == 2
    assert ("--data: cannot read a.jpg" in capsys.readouterr().err) == speaks


# ---------------------------------------------------------------------------------- variables without torchrun


@pytest.mark.parametrize(
    "variables",
    ["RANK=1", "WORLD_SIZE=auto", "WORLD_SIZE=2", "LOCAL_RANK=3", "RANK=1 WORLD_SIZE=2 LOCAL_RANK=1",
     "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=1", "RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT="],
)  # fmt: skip
def test_with_a_part_of_torchruns_variables_a_script_works_alone_and_says_so(variables, tmp_path, monkeypatch, capsys):
    clear(monkeypatch)
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    args = train_cifar.parse_args(["--output_dir", str(tmp_path / "run"), "--device", "cpu"])
    assert distributed.start(prepare(args, shared=True)) == CPU
    (line,) = capsys.readouterr().out.splitlines()
    given = " ".join(variable for variable in variables.split() if not variable.endswith("="))
    assert line.startswith(f"note: working as one process: {given} is set without ")
    assert prepare(args) == CPU  # nor is a script of one process refused
    assert not torch.distributed.is_initialized()
    assert (distributed.planned_world(), distributed.world(), distributed.is_main()) == (1, 1, True)
    write_config(tmp_path, args, CPU)
    assert from_json((tmp_path / "config.json").read_text())["processes"] == 1
    with pytest.raises(SystemExit):
        fail("something")
    assert "error: something" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [("RANK", "2"), ("RANK", "-1"), ("RANK", "one"), ("WORLD_SIZE", "auto"), ("WORLD_SIZE", "0"), ("LOCAL_RANK", "²"),
     ("LOCAL_RANK", "7"), ("MASTER_PORT", "99999"), ("LOCAL_WORLD_SIZE", "3"), ("WORLD_SIZE", "9" * 5000)],
)  # fmt: skip
def test_variables_that_cannot_be_are_one_line_in_every_process(name, value, monkeypatch, capsys):
    as_by_torchrun(monkeypatch, rank=1, world=2)
    monkeypatch.setenv(name, value)
    for ask in (lambda: train_cifar.parse_args([]), lambda: fail("something"), this_process):
        with pytest.raises(SystemExit) as error:
            ask()
        (line,) = capsys.readouterr().err.splitlines()
        assert error.value.code == 2 and "error: environment: expected RANK" in line and f"{name}={value[:60]}" in line


def test_one_of_several_processes_is_known_by_all_variables_and_nothing_else_is_asked(monkeypatch):
    as_by_torchrun(monkeypatch, rank=1, world=3)
    assert this_process() == (1, 3, 1, 3, "127.0.0.1:29500", "")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")  # other launchers than torchrun may not set it
    assert this_process().local_world == 1
    clear(monkeypatch)
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):  # of a job without torchrun: several runs
        monkeypatch.setenv(name, "2")
    monkeypatch.setenv("MASTER_ADDR", "node7")
    assert this_process() == Process()
    for file in python_files(ROOT):
        text = (ROOT / file).read_text()
        if not file.startswith("tests/") and file != "utils.py":
            assert not any(f'"{name}"' in text for name in (*LAUNCHER_VARIABLES, "LOCAL_WORLD_SIZE")), file


def test_processes_that_do_not_find_each_other_are_one_line(monkeypatch, capsys):
    """Process 1, where no process 0 is; it waits for a second here."""
    as_by_torchrun(monkeypatch, rank=1, world=2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setattr(distributed, "LONGEST_START", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "PATIENCE", 0.1)
    with pytest.raises(SystemExit) as error:
        distributed.start(CPU)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert "process 1 of 2 is waiting for the others at 127.0.0.1:" in out
    assert len(err.splitlines()) == 1 and "process 1 of 2 does not find the others at 127.0.0.1:" in err
