"""Random genotypes: the pool that the supernet is trained on and scores (NAG paper, section 3.3)."""

import numpy as np

from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace


def random_cell(rng: np.random.Generator, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None) -> CellSpec:
    """One cell as drawn, not pruned and perhaps not valid.

    The number of vertices is drawn with weights 1, 8, 16, 32, ... (doubling) from the smallest cell to the largest;
    a density b ~ U(0, 1) is drawn for the cell and every allowed edge exists with probability b; ops are uniform.
    """
    sizes = range(space.min_vertices, (max_vertices or space.max_vertices) + 1)
    weights = np.array([1.0] + [2.0 ** (i + 3) for i in range(len(sizes) - 1)])
    size = int(rng.choice(sizes, p=weights / weights.sum()))
    matrix = np.triu(rng.random((size, size)) < rng.random(), k=1)
    matrix[: space.num_inputs, : space.num_inputs] = False
    ops = rng.choice(space.ops, size - space.num_inputs - 1)
    return CellSpec(matrix.astype(int).tolist(), [*space.inputs, *map(str, ops), space.output], space)


def random_genotype(
    rng: np.random.Generator, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None
) -> Genotype:
    """A valid genotype, pruned. Cells are drawn independently; when one is invalid, all are drawn again."""
    while True:
        genotype = Genotype(*(random_cell(rng, space, max_vertices) for _ in space.cells), space=space).prune()
        if genotype is not None:
            return genotype


def random_pool(n: int, seed: int, space: SearchSpace = NAG_SPACE, max_vertices: int | None = None) -> list[Genotype]:
    """n valid pruned genotypes, no two of them isomorphic, fixed by the seed.

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


class RandomCells:
    """Random cells behind the interface of a generator: the baseline for everything that is said of generated ones."""

    def __init__(self, max_vertices: int | None = None):
        self.max_vertices = max_vertices

    def sample(self, labels: tuple[int, ...], n: int, seed: int, temperature: float | None = None) -> list[Genotype]:
        """n valid pruned genotypes, whatever labels and temperature."""
        rng = np.random.default_rng(seed)
        return [random_genotype(rng, max_vertices=self.max_vertices) for _ in range(n)]
