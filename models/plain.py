"""The published generator and discriminator in obvious loops: read this file first, beside the paper (section 3.2).

models/generator.py and models/discriminator.py compute the same faster and add what the robust recipe needs. Here there
is nothing but the published method: a message for every edge, a concatenation for every edge that is decided, genotypes
encoded one by one. All cells are grown to the last vertex, and what comes after a cell's end is cut off. Weights have
the names of the fast networks, so that one can load those of the other:

    plain = PlainGenerator(generator.config)
    plain.load_state_dict(generator.state_dict())

A decision is made hard (an argmax, or a probability above one half) for growth to go on with; the cells returned are
soft: they hold the probabilities, which carry the gradient to the generator. A graph state (models/graph.py) is the sum
over vertices of Linear(state) x sigmoid(gate of the state), brought to unit length; there are two, one that tokens and
edges are decided by and one that a new vertex is initialised with.

Sizes in the comments: B samples, V vertices, T tokens, D vertex state, S graph state, C condition.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig, mlp
from models.graph import CellBatch, GraphState, LabelEmbedding


class PlainMessagePassing(nn.Module):
    """One round of messages along every edge and against it, then a GRU cell for every vertex."""

    def __init__(self, vertex_size: int, dropout: float):
        super().__init__()
        width = 2 * vertex_size
        self.dropout = nn.Dropout(dropout)
        self.message = nn.Linear(width, width)  # along the edge j -> i, to i, from [h_j, h_i]
        self.message_reversed = nn.Linear(width, width)  # against the same edge, to j, from [h_i, h_j]
        self.update = nn.GRUCell(width, vertex_size)

    def forward(self, states: Tensor, edges: Tensor) -> Tensor:
        """states (B, V, D), edges (B, V, V) of 0/1, from row to column -> new states (B, V, D)."""
        states = self.dropout(states)
        b, j, i = edges.nonzero().T  # every edge j -> i of every sample b, (E,) each
        along = self.message(torch.cat([states[b, j], states[b, i]], dim=1))  # (E, 2D)
        against = self.message_reversed(torch.cat([states[b, i], states[b, j]], dim=1))
        messages = states.new_zeros(*edges.shape[:2], along.shape[1])  # (B, V, 2D), each the sum of what is received
        messages = messages.index_put((b, i), along, accumulate=True).index_put((b, j), against, accumulate=True)
        return self.update(messages.flatten(0, 1), states.flatten(0, 1)).view_as(states)


class PlainCellGenerator(nn.Module):
    """Grows one cell per sample, vertex by vertex. Growth follows hard decisions; what it returns is soft."""

    def __init__(self, condition_size: int, config: GeneratorConfig):
        super().__init__()
        self.space, self.max_vertices = config.space, config.max_vertices
        vertex, graph, tokens = config.vertex_size, config.graph_size, len(config.space.tokens)
        self.tokens = nn.Embedding(tokens, vertex)
        self.start = mlp(vertex + condition_size, vertex + graph, vertex)
        self.layers = nn.ModuleList(PlainMessagePassing(vertex, config.dropout) for _ in range(config.num_layers))
        self.graph_state = GraphState(vertex, graph, config.aggregation)
        self.graph_state_init = GraphState(vertex, graph, config.aggregation)
        self.add_vertex = mlp(graph + condition_size, graph, tokens)
        self.init_vertex = mlp(vertex + graph + condition_size, vertex + graph, vertex)
        if config.space.wiring is None:  # else no edge is decided
            self.add_edge = mlp(2 * vertex + graph + condition_size, vertex + graph, 1)

    def forward(self, condition: Tensor) -> CellBatch:
        """condition (B, C): noise and embedded labels -> B soft cells."""
        batch, size = len(condition), self.max_vertices
        states, soft_ops, soft_edges = [], [], []  # of each vertex: (B, D), (B, T), and (B, V) edges into it
        edges = condition.new_zeros(batch, size, size)  # hard ones, from row to column
        growing = condition.new_ones(batch, dtype=torch.bool)  # whose cell has no output vertex yet
        for name in self.space.inputs:
            token = torch.full((batch,), self.space.token_id[name], device=condition.device)
            states.append(self.start(torch.cat([self.tokens(token), condition], dim=1)))
            soft_ops.append(F.one_hot(token, len(self.space.tokens)).to(condition))
            soft_edges.append(condition.new_zeros(batch, size))
        for t in range(len(self.space.inputs), size):  # vertices 0 to t - 1 exist, vertex t is added
            states = self.propagate(states, edges)
            existing = torch.stack(states, dim=1)  # (B, t, D)
            graph, graph_init = self.graph_state(existing), self.graph_state_init(existing)  # (B, S) each

            token_logits = self.token_logits(graph, condition, t)  # (B, T)
            token = token_logits.argmax(1)  # (B,)
            new = F.normalize(self.init_vertex(torch.cat([self.tokens(token), graph_init, condition], dim=1)), dim=1)
            edge_logits = self.edge_logits(states, new, graph, condition)  # (B, t)
            edges[:, :t, t] = (edge_logits > 0).to(edges.dtype)  # a probability above one half

            states.append(new)
            soft_ops.append(token_logits.softmax(1) * growing[:, None])
            soft_edges.append(F.pad(edge_logits.sigmoid(), (0, size - t)) * growing[:, None])
            growing = growing & (token != self.space.token_id[self.space.output])
        ops = torch.stack(soft_ops, dim=1)
        return CellBatch(torch.stack(soft_edges, dim=2), ops, (ops.sum(2) > 0).sum(1))

    def propagate(self, states: list[Tensor], edges: Tensor) -> list[Tensor]:
        """Message passing over the graph so far; a sample that has no edge yet keeps its states."""
        old = torch.stack(states, dim=1)  # (B, t, D)
        edges, new = edges[:, : len(states), : len(states)], old
        for layer in self.layers:
            new = layer(new, edges)
        new = F.normalize(new, dim=2)
        kept = [new[b] if edges[b].any() else old[b] for b in range(len(old))]
        return list(torch.stack(kept).unbind(1))

    def token_logits(self, graph: Tensor, condition: Tensor, t: int) -> Tensor:
        """What vertex t is to be, (B, T): never an input; the last vertex is the output for sure.

        Where the wiring of the space is fixed, no other vertex is.
        """
        logits = self.add_vertex(torch.cat([graph, condition], dim=1))
        if t == self.max_vertices - 1:
            impossible, logits = set(self.space.tokens) - {self.space.output}, torch.zeros_like(logits)
        elif self.space.wiring is None:
            impossible = self.space.inputs
        else:
            impossible = {*self.space.inputs, self.space.output}
        forbidden = torch.tensor([token in impossible for token in self.space.tokens], device=logits.device)
        return logits.masked_fill(forbidden, -torch.inf)

    def edge_logits(self, states: list[Tensor], new: Tensor, graph: Tensor, condition: Tensor) -> Tensor:
        """Whether each existing vertex is a source of the new one, (B, t). All four inputs are of the same sample.

        Where the space fixes the wiring, the logits are +inf for its edges and -inf for all others.
        """
        if self.space.wiring is not None:
            sure = [math.inf if row[len(states)] else -math.inf for row in self.space.wiring[: len(states)]]
            return torch.tensor(sure).to(new).expand(len(new), -1)
        logits = [self.add_edge(torch.cat([state, new, graph, condition], dim=1)) for state in states]
        return torch.cat(logits, dim=1)


class PlainGenerator(nn.Module):
    """Noise and labels -> genotypes. The cells of one share noise and labels; each kind has weights of its own."""

    cell_generator = PlainCellGenerator  # benchmarks/plain_gan.py has another, with what the robust recipe adds

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config, self.space = config, config.space
        self.labels = LabelEmbedding(config.num_classes, config.label_sizes)
        condition_size = config.latent_dim + sum(config.label_sizes)
        cells = {cell: self.cell_generator(condition_size, config) for cell in config.space.cells}
        self.cells = nn.ModuleDict(cells)

    def forward(self, z: Tensor, labels: Tensor) -> tuple[CellBatch, ...]:
        """z (B, latent_dim), labels (B, objectives) -> B soft cells for each cell of the space."""
        condition = torch.cat([z, self.labels(labels)], dim=1)  # (B, C)
        return tuple(cell(condition) for cell in self.cells.values())


class PlainCellEncoder(nn.Module):
    """Soft or hard cells -> graph states (B, S), by graph convolutions over the undirected cell with self-loops."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        width, layers = config.vertex_size, config.num_layers
        self.tokens = nn.Linear(len(config.space.tokens), width, bias=False)
        self.convs = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))
        self.dropout = nn.Dropout(config.gcn_dropout)
        self.graph_state = GraphState(width, config.graph_size, config.aggregation)

    def forward(self, cells: CellBatch) -> Tensor:
        graphs = []
        for adj, ops, size in zip(cells.adj, cells.ops, cells.num_nodes.tolist(), strict=True):
            adj, ops = adj[:size, :size], ops[:size]  # without padding
            neighbours = adj + adj.T + torch.eye(size, dtype=adj.dtype, device=adj.device)
            degree = neighbours.sum(1)
            weights = neighbours / (degree[:, None] * degree[None, :]).sqrt()
            states = self.tokens(ops)  # (V, D)
            for layer, conv in enumerate(self.convs):
                if layer > 0:
                    states = F.leaky_relu(states, 0.2)
                states = weights @ conv(self.dropout(states))
            graphs.append(self.graph_state(F.normalize(states, dim=1)[None]))
        return torch.cat(graphs)


class PlainDiscriminator(nn.Module):
    """Scores genotypes against labels: it is trained to give 1 to real ones and 0 to generated ones."""

    def __init__(self, config: DiscriminatorConfig):
        super().__init__()
        space = config.space
        self.encoders = nn.ModuleDict({cell: PlainCellEncoder(config) for cell in space.cells})
        self.labels = LabelEmbedding(config.num_classes, config.label_sizes)
        layers, width = [], len(space.cells) * config.graph_size + sum(config.label_sizes)
        for _ in range(config.mlp_layers - 1):
            layers += [nn.Dropout(config.mlp_dropout), nn.Linear(width, max(1, width // 2)), nn.LeakyReLU(0.2)]
            width = max(1, width // 2)
        self.score = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, cells: tuple[CellBatch, ...], labels: Tensor) -> Tensor:
        """B cells for each cell of the space, labels (B, objectives) -> scores (B, 1)."""
        states = [encoder(batch) for encoder, batch in zip(self.encoders.values(), cells, strict=True)]
        return self.score(torch.cat([*states, self.labels(labels)], dim=1))
