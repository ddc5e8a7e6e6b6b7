"""What the training scripts share: their flags, optimizers, the steps of an epoch, evaluation; one process or several.

A step is one global batch. Each process takes its part of it, in --accumulate parts one after the other, so a batch
is cut into processes * accumulate equal parts in all. A batch norm sees one such part (all processes' with --sync_bn).
"""

import argparse
import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from genotypes import Genotype, load_genotype
from models.export import rebuild
from models.fast.cuda_graphs import Recorded
from models.network import Network
from training import distributed
from training.images import ImageSet
from utils import (
    RunLog,
    add_cuda_graphs_flag,
    autocast,
    fail,
    load_optimizer,
    number,
    of_this_version,
    on_device,
    progress_bar,
    set_lr,
    set_seed,
    user_input,
)

ADABELIEF_LR = 1e-3  # learning rate and epsilon of the reference's later code; decays are those of its two data sets
ADABELIEF_EPSILON = 1e-8
ADABELIEF_DECAY = {"cifar": 5e-4, "imagenet": 1e-2}  # coupled (added to the gradient), decoupled


# ------------------------------------------------------------------------------------------------------- flags


def add_step_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of how a step is computed."""
    add = parser.add_argument
    add("--optimizer", default="sgd", choices=["sgd", "adabelief"])
    add("--accumulate", type=number(int, 1), default=1, help="parts in which a batch is computed, to save memory")
    add("--sync_bn", action="store_true", help="batch statistics over all processes (CUDA)")
    add("--amp", default="auto", choices=["auto", "off", "bf16"])
    add("--compile", action="store_true", help="torch.compile the cells for training; needs a C++ compiler")
    add_cuda_graphs_flag(parser)


def check_step_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, processes: int) -> None:
    """Refuse what flags, processes and installed packages do not allow together. processes: that share a batch."""
    if args.optimizer == "adabelief" and importlib.util.find_spec("pytorch_optimizer") is None:
        parser.error("argument --optimizer: adabelief comes from a package: pip install pytorch-optimizer")
    parts = args.accumulate * processes
    if args.batch_size % parts or args.batch_size < 2 * parts:
        parser.error(f"argument --batch_size: expected at least 2 for each of {parts} equal parts (processes times "
                     f"--accumulate), got {args.batch_size}")  # fmt: skip


def check_image_size(parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: tuple[int, int]) -> None:
    """sizes: the smallest and the largest image that training with an auxiliary head takes."""
    low, high = sizes
    if args.auxiliary_weight and not low <= args.image_size <= high:
        parser.error(f"argument --image_size: the auxiliary head takes {low} to {high} px; add --auxiliary_weight 0")


def check_network_flags(args: argparse.Namespace, given: set[str], state: dict, path: str) -> None:
    """Refuse to evaluate another network than the one asked for. given: names of the flags on the command line.

    Ends the script when --arch, --layers or --channels are not those of `state`, the checkpoint in `path`.
    """
    if "arch" in given:
        with user_input("--arch"):
            asked, saved = load_genotype(args.arch), Genotype.from_dict(state["genotype"])
            if asked.canonical() != saved.canonical():
                raise ValueError(f"{args.arch} is another genotype than that of {path}, {state['args']['arch']}")
    for name in given & {"layers", "channels"}:
        if getattr(args, name) != state["args"][name]:
            fail(f"--{name}: {path} was trained with {state['args'][name]}, got {getattr(args, name)}")


def check_sync_bn(args: argparse.Namespace, device: torch.device) -> None:
    if args.sync_bn and device.type != "cuda":
        fail("--sync_bn: torch has it for CUDA devices only")


# -------------------------------------------------------------------------------------------------- preparation


def build_network(
    kind: type[Network], genotype: Genotype, num_classes: int, args: argparse.Namespace, device: torch.device
) -> Network:
    """A fresh network, whose weights depend on the seed only."""
    set_seed(args.seed)
    network = kind(
        genotype,
        num_classes,
        args.layers,
        args.channels,
        args.keep_prob,
        args.drop_path_keep_prob,
        auxiliary=args.auxiliary_weight > 0,
    )
    return network.to(device, memory_format=torch.channels_last)


def network_from_checkpoint(state: dict, path: str | Path, device: torch.device) -> Network:
    """The trained network of a checkpoint (of kind "cifar" or "imagenet") in eval mode, built from what that says.

    Raises ValueError naming `path`, where the checkpoint is from, when its weights are not those of such a network.
    """
    with of_this_version(path):
        network = rebuild(state, state["network"])
    return network.to(device, memory_format=torch.channels_last)


def go_on_from(state: dict, path: str | Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the weights and the state of the optimizer from a checkpoint. Raises ValueError like the above."""
    with of_this_version(path):
        network.load_state_dict(state["network"])
        load_optimizer(optimizer, state["optimizer"])


def build_optimizer(
    name: str, network: nn.Module, lr: float, momentum: float, weight_decay: float, decoupled: bool = False
) -> torch.optim.Optimizer:
    """name: "sgd" or "adabelief". decoupled: of AdaBelief's weight decay. momentum: of SGD."""
    parameters = list(network.parameters())
    if name == "sgd":
        on_gpu = {"fused": True} if parameters[0].is_cuda else {}
        lr = on_device(lr, parameters[0].device)
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay, **on_gpu)
    from pytorch_optimizer import AdaBelief  # imported late: an optional package

    return AdaBelief(
        parameters,
        lr,
        eps=ADABELIEF_EPSILON,
        weight_decay=weight_decay,
        weight_decouple=decoupled,
        rectify=False,
    )


