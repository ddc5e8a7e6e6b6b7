"""The predictor: where in the NAS dataset's ranking does a genotype stand, objective by objective? And its training.

It is an addition to the paper: the robust recipe takes its rewards from it, and generate_archs.py ranks cells by it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import kendalltau
from torch import Tensor, nn

from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.graph import CellBatch
from plumbing.checkpoint_files import load_checkpoint, of_this_version
from plumbing.console import progress_bar
from utils import all_finite, derive_seed, set_seed

HELD_OUT = 0.1  # share of the genotypes that the predictor is measured on, and not trained on
EPOCHS = 20
PEAK_LR, WEIGHT_DECAY = 3e-3, 0.1  # of AdamW, in one cycle


@dataclass(frozen=True)
class PredictorConfig:
    """The settings of a predictor, which go into checkpoints as they are.

    num_objectives: K. vertex_size: width of a vertex state, D. num_layers: rounds of messages. space: of the cells.
    reads_function: whether it reads what cells compute, CellBatch.computed, or cells as they are written. Both are the
    same where no op is none_op or skip_op.
    """

    num_objectives: int
    vertex_size: int = 64
    num_layers: int = 3
    space: SearchSpace = NAG_SPACE
    reads_function: bool = False

    def __post_init__(self):
        object.__setattr__(self, "space", SearchSpace.of(self.space))


class DirectedEncoder(nn.Module):
    """Cells -> (B, 2D): the mean-like sum of all vertex states, and the state of the output vertex.

    Messages are sums over neighbours, never normalised, since #params and MACs are matters of counting.
    """

    def __init__(self, space: SearchSpace, vertex_size: int, num_layers: int):
        super().__init__()
        self.output_token, self.scale = space.token_id[space.output], space.max_vertices
        self.tokens = nn.Linear(len(space.tokens), vertex_size, bias=False)
        self.layers = nn.ModuleList(nn.Linear(3 * vertex_size, vertex_size) for _ in range(num_layers))

    def forward(self, cells: CellBatch) -> Tensor:
        present = cells.ops.sum(-1, keepdim=True)  # (B, V, 1), 0 for absent vertices
        states = self.tokens(cells.ops)  # (B, V, D)
        for layer in self.layers:
            messages = torch.cat([states, cells.adj.mT @ states, cells.adj @ states], dim=-1)
            states = states + F.leaky_relu(layer(messages), 0.2) * present
        output = states * cells.ops[..., self.output_token, None]
        return torch.cat([states.sum(1) / self.scale, output.sum(1)], dim=-1)


class Predictor(nn.Module):
    """Genotypes -> the quantile, 0 lowest to 1 highest, of each of K objectives in the NAS dataset (B, K).

    The keywords are the fields of PredictorConfig. error (a buffer): the root mean square error of each objective's
    quantile (K,) on records that it was not trained on.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = config = PredictorConfig(*args, **kwargs)
        space = config.space
        encoders = {cell: DirectedEncoder(space, config.vertex_size, config.num_layers) for cell in space.cells}
        self.encoders = nn.ModuleDict(encoders)
        width = 2 * config.vertex_size * len(space.cells)
        self.head = nn.Sequential(
            nn.Linear(width, config.vertex_size),
            nn.LeakyReLU(0.2),
            nn.Linear(config.vertex_size, config.num_objectives),
        )
        self.register_buffer("error", torch.zeros(config.num_objectives))

    def forward(self, cells: tuple[CellBatch, ...]) -> Tensor:
        """cells: one CellBatch of B cells for each cell of the space, hard or with straight-through gradients."""
        if self.config.reads_function:
            cells = tuple(batch.computed(self.config.space) for batch in cells)
        states = [encoder(batch) for encoder, batch in zip(self.encoders.values(), cells, strict=True)]
        return self.head(torch.cat(states, dim=-1))

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu") -> "Predictor":
        """The predictor of a GAN checkpoint. Raises ValueError when the file is no such checkpoint."""
        checkpoint = load_checkpoint(path, "gan", ("predictor", "predictor_config"))
        with of_this_version(path):
            predictor = cls(**checkpoint["predictor_config"])
            predictor.load_state_dict(checkpoint["predictor"])
        return predictor.requires_grad_(False).to(device)

    @torch.no_grad()
    def quantiles(self, genotypes: list[Genotype]) -> np.ndarray:
        """Predicted quantiles (n, K) of pruned genotypes."""
        device = next(self.parameters()).device
        cells = (CellBatch.encode([genotype[name] for genotype in genotypes]) for name in self.encoders)
        return self(tuple(batch.to(device) for batch in cells)).cpu().numpy()


