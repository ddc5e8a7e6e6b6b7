"""The generator: grows the cells of a genotype vertex by vertex, from noise and the labels asked for.

    generator = Generator.from_checkpoint("runs/gan/checkpoint.pt")
    genotypes = generator.sample(labels=(2,), n=100, seed=1997)     # 2: the highest of three accuracy classes

What the discriminator sees of a cell is soft (probabilities of tokens and edges); growth itself is hard. As published,
a decision is the likelier side; with a temperature it is drawn, and the soft values are its Gumbel-softmax relaxation.
"""

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genotypes import NAG_SPACE, Genotype, SearchSpace
from models.fast.cpu import Dropout
from models.fast.cuda_graphs import Branch
from models.graph import CellBatch, GraphState, LabelEmbedding
from utils import load_checkpoint, of_this_version

# Logits. The largest difference between float32 and float64 measured on 512 genotypes is 2.4e-6 with the shipped
# generators, 1e-6 with untrained ones of default size and 1e-4 with one whose weights are quadrupled. Of the shipped
# generators' genotypes, 1 to 3 % have a decision this close.
CLOSE = 1e-3


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, outputs))


def forcing_noise(cells: tuple[CellBatch, ...], strength: float = 1e4) -> tuple[Tensor, ...]:
    """What to add to the logits of the decisions for growth to retrace hard cells: (B, V, T + V) for each cell.

    strength: more than any logit.
    """
    return tuple(strength * (2 * torch.cat([batch.ops, batch.adj.mT], dim=-1) - 1) for batch in cells)


