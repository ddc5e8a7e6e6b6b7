"""What a search by the generator is compared with: random search, regularised evolution, local search.

Each is a function of a table, a number of queries and a random generator that returns the rows in the order in which
they were queried. A row that was queried is known: it is not queried again, and looking it up again costs nothing.
"""

from collections import deque

import numpy as np

from generation.search_table import SearchTable


def random_search(table: SearchTable, queries: int, rng: np.random.Generator) -> list[int]:
    """Rows at random."""
    return rng.permutation(len(table))[:queries].tolist()


def evolution(
    table: SearchTable, queries: int, rng: np.random.Generator, population: int = 50, sample: int = 10
) -> list[int]:
    """Regularised evolution (Real et al. 2019): the best of `sample` members, drawn at random, gets a changed child,
    which joins the population while the oldest member leaves. It begins with `population` random rows.

    A child that was queried before joins too, without a query. After a hundred of these in a row a random row is next.
    """
    rows = random_search(table, min(population, queries), rng)
    members, known, repeated = deque(rows), set(rows), 0
    while len(rows) < queries:
        drawn = rng.choice(len(members), min(sample, len(members)), replace=False)
        parent = max((members[i] for i in drawn), key=table.signal.__getitem__)
        child = int(rng.choice(table.neighbours(parent)))
        if repeated == 100:
            child = int(rng.choice(np.setdiff1d(np.arange(len(table)), rows)))
        repeated = repeated + 1 if child in known else 0
        if child not in known:
            known.add(child)
            rows.append(child)
        members.append(child)
        members.popleft()
    return rows


def local_search(table: SearchTable, queries: int, rng: np.random.Generator) -> list[int]:
    """Local search (White et al. 2020), first improvement: from a random row go to the first neighbour, in random
    order, that is better; where none is, begin again at a random row that was not queried.
    """
    starts = iter(rng.permutation(len(table)).tolist())
    rows, known = [], set()

    def query(row: int) -> None:
        if row not in known and len(rows) < queries:
            known.add(row)
            rows.append(row)

    while len(rows) < queries:
        here = next(row for row in starts if row not in known)
        query(here)
        while True:
            before = here
            for row in rng.permutation(table.neighbours(here)).tolist():
                query(row)
                if table.signal[row] > table.signal[here] or len(rows) == queries:
                    here = row
                    break
            if here == before or len(rows) == queries:
                break
    return rows
