"""models/plain.py with what the robust recipe adds to the published generator, in the same obvious loops.

The decisions can be drawn (noise is added to their logits) and have a log-likelihood, a cell can be grown in view of
the cells before it, and edges can be decided one after the other. It is the oracle of models/generator.py in tests,
and the plain variant in benchmarks/gan.py and generate.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import Discriminator
from models.generator import Generator, GeneratorConfig, forcing_noise, mlp
from models.graph import CellBatch
from models.plain import PlainCellGenerator, PlainDiscriminator, PlainGenerator


class PlainRobustCellGenerator(PlainCellGenerator):
    """Grows one cell per sample by noisy decisions."""

    def __init__(self, condition_size: int, config: GeneratorConfig):
        super().__init__(condition_size, config)
        hidden = config.vertex_size + config.graph_size
        decides = config.autoregressive_edges and config.space.wiring is None
        self.earlier_edges = nn.Linear(config.vertex_size, hidden) if decides else None

    def draw(self, condition: Tensor, noise: Tensor | None) -> tuple[CellBatch, Tensor]:
        """condition (B, C), noise (B, V, T + V) -> B soft cells, and the log-likelihood (B,) of the hard decisions."""
        self.noise, self.logits_of_tokens, self.logits_of_edges = noise, [], []
        cells = self(condition)
        hard, inputs = cells.straight_through(), len(self.space.inputs)
        log_likelihood = torch.zeros(len(condition)).to(condition)
        for i, (tokens, edges) in enumerate(zip(self.logits_of_tokens, self.logits_of_edges, strict=True)):
            t = inputs + i
            of_token = tokens.log_softmax(1)[range(len(tokens)), hard.ops[:, t].argmax(1)]
            of_edges = torch.where(hard.adj[:, :t, t] > 0, F.logsigmoid(edges), F.logsigmoid(-edges)).sum(1)  # sure: 0
            log_likelihood = log_likelihood + torch.where(t < cells.num_nodes, of_token + of_edges, 0)
        return cells, log_likelihood

    def token_logits(self, graph: Tensor, condition: Tensor, t: int) -> Tensor:
        logits = super().token_logits(graph, condition, t)
        self.logits_of_tokens.append(logits)
        return logits if self.noise is None else logits + self.noise[:, t, : logits.shape[1]]

    def edge_logits(self, states: list[Tensor], new: Tensor, graph: Tensor, condition: Tensor) -> Tensor:
        if self.space.wiring is not None:
            self.logits_of_edges.append(super().edge_logits(states, new, graph, condition))
            return self.logits_of_edges[-1]
        first, activation, second = self.add_edge
        t, tokens, before, plain, noisy = len(states), len(self.space.tokens), 0, [], []
        for j, state in enumerate(states):
            hidden = first(torch.cat([state, new, graph, condition], dim=1)) + before
            plain.append(second(activation(hidden)).squeeze(1))  # (B,)
            noisy.append(plain[-1] if self.noise is None else plain[-1] + self.noise[:, t, tokens + j])
            if self.earlier_edges is not None:  # the edges after this one see it, if it is there
                before = before + (noisy[-1] > 0)[:, None] * self.earlier_edges(state)
        self.logits_of_edges.append(torch.stack(plain, dim=1))
        return torch.stack(noisy, dim=1)


class PlainRobustGenerator(PlainGenerator):
    """Has the calls, the weights and the outputs of a Generator."""

    cell_generator = PlainRobustCellGenerator
    draw_noise = Generator.draw_noise

    def __init__(self, config: GeneratorConfig):
        super().__init__(config)
        space = self.space
        self.summaries, condition_size = nn.ModuleDict(), config.latent_dim + sum(config.label_sizes)
        if config.chain_cells:
            for i, cell in enumerate(space.cells):
                self.cells[cell] = self.cell_generator(condition_size + i * config.graph_size, config)
            flat = config.max_vertices * (config.max_vertices + len(space.tokens))
            for cell in space.cells[:-1]:
                self.summaries[cell] = mlp(flat, config.vertex_size, config.graph_size)

    def forward(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None = None) -> tuple[CellBatch, ...]:
        return self.grow(z, labels, noise, gradient_between_cells=True)[0]

    def draw(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None) -> tuple[tuple[CellBatch, ...], Tensor]:
        return self.grow(z, labels, noise, gradient_between_cells=False)

    def log_likelihood(self, z: Tensor, labels: Tensor, cells: tuple[CellBatch, ...]) -> Tensor:
        return self.draw(z, labels, forcing_noise(cells))[1]

    def grow(
        self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None, gradient_between_cells: bool
    ) -> tuple[tuple[CellBatch, ...], Tensor]:
        condition, cells, total = torch.cat([z, self.labels(labels)], dim=1), [], 0
        for i, (name, cell) in enumerate(self.cells.items()):
            grown, log_likelihood = cell.draw(condition, None if noise is None else noise[i])
            cells.append(grown)
            total = total + log_likelihood
            if name in self.summaries:
                finished = grown.straight_through()
                flat = torch.cat([finished.adj, finished.ops], dim=2).flatten(1)
                summary = self.summaries[name](flat if gradient_between_cells else flat.detach())
                condition = torch.cat([condition, F.normalize(summary, dim=1)], dim=1)
        return tuple(cells), total


def plain_generator(generator: Generator) -> PlainRobustGenerator:
    """The plain form of a generator, with copies of its weights, on its device and in its mode."""
    plain = PlainRobustGenerator(generator.config)
    return same_weights(plain, generator)


def plain_discriminator(discriminator: Discriminator) -> PlainDiscriminator:
    """The plain form of a discriminator, with copies of its weights, on its device and in its mode."""
    return same_weights(PlainDiscriminator(discriminator.config), discriminator)


def same_weights(plain: nn.Module, fast: nn.Module) -> nn.Module:
    plain.to(next(fast.parameters())).load_state_dict(fast.state_dict())
    return plain.train(fast.training)