def wrap(network: Network, args: argparse.Namespace) -> nn.Module:
    """What training calls: the network, with averaged gradients among several processes.

    Its cells are compiled if asked for, in train mode only. Checkpoints and evaluation use the network itself.
    """
    forward = network
    if args.compile:
        network.compile_cells()
    if distributed.world() > 1:
        if args.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)  # exchanges the modules within the network
        unread = any(not any(cell.matrix[1]) for cell in network.genotype.cells)  # then a whole cell may be unused
        with warnings.catch_warnings():  # newer releases of torch call broadcast_buffers forward_sync_buffers
            warnings.simplefilter("ignore", FutureWarning)
            forward = DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=unread)
    return forward


def open_log(folder: Path, args: argparse.Namespace, device: torch.device, step: int | None) -> RunLog | None:
    """The record of the run, which process 0 alone keeps. step: as of RunLog. Ends the script on bad input."""
    with user_input("--output_dir"), distributed.first_process_first():
        return RunLog(folder, args, device, step) if distributed.is_main() else None


# ------------------------------------------------------------------------------------------------------- steps


class Step:
    """A step of training: the gradients of a batch, clipped, and the optimizer's update.

    On CUDA it is replayed as a graph, but not where processes share a batch, nor with optimizers that compute on the
    host.
    """

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        args: argparse.Namespace,
        device: torch.device,
        label_smoothing: float = 0.0,
    ):
        self.network, self.optimizer, self.args, self.device = network, optimizer, args, device
        self.label_smoothing = label_smoothing
        self.forward = wrap(network, args)
        recordable = isinstance(optimizer, torch.optim.SGD) and distributed.world() == 1
        self.run = Recorded(self._run) if device.type == "cuda" and args.cuda_graphs and recordable else self._run

    def __call__(self, x: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
        """See accumulate_gradients."""
        return self.run(x, labels, progress)

    def _run(self, x: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        totals = accumulate_gradients(self.forward, x, labels, progress, self.args, self.device, self.label_smoothing)
        if self.args.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.args.grad_clip)
        self.optimizer.step()
        return totals


def train_steps(
    step: Step,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Tensor,
    learning_rate: Callable[[int], float],
    title: str = "",
) -> dict[str, float]:
    """One epoch. Returns the mean loss and the training accuracy over all processes.

    batches: this process's part of each step's batch, (x (B, 3, S, S), labels (B,)).
    progress: (steps,) of the whole run, for drop path.
    learning_rate: of a step within the epoch, from 0.
    """
    totals = torch.zeros(2, device=step.device)
    step.network.train()
    for i, (x, labels) in enumerate(progress_bar(batches, total=len(progress), desc=title)):
        set_lr(step.optimizer, learning_rate(i))
        totals += step(x, labels, progress[i])
    distributed.average_buffers(step.network)
    loss, accuracy = (distributed.sum_over_ranks(totals) / (len(progress) * distributed.world())).tolist()
    return {"loss": loss, "train_accuracy": accuracy}


def accumulate_gradients(
    forward: nn.Module,
    x: Tensor,
    labels: Tensor,
    progress: Tensor,
    args: argparse.Namespace,
    device: torch.device,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Gradients of a batch, computed in --accumulate equal parts; they are averaged among processes at the last part.

    Returns (2,): mean loss, auxiliary head left out, and share classified correctly.
    """
    totals = torch.zeros(2, device=device)
    parts = list(zip(x.chunk(args.accumulate), labels.chunk(args.accumulate), strict=True))
    for i, (images, targets) in enumerate(parts):
        averaged_later = i + 1 < len(parts) and distributed.world() > 1
        with forward.no_sync() if averaged_later else contextlib.nullcontext():
            with autocast(args.amp, device):
                logits, auxiliary = forward(images, progress)
                loss = total = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
                if auxiliary is not None:
                    second = F.cross_entropy(auxiliary, targets, label_smoothing=label_smoothing)
                    total = loss + args.auxiliary_weight * second
            (total / len(parts)).backward()
        totals += torch.stack([loss.detach(), (logits.argmax(1) == targets).float().mean()]) / len(parts)
    return totals


# -------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(
    network: Network, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: str = "auto"
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in eval mode, over the images of all processes, and how many these were.

    batches: of this process's images. top-5: of min(5, classes) guesses.
    """
    network.eval()
    correct, images = torch.zeros(2, dtype=torch.long, device=device), 0
    for x, labels in batches:
        with autocast(amp, device):
            logits, _ = network(x)
        top1 = logits.argmax(1) == labels
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        correct += torch.stack([top1.sum(), top5.sum()])
        images += len(labels)
    counts = torch.cat([correct, torch.tensor([images], device=device)])
    top1, top5, images = distributed.sum_over_ranks(counts).tolist()
    if not images:
        raise ValueError("there are no images to evaluate on")
    return {"top1": top1 / images, "top5": top5 / images, "images": images}


def own_part(images: ImageSet) -> ImageSet:
    """This process's part of the images, to evaluate on: no image is in two parts."""
    part = distributed.share(len(images))
    return replace(images, images=images.images[part], labels=images.labels[part])


def vote(logits: torch.Tensor, voting: str) -> torch.Tensor:
    """The classes (B,) that an ensemble of logits (networks, B, classes) chooses.

    hard: what most networks choose; of equally many votes, the class of the highest mean probability.
    soft: the highest mean logit.
    """
    if voting == "soft":
        return logits.mean(0).argmax(1)
    votes = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    leading = votes == votes.amax(1, keepdim=True)
    return logits.softmax(2).mean(0).masked_fill(~leading, -1).argmax(1)
