"""Random genotypes: the pool that the supernet is trained on and scores (NAG paper, section 3.3).

They are drawn in two ways with the same distribution: random_cell, random_genotype and random_pool draw one after the
other, as specs; random_cells and random_batch draw many at once, as tensors, for the training of the generator.
A cell has V vertices with the chances of size_weights. A density b ~ U(0, 1) is drawn for it, every edge that may
exist does so with probability b, and the ops are uniform. Where the wiring is fixed, only the ops are drawn.
"""

import numpy as np
import torch
from torch.nn import functional as F

from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace
from models.graph import CellBatch


def size_weights(space: SearchSpace, max_vertices: int | None = None) -> np.ndarray:
    """The chance of each number of vertices, from the smallest to max_vertices (None: the space's), as (sizes,).

    They are in the proportion 1 : 8 : 16 : 32 : ..., doubling from the second on.
    """
    sizes = (max_vertices or space.max_vertices) + 1 - space.min_vertices
    weights = np.array([1.0] + [2.0 ** (i + 3) for i in range(sizes - 1)])
    return weights / weights.sum()


def random_cell(rng: np.random.Generator, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None) -> CellSpec:
    """One cell as drawn, not pruned and perhaps not valid. max_vertices: of the largest; None: the space's."""
    weights = size_weights(space, max_vertices)
    size = space.min_vertices + int(rng.choice(len(weights), p=weights))
    if space.wiring is None:
        matrix = np.triu(rng.random((size, size)) < rng.random(), k=1)
        matrix[: space.num_inputs, : space.num_inputs] = False
    ops = rng.choice(space.ops, size - space.num_inputs - 1)
    matrix = space.wiring or matrix.astype(int).tolist()
    return CellSpec(matrix, [*space.inputs, *map(str, ops), space.output], space)


def random_cells(
    n: int, source: torch.Generator, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None
) -> CellBatch:
    """n cells with the distribution of random_cell, not pruned and perhaps not valid, as tensors on source's device.

    Vertices beyond a cell's own number are there with neither op nor edges.
    """
    device, limit = source.device, max_vertices or space.max_vertices
    weights = torch.tensor(size_weights(space, max_vertices), device=device)
    size = space.min_vertices + torch.multinomial(weights, n, replacement=True, generator=source)[:, None]  # (n, 1)
    vertices = torch.arange(limit, device=device)
    tokens = torch.randint(len(space.ops), (n, limit), generator=source, device=device) + 1 + space.num_inputs
    tokens = torch.where(vertices < space.num_inputs, vertices + 1, tokens)
    tokens = torch.where(vertices == size - 1, space.token_id[space.output], tokens)  # (n, V)
    ops = F.one_hot(tokens, len(space.tokens)) * (vertices < size)[..., None]
    density = torch.rand(n, 1, 1, generator=source, device=device)
    if space.wiring is None:
        adj = (torch.rand(n, limit, limit, generator=source, device=device) < density).triu(1)
        adj &= (vertices >= space.num_inputs) & (vertices < size)[:, None]  # by target; sources are below it
    else:
        adj = torch.tensor(space.wiring, device=device).expand(n, -1, -1)
    dtype = torch.get_default_dtype()
    return CellBatch(adj.to(dtype), ops.to(dtype), size.squeeze(1))


def random_genotype(
    rng: np.random.Generator, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None
) -> Genotype:
    """A valid genotype, pruned. Its cells are drawn independently; when one is invalid, all are drawn again."""
    while True:
        genotype = Genotype(*(random_cell(rng, space, max_vertices) for _ in space.cells), space=space).prune()
        if genotype is not None:
            return genotype


def random_pool(n: int, seed: int, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None) -> list[Genotype]:
    """n genotypes of random_genotype, no two of them isomorphic; the same ones for the same seed.

    Raises ValueError when the space does not seem to hold that many.
    """
    rng = np.random.default_rng(seed)
    pool, seen, misses = [], set(), 0
    while len(pool) < n:
        genotype = random_genotype(rng, space, max_vertices)
        canonical = genotype.canonical()
        if canonical in seen:
            misses += 1
            if misses > 100 * (n + 10):
                raise ValueError(f"found only {len(pool)} different genotypes of {n} with these cell sizes")
            continue
        seen.add(canonical)
        pool.append(genotype)
    return pool


def random_batch(
    n: int, source: torch.Generator, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None
) -> tuple[CellBatch, ...]:
    """The valid ones of n genotypes with the distribution of random_genotype, pruned: one CellBatch for each cell.

    No two have the same tensors. With its vertices in another order, a genotype may be there twice; small cells, which
    are repeated most, have one order only.
    source: gives the random numbers and the device.
    """
    drawn, valid = zip(*(random_cells(n, source, space, max_vertices).prune(space) for _ in space.cells), strict=True)
    keep = torch.stack(valid).all(0)
    cells = [batch[keep].close_up() for batch in drawn]
    rows = torch.cat([part.flatten(1) for batch in cells for part in (batch.adj, batch.ops)], dim=1).to(torch.uint8)
    distinct, inverse = torch.unique(rows, dim=0, return_inverse=True)
    places = torch.arange(len(rows), device=rows.device)
    first = places.new_full((len(distinct),), len(rows)).scatter_reduce(0, inverse, places, "amin").sort().values
    return tuple(batch[first] for batch in cells)


class RandomCells:
    """Random genotypes behind the interface of a generator: the baseline for all that is said of generated ones.

    max_vertices: vertices of the largest cells; None: those of the space.
    """

    def __init__(self, max_vertices: int | None = None, space: SearchSpace = NAG_SPACE):
        self.max_vertices, self.space = max_vertices, space

    def sample(self, labels: tuple[int, ...], n: int, seed: int, temperature: float | None = None) -> list[Genotype]:
        """n genotypes of random_genotype, whatever the labels and the temperature."""
        rng = np.random.default_rng(seed)
        return [random_genotype(rng, self.space, self.max_vertices) for _ in range(n)]
