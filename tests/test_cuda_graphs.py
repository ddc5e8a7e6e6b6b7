"""What CUDA adds: steps replayed as graphs, that never wait for the host. The numbers are those of step by step."""

import argparse
import itertools
import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import gan
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record
from generation.training import Trainer, TrainingData
from genotypes import GENOTYPES
from models.cost import genotype_cost
from models.fast.cuda_graphs import Branch, Recorded, map_tensors, side_stream, tensors_of
from models.graph import CellBatch
from models.network import CifarNetwork
from models.predictor import train_predictor
from training import steps as training
from utils import load_optimizer, set_lr, set_seed

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GAN_FLAGS = {
    "paper": "--recipe paper --temperature 1",
    "robust": "--objectives accuracy,params --warmup_epochs 1 --pool_size 1000",
    "all": "--warmup_epochs 1 --adversarial_weight 1 --g_dropout 0.3 --n_critic 2 --pool_size 0",
}


def test_tensors_are_found_in_tuples_dicts_and_dataclasses():
    a, b, cells = torch.ones(2), torch.zeros(3), CellBatch.encode([GENOTYPES["NAG_HIGH_ACC"].normal])
    value = {"a": a, "rest": (None, (cells, b))}
    assert [id(t) for t in tensors_of(value)] == list(map(id, (a, cells.adj, cells.ops, cells.num_nodes, b)))
    doubled = map_tensors(lambda tensor: 2 * tensor, value)
    assert doubled["rest"][0] is None and torch.equal(doubled["rest"][1][0].adj, 2 * cells.adj)
    assert torch.equal(doubled["a"], 2 * a) and torch.equal(a, torch.ones(2))
    with pytest.raises(TypeError, match="got list"):
        tensors_of([a])


@pytest.mark.parametrize("adam", [False, True])
def test_an_optimizer_keeps_its_learning_rate_a_tensor_when_a_state_is_loaded(adam):
    def make(lr):
        layer = nn.Linear(2, 2)
        if adam:
            return layer, torch.optim.Adam(layer.parameters(), lr, fused=isinstance(lr, torch.Tensor))
        return layer, torch.optim.SGD(layer.parameters(), lr, momentum=0.9)

    (layer, other), (_, own) = make(0.1), make(torch.tensor(0.5))
    layer(torch.ones(1, 2)).sum().backward()
    other.step()
    load_optimizer(own, other.state_dict())
    assert isinstance(own.param_groups[0]["lr"], torch.Tensor) and len(own.state) == 2
    assert own.param_groups[0]["lr"].item() == pytest.approx(0.1)  # that of the state
    assert not adam or own.param_groups[0]["fused"]
    set_lr(own, 0.25)
    assert own.param_groups[0]["lr"].item() == 0.25 and other.param_groups[0]["lr"] == 0.1


def test_an_optimizer_takes_its_place_on_another_device_with_a_loaded_state():
    """Its step counts too, which torch leaves on the CPU unless the settings say that they are needed elsewhere."""
    layer = nn.Linear(2, 2)
    other = torch.optim.Adam(layer.parameters(), 0.1)
    layer(torch.ones(1, 2)).sum().backward()
    other.step()
    elsewhere = nn.Linear(2, 2, device="meta")
    own = torch.optim.Adam(elsewhere.parameters(), torch.tensor(0.5), capturable=True)
    load_optimizer(own, other.state_dict())
    assert all(state["step"].is_meta for state in own.state.values())


def trainer(name: str, **changes) -> Trainer:
    flags = f"{GAN_FLAGS[name]} --batch_size 8 --g_emb_size 16 --d_emb_size 16 --n_epochs 3"
    args = gan.parse_args(flags.split())
    vars(args).update(changes)
    pool, device = random_pool(60, seed=3), torch.device("cuda")
    records = [Record(i, g, 0.1 + i / 100, *genotype_cost(g)) for i, g in enumerate(pool)]
    data = TrainingData(records, dict.fromkeys(args.objectives, 3), 10, device)
    set_seed(0)
    networks = gan.build_networks(args, device)
    networks.predictor, _ = train_predictor(data.cells, data.quantiles, [g.canonical() for g in pool], 8, 0)
    if networks.reference is not None:  # another policy than the generator's
        networks.reference.load_state_dict(gan.build_networks(args, device).generator.state_dict())
    return Trainer(networks, data, args)


@needs_cuda
@pytest.mark.parametrize("name", GAN_FLAGS)
def test_a_recorded_gan_step_gives_the_numbers_of_the_step_itself(name):
    recorded, plain = trainer(name), trainer(name, cuda_graphs=False)
    for epoch in range(3):
        ours, theirs = recorded.train_epoch(epoch), plain.train_epoch(epoch)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert isinstance(recorded.step, Recorded) and recorded.step.graph is not None
    for network in recorded.networks.optimizers:
        a, b = getattr(recorded.networks, network), getattr(plain.networks, network)
        for (key, value), other in zip(a.named_parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4, msg=key)


