"""The generator: grows the cells of a genotype vertex by vertex, from noise and the labels asked for.

models/plain.py has the published generator in obvious loops: read it first. This one computes the same on whole batches
and can do four things more, which the paper does not have: draw its decisions instead of rounding them (temperature),
give the log-likelihood of cells, grow a cell in view of the cells before it (chain_cells), and decide each edge in view
of the edges before it (autoregressive_edges).

    generator = Generator.from_checkpoint("runs/gan/checkpoint.pt")
    genotypes = generator.sample(labels=(2,), n=100, seed=1997)     # 2: the highest of three accuracy classes

Growth follows hard decisions. As published, a decision takes the likelier side; with a temperature it is drawn. Beside
every hard decision there is a soft one, the probabilities of tokens and edges (with a temperature, its Gumbel-softmax
relaxation), through which the discriminator's gradient reaches the generator. As published, the discriminator sees the
soft decisions; by CellBatch.straight_through it sees the hard ones.
"""

import math
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.fast.cuda_graphs import can_record, side_by_side
from models.fast.sampling import decide_as_in_float64
from models.graph import CellBatch, GraphState, LabelEmbedding, MessagePassing, neighbours
from plumbing.checkpoint_files import load_checkpoint, of_this_version


@dataclass(frozen=True)
class GeneratorConfig:
    """The settings of a generator, as published by default, which go into checkpoints as they are.

    latent_dim: width of the noise z. vertex_size, graph_size: widths of vertex and graph states. num_layers, dropout:
    of message passing. aggregation: from vertex states to a graph state, "gsum" or "mean", see GraphState.
    num_classes, label_sizes: classes and width of the label embedding of each objective.
    max_vertices: at which growth ends; None is the limit of the search space. space: the search space of the cells.
    Not in the paper: chain_cells (a cell is grown in view of the finished cells before it), autoregressive_edges (the
    edges into a vertex are decided one after the other, each in view of those before it; decided independently, as
    published, "exactly one of these" cannot be said), temperature (0, as published: every decision takes the likelier
    side; 1: it is drawn with its probability).
    """

    latent_dim: int = 100
    vertex_size: int = 250
    graph_size: int = 56
    num_layers: int = 3
    dropout: float = 0.5
    aggregation: str = "gsum"
    num_classes: tuple[int, ...] = (3,)
    label_sizes: tuple[int, ...] = (10,)
    max_vertices: int | None = None
    chain_cells: bool = False
    autoregressive_edges: bool = False
    temperature: float = 0.0
    space: SearchSpace = NAG_SPACE

    @staticmethod
    def of(settings: dict) -> "GeneratorConfig":
        """The config with these settings, of which asdict may have made the space a dict.

        Raises ValueError when the space has no cells of max_vertices.
        """
        limit, space = settings.get("max_vertices"), SearchSpace.of(settings.get("space", NAG_SPACE))
        settings = settings | {"max_vertices": space.max_vertices if limit is None else limit, "space": space}
        config = GeneratorConfig(**settings)
        if not space.min_vertices <= config.max_vertices <= space.max_vertices:
            limits = f"{space.min_vertices} to {space.max_vertices}"
            raise ValueError(f"max_vertices must be {limits} in the space {space.name}, got {config.max_vertices}")
        return config


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, outputs))


def forcing_noise(cells: tuple[CellBatch, ...], strength: float | None = None) -> tuple[Tensor, ...]:
    """Noise that makes growth decide as it must for the result to be the given hard cells (teacher forcing).

    It is added to the logits of the decisions: (B, V, T + V) for each cell, `strength` where the cell has the token or
    the edge, minus that elsewhere. strength: more than any logit; by default a quarter of the largest number of the
    dtype, to which logits of any network that computes with finite numbers can be added.
    """
    strength = torch.finfo(cells[0].adj.dtype).max / 4 if strength is None else strength
    return tuple(strength * (2 * torch.cat([batch.ops, batch.adj.mT], dim=-1) - 1) for batch in cells)


