"""The predictor: where in the NAS dataset's ranking does a genotype stand, objective by objective?"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.graph import CellBatch
from utils import load_checkpoint, of_this_version


class DirectedEncoder(nn.Module):
    """CellBatch -> (B, 2D). Sums over neighbours, never normalised: #params and MACs are matters of counting."""

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
    """Genotypes -> the quantile, 0 lowest to 1 highest, of each of K objectives in the NAS dataset (B, K)."""

    def __init__(self, num_objectives: int, vertex_size: int = 64, num_layers: int = 3, space: SearchSpace = NAG_SPACE):
        super().__init__()
        self.config = {"num_objectives": num_objectives, "vertex_size": vertex_size, "num_layers": num_layers}
        self.encoders = nn.ModuleDict({cell: DirectedEncoder(space, vertex_size, num_layers) for cell in space.cells})
        width = 2 * vertex_size * len(space.cells)
        self.head = nn.Sequential(
            nn.Linear(width, vertex_size), nn.LeakyReLU(0.2), nn.Linear(vertex_size, num_objectives)
        )

        # Root mean square (K,), on records that it was not trained on.
        self.register_buffer("error", torch.zeros(num_objectives))

    def forward(self, cells: tuple[CellBatch, ...]) -> Tensor:
        """cells: one CellBatch of B cells for each cell of the space, hard or with straight-through gradients."""
        states = [encoder(batch) for encoder, batch in zip(self.encoders.values(), cells, strict=True)]
        return self.head(torch.cat(states, dim=-1))

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: torch.device | str = "cpu", space: SearchSpace = NAG_SPACE
    ) -> "Predictor":
        """The predictor of a GAN checkpoint. Raises ValueError when the file is no such checkpoint."""
        checkpoint = load_checkpoint(path, "gan", ("predictor", "predictor_config"))
        with of_this_version(path):
            predictor = cls(**checkpoint["predictor_config"], space=space)
            predictor.load_state_dict(checkpoint["predictor"])
        return predictor.requires_grad_(False).to(device)

    @torch.no_grad()
    def quantiles(self, genotypes: list[Genotype]) -> np.ndarray:
        """Predicted quantiles (n, K) of pruned genotypes."""
        device = next(self.parameters()).device
        cells = (CellBatch.encode([genotype[name] for genotype in genotypes]) for name in self.encoders)
        return self(tuple(batch.to(device) for batch in cells)).cpu().numpy()