@contextmanager
def no_waiting(allowed: int = 0):
    """Fails when the host waits for the device more often than `allowed`."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    waits = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    assert len(waits) <= allowed, waits


@needs_cuda
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", ["paper", "robust"])
def test_the_steps_of_an_epoch_of_the_gan_wait_for_the_device_at_its_end_only(name, cuda_graphs):
    run = trainer(name, cuda_graphs=cuda_graphs, pool_size=0)  # which is drawn before the steps
    for epoch in range(2):  # the first steps that are recorded allocate
        values = run.train_epoch(epoch)
    with no_waiting(allowed=len(values)):  # for the means
        run.train_epoch(2)


def network_step(cuda_graphs: bool, amp: str) -> training.Step:
    set_seed(0)
    network = CifarNetwork(GENOTYPES["NAG_HIGH_ACC"], 10, layers=1, channels=8)
    network = network.to("cuda", memory_format=torch.channels_last).train()
    optimizer = training.build_optimizer("sgd", network, 0.1, momentum=0.9, weight_decay=3e-4)
    flags = {"amp": amp, "accumulate": 2, "auxiliary_weight": 0.4, "grad_clip": 5.0}
    args = argparse.Namespace(**flags, compile=False, sync_bn=False, cuda_graphs=cuda_graphs)
    return training.Step(network, optimizer, args, torch.device("cuda"))


@needs_cuda
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_recorded_training_step_gives_the_numbers_of_the_step_itself(amp):
    found = []
    for cuda_graphs in (True, False):
        step = network_step(cuda_graphs, amp)
        source = torch.Generator("cuda").manual_seed(1)
        x = torch.randn(8, 16, 3, 32, 32, device="cuda", generator=source).to("cuda")
        labels = torch.randint(10, (8, 16), device="cuda", generator=source)
        set_seed(2)
        progress = torch.arange(1, 9, device="cuda") / 8
        values = [training.train_steps(step, list(zip(x, labels, strict=True)), progress, lambda i: 0.1 / (1 + i))]
        values.append(training.train_steps(step, list(zip(x, labels, strict=True)), progress, lambda i: 0.05))
        found.append([v["loss"] for v in values])
        assert (step.run.graph is not None) if cuda_graphs else not isinstance(step.run, Recorded)
    assert found[0] == pytest.approx(found[1], rel=2e-2 if amp == "bf16" else 2e-3)


@needs_cuda
def test_training_steps_do_not_wait_for_the_device():
    step = network_step(True, "bf16")
    x, labels = torch.randn(16, 3, 32, 32, device="cuda"), torch.arange(16, device="cuda") % 10
    progress = torch.ones(6, device="cuda")
    training.train_steps(step, [(x, labels)] * 6, progress, lambda i: 0.1)
    with no_waiting(allowed=1):  # the loss at the end
        training.train_steps(step, [(x, labels)] * 6, progress, lambda i: 0.1)


class FakeStream:
    """Notes what it waits for, by the number of operations of the other stream so far."""

    def __init__(self, name: str):
        self.stream_id, self.log = name, []

    def wait_stream(self, other: "FakeStream") -> None:
        self.log.append(("wait", other.stream_id, len(other.log)))


def test_branches_start_where_they_are_made_and_end_where_they_are_joined(monkeypatch):
    """Two cells beside each other, and work of the main stream beside both; within one of them, another branch."""
    streams, made = [FakeStream("main")], itertools.count()

    @contextmanager
    def on(stream):
        streams.append(stream)
        yield
        streams.pop()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: streams[-1])
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream(next(made)))
    side_stream.cache_clear()
    used = {}
    example = argparse.Namespace(is_cuda=True)
    monkeypatch.setattr("models.fast.cuda_graphs.tensors_of", lambda tensors: [Used(used, name) for name in tensors])

    first = Branch("first", example)
    streams[-1].log.append("between")
    second = Branch("second", example)
    with first.work("condition"):
        streams[-1].log.append("grow")
        inner = Branch("first", example)
        with inner.work("states"):
            streams[-1].log.append("retrace")
        inner.join("likelihood")
    with second.work("condition"):
        streams[-1].log.append("grow")
    main = streams[0]
    main.log.append("beside")
    first.join("a cell")
    second.join("another")
    assert main.log == ["between", "beside", ("wait", 0, 3), ("wait", 1, 2)]
    assert first.stream.log == [("wait", "main", 0), "grow", ("wait", 2, 2)]
    assert second.stream.log == [("wait", "main", 1), "grow"] and inner.stream.log == [("wait", 0, 2), "retrace"]
    assert used == {"condition": [0, 1], "states": [2], "likelihood": [0], "a cell": ["main"], "another": ["main"]}
    assert Branch("first", example).stream is first.stream  # the next one takes its memory again
    side_stream.cache_clear()


@dataclass
class Used:
    """A tensor that notes on what streams it is said to be used."""

    by: dict
    name: str

    def record_stream(self, stream: FakeStream) -> None:
        self.by.setdefault(self.name, []).append(stream.stream_id)
