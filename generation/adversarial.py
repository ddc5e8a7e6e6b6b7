"""The published game between generator and discriminator (NAG paper, section 3.2), and nothing else.

The discriminator learns to give 1 to real genotypes and 0 to generated ones, given their labels; the generator learns
to write genotypes that get 1. Both losses are least squares.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.discriminator import Discriminator
from models.generator import Generator, Request
from models.graph import CellBatch, LabelledCells


def generate(generator: Generator, request: Request, straight_through: bool) -> LabelledCells:
    """Cells for a request, with the labels asked for.

    straight_through: the hard decisions, with the gradients of the soft ones; False, as published: the soft ones.
    """
    cells = generator(*request)
    if straight_through:
        cells = tuple(batch.straight_through() for batch in cells)
    return LabelledCells(cells, request.labels)


def discriminator_loss(
    discriminator: Discriminator, real: LabelledCells, fake: LabelledCells
) -> tuple[Tensor, dict[str, Tensor]]:
    """(mean (D(real) - 1)^2 + mean D(generated)^2) / 2, and values to record.

    Real and generated genotypes go through the discriminator together; a score depends on its own genotype only.
    """
    both = tuple(CellBatch.cat(pair) for pair in zip(real.cells, fake.cells, strict=True))
    scores = discriminator(both, torch.cat([real.labels, fake.labels]))
    real_scores, fake_scores = scores.split([len(real.labels), len(fake.labels)])
    loss = (real_scores.sub(1).square().mean() + fake_scores.square().mean()) / 2
    return loss, {"d_loss": loss, "real_score": real_scores.mean(), "fake_score": fake_scores.mean()}


def generator_loss(discriminator: Discriminator, fake: LabelledCells) -> Tensor:
    """mean (D(generated) - 1)^2."""
    discriminator.requires_grad_(False)  # saves the gradients of its weights, which nothing reads
    scores = discriminator(*fake)
    discriminator.requires_grad_(True)
    return F.mse_loss(scores, torch.ones_like(scores))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip_value: float) -> None:
    """One step of an optimizer down the gradient of a loss. clip_value: its largest norm; 0: it is not clipped."""
    optimizer.zero_grad()
    loss.backward()
    if clip_value:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_value)
    optimizer.step()
