"""A supernet whose parts are replayed as CUDA graphs gives the numbers of one that is not; CPUs have stand-ins."""

import argparse
import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from test_cuda_graphs import needs_cuda, no_waiting
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from build_nas_dataset import build_nas_dataset, supernet_training
from build_nas_dataset.random_cells import random_pool
from genotypes import NAG_SPACE, CellSpec, Genotype
from models.fast.replay import parameters_to_clip, record_parts
from models.supernet import Supernet
from training.images import ImageSet
from utils import autocast, set_seed

PRECISIONS = ["off", pytest.param("bf16", marks=pytest.mark.slow)]  # many CPUs emulate bf16, slowly


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

    def __init__(self, device: str, cuda_graphs: bool, amp: str = "off", steps: int = 12):
        flags = f"--batch_size 16 --epochs 4 --scorings 1 --cutout_size 0 --lr_max 0.01 --grad_clip 1 --amp {amp}"
        self.args = build_nas_dataset.parse_args(flags.split())
        source, self.device = torch.Generator().manual_seed(0), torch.device(device)
        pixels = torch.randint(256, (16 * steps, 3, 32, 32), generator=source, dtype=torch.uint8)
        classes = [str(i) for i in range(10)]
        self.images = ImageSet(pixels, torch.arange(16 * steps) % 10, classes, (0.5,) * 3, (0.25,) * 3).to(device)
        self.pool = random_pool(24, seed=5)
        set_seed(0)
        self.supernet = Supernet(layers=1, channels=8).to(device, memory_format=torch.channels_last)
        self.optimizer = supernet_training.make_optimizer(self.supernet, self.args)
        if cuda_graphs:
            record_parts(self.supernet)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        return supernet_training.train_epoch(
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
            return [self.supernet(self.inputs(12, i), genotype)[0].clone() for i, genotype in enumerate(self.pool[:2])]


def recorded_parts(supernet: Supernet) -> list[int]:
    """How many, in training and in scoring."""
    return [len(parts.parts) for parts in supernet.parts.values()]


@pytest.mark.parametrize("amp", PRECISIONS)
def test_parts_of_a_supernet_are_replayed_as_recorded(graphs_on_cpu, amp, monkeypatch):
    steps = 2 if amp == "bf16" else 12  # many CPUs emulate bf16, slowly
    recorded, plain = SupernetRun("cpu", True, amp, steps), SupernetRun("cpu", False, amp, steps)
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item()))
    assert recorded.train_epoch(0)["loss"] == pytest.approx(plain.train_epoch(0)["loss"], rel=5e-3)
    assert norms[0] == pytest.approx(norms[len(norms) // 2], rel=5e-2 if amp == "bf16" else 1e-3)
    in_training, in_scoring = recorded_parts(recorded.supernet)
    assert in_training > 50 and not in_scoring
    if amp == "off":
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


@pytest.mark.slow
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


@pytest.mark.parametrize("amp", PRECISIONS)
def test_scorings_are_replayed_as_recorded(graphs_on_cpu, amp):
    recorded, plain = SupernetRun("cpu", True, amp, steps=1), SupernetRun("cpu", False, amp, steps=1)
    recorded.train_epoch(0)
    plain.supernet.load_state_dict(recorded.supernet.state_dict())
    expected = plain.logits()
    for _ in range(2):
        for ours, theirs in zip(recorded.logits(), expected, strict=True):
            assert (ours - theirs).norm() <= (0.1 if amp == "bf16" else 1e-3) * theirs.norm()
    assert recorded_parts(recorded.supernet)[1] > 40
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


@needs_cuda
@pytest.mark.parametrize("amp", PRECISIONS)
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
