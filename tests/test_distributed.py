"""distributed.py with one process; several are tested through train_cifar.py and eval_archs."""

import contextlib

import pytest
import torch

import utils
from models.ops import FactorizedReduce
from training import distributed

CPU = torch.device("cpu")


def test_a_script_started_by_hand_is_process_0_of_1(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
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


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_bad_input_is_told_once(monkeypatch, capsys, rank, lines):
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as error:
        utils.fail("something")
    assert error.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


@pytest.mark.parametrize(("rank", "everywhere", "speaks"), [(0, False, True), (1, False, False), (1, True, True)])
def test_bad_input_is_said_once_or_by_each_process_that_met_it(monkeypatch, capsys, rank, everywhere, speaks):
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit) as error, utils.user_input("--data", everywhere):
        raise ValueError("cannot read a.jpg")
    assert error.value.code == 2
    assert ("--data: cannot read a.jpg" in capsys.readouterr().err) == speaks
