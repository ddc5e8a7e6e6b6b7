"""GAN, plain: what models/generator.py and models/discriminator.py compute, written the obvious way.

Edge lists built by Python loops, a linear layer for every edge, the edge MLP on whole concatenations, and all cells
grown to the last vertex, whatever of them is used. Weights are those of the fast network, which is only wrapped; so
equal inputs must give equal outputs, up to dropout, whose random stream is used in another order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.discriminator import CellEncoder, Discriminator
from models.generator import CellGenerator, Generator, MessagePassing, forcing_noise
from models.graph import CellBatch


class PlainGenerator(nn.Module):
    """Wraps a Generator; same calls, same outputs."""

    def __init__(self, generator: Generator):
        super().__init__()
        self.generator = generator
        self.config, self.space = generator.config, generator.space

    def draw_noise(self, *args, **kwargs):
        return self.generator.draw_noise(*args, **kwargs)

    def forward(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...] | None = None) -> tuple[CellBatch, ...]:
        return self._grow(z, labels, noise)[0]

    def draw(self, z: Tensor, labels: Tensor, noise: tuple[Tensor, ...]) -> tuple[tuple[CellBatch, ...], Tensor]:
        return self._grow(z, labels, noise, given=True)

    def likelihood(self, z: Tensor, labels: Tensor, cells: tuple[CellBatch, ...]) -> Tensor:
        return self.draw(z, labels, forcing_noise(cells))[1]

    def _grow(self, z, labels, noise, given=False):
        condition = torch.cat([z, self.generator.labels(labels)], dim=1)
        cells, likelihood = [], 0
        for i, (name, cell) in enumerate(self.generator.cells.items()):
            grown, own = grow(cell, condition, None if noise is None else noise[i])
            cells.append(grown)
            likelihood = likelihood + own
            if name in self.generator.summaries:
                finished = grown.straight_through()
                flat = torch.cat([finished.adj, finished.ops], dim=2).flatten(1)
                summary = self.generator.summaries[name](flat.detach() if given else flat)
                condition = torch.cat([condition, F.normalize(summary, dim=1)], dim=1)
        return tuple(cells), likelihood


def grow(cell: CellGenerator, condition: Tensor, noise: Tensor | None) -> tuple[CellBatch, Tensor]:
    """One cell a sample: condition (B, C) -> CellBatch and log-likelihood (B,), as CellGenerator."""
    batch, size = len(condition), cell.max_vertices
    inputs = range(cell.input_tokens.start, cell.input_tokens.stop)
    tokens = cell.tokens.num_embeddings
    states = []  # vertex by vertex, (B, D)
    soft_ops = []  # vertex by vertex, (B, T)
    soft_adj = []  # target by target, (B, V)
    adj = torch.zeros(batch, size, size, dtype=condition.dtype, device=condition.device)  # hard
    growing = torch.ones(batch, dtype=torch.bool, device=condition.device)
    likelihood = torch.zeros(batch, dtype=condition.dtype, device=condition.device)
    for token in inputs:
        token = torch.full((batch,), token, device=condition.device)
        states.append(cell.start(torch.cat([cell.tokens(token), condition], dim=1)))
        soft_ops.append(F.one_hot(token, tokens).to(condition.dtype))
        soft_adj.append(torch.zeros(batch, size, dtype=condition.dtype, device=condition.device))
    for t in range(len(inputs), size):
        old = new = torch.stack(states, dim=1)  # (B, t, D)
        if t > len(inputs):
            for layer in cell.layers:
                new = pass_messages(layer, new, adj[:, :t, :t])
            new = F.normalize(new, dim=2)
        new = torch.stack([new[b] if adj[b].any() else old[b] for b in range(batch)])
        states = list(new.unbind(1))
        graph, graph_init = cell.graph_state(new), cell.graph_state_init(new)

        logits = cell.add_vertex(torch.cat([graph, condition], dim=1))  # (B, T)
        forbidden = torch.tensor([token in inputs for token in range(tokens)], device=logits.device)
        if t == size - 1:
            forbidden = torch.tensor([token != cell.output_token for token in range(tokens)], device=logits.device)
            logits = torch.zeros_like(logits)
        logits = logits.masked_fill(forbidden, -torch.inf)
        noisy_tokens = logits if noise is None else logits + noise[:, t, :tokens]
        token = noisy_tokens.argmax(1)  # (B,)
        vertex = F.normalize(cell.init_vertex(torch.cat([cell.tokens(token), graph_init, condition], dim=1)), dim=1)

        target_logits, before, own = [], 0, logits.log_softmax(1)[range(batch), token]
        for j in range(t):
            hidden = cell.add_edge[0](torch.cat([states[j], vertex, graph, condition], dim=1)) + before
            logit = cell.add_edge[2](cell.add_edge[1](hidden)).squeeze(1)  # (B,)
            noisy = logit if noise is None else logit + noise[:, t, tokens + j]
            edge = (noisy > 0).to(condition.dtype)
            adj[:, j, t] = edge
            target_logits.append(noisy)
            own = own + torch.where(edge > 0, F.logsigmoid(logit), F.logsigmoid(-logit))
            if cell.chosen is not None:  # edges in turn: in view of the sources chosen before
                before = before + edge[:, None] * cell.chosen(states[j])
        likelihood = likelihood + torch.where(growing, own, 0)
        states.append(vertex)
        soft_ops.append(noisy_tokens.softmax(1) * growing[:, None])
        soft_adj.append(F.pad(torch.stack(target_logits, dim=1).sigmoid(), (0, size - t)) * growing[:, None])
        growing = growing & (token != cell.output_token)
    ops = torch.stack(soft_ops, dim=1)
    return CellBatch(torch.stack(soft_adj, dim=2), ops, (ops.sum(2) > 0).sum(1)), likelihood


def pass_messages(layer: MessagePassing, states: Tensor, adj: Tensor) -> Tensor:
    """states (B, V, D), adj (B, V, V) of 0/1 -> new states: a message along every edge, and one against it."""
    batch, vertices, _ = states.shape
    states = layer.dropout(states).flatten(0, 1)  # (B * V, D)
    sources, targets = [], []
    for b in range(batch):
        for i in range(vertices):
            for j in range(i):
                if adj[b, j, i].item():
                    sources.append(b * vertices + j)
                    targets.append(b * vertices + i)
    sources, targets = (torch.tensor(x, dtype=torch.long, device=states.device) for x in (sources, targets))
    along = layer.message(torch.cat([states[sources], states[targets]], dim=1))  # (E, 2D)
    against = layer.message_reversed(torch.cat([states[targets], states[sources]], dim=1))
    messages = torch.zeros(len(states), along.shape[1], dtype=along.dtype, device=states.device)
    messages = messages.index_add(0, targets, along).index_add(0, sources, against)
    return layer.update(messages, states).unflatten(0, (batch, vertices))


class PlainDiscriminator(nn.Module):
    """Wraps a Discriminator; same calls, same outputs."""

    def __init__(self, discriminator: Discriminator):
        super().__init__()
        self.discriminator = discriminator

    def forward(self, cells: tuple[CellBatch, ...], labels: Tensor) -> Tensor:
        pairs = zip(self.discriminator.encoders.values(), cells, strict=True)
        states = [encode(encoder, batch) for encoder, batch in pairs]
        return self.discriminator.score(torch.cat([*states, self.discriminator.labels(labels)], dim=1))


def encode(encoder: CellEncoder, cells: CellBatch) -> Tensor:
    """CellBatch -> graph states (B, S), by messages along a list of weighted edges."""
    batch, vertices, tokens = cells.ops.shape
    b, j, i = cells.adj.nonzero().T
    weight = cells.adj[b, j, i]
    loops = torch.arange(batch * vertices, device=weight.device)
    sources = torch.cat([b * vertices + j, b * vertices + i, loops])
    targets = torch.cat([b * vertices + i, b * vertices + j, loops])
    weight = torch.cat([weight, weight, torch.ones_like(loops, dtype=weight.dtype)])
    degree = torch.zeros(len(loops), dtype=weight.dtype, device=weight.device).index_add(0, targets, weight)
    weight = weight / (degree[sources] * degree[targets]).sqrt()
    states = encoder.tokens(cells.ops.reshape(-1, tokens))  # (B * V, D)
    for number, conv in enumerate(encoder.convs):
        if number > 0:
            states = F.leaky_relu(states, 0.2)
        states = conv(encoder.dropout(states))
        states = torch.zeros_like(states).index_add(0, targets, weight[:, None] * states[sources])
    present = torch.arange(vertices, device=weight.device) < cells.num_nodes[:, None]
    return encoder.graph_state(F.normalize(states, dim=1).unflatten(0, (batch, vertices)), present)