class MessagePassing(nn.Module):
    """One round of messages along the edges and against them, then a GRU cell (NAG paper, section 3.2)."""

    def __init__(self, vertex_size: int, dropout: float):
        super().__init__()
        width = 2 * vertex_size
        self.dropout = Dropout(dropout)
        self.message = nn.Linear(width, width)  # of edge j -> i, to i, from [h_j, h_i]
        self.message_reversed = nn.Linear(width, width)  # of the same edge, to j, from [h_i, h_j]
        self.update = nn.GRUCell(width, vertex_size)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Of the messages along and against the edges: (2D, 4D), and their biases (2, 2D)."""
        both = self.message, self.message_reversed
        return torch.cat([linear.weight for linear in both], dim=1), torch.stack([linear.bias for linear in both])

    def forward(self, states: Tensor, senders: Tensor, count: Tensor, weight: Tensor, biases: Tensor) -> Tensor:
        """states (B, V, D) -> new states (B, V, D).

        senders, count: `neighbours` of the cells. weight, biases: `weights`. Several calls share them.
        The sum of a linear map is the linear map of the sum, so the map is applied once per vertex, not per edge.
        """
        states = self.dropout(states)
        inputs = (senders @ states).view(-1, weight.shape[1])  # (B * V, 4D)
        messages = torch.addmm(count.flatten(0, 1) @ biases, inputs, weight.T)  # (B * V, 2D)
        return self.update(messages, states.flatten(0, 1)).view_as(states)


def neighbours(adj: Tensor) -> tuple[Tensor, Tensor]:
    """adj (B, V, V) of 0/1 -> what turns states (B, V, D) into the inputs of the messages, and the numbers of edges.

    (B, 4V, V), whose product with the states is, for each vertex i, the sum over the edges into it of h_j and of h_i,
    and the same of the edges out of it; and (B, V, 2): how many there are.
    """
    others = torch.stack([adj.mT, adj], dim=2)  # (B, V, 2, V)
    count = others.sum(-1)  # (B, V, 2)
    own = count[..., None] * torch.eye(adj.shape[1], dtype=adj.dtype, device=adj.device)[:, None]
    return torch.stack([others, own], dim=3).flatten(1, 3), count


class CellGenerator(nn.Module):
    """Grows one cell per sample (NAG paper, section 3.2). Sizes: D vertex state, S graph state, C condition."""

    def __init__(
        self,
        condition_size: int,
        vertex_size: int,
        graph_size: int,
        num_layers: int,
        dropout: float,
        aggregation: str,
        max_vertices: int,
        edges_in_turn: bool,
        space: SearchSpace,
    ):
        super().__init__()
        tokens, hidden = len(space.tokens), vertex_size + graph_size
        self.max_vertices = max_vertices
        self.num_inputs = space.num_inputs
        self.output_token = space.token_id[space.output]
        self.input_tokens = slice(1, 1 + space.num_inputs)  # space.tokens = (output, *inputs, *ops)
        self.register_buffer("one_hot", torch.eye(tokens), persistent=False)

        self.tokens = nn.Embedding(tokens, vertex_size)
        self.start = mlp(vertex_size + condition_size, hidden, vertex_size)
        self.layers = nn.ModuleList(MessagePassing(vertex_size, dropout) for _ in range(num_layers))
        self.graph_state = GraphState(vertex_size, graph_size, aggregation)
        self.graph_state_init = GraphState(vertex_size, graph_size, aggregation)
        self.add_vertex = mlp(graph_size + condition_size, graph_size, tokens)
        self.init_vertex = mlp(vertex_size + graph_size + condition_size, hidden, vertex_size)
        self.add_edge = mlp(2 * vertex_size + graph_size + condition_size, hidden, 1)
        self.chosen = nn.Linear(vertex_size, hidden) if edges_in_turn else None

    def forward(
        self, condition: Tensor, fixed_shape: bool, noise: Tensor | None, known: CellBatch | None
    ) -> tuple[CellBatch, Tensor]:
        """condition (B, C) -> CellBatch of B cells, soft; and the log-likelihood (B,) of the hard ones, without noise.

        Growth follows the hard decisions; the soft values returned carry the gradient.
        noise: (B, V, T + V) added to the logits of each new vertex's token and edges, see Generator.draw_noise.
        known: the hard cells, where noise forces them.
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
            forced = None if known is None else known.adj[sample, :t, t].detach()  # (b, t)
            edge_logits = self._edge_logits(states, context, edge_noise, forced)  # (b, t)
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
        """Logits (B, V - inputs, T + V) of the new vertices' tokens and edges, any after a cell's end -> as forward."""
        noisy = logits + noise[:, self.num_inputs :]
        tokens, size = self.one_hot.shape[0], self.max_vertices
        token = noisy[..., :tokens].argmax(-1, keepdim=True)  # (B, N, 1)
        is_output = token == self.output_token
        present = is_output.cumsum(1) <= is_output  # (B, N, 1) up to the first output
        vertices = torch.arange(size, device=logits.device)
        possible = present & (vertices < vertices[self.num_inputs :, None])  # (B, N, V) edges, from vertices before

        of_token = logits[..., :tokens].log_softmax(-1).gather(2, token)  # (B, N, 1)
        edge_logits, edges = logits[..., tokens:], noisy[..., tokens:] > 0
        of_edges = -F.binary_cross_entropy_with_logits(edge_logits, edges.to(logits.dtype), reduction="none")
        likelihood = torch.where(present, of_token, 0).sum((1, 2)) + torch.where(possible, of_edges, 0).sum((1, 2))

        inputs = self.one_hot[self.input_tokens].expand(len(logits), -1, -1)
        ops = torch.cat([inputs, torch.where(present, noisy[..., :tokens].softmax(-1), 0)], dim=1)  # (B, V, T)
        adj = F.pad(torch.where(possible, noisy[..., tokens:].sigmoid(), 0).mT, (self.num_inputs, 0))  # (B, V, V)
        return CellBatch(adj, ops, self.num_inputs + present.sum((1, 2))), likelihood

    def _start_states(self, condition: Tensor) -> Tensor:
        """(B, C) -> states of the input vertices (B, inputs, D), not normalised."""
        tokens = self.tokens.weight[self.input_tokens].expand(len(condition), -1, -1)  # (B, inputs, D)
        return self.start(torch.cat([tokens, condition[:, None].expand(-1, self.num_inputs, -1)], dim=-1))

    def _propagate(self, states: Tensor, adj: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Message passing over (b, t, D); a sample without any edge keeps its states. weights: of each layer."""
        new, (senders, count) = states, neighbours(adj)
        for layer, own in zip(self.layers, weights, strict=True):
            new = layer(new, senders, count, *own)
        has_edge = adj.sum((1, 2), keepdim=True) > 0  # (b, 1, 1)
        return torch.where(has_edge, F.normalize(new, dim=-1), states)

    def _split_noise(self, noise: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """(b, T + V) -> noise of the tokens (b, T) and of the edges from vertices before t (b, t)."""
        tokens = self.one_hot.shape[0]
        return noise[:, :tokens], noise[:, tokens : tokens + t]

    def _token_logits(self, graph: Tensor, condition: Tensor, last: bool) -> Tensor:
        """graph (b, S) -> what vertex is added, (b, T): never an input, and the output when no vertex may follow."""
        if last:
            return self.one_hot[self.output_token].log().expand(len(graph), -1)
        logits = self.add_vertex(torch.cat([graph, condition], dim=-1))
        logits[:, self.input_tokens] = -math.inf
        return logits

    def _edge_logits(self, states: Tensor, context: Tensor, noise: Tensor, forced: Tensor | None) -> Tensor:
        """states (b, t, D) of the sources, context [h_v, h_G, c] of the same samples -> (b, t), without noise.

        The MLP of [h_j, context] for every j, but the context's share of its first layer is computed once.
        The reference mixes the contexts of different samples here, which cuts the edges off from the labels.
        With `edges_in_turn`, every edge also sees the sum over the sources that were chosen before it: with the noise
        (b, t), or those that are `forced` (b, t).
        """
        first, activation, second = self.add_edge
        of_state, of_context = first.weight.split([states.shape[-1], context.shape[-1]], dim=1)
        hidden = F.linear(states, of_state) + F.linear(context, of_context, first.bias)[:, None]  # (b, t, D + S)
        if self.chosen is not None:
            further = self.chosen(states)  # (b, t, D + S) what a chosen source adds for those after it
            edges = self._decide_in_turn(hidden.detach(), further.detach(), noise) if forced is None else forced
            hidden = torch.baddbmm(hidden, edges[:, None].expand(-1, edges.shape[1], -1).tril(-1), further)
        return second(activation(hidden)).squeeze(-1)

    @torch.no_grad()
    def _decide_in_turn(self, hidden: Tensor, further: Tensor, noise: Tensor) -> Tensor:
        """The edges (b, t) of 0/1, each in view of those before it. hidden, further (b, t, D + S), noise (b, t)."""
        _, activation, second = self.add_edge
        before, edges = torch.zeros_like(hidden[:, 0]), []  # (b, D + S)
        for j in range(hidden.shape[1]):
            logit = second(activation(hidden[:, j] + before))  # (b, 1)
            edges.append((logit + noise[:, j, None] > 0).to(hidden.dtype))
            before = torch.addcmul(before, edges[-1], further[:, j])
        return torch.cat(edges, dim=1)


class Generator(nn.Module):
    """Noise and labels -> genotypes: one CellGenerator for each cell of the space, on a common condition.

    num_classes, label_sizes: classes and embedding width of each of the K objectives.
    max_vertices: at which growth ends (default: the space's limit).
    aggregation: "gsum" or "mean", see GraphState.
    chain_cells: a cell is grown in view of the finished cells before it (an addition to the paper, where the cells
        of a genotype have noise and labels in common only).
    edges_in_turn: the edges into a vertex are decided one after the other, each in view of those before (an addition:
        decided independently, as published, "exactly one of these" cannot be said).
    temperature: 0, as published: every decision takes the likelier side; 1: it is drawn with its probability.

    fixed_shape (attribute): True for shapes that depend on no value and a forward pass that never waits for the
    device; False for less work, finished samples leaving the batch; None: True on CUDA only.
    """

    fixed_shape: bool | None = None

    def __init__(
        self,
        latent_dim: int = 100,
        vertex_size: int = 250,
        graph_size: int = 56,
        num_layers: int = 3,
        dropout: float = 0.5,
        aggregation: str = "gsum",
        num_classes: tuple[int, ...] = (3,),
        label_sizes: tuple[int, ...] = (10,),
        max_vertices: int | None = None,
        chain_cells: bool = False,
        edges_in_turn: bool = False,
        temperature: float = 0.0,
        space: SearchSpace = NAG_SPACE,
    ):
        super().__init__()
        max_vertices = space.max_vertices if max_vertices is None else max_vertices
        if not space.min_vertices <= max_vertices <= space.max_vertices:
            limits = f"{space.min_vertices} to {space.max_vertices}"
            raise ValueError(f"max_vertices must be {limits} in the space {space.name}, got {max_vertices}")
        self.config = {
            "latent_dim": latent_dim,
            "vertex_size": vertex_size,
            "graph_size": graph_size,
            "num_layers": num_layers,
            "dropout": dropout,
            "aggregation": aggregation,
            "num_classes": tuple(num_classes),
            "label_sizes": tuple(label_sizes),
            "max_vertices": max_vertices,
            "chain_cells": chain_cells,
            "edges_in_turn": edges_in_turn,
            "temperature": temperature,
        }
        self.space = space
        self.labels = LabelEmbedding(num_classes, label_sizes)
        self.cells, self.summaries = nn.ModuleDict(), nn.ModuleDict()
        condition_size = latent_dim + sum(label_sizes)
        for i, cell in enumerate(space.cells):
            self.cells[cell] = CellGenerator(
                condition_size,
                vertex_size,
                graph_size,
                num_layers,
                dropout,
                aggregation,
                max_vertices,
                edges_in_turn,
                space,
            )
            if chain_cells and i < len(space.cells) - 1:  # for the cells after this one
                flat = max_vertices * (max_vertices + len(space.tokens))
                self.summaries[cell] = mlp(flat, vertex_size, graph_size)
                condition_size += graph_size

    def forward(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None = None) -> tuple[CellBatch, ...]:
        """z (B, latent_dim), labels (B, K) long -> one CellBatch of B soft cells for each cell of the space.

        noise: of the decisions, from draw_noise; None: every decision takes the likelier side.
        """
        return self._grow(z, labels, noise)[0]

    def draw(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None) -> tuple[tuple[CellBatch, ...], Tensor]:
        """The cells of forward, and the log-likelihood (B,) of the hard decisions in them, which are taken as given.

        In nats, at temperature 1; from logits, so that it is exact where probabilities are rounded to 0 or 1.
        """
        return self._grow(z, labels, noise, given=True)

    def likelihood(self, z: Tensor, labels: Tensor, cells: tuple[CellBatch, ...]) -> Tensor:
        """The log-likelihood of hard cells (B,), as from draw: growth is made to retrace them (teacher forcing)."""
        return self._grow(z, labels, forcing_noise(cells), given=True, known=cells)[1]

    def _grow(
        self, z: Tensor, labels: Tensor, noise, given: bool = False, known: tuple[CellBatch, ...] | None = None
    ) -> tuple[tuple[CellBatch, ...], Tensor]:
        """given: no gradient from a cell to the decisions in the cells before it, which is that of straight_through.

        known: the hard cells, where noise forces them.
        """
        fixed_shape = z.is_cuda if self.fixed_shape is None else self.fixed_shape
        condition = torch.cat([z, self.labels(labels)], dim=-1)  # (B, C)
        results, branches = [], []  # of the cells
        for i, (name, cell) in enumerate(self.cells.items()):
            branches.append(Branch(name, condition))
            own_noise, own_known = (None if of_cells is None else of_cells[i] for of_cells in (noise, known))
            with branches[i].work(condition, own_noise, own_known):  # cells wait for each other only where they must
                results.append(cell(condition, fixed_shape, own_noise, own_known))
            if name in self.summaries:
                if known is not None:
                    finished = known[i]
                else:
                    branches[i].join(*results[i])
                    finished = results[i][0].straight_through()
                flat = torch.cat([finished.adj, finished.ops], dim=-1).flatten(1)  # (B, V * (V + T))
                summary = self.summaries[name](flat.detach() if given else flat)
                condition = torch.cat([condition, F.normalize(summary, dim=-1)], dim=-1)
        for branch, result in zip(branches, results, strict=True):
            branch.join(*result)
        cells, likelihoods = zip(*results, strict=True)
        return cells, sum(likelihoods)

    def draw_noise(
        self, n: int, generator: torch.Generator, temperature: float | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """z (n, latent_dim), and what forward adds to the logits of the decisions; on the device of `generator`.

        Gumbel noise for tokens and logistic noise for edges, times the temperature: the decision that is then the
        likelier one has been drawn from the softmax or sigmoid of logits / temperature.
        temperature: the generator's by default.
        """
        temperature = self.config["temperature"] if temperature is None else temperature
        device, size, tokens = generator.device, self.config["max_vertices"], len(self.space.tokens)
        z = torch.randn(n, self.config["latent_dim"], generator=generator, device=device)
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
    def from_checkpoint(
        cls, path: str | Path, device: torch.device | str = "cpu", space: SearchSpace = NAG_SPACE
    ) -> "Generator":
        """The generator of a GAN checkpoint, in eval mode. Raises ValueError when the file is no such checkpoint."""
        checkpoint = load_checkpoint(path, "gan", ("generator", "generator_config"))
        with of_this_version(path):
            generator = cls(**checkpoint["generator_config"], space=space)
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
        For speed, samples are grown in float32 first, and grown again where a decision is closer than CLOSE.
        """
        num_classes = self.config["num_classes"]
        if len(labels) != len(num_classes):
            raise ValueError(f"expected {len(num_classes)} labels, one for each objective, got {len(labels)}")
        for i, (label, classes) in enumerate(zip(labels, num_classes, strict=True)):
            if not 0 <= label < classes:
                raise ValueError(f"label {i} must be 0 to {classes - 1}, got {label}")
        exact = copy.deepcopy(self).double().eval()
        fast = copy.deepcopy(self).float().eval() if torch.get_float32_matmul_precision() == "highest" else exact
        device = next(exact.parameters()).device
        z, noise = self.draw_noise(n, torch.Generator().manual_seed(seed), temperature)
        genotypes = []
        for start in range(0, n, batch_size):
            rows = torch.arange(start, min(start + batch_size, n))
            cells = fast._grow_rows(z, noise, labels, rows, device)
            decoded = list(zip(*(batch.decode(self.space) for batch in cells), strict=True))
            margin = torch.stack([batch.margin() for batch in cells]).amin(0).cpu()
            close = (margin < CLOSE).nonzero().flatten()
            if fast is not exact and len(close):
                cells = exact._grow_rows(z, noise, labels, rows[close], device)
                again = zip(*(batch.decode(self.space) for batch in cells), strict=True)
                for i, specs in zip(close.tolist(), again, strict=True):
                    decoded[i] = specs
            genotypes += [Genotype(*specs, space=self.space).prune() for specs in decoded]
        return genotypes

    def _grow_rows(self, z: Tensor, noise, labels: tuple[int, ...], rows: Tensor, device) -> tuple[CellBatch, ...]:
        """The cells of some rows of a draw, in the precision of the weights."""
        dtype = next(self.parameters()).dtype
        decisions = None if noise is None else tuple(part[rows].to(device, dtype) for part in noise)
        return self(z[rows].to(device, dtype), torch.tensor([labels], device=device).expand(len(rows), -1), decisions)
