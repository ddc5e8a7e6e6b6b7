"""How a supernet is trained: in every step one genotype of the pool, on one batch of images. NAG paper, section 3.3."""

import argparse
from itertools import islice

import torch
from torch.nn import functional as F

from build_nas_dataset.scoring import clip_gradients
from genotypes import Genotype
from models.supernet import Supernet
from plumbing.console import pace
from training.checkpoints import Checkpoints
from training.images import ImageSet, train_batches
from training.steps import build_optimizer
from utils import autocast, cosine, derive_seed, set_lr, set_seed


def make_optimizer(supernet: Supernet, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD for the weights of a supernet, with a momentum of zero to start with.

    torch would start a weight's momentum in the first step that gives it a gradient, with the same result. But a step
    gives gradients to the weights on one genotype's path, and fused kernels take the momentum of all weights or none.
    """
    optimizer = build_optimizer("sgd", supernet, args.lr_max, momentum=0.9, weight_decay=args.l2_reg)
    for parameter in supernet.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_epoch(
    supernet, optimizer, images: ImageSet, pool: list[Genotype], args, epoch: int, device, checkpoints=None
) -> dict:
    """Train for one epoch over the images, one random genotype of the pool a step. Returns mean loss and accuracy."""
    checkpoints = checkpoints or Checkpoints(network=supernet)
    set_seed(derive_seed(args.seed, epoch))
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    steps = len(images) // args.batch_size
    choices = torch.randint(len(pool), (steps,), generator=torch.Generator().manual_seed(args.seed + epoch)).tolist()
    parameters = list(supernet.parameters())  # finding them takes milliseconds
    supernet.train()
    batches = train_batches(images, args.batch_size, generator, args.cutout_size, args.image_size // 8)
    first, totals = checkpoints.done, checkpoints.begin(epoch)
    timed = pace.steps(islice(batches, first, None), initial=first, total=steps, desc=f"epoch {epoch + 1}")
    for step, (x, labels) in enumerate(timed, start=first):
        done = epoch * steps + step
        set_lr(optimizer, cosine(done, args.epochs * steps, args.lr_max, args.lr_min))
        with autocast(args.amp, device):
            logits, auxiliary = supernet(x, pool[choices[step]], progress=(done + 1) / (args.epochs * steps))
            loss = F.cross_entropy(logits, labels)
            total = loss if auxiliary is None else loss + args.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        optimizer.zero_grad()
        total.backward()
        clip_gradients(supernet, parameters, args.grad_clip)
        optimizer.step()
        totals += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
        checkpoints.after_step(step + 1)
    set_lr(optimizer, cosine((epoch + 1) * steps - 1, args.epochs * steps, args.lr_max, args.lr_min))
    loss, accuracy = (totals / steps).tolist()
    return {"loss": loss, "train_accuracy": accuracy}