def split_records(canonical: Sequence[Genotype], seed: int) -> tuple[list[int], list[int]]:
    """Positions of the records that a predictor is measured on, and of those that it is trained on.

    canonical: the genotype of each record in canonical form. HELD_OUT of the genotypes are held out, each by its first
    record, and the predictor is trained on no record of theirs: of 1,000 random strings of NAS-Bench-201, it would
    otherwise know half of those held out by another string that computes the same.
    Raises ValueError for fewer than four different genotypes: two to measure the predictor, two to train it.
    """
    first = {}
    for i, genotype in enumerate(canonical):
        first.setdefault(genotype, i)
    if len(first) < 4:
        raise ValueError(f"there are {len(first)} different genotypes in the NAS dataset, at least 4 are needed")
    order = torch.randperm(len(canonical), generator=torch.Generator().manual_seed(seed)).tolist()
    different = [i for i in order if first[canonical[i]] == i]
    held_out = different[: max(2, int(HELD_OUT * len(different)))]
    measured = {canonical[i] for i in held_out}
    return held_out, [i for i in order if canonical[i] not in measured]


def train_predictor(
    cells: tuple[CellBatch, ...], quantiles: Tensor, canonical: Sequence[Genotype], batch_size: int, seed: int
) -> tuple[Predictor, list[float]]:
    """A frozen predictor, and for each objective Kendall's tau of its predictions on records held out.

    cells: N genotypes, one CellBatch for each cell of the space. quantiles: what it is to predict, (N, K); NaN where it
    is not known, which is left out. canonical: the N genotypes in canonical form, see split_records. tau is NaN where
    fewer than two held-out records are known. Its root mean square error on the records held out is kept in it. Raises
    ValueError when there are too few genotypes, or when the training diverges.
    """
    device, space = quantiles.device, canonical[0].space
    set_seed(derive_seed(seed, 2))
    held_out, train = (torch.tensor(part, device=device) for part in split_records(canonical, seed))
    batch_size, whole = min(batch_size, len(train)), not quantiles.isnan().any()
    predictor = Predictor(quantiles.shape[1], space=space, reads_function=True).to(device)
    optimizer = torch.optim.AdamW(predictor.parameters(), weight_decay=WEIGHT_DECAY)
    steps = EPOCHS * (len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=PEAK_LR, total_steps=steps)
    for epoch in progress_bar(range(EPOCHS), desc="predictor"):
        shuffled = train[torch.randperm(len(train), device=device)]
        for index in shuffled[: len(train) // batch_size * batch_size].split(batch_size):
            predicted = predictor(tuple(batch[index] for batch in cells))
            loss = F.mse_loss(predicted, quantiles[index]) if whole else known_mse(predicted, quantiles[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not all_finite(predictor):
            raise ValueError(f"the predictor's training diverged in epoch {epoch + 1}; another --batch_size may help")
    predictor.requires_grad_(False)
    predicted, truth = predictor(tuple(batch[held_out] for batch in cells)).cpu(), quantiles[held_out].cpu()
    squares = (predicted - truth).square()
    predictor.error.copy_((squares.mean(0) if whole else squares.nanmean(0)).sqrt())
    known = [(a[~b.isnan()], b[~b.isnan()]) for a, b in zip(predicted.T, truth.T, strict=True)]
    return predictor, [float(kendalltau(*pair).statistic) if len(pair[0]) > 1 else math.nan for pair in known]


def known_mse(predicted: Tensor, quantiles: Tensor) -> Tensor:
    """The mean over the objectives of the mean square error of the quantiles (B, K) that are known, not NaN."""
    known = ~quantiles.isnan()
    squares = torch.where(known, predicted - quantiles, 0.0).square()
    return (squares.sum(0) / known.sum(0).clamp(min=1)).mean()
