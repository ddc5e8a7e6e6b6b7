"""The steps of training a stand-alone network, in one process or in several, and its evaluation.

A step takes one batch. Every process computes its part of the batch, in --accumulate parts one after the other, so that
a batch is cut into processes * accumulate equal parts in all. A batch norm sees one such part at a time or, with
--sync_bn, the parts of all processes together.
"""

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from genotypes import Genotype, load_genotype
from models.export import export_network, rebuild
from models.fast.cuda_graphs import Recorded
from models.network import Network
from models.ops import check_has_network
from plumbing.checkpoint_files import of_this_version
from plumbing.console import pace, progress_bar
from plumbing.run_folder import RunLog
from training import distributed
from training.checkpoints import Checkpoints
from training.images import ImageSet
from utils import autocast, load_optimizer, on_device, set_lr, set_seed, user_input

ADABELIEF_LR, ADABELIEF_EPSILON = 1e-3, 1e-8  # as in the later code of the authors


# -------------------------------------------------------------------------------------------------- preparation


def genotype_to_train(args: argparse.Namespace, state: dict | None) -> Genotype:
    """The genotype of --arch or, with --resume, of the checkpoint `state`. Ends the script when it is not valid."""
    with user_input("--resume" if args.resume else "--arch"):
        genotype = Genotype.from_dict(state["genotype"]) if state else load_genotype(args.arch)
        check_has_network(genotype.space)
        if not genotype.is_valid:
            raise ValueError(f"{args.arch} is not valid: a cell has no path from an input to the output")
    return genotype


def build_network(
    kind: type[Network], genotype: Genotype, num_classes: int, args: argparse.Namespace, device: torch.device
) -> Network:
    """A fresh network with the settings of the flags, whose weights depend on the seed alone.

    kind: CifarNetwork or ImageNetNetwork.
    """
    set_seed(args.seed)
    settings = {name: getattr(args, name) for name in ("layers", "channels", "keep_prob", "drop_path_keep_prob")}
    network = kind(genotype, num_classes, **settings, auxiliary=args.auxiliary_weight > 0)
    return network.to(device, memory_format=torch.channels_last)


def network_from_checkpoint(state: dict, path: str | Path, device: torch.device) -> Network:
    """The trained network of a checkpoint of train_cifar.py or train_imagenet.py, in eval mode.

    state: the checkpoint in the file `path`. Raises ValueError naming `path` when the weights are those of another
    network than the checkpoint describes.
    """
    with of_this_version(path):
        network = rebuild(state, state["network"])
    return network.to(device, memory_format=torch.channels_last)


