"""What CUDA adds: steps replayed as graphs, that never wait for the host. The numbers are those of step by step."""

import argparse
import itertools
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import gan
from build_nas_dataset import build_nas_dataset
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record
from genotypes import GENOTYPES, NAG_SPACE, CellSpec, Genotype
from models.cost import genotype_cost
from models.fast.cuda_graphs import Branch, Recorded, map_tensors, side_stream, tensors_of
from models.fast.replay import parameters_to_clip, record_parts
from models.graph import CellBatch
from models.network import CifarNetwork
from models.supernet import Supernet
from training import steps as training
from training.images import ImageSet
from utils import autocast, load_optimizer, set_lr, set_seed

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

GAN_FLAGS = {
    "paper": "--recipe paper --temperature 1",
    "robust": "--objectives accuracy,params --warmup_epochs 1 --pool 1000",
    "all": "--warmup_epochs 1 --adversarial_weight 1 --g_dropout 0.3 --n_critic 2 --pool 0",
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
def test_an_optimizer_keeps_its_own_learning_rate_tensor_when_a_state_is_loaded(adam):
    def make(lr):
        layer = nn.Linear(2, 2)
        if adam:
            return layer, torch.optim.Adam(layer.parameters(), lr, fused=isinstance(lr, torch.Tensor))
        return layer, torch.optim.SGD(layer.parameters(), lr, momentum=0.9)

    (layer, other), (_, own) = make(0.1), make(torch.tensor(0.5))
    layer(torch.ones(1, 2)).sum().backward()
    other.step()
    load_optimizer(own, other.state_dict())
    assert own.param_groups[0]["lr"].item() == 0.5 and len(own.state) == 2
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


def trainer(name: str, **changes) -> gan.Trainer:
    flags = GAN_FLAGS[name] + " --batch_size 8 --g_emb_size 16 --d_emb_size 16 --n_epochs 3"
    args = gan.parse_args(flags.split())
    vars(args).update(changes)
    pool = random_pool(60, seed=3)
    records = [Record(i, g, 0.1 + i / 100, *genotype_cost(g)) for i, g in enumerate(pool)]
    data = gan.TrainingData(records, dict.fromkeys(args.objectives, 3), 10, torch.device("cuda"))
    set_seed(0)
    generator, discriminator = (network.to("cuda") for network in gan.build_networks(args, data.num_classes))
    reference, _ = (network.to("cuda") for network in gan.build_networks(args, data.num_classes))
    predictor, _ = gan.train_predictor(data, 8, 0)
    networks = {"generator": generator, "discriminator": discriminator}
    optimizers = {name: gan.build_optimizer(network, args) for name, network in networks.items()}
    reference = reference.requires_grad_(False).eval() if args.kl_weight else None
    return gan.Trainer(generator, reference, discriminator, predictor, optimizers, data, args)


@needs_cuda
@pytest.mark.parametrize("name", GAN_FLAGS)
def test_a_recorded_gan_step_gives_the_numbers_of_the_step_itself(name):
    recorded, plain = trainer(name), trainer(name, cuda_graphs=False)
    for epoch in range(3):
        ours, theirs = recorded.train_epoch(epoch), plain.train_epoch(epoch)
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    assert any(isinstance(step, Recorded) and step.graph is not None for step in recorded.step)
    for network in ("generator", "discriminator"):
        a, b = getattr(recorded, network), getattr(plain, network)
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
    run = trainer(name, cuda_graphs=cuda_graphs, pool=0)  # which is drawn before the steps
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


class RecordedCalls:
    """Stands in for a CUDA graph on a CPU: the same operations once more, their results written where they were."""

    def __init__(self):
        self.calls, self.others = [], ()

    @torch.no_grad()
    def replay(self):
        for graph in self.others:  # of the same pool, which may have these results in the same memory
            for *_, outputs in graph.calls:
                for tensor in tree_leaves(outputs):
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in graph.own:
                        tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(tree_leaves(outputs), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recording(TorchDispatchMode):
    """Stands in for torch.cuda.graph."""

    def __init__(self, pools: dict[int, list[RecordedCalls]], graph: RecordedCalls, *, pool: int, **_):
        super().__init__()
        self.graph, graphs = graph, pools.setdefault(pool, [])
        self.graph.own = set()  # memory that is its own
        graphs.append(graph)
        own = 1 if torch.is_inference_mode_enabled() else 2  # each forward pass before its backward pass
        for i in range(0, len(graphs), own):
            graphs[i].others = graphs[:i] + graphs[i + own :]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        given, made = (
            {t.untyped_storage().data_ptr() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}
            for tensors in ((args, kwargs), outputs)
        )
        self.graph.own |= made - given
        self.graph.calls.append((function, args, kwargs or {}, outputs))
        return outputs


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    stream, pools, handles = argparse.Namespace(wait_stream=lambda other: None), {}, itertools.count()
    changes = {
        "CUDAGraph": RecordedCalls,
        "graph": partial(Recording, pools),
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda stream: nullcontext(),
        "graph_pool_handle": lambda: next(handles),
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return pools


class SupernetRun:
    """What build_nas_dataset trains, small: 24 genotypes, 12 steps an epoch."""

    def __init__(self, device: str, cuda_graphs: bool, amp: str = "off"):
        flags = "--batch_size 16 --epochs 4 --scorings 1 --cutout_size 0 --lr_max 0.01 --grad_clip 1"
        self.args = build_nas_dataset.parse_args([*flags.split(), "--amp", amp])
        source, self.device = torch.Generator().manual_seed(0), torch.device(device)
        pixels = torch.randint(256, (192, 3, 32, 32), generator=source, dtype=torch.uint8)
        classes = [str(i) for i in range(10)]
        self.images = ImageSet(pixels, torch.arange(192) % 10, classes, (0.5,) * 3, (0.25,) * 3).to(device)
        self.pool = random_pool(24, seed=5)
        set_seed(0)
        self.supernet = Supernet(layers=1, channels=8).to(device, memory_format=torch.channels_last)
        self.optimizer = build_nas_dataset.make_optimizer(self.supernet, self.args)
        if cuda_graphs:
            record_parts(self.supernet)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        return build_nas_dataset.train_epoch(
            self.supernet, self.optimizer, self.images, self.pool, self.args, epoch, self.device
        )

    def gradients(self, genotype: Genotype) -> dict[str, torch.Tensor]:
        """Those of the last of three steps with drop path; the second is another genotype's."""
        self.supernet.train()
        for path in (genotype, self.pool[1], genotype):
            set_seed(7)
            self.optimizer.zero_grad()
            logits, auxiliary = self.supernet(self.inputs(16, seed=1), path, 0.5)
            (logits.square().mean() + auxiliary.square().mean()).backward()
        return {name: p.grad for name, p in self.supernet.named_parameters() if p.grad is not None}

    def logits_in_training(self) -> tuple[torch.Tensor, float]:
        """With drop path; and the random number drawn next, from the device's generator."""
        self.supernet.train()
        with autocast(self.args.amp, self.device):
            logits = self.supernet(self.inputs(16, seed=2), self.pool[2], 0.5)[0].detach()
        return logits, torch.rand(1, device=self.device).item()

    def inputs(self, n: int, seed: int) -> torch.Tensor:
        x = torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        return x.to(next(self.supernet.parameters())).contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def logits(self) -> list[torch.Tensor]:
        """Of some genotypes, one after the other, as in a scoring."""
        self.supernet.eval()
        with autocast(self.args.amp, self.device):
            return [self.supernet(self.inputs(12, i), genotype)[0].clone() for i, genotype in enumerate(self.pool[:3])]


def recorded_parts(supernet: Supernet) -> list[int]:
    """How many, in training and in scoring."""
    return [len(parts.parts) for parts in supernet.parts.values()]


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_parts_of_a_supernet_are_replayed_as_recorded(graphs_on_cpu, amp, monkeypatch):
    recorded, plain = SupernetRun("cpu", True, amp), SupernetRun("cpu", False, amp)
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item()))
    assert recorded.train_epoch(0)["loss"] == pytest.approx(plain.train_epoch(0)["loss"], rel=5e-3)
    assert norms[0] == pytest.approx(norms[len(norms) // 2], rel=1e-2 if amp == "bf16" else 1e-3)
    in_training, in_scoring = recorded_parts(recorded.supernet)
    assert in_training > 50 and not in_scoring
    assert max(map(len, graphs_on_cpu.values())) >= 8  # four ops of a vertex, in the same memory

    found = []
    set_seed(3)
    with torch.no_grad():  # other weights, equal ones
        for weight in recorded.supernet.parameters():
            weight *= 1 + torch.randn_like(weight)
    plain.supernet.load_state_dict(recorded.supernet.state_dict())
    for run in (recorded, plain):
        set_seed(4)
        found.append(run.logits_in_training())
    (ours, after_ours), (theirs, after_theirs) = found
    assert (ours - theirs).norm() <= (0.1 if amp == "bf16" else 1e-3) * theirs.norm()
    assert after_ours == after_theirs  # random number
    with pytest.raises(ValueError, match=r"recorded with shape \(16, .*, got \(1, "):
        recorded.supernet(torch.randn(1, 3, 32, 32), recorded.pool[0])


def passes_over_cells() -> Genotype:
    """Reduction cells pass over the cell before them, which no other reads then."""

    def cell(source: int) -> CellSpec:
        matrix = [[0] * 5 for _ in range(5)]
        matrix[source][2] = matrix[source][3] = matrix[2][3] = matrix[3][4] = 1
        return CellSpec(matrix, [*NAG_SPACE.inputs, "seqconv3x3", "identity", NAG_SPACE.output])

    return Genotype(cell(1), cell(0))


def test_gradients_of_replayed_parts_are_those_of_the_parts_themselves(graphs_on_cpu):
    """In float64, where hardly any ReLU is decided otherwise by rounding; cells that nothing reads included."""
    found = []
    for cuda_graphs in (True, False):
        run = SupernetRun("cpu", False)
        run.supernet.double()
        if cuda_graphs:
            record_parts(run.supernet)
        for genotype in (run.pool[0], passes_over_cells()):
            grads = run.gradients(genotype)
            norm = torch.nn.utils.get_total_norm(list(grads.values()))
            parameters = parameters_to_clip(run.supernet, list(run.supernet.parameters()))
            assert len(parameters) < 150 or not cuda_graphs
            torch.nn.utils.clip_grad_norm_(parameters, norm / 2)  # scales all of them
            found.append({name: grad.clone() for name, grad in grads.items()})
    for ours, theirs, number in ((found[0], found[2], 100), (found[1], found[3], 40)):
        assert ours.keys() == theirs.keys() and len(ours) > number
        for name, grad in ours.items():
            assert (grad - theirs[name]).norm() <= 1e-6 * theirs[name].norm() + 1e-12, name


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_scorings_are_replayed_as_recorded(graphs_on_cpu, amp):
    recorded, plain = SupernetRun("cpu", True, amp), SupernetRun("cpu", False, amp)
    recorded.train_epoch(0)
    plain.supernet.load_state_dict(recorded.supernet.state_dict())
    expected = plain.logits()
    for _ in range(2):
        for ours, theirs in zip(recorded.logits(), expected, strict=True):
            assert (ours - theirs).norm() <= (0.1 if amp == "bf16" else 1e-3) * theirs.norm()
    assert recorded_parts(recorded.supernet)[1] > 50
    with torch.inference_mode(), pytest.raises(ValueError, match=r"recorded with shape \(12, .*, got \(1, "):
        recorded.supernet(torch.randn(1, 3, 32, 32), recorded.pool[0])


@pytest.mark.parametrize(("training", "gradients"), [(False, True), (True, False)])
def test_nothing_else_is_recorded(graphs_on_cpu, training, gradients):
    recorded, plain = SupernetRun("cpu", True), SupernetRun("cpu", False)
    x, found = recorded.inputs(8, seed=0), []
    for run in (recorded, plain):
        set_seed(0)  # drop path
        with torch.set_grad_enabled(gradients):
            found.append(run.supernet.train(training)(x, plain.pool[3], 0.5)[0])
    torch.testing.assert_close(*found)
    assert recorded_parts(recorded.supernet) == [0, 0]


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


@needs_cuda
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_a_supernet_trains_by_recorded_parts_as_it_does_without(amp):
    recorded, plain = SupernetRun("cuda", True, amp), SupernetRun("cuda", False, amp)
    ours, theirs = recorded.train_epoch(0), plain.train_epoch(0)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
    assert recorded_parts(recorded.supernet)[0] > 50


@needs_cuda
def test_gradients_and_scorings_of_recorded_parts_are_those_of_the_parts_themselves(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    recorded, plain = SupernetRun("cuda", True), SupernetRun("cuda", False)
    ours, theirs = (run.gradients(run.pool[0]) for run in (recorded, plain))
    assert ours.keys() == theirs.keys()
    for name, grad in ours.items():
        assert (grad - theirs[name]).norm() <= 2e-3 * theirs[name].norm() + 1e-6, name
    expected = plain.logits()
    for _ in range(2):
        for logits, other in zip(recorded.logits(), expected, strict=True):
            assert (logits - other).norm() <= 1e-3 * other.norm()


@needs_cuda
def test_steps_of_a_recorded_supernet_do_not_wait_for_the_device():
    run = SupernetRun("cuda", True)
    for _ in range(2):  # the same genotypes in every call
        run.train_epoch(0)
    with no_waiting(allowed=1):  # the loss at the end
        run.train_epoch(0)
