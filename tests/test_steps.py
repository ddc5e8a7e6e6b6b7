"""Steps, optimizers, evaluation and votes against their definitions."""

import copy
from argparse import Namespace
from collections import Counter

import pytest
import torch
from torch.nn import functional as F

from genotypes import GENOTYPES
from models.network import CifarNetwork
from training import steps as training
from training.images import ImageSet, eval_batches

CPU = torch.device("cpu")
FLAGS = Namespace(accumulate=1, amp="off", auxiliary_weight=0.4, grad_clip=0.0, sync_bn=False, compile=False)


def tiny_network(classes: int = 6, auxiliary: bool = False) -> CifarNetwork:
    torch.manual_seed(0)
    return CifarNetwork(GENOTYPES["NAG_ENSEMBLE_B"], classes, 1, 4, 1.0, 1.0, auxiliary).to(
        memory_format=torch.channels_last
    )


def test_accumulated_gradients_are_those_of_the_whole_batch():
    """In eval mode, where a batch norm does not mix images; label smoothing included."""
    x, labels = torch.randn(8, 3, 16, 16).double(), torch.arange(8) % 6
    found = []
    for accumulate in (1, 2, 4):
        network = tiny_network().double().eval()
        args = Namespace(**{**vars(FLAGS), "accumulate": accumulate})
        totals = training.accumulate_gradients(network, x, labels, torch.tensor(1.0), args, CPU, 0.1)
        found.append([totals, *(p.grad for p in network.parameters() if p.grad is not None)])
    network = tiny_network().double().eval()
    F.cross_entropy(network(x)[0], labels, label_smoothing=0.1).backward()
    expected = [p.grad for p in network.parameters() if p.grad is not None]
    for totals, *gradients in found:
        torch.testing.assert_close(gradients, expected)
        torch.testing.assert_close(totals, found[0][0])


def test_the_auxiliary_loss_counts_with_its_weight_and_is_left_out_of_the_loss_reported():
    x, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    network, other = tiny_network(auxiliary=True), tiny_network(auxiliary=True)
    totals = training.accumulate_gradients(network, x, labels, torch.tensor(1.0), FLAGS, CPU)
    logits, auxiliary = other(x)
    loss = F.cross_entropy(logits, labels)
    (loss + 0.4 * F.cross_entropy(auxiliary, labels)).backward()
    assert totals[0] == loss
    for (name, ours), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)


def test_compiled_cells_are_for_training_alone(monkeypatch):
    """Evaluation, checkpoints and exports see the network as it is."""
    monkeypatch.setattr(torch, "compile", lambda call, **_: lambda *args: calls.append(call.__self__) or call(*args))
    network, calls = tiny_network(), []
    names = list(network.state_dict())
    assert training.wrap(network, Namespace(**{**vars(FLAGS), "compile": True})) is network
    x = torch.randn(2, 3, 32, 32)
    network.eval()(x)
    assert not calls
    network.train()(x)
    assert calls == list(network.cells) and list(network.state_dict()) == names
    copy.deepcopy(network).train()(x)
    assert len(calls) == len(network.cells)  # a copy is as it is


def test_every_step_has_its_own_learning_rate_and_clipped_gradients():
    network, seen = tiny_network(), []
    optimizer = training.build_optimizer("sgd", network, 1.0, momentum=0.0, weight_decay=0.0)
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            (
                optimizer.param_groups[0]["lr"],
                torch.stack([p.grad.norm() for p in network.parameters() if p.grad is not None]).norm().item(),
            )
        )
    )
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4)) for _ in range(3)]
    args = Namespace(**{**vars(FLAGS), "grad_clip": 1e-3})
    step = training.Step(network, optimizer, args, CPU)
    training.train_steps(step, batches, torch.ones(3), lambda i: 0.1 * i)
    assert [lr for lr, _ in seen] == pytest.approx([0, 0.1, 0.2])
    assert [norm for _, norm in seen] == pytest.approx([1e-3] * 3, rel=1e-3)


@pytest.mark.parametrize("decoupled", [False, True])
def test_adabelief_is_the_published_update(decoupled):
    """Zhuang et al. 2020, algorithm 2, with the given decay, written out for two steps."""
    pytest.importorskip("pytorch_optimizer")
    lr, decay, epsilon, b1, b2 = 1e-3, 0.1, training.ADABELIEF_EPSILON, 0.9, 0.999
    layer = torch.nn.Linear(3, 2, bias=False).double()
    optimizer = training.build_optimizer("adabelief", layer, lr, 0.9, decay, decoupled)
    w, m, s = layer.weight.detach().clone(), torch.zeros(2, 3).double(), torch.zeros(2, 3).double()
    for t in (1, 2):
        gradient = torch.randn(2, 3).double()
        layer.weight.grad = gradient.clone()
        optimizer.step()
        g = gradient if decoupled else gradient + decay * w
        w = w * (1 - lr * decay) if decoupled else w
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + epsilon
        w = w - lr * (m / (1 - b1**t)) / ((s / (1 - b2**t)).sqrt() + epsilon)
        torch.testing.assert_close(layer.weight.detach(), w, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("classes", [3, 6])
def test_evaluation_counts_as_a_loop_would(batch_size, classes):
    pixels = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = ImageSet(pixels, torch.arange(20) % classes, list("abcdef"[:classes]), (0.5,) * 3, (0.25,) * 3)
    network = tiny_network(classes)
    measured = training.evaluate(network, eval_batches(images, batch_size), CPU, "off")
    top1 = top5 = 0
    for x, labels in eval_batches(images, 1):
        ranking = network(x)[0][0].argsort(descending=True).tolist()
        top1 += ranking[0] == labels.item()
        top5 += labels.item() in ranking[:5]
    assert measured == {"top1": top1 / 20, "top5": top5 / 20, "images": 20}


@pytest.mark.parametrize("networks", [2, 3, 4])
def test_votes_are_those_of_counting_by_hand(networks):
    logits = torch.randn(networks, 200, 4, generator=torch.Generator().manual_seed(networks)) * 3
    hard, soft = training.vote(logits, "hard").tolist(), training.vote(logits, "soft").tolist()
    ties = 0
    for i in range(200):
        ballots = Counter(row.argmax().item() for row in logits[:, i])
        most = max(ballots.values())
        leading = [choice for choice, n in ballots.items() if n == most]
        ties += len(leading) > 1
        mean = sum(row.softmax(0) for row in logits[:, i]) / networks
        assert hard[i] == max(leading, key=lambda choice: mean[choice].item())
        assert soft[i] == sum(logits[:, i]).argmax().item()
    assert ties and hard != soft