def go_on_from(state: dict, path: str | Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the weights and the optimizer's state from the checkpoint `state` in the file `path`.

    Raises ValueError naming `path` when they are those of another network.
    """
    with of_this_version(path):
        network.load_state_dict(state["network"])
        load_optimizer(optimizer, state["optimizer"])


def network_state(network: Network, genotype: Genotype, optimizer: torch.optim.Optimizer) -> dict:
    """What a checkpoint holds of a network and its optimizer, for network_from_checkpoint and go_on_from."""
    return {
        "network": network.state_dict(),
        "network_config": asdict(network.config),
        "genotype": genotype.to_dict(),
        "optimizer": optimizer.state_dict(),
    }


def check_training_images(images: Sized, state: dict) -> None:
    """End the script when the run to resume, whose checkpoint is `state`, has another number of training images."""
    with user_input("--data"):
        if len(images) != state["training_images"]:
            raise ValueError(f"{len(images)} training images, the run to resume has {state['training_images']}")


def build_optimizer(
    name: str, network: nn.Module, lr: float, momentum: float, weight_decay: float, decoupled: bool = False
) -> torch.optim.Optimizer:
    """SGD with momentum (name "sgd"), or AdaBelief ("adabelief"), which does not use `momentum`.

    decoupled: whether AdaBelief shrinks the weights themselves (decoupled weight decay) instead of adding the decay to
    the gradients.
    """
    parameters = list(network.parameters())
    device = parameters[0].device
    if name == "sgd":
        fused = {} if device.type == "cpu" else {"fused": True}
        return torch.optim.SGD(parameters, on_device(lr, device), momentum=momentum, weight_decay=weight_decay, **fused)
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
    """The module that training calls in the place of the network: several processes average their gradients in it.

    With --compile, the network's cells are compiled for train mode. Checkpoints and evaluation use the network itself.
    """
    forward = network
    if args.compile:
        network.compile_cells()
    if distributed.world() > 1:
        if args.sync_bn:
            nn.SyncBatchNorm.convert_sync_batchnorm(network)  # exchanges the modules within the network
        # where a cell does not read its second input, nothing may use the cell before it
        unread = any(not any(cell.matrix[1]) for cell in network.genotype.cells)
        with warnings.catch_warnings():  # newer releases of torch call broadcast_buffers forward_sync_buffers
            warnings.simplefilter("ignore", FutureWarning)
            forward = DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=unread)
    return forward


def open_log(folder: Path, args: argparse.Namespace, device: torch.device, step: int | None) -> RunLog | None:
    """The record of the run, a RunLog in process 0 and None in all others.

    step: for a resumed run, the last step to keep; None for a new run. Ends the script when --output_dir is in use.
    """
    with user_input("--output_dir"), distributed.first_process_first():
        return RunLog(folder, args, device, step) if distributed.is_main() else None


# ------------------------------------------------------------------------------------------------------- steps


class Step:
    """A training step: step(x, labels, progress) computes the gradients of a batch, clips them and updates the weights.

    With --cuda_graphs on a GPU, the step is recorded and replayed, unless several processes share a batch or the
    optimizer is AdaBelief, which computes on the host.
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
        self.run = Recorded(self._run) if device.type != "cpu" and args.cuda_graphs and recordable else self._run

    def __call__(self, x: Tensor, labels: Tensor, progress: Tensor) -> Tensor:
        """Train on this process's part of a batch; arguments and result are those of accumulate_gradients."""
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
    epoch: int = 0,
    checkpoints: Checkpoints | None = None,
) -> dict[str, float]:
    """Train for one epoch. Returns the mean loss and the training accuracy over all processes.

    batches: this process's part of each step's batch, x (B, 3, S, S) and labels (B,), without those of the
    checkpoints.done steps that were done before a stop.
    progress: (steps,), the share of the schedule that is done after each step, by which drop path grows.
    learning_rate: the learning rate of each step of the epoch, which are numbered from 0. epoch: its number, from 0.
    """
    checkpoints = checkpoints or Checkpoints(network=step.network)
    done = checkpoints.done
    totals = checkpoints.begin(epoch)
    step.network.train()
    timed = pace.steps(batches, initial=done, total=len(progress), desc=f"epoch {epoch + 1}")
    for i, (x, labels) in enumerate(timed, start=done):
        set_lr(step.optimizer, learning_rate(i))
        totals += step(x, labels, progress[i])
        checkpoints.after_step(i + 1)
    set_lr(step.optimizer, learning_rate(len(progress) - 1))  # for an epoch whose steps were all done before a stop
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
    """Compute the gradients of a batch in --accumulate equal parts. Processes average them in the last part.

    x: (B, 3, S, S). labels: (B,). progress: a scalar, the share of the run that is done, by which drop path grows.
    Returns (2,): the mean loss without that of the auxiliary head, and the share of images classified correctly.
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
    network: Network,
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    amp: str = "auto",
    total: int = 0,
    tell: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> dict[str, float]:
    """The accuracy in eval mode over the images of all processes: {"top1", "top5", "images": how many there were}.

    batches: this process's images, x (B, 3, S, S) and labels (B,). total: how many batches there are; 0: not known.
    tell: is called with x, labels and logits (B, classes) of each batch. Of fewer than 5 classes, top-5 counts all
    guesses. Raises ValueError when there are no images.
    """
    network.eval()
    correct, images = torch.zeros(2, dtype=torch.long, device=device), 0
    for x, labels in progress_bar(batches, total=total or None, desc="evaluate"):
        with autocast(amp, device):
            logits, _ = network(x)
        top1 = logits.argmax(1) == labels
        top5 = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        correct += torch.stack([top1.sum(), top5.sum()])
        images += len(labels)
        if tell is not None:
            tell(x, labels, logits)
    counts = torch.cat([correct, torch.tensor([images], device=device)])
    top1, top5, images = distributed.sum_over_ranks(counts).tolist()
    if not images:
        raise ValueError("there are no images to evaluate on")
    return {"top1": top1 / images, "top5": top5 / images, "images": images}


def own_part(images: ImageSet) -> ImageSet:
    """This process's part of the images for an evaluation; the parts of all processes are disjoint."""
    part = distributed.share(len(images))
    return replace(images, images=images.images[part], labels=images.labels[part])


def export_trained(
    network: Network,
    state: dict,
    args: argparse.Namespace,
    kind: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Write a trained network, and beside it what is known of it, to the file of --export.

    state: its checkpoint. kind: "cifar" or "imagenet". mean, std: by which its images were normalised.
    """
    known = {"kind": kind, "arch": state["args"]["arch"], "image_size": args.image_size, "mean": mean, "std": std}
    known |= {name: state[name] for name in ("genotype", "network_config", "classes")}
    with user_input("--export"):
        written = export_network(network, args.export, known)
    print(f"wrote {' and '.join(map(str, written))}")


def vote(logits: torch.Tensor, voting: str) -> torch.Tensor:
    """The classes (B,) that an ensemble chooses by its logits (networks, B, classes).

    voting: "hard" for the class that most networks choose, and among classes of equally many votes the one with the
    highest mean probability; "soft" for the class with the highest mean logit.
    """
    if voting == "soft":
        return logits.mean(0).argmax(1)
    votes = F.one_hot(logits.argmax(2), logits.shape[2]).sum(0)
    leading = votes == votes.amax(1, keepdim=True)
    return logits.softmax(2).mean(0).masked_fill(~leading, -1).argmax(1)
