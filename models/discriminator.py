"""The discriminator: does a genotype look like one of the NAS dataset with these labels?"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genotypes import NAG_SPACE, SearchSpace
from models.fast.cpu import Dropout
from models.graph import CellBatch, GraphState, LabelEmbedding


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The settings of a discriminator, as published by default, which go into checkpoints as they are.

    vertex_size, graph_size: widths of vertex and graph states. num_layers: graph convolutions. mlp_layers: linear
    layers that make the score. aggregation: from vertex states to a graph state, "gsum" or "mean", see GraphState.
    num_classes, label_sizes: classes and width of the label embedding of each objective. space: of the cells.
    """

    vertex_size: int = 250
    graph_size: int = 56
    num_layers: int = 3
    mlp_layers: int = 4
    gcn_dropout: float = 0.5
    mlp_dropout: float = 0.5
    aggregation: str = "gsum"
    num_classes: tuple[int, ...] = (3,)
    label_sizes: tuple[int, ...] = (10,)
    space: SearchSpace = NAG_SPACE

    def __post_init__(self):
        object.__setattr__(self, "space", SearchSpace.of(self.space))


class CellEncoder(nn.Module):
    """CellBatch -> graph states (B, S), by graph convolutions over the undirected cell (NAG paper, section 3.2)."""

    def __init__(self, num_tokens: int, config: DiscriminatorConfig):
        super().__init__()
        vertex_size = config.vertex_size
        # A linear layer rather than a table, since the tokens of generated cells are soft.
        self.tokens = nn.Linear(num_tokens, vertex_size, bias=False)
        self.convs = nn.ModuleList(nn.Linear(vertex_size, vertex_size, bias=False) for _ in range(config.num_layers))
        self.dropout = Dropout(config.gcn_dropout)
        self.graph_state = GraphState(vertex_size, config.graph_size, config.aggregation)

    def forward(self, cells: CellBatch) -> Tensor:
        vertices = cells.adj.shape[1]
        adj = cells.adj + cells.adj.mT + torch.eye(vertices, dtype=cells.adj.dtype, device=cells.adj.device)
        scale = adj.sum(-1).rsqrt()  # (B, V); the loops keep every degree at 1 or more
        adj = scale[:, :, None] * adj * scale[:, None, :]

        states = self.tokens(cells.ops)  # (B, V, D)
        for i, conv in enumerate(self.convs):
            if i > 0:
                states = F.leaky_relu(states, 0.2)
            states = adj @ conv(self.dropout(states))
        present = torch.arange(vertices, device=adj.device) < cells.num_nodes[:, None]  # (B, V)
        return self.graph_state(F.normalize(states, dim=-1), present)


class Discriminator(nn.Module):
    """Scores genotypes against labels (NAG paper, section 3.2): 1 is real, 0 is generated (least squares, no sigmoid).

    models/plain.py has the same in obvious loops. The keywords are the fields of DiscriminatorConfig.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self.config = config = DiscriminatorConfig(*args, **kwargs)
        space = config.space
        self.encoders = nn.ModuleDict({cell: CellEncoder(len(space.tokens), config) for cell in space.cells})
        self.labels = LabelEmbedding(config.num_classes, config.label_sizes)
        layers = []
        width = len(space.cells) * config.graph_size + sum(config.label_sizes)
        for _ in range(config.mlp_layers - 1):
            layers += [Dropout(config.mlp_dropout), nn.Linear(width, max(1, width // 2)), nn.LeakyReLU(0.2)]
            width = max(1, width // 2)
        self.score = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, cells: tuple[CellBatch, ...], labels: Tensor) -> Tensor:
        """cells: one CellBatch of B cells for each cell of the space; labels (B, K) long -> scores (B, 1)."""
        states = [encoder(batch) for encoder, batch in zip(self.encoders.values(), cells, strict=True)]
        return self.score(torch.cat([*states, self.labels(labels)], dim=-1))
