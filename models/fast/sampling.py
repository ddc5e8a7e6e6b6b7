"""Cells whose decisions are those of float64, grown for the most part in float32, which takes half the time.

Growth in float64 is the obvious way to the same cells (generator.double()). A decision that is close in float32 might
fall otherwise in float64, so samples with such a decision are grown again.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from genotypes import CellSpec

if TYPE_CHECKING:
    from models.generator import Generator
    from models.graph import CellBatch

# A decision whose two likeliest sides differ by less than this, in logits, is made again in float64. The largest
# difference between float32 and float64 measured on 512 genotypes is 2.4e-6 with the shipped generators, 1e-6 with
# untrained ones of default size and 1e-4 with one whose weights are quadrupled. Of the shipped generators' genotypes,
# 1 to 3 % have a decision this close.
CLOSE = 1e-3


@torch.no_grad()
def decide_as_in_float64(
    generator: "Generator", z: Tensor, noise: tuple[Tensor, ...] | None, labels: Tensor, batch_size: int
) -> list[tuple[CellSpec, ...]]:
    """The hard cells of n samples, not pruned, in eval mode whatever the generator's mode.

    z, noise: from generator.draw_noise, on any device. labels: (K,), the same for all samples.
    batch_size: samples that are grown at once; it makes no difference to the result.
    """
    exact = copy.deepcopy(generator).double().eval()
    fast = copy.deepcopy(generator).float().eval() if torch.get_float32_matmul_precision() == "highest" else exact
    decoded = []
    for start in range(0, len(z), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(z)))
        cells = _grow_rows(fast, z, noise, labels, rows)
        found = _decode(generator, cells)
        close = (torch.stack([margin(batch) for batch in cells]).amin(0).cpu() < CLOSE).nonzero().flatten()
        if fast is not exact and len(close):
            again = _decode(generator, _grow_rows(exact, z, noise, labels, rows[close]))
            for i, specs in zip(close.tolist(), again, strict=True):
                found[i] = specs
        decoded += found
    return decoded


def _grow_rows(generator, z: Tensor, noise, labels: Tensor, rows: Tensor) -> "tuple[CellBatch, ...]":
    """The cells of some of the samples, in the precision and on the device of the generator's weights."""
    weight = next(generator.parameters())
    own_noise = None if noise is None else tuple(part[rows].to(weight) for part in noise)
    return generator(z[rows].to(weight), labels.to(weight.device).expand(len(rows), -1), own_noise)


def _decode(generator, cells: "tuple[CellBatch, ...]") -> list[tuple[CellSpec, ...]]:
    return list(zip(*(batch.decode(generator.space) for batch in cells), strict=True))


@torch.no_grad()
def margin(cells: "CellBatch") -> Tensor:
    """How far each cell's closest decision is from its other side, in logits: (B,), infinite where all are sure."""
    edges = torch.where(cells.adj > 0, cells.adj.logit().abs(), torch.inf).amin((1, 2))
    first, second = cells.ops.topk(2, dim=-1).values.log().unbind(-1)  # (B, V)
    tokens = (first - second).nan_to_num(nan=torch.inf, posinf=torch.inf).amin(1)  # nan: an absent vertex
    return torch.minimum(edges, tokens)