class Request(NamedTuple):
    """What a generator is called with: B genotypes are asked for.

    z: (B, latent_dim). labels: (B, K) long, one for each of K objectives. noise: of the decisions in each cell
    (B, V, T + V), see Generator.draw_noise; None: every decision takes the likelier side.
    """

    z: Tensor
    labels: Tensor
    noise: tuple[Tensor, ...] | None

    @staticmethod
    def cat(first: "Request", second: "Request") -> "Request":
        """Both requests in one; both have noise."""
        noise = tuple(torch.cat(pair) for pair in zip(first.noise, second.noise, strict=True))
        return Request(torch.cat([first.z, second.z]), torch.cat([first.labels, second.labels]), noise)


class CellGenerator(nn.Module):
    """Grows one cell per sample (NAG paper, section 3.2). Sizes: D vertex state, S graph state, C condition.

    Where the wiring of the space is fixed, no edge is decided, and the last vertex is the output.
    """

    def __init__(self, condition_size: int, config: GeneratorConfig):
        super().__init__()
        space = config.space
        vertex_size, graph_size, tokens = config.vertex_size, config.graph_size, len(space.tokens)
        hidden = vertex_size + graph_size
        self.max_vertices = config.max_vertices
        self.num_inputs = space.num_inputs
        self.output_token = space.token_id[space.output]
        self.input_tokens = slice(1, 1 + space.num_inputs)  # space.tokens = (output, *inputs, *ops)
        # What is not drawn: an input, and where the wiring is fixed, the output before the last vertex.
        self.impossible_tokens = self.input_tokens if space.wiring is None else slice(0, 1 + space.num_inputs)
        self.register_buffer("one_hot", torch.eye(tokens), persistent=False)
        wiring = None if space.wiring is None else torch.tensor(space.wiring, dtype=torch.get_default_dtype())
        self.register_buffer("wiring", wiring, persistent=False)  # (V, V)

        self.tokens = nn.Embedding(tokens, vertex_size)
        self.start = mlp(vertex_size + condition_size, hidden, vertex_size)
        self.layers = nn.ModuleList(MessagePassing(vertex_size, config.dropout) for _ in range(config.num_layers))
        self.graph_state = GraphState(vertex_size, graph_size, config.aggregation)
        self.graph_state_init = GraphState(vertex_size, graph_size, config.aggregation)
        self.add_vertex = mlp(graph_size + condition_size, graph_size, tokens)
        self.init_vertex = mlp(vertex_size + graph_size + condition_size, hidden, vertex_size)
        free = space.wiring is None
        self.add_edge = mlp(2 * vertex_size + graph_size + condition_size, hidden, 1) if free else None
        self.earlier_edges = nn.Linear(vertex_size, hidden) if free and config.autoregressive_edges else None

    def forward(
        self,
        condition: Tensor,
        noise: Tensor | None = None,
        forced: CellBatch | None = None,
        fixed_shape: bool = False,
    ) -> tuple[CellBatch, Tensor]:
        """condition (B, C) -> B soft cells, and the log-likelihood (B,) of their hard decisions, noise left out.

        Growth follows the hard decisions; the soft values returned carry the gradient.
        noise: (B, V, T + V) added to the logits of each new vertex's token and edges, see Generator.draw_noise.
        forced: the hard cells that the noise forces, with teacher forcing.
        fixed_shape: keep finished samples in the batch, masked, so that no shape depends on a value. Otherwise they
            leave it, and b <= B samples are left at a step. The result is the same.
        """
        batch, size = len(condition), self.max_vertices
        sample = torch.arange(batch, device=condition.device)  # (b,) the sample that each row below belongs to
        states = self._start_states(condition)  # (b, inputs, D)
        adj = condition.new_zeros(batch, self.num_inputs, self.num_inputs)  # (b, t, t) of 0/1, inputs unconnected
        weights = [layer.weights() for layer in self.layers]
        if noise is None:
            noise = condition.new_zeros(batch, size, self.one_hot.shape[0] + size)
        logits = []  # of each new vertex, (B, T + V)

        for t in range(self.num_inputs, size):  # t vertices exist, vertex t is added
            if t > self.num_inputs:  # there can be an edge
                states = self._propagate(states, adj, weights)
            token_noise, edge_noise = self._split_noise(noise[sample, t], t)
            graph = self.graph_state(states)  # (b, S)
            token_logits = self._token_logits(graph, condition, last=t == size - 1)  # (b, T)
            token = (token_logits + token_noise).argmax(-1)  # (b,)
            vertex = torch.cat([self.tokens(token), self.graph_state_init(states), condition], dim=-1)
            vertex = F.normalize(self.init_vertex(vertex), dim=-1)  # (b, D)
            context = torch.cat([vertex, graph, condition], dim=-1)
            forced_edges = None if forced is None else forced.adj[sample, :t, t].detach()  # (b, t)
            edge_logits = self._edge_logits(states, context, edge_noise, forced_edges)  # (b, t)
            edges = edge_logits + edge_noise > 0  # (b, t)
            own = F.pad(torch.cat([token_logits, edge_logits], dim=-1), (0, size - t))  # (b, T + V)
            if len(sample) < batch:
                own = own.new_zeros(batch, own.shape[1]).index_copy(0, sample, own)
            logits.append(own)

            states = torch.cat([states, vertex[:, None]], dim=1)  # (b, t + 1, D)
            adj = F.pad(torch.cat([adj, edges[:, :, None]], dim=2), (0, 0, 0, 1))  # (b, t + 1, t + 1), new row: no edge
            if not fixed_shape:
                left = (token != self.output_token).nonzero().squeeze(1)
                if len(left) < len(sample):
                    sample, condition, states, adj = (x.index_select(0, left) for x in (sample, condition, states, adj))
        return self._decisions(torch.stack(logits, dim=1), noise)

    def _decisions(self, logits: Tensor, noise: Tensor) -> tuple[CellBatch, Tensor]:
        """Logits of all decisions -> what forward returns.

        logits: (B, V - inputs, T + V), of the tokens and edges of the new vertices; those after a cell's end do not
        count. noise: (B, V, T + V).
        """
        noisy = logits + noise[:, self.num_inputs :]
        tokens, size = self.one_hot.shape[0], self.max_vertices
        token = noisy[..., :tokens].argmax(-1, keepdim=True)  # (B, N, 1)
        is_output = token == self.output_token
        present = is_output.cumsum(1) <= is_output  # (B, N, 1) up to the first output
        of_token = logits[..., :tokens].log_softmax(-1).gather(2, token)  # (B, N, 1)
        likelihood = torch.where(present, of_token, 0).sum((1, 2))
        inputs = self.one_hot[self.input_tokens].expand(len(logits), -1, -1)
        ops = torch.cat([inputs, torch.where(present, noisy[..., :tokens].softmax(-1), 0)], dim=1)  # (B, V, T)
        if self.wiring is None:
            vertices = torch.arange(size, device=logits.device)
            possible = present & (vertices < vertices[self.num_inputs :, None])  # (B, N, V) edges, from vertices before
            edge_logits, edges = logits[..., tokens:], noisy[..., tokens:] > 0
            of_edges = -F.binary_cross_entropy_with_logits(edge_logits, edges.to(logits.dtype), reduction="none")
            likelihood = likelihood + torch.where(possible, of_edges, 0).sum((1, 2))
            adj = F.pad(torch.where(possible, noisy[..., tokens:].sigmoid(), 0).mT, (self.num_inputs, 0))  # (B, V, V)
        else:
            adj = self.wiring.expand(len(logits), -1, -1)
        return CellBatch(adj, ops, self.num_inputs + present.sum((1, 2))), likelihood

    def _start_states(self, condition: Tensor) -> Tensor:
        """(B, C) -> states of the input vertices (B, inputs, D), not normalised."""
        tokens = self.tokens.weight[self.input_tokens].expand(len(condition), -1, -1)  # (B, inputs, D)
        return self.start(torch.cat([tokens, condition[:, None].expand(-1, self.num_inputs, -1)], dim=-1))

    def _propagate(self, states: Tensor, adj: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Message passing over states (b, t, D); a sample without any edge keeps its states.

        weights: what MessagePassing.weights gives, layer by layer.
        """
        new, (senders, count) = states, neighbours(adj)
        for layer, own in zip(self.layers, weights, strict=True):
            new = layer(new, senders, count, *own)
        has_edge = adj.sum((1, 2), keepdim=True) > 0  # (b, 1, 1)
        return torch.where(has_edge, F.normalize(new, dim=-1), states)

    def _split_noise(self, noise: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Noise of vertex t (b, T + V) -> that of its token (b, T) and that of the edges to it (b, t)."""
        tokens = self.one_hot.shape[0]
        return noise[:, :tokens], noise[:, tokens : tokens + t]

    def _token_logits(self, graph: Tensor, condition: Tensor, last: bool) -> Tensor:
        """Graph states (b, S) -> logits of the token of the vertex that is added (b, T).

        It is never an input. last: no vertex may follow, so it is the output for sure. Where the wiring is fixed, the
        output is the last vertex.
        """
        if last:
            return self.one_hot[self.output_token].log().expand(len(graph), -1)
        logits = self.add_vertex(torch.cat([graph, condition], dim=-1))
        logits[:, self.impossible_tokens] = -math.inf
        return logits

    def _edge_logits(self, states: Tensor, context: Tensor, noise: Tensor, forced: Tensor | None) -> Tensor:
        """Logits of the edges from every existing vertex to the new one (b, t), without noise.

        states: of the existing vertices (b, t, D). context: [h_v, h_G, c] of the same samples, v being the new vertex.
        It is the MLP of [h_j, context] for every j, but the context's share of the first layer is computed once.
        (The public code takes the contexts of other samples here, which cuts the edges off from the labels.)
        With autoregressive edges, the hidden layer of every edge also has the sum of `earlier_edges(h_i)` over the
        sources i of those edges before it that are present. Which are present is decided here, with the noise (b, t),
        or given by `forced` (b, t) of 0/1.
        Where the space fixes the wiring, the logits are +inf for its edges and -inf for all others.
        """
        if self.wiring is not None:
            vertex = states.shape[1]
            return ((self.wiring[:vertex, vertex] - 0.5) * math.inf).expand(len(states), -1)
        first, activation, second = self.add_edge
        of_state, of_context = first.weight.split([states.shape[-1], context.shape[-1]], dim=1)
        hidden = F.linear(states, of_state) + F.linear(context, of_context, first.bias)[:, None]  # (b, t, D + S)
        if self.earlier_edges is not None:
            seen = self.earlier_edges(states)  # (b, t, D + S) what an edge from this source adds for those after it
            edges = self._decide_one_by_one(hidden.detach(), seen.detach(), noise) if forced is None else forced
            hidden = torch.baddbmm(hidden, edges[:, None].expand(-1, edges.shape[1], -1).tril(-1), seen)
        return second(activation(hidden)).squeeze(-1)

    @torch.no_grad()
    def _decide_one_by_one(self, hidden: Tensor, seen: Tensor, noise: Tensor) -> Tensor:
        """Autoregressive edges (b, t) of 0/1: each is decided in view of those before it.

        hidden: the hidden layer of each edge without the others (b, t, D + S). seen: what an edge adds to the hidden
        layers of those after it (b, t, D + S). noise: (b, t), added to the logits.
        """
        _, activation, second = self.add_edge
        before, edges = torch.zeros_like(hidden[:, 0]), []  # (b, D + S)
        for j in range(hidden.shape[1]):
            logit = second(activation(hidden[:, j] + before))  # (b, 1)
            edges.append((logit + noise[:, j, None] > 0).to(hidden.dtype))
            before = torch.addcmul(before, edges[-1], seen[:, j])
        return torch.cat(edges, dim=1)


class Generator(nn.Module):
    """Noise and labels -> genotypes: one CellGenerator for each cell of the space, on a common condition.

    The keywords are the fields of GeneratorConfig.

    fixed_shape (attribute): True for shapes that depend on no value and a forward pass that never waits for the
    device; False for less work, since finished samples leave the batch; None for whichever suits the device.
    """

    fixed_shape: bool | None = None

    def __init__(self, *args, **kwargs):
        super().__init__()
        names = [field.name for field in fields(GeneratorConfig)]
        self.config = config = GeneratorConfig.of(dict(zip(names, args, strict=False)) | kwargs)
        self.space = space = config.space
        self.labels = LabelEmbedding(config.num_classes, config.label_sizes)
        self.cells, self.summaries = nn.ModuleDict(), nn.ModuleDict()
        condition_size = config.latent_dim + sum(config.label_sizes)
        for i, cell in enumerate(space.cells):
            self.cells[cell] = CellGenerator(condition_size, config)
            if config.chain_cells and i < len(space.cells) - 1:  # the cells after this one see a summary of it
                flat = config.max_vertices * (config.max_vertices + len(space.tokens))
                self.summaries[cell] = mlp(flat, config.vertex_size, config.graph_size)
                condition_size += config.graph_size

    def forward(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None = None) -> tuple[CellBatch, ...]:
        """z (B, latent_dim), labels (B, K) long -> B soft cells for each cell of the space.

        noise: what draw_noise gives for the decisions; None: every decision takes the likelier side.
        """
        return self._grow(z, labels, noise, gradient_between_cells=True)[0]

    def draw(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None) -> tuple[tuple[CellBatch, ...], Tensor]:
        """The cells that forward gives, and the log-likelihood (B,) of their hard decisions, each given those before.

        In nats, at temperature 1. It is computed from logits and so exact where probabilities are rounded to 0 or 1.
        """
        return self._grow(z, labels, noise)

    def log_likelihood(self, z: Tensor, labels: Tensor, cells: tuple[CellBatch, ...]) -> Tensor:
        """The log-likelihood (B,) of hard cells, in nats: growth is made to decide as in these (teacher forcing)."""
        return self._grow(z, labels, forcing_noise(cells), cells)[1]

    def _grow(
        self,
        z: Tensor,
        labels: Tensor,
        noise: tuple[Tensor, ...] | None,
        forced: tuple[CellBatch, ...] | None = None,
        gradient_between_cells: bool = False,
    ) -> tuple[tuple[CellBatch, ...], Tensor]:
        """The soft cells, and the log-likelihood (B,) of their hard decisions.

        forced: the hard cells that the noise forces, with teacher forcing.
        gradient_between_cells: whether, with chain_cells, gradients pass from a cell to the decisions in the cells
            before it (straight through). For a likelihood they must not: these decisions are given.
        """
        condition = torch.cat([z, self.labels(labels)], dim=-1)  # (B, C)
        fixed_shape = can_record(z.device) if self.fixed_shape is None else self.fixed_shape
        noise = noise or (None,) * len(self.cells)
        results = []
        if self.summaries and forced is None:  # a cell waits for the cells before it
            for (name, cell), own_noise in zip(self.cells.items(), noise, strict=True):
                results.append(cell(condition, own_noise, fixed_shape=fixed_shape))
                finished = results[-1][0].straight_through()
                condition = self._in_view_of(condition, name, finished, gradient_between_cells)
        else:
            calls = []
            for i, (name, cell) in enumerate(self.cells.items()):
                own = None if forced is None else forced[i]
                calls.append((partial(cell, fixed_shape=fixed_shape), condition, noise[i], own))
                condition = self._in_view_of(condition, name, own, gradient_between_cells)
            results = side_by_side(*calls)
        cells, likelihoods = zip(*results, strict=True)
        return cells, sum(likelihoods)

    def _in_view_of(self, condition: Tensor, name: str, cells: CellBatch | None, gradient: bool) -> Tensor:
        """The condition of the cells after the cell called `name`: with chain_cells, a summary of that cell is added.

        gradient: whether gradients pass to the given hard cells.
        """
        if name not in self.summaries:
            return condition
        flat = torch.cat([cells.adj, cells.ops], dim=-1).flatten(1)  # (B, V * (V + T))
        summary = self.summaries[name](flat if gradient else flat.detach())
        return torch.cat([condition, F.normalize(summary, dim=-1)], dim=-1)

    def draw_noise(
        self, n: int, generator: torch.Generator, temperature: float | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """z (n, latent_dim), and for each cell what forward adds to the logits of the decisions (n, V, T + V).

        Gumbel noise for tokens and logistic noise for edges, times the temperature: the decision that is then the
        likelier one has been drawn from the softmax or sigmoid of logits / temperature. None at temperature 0.
        generator: on whose device the noise is drawn. temperature: the config's by default.
        """
        temperature = self.config.temperature if temperature is None else temperature
        device, size, tokens = generator.device, self.config.max_vertices, len(self.space.tokens)
        z = torch.randn(n, self.config.latent_dim, generator=generator, device=device)
        if not temperature:
            return z, None
        noise = []
        for _ in self.cells:
            gumbel = -torch.empty(n, size, tokens + size, device=device).exponential_(generator=generator).log()
            other = -torch.empty(n, size, size, device=device).exponential_(generator=generator).log()
            gumbel[..., tokens:] -= other  # the difference of two Gumbel variables is logistic
            noise.append(gumbel * temperature)
        return z, tuple(noise)

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: torch.device | str = "cpu") -> "Generator":
        """The generator of a GAN checkpoint, in eval mode. Raises ValueError when the file is no such checkpoint."""
        checkpoint = load_checkpoint(path, "gan", ("generator", "generator_config"))
        with of_this_version(path):
            generator = cls(**checkpoint["generator_config"])
            generator.load_state_dict(checkpoint["generator"])
        return generator.to(device).eval()

    @torch.no_grad()
    def sample(
        self,
        labels: tuple[int, ...],
        n: int,
        seed: int,
        batch_size: int = 512,
        temperature: float | None = None,
    ) -> list[Genotype | None]:
        """Draw n genotypes for `labels` (one class for each objective), pruned; None where a cell is invalid.

        temperature: the generator's by default; lower ones draw likelier cells, less varied ones.
        What is drawn depends on weights, labels, n, seed and temperature, not on batch_size, device or training mode:
        the noise comes from the CPU in one draw, dropout is off, and decisions are those of float64, since in float32
        the order of a sum (another batch size or device) can carry a probability from one side of 0.5 to the other.
        """
        num_classes = self.config.num_classes
        if len(labels) != len(num_classes):
            raise ValueError(f"expected {len(num_classes)} labels, one for each objective, got {len(labels)}")
        for i, (label, classes) in enumerate(zip(labels, num_classes, strict=True)):
            if not 0 <= label < classes:
                raise ValueError(f"label {i} must be 0 to {classes - 1}, got {label}")
        z, noise = self.draw_noise(n, torch.Generator().manual_seed(seed), temperature)
        cells = decide_as_in_float64(self, z, noise, torch.tensor(labels), batch_size)
        return [Genotype(*specs, space=self.space).prune() for specs in cells]
