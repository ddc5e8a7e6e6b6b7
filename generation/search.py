"""Search for the best genotypes with few evaluations: query, learn, generate, query the best new ones, and again.

    search = GeneratorSearch(space, max_vertices, seed=0)
    run_search(search, start=random_genotypes, evaluate=scores_of, queries=300)

`run_search` is the loop of the paper's first experiment, whose code was never released: what was queried is the NAS
dataset; predictor and generator learn from it and keep their weights from round to round (warm start); the generator is
asked for the highest class; of the new genotypes that it draws, the best by the predictor are queried, and some at
random. The generator learns as in the robust recipe's first part (generation/likelihood.py), with settings that are
small enough for one core and some ten seconds, see SearchSettings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from build_nas_dataset.objectives import Objective
from build_nas_dataset.random_cells import random_batch, random_genotype
from generation.likelihood import choose_for_labels, likelihood_pass
from genotypes import Genotype, SearchSpace
from models.generator import Generator
from models.graph import CellBatch
from models.predictor import Predictor
from utils import cosine, derive_seed, set_lr, set_seed

CHUNK = 4096  # cells that the predictor looks at together


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search; widths are those of PredictorConfig and GeneratorConfig.

    start: random genotypes that are queried first. batch: queries of a round at least; later rounds have `growth` times
    as many as there were before. explore: how many of them are drawn at random from the new genotypes; the others are
    the best by the predictor.
    num_classes: equal parts of what was queried, by score; the highest one is asked for.
    members: predictors whose mean is taken. first_steps, steps: training steps in the first and in a later round, of
    the predictors and of the generator, each on so many genotypes (batch).
    pool_size: random genotypes of a round, from which the generator's examples are chosen. draws: genotypes that the
    generator draws in a round.
    """

    start: int = 20
    batch: int = 10
    growth: float = 0.125
    explore: int = 2
    num_classes: int = 5
    members: int = 2
    predictor_size: int = 64
    predictor_lr: float = 1e-2
    predictor_steps: tuple[int, int] = (80, 25)
    generator_size: int = 32
    graph_size: int = 16
    latent_dim: int = 8
    generator_lr: float = 5e-3
    generator_steps: tuple[int, int] = (30, 8)
    predictor_batch: int = 64
    generator_batch: int = 128
    pool_size: int = 2048
    inverse_temperature: float = 10.0
    draws: int = 512

    def of_round(self, done: int) -> int:
        """Queries of the round after so many."""
        return max(self.batch, int(self.growth * done))


def run_search(
    search: "PredictorSearch",
    start: Sequence[Genotype],
    evaluate: Callable[[list[Genotype]], list[float]],
    queries: int,
    after_round: Callable[[], None] = lambda: None,
) -> None:
    """The loop. start: what is queried first. evaluate: gives a score for each genotype, the higher the better.

    It goes on from what `search` has queried already, and ends after `queries` evaluations, or when no new genotype is
    found. after_round: is called when the scores of a round are there.
    """
    if not search.genotypes:
        first = list(start)[:queries]
        search.add(first, evaluate(first))
        after_round()
    while len(search.genotypes) < queries:
        search.learn()
        done = len(search.genotypes)
        found = search.propose(min(search.settings.of_round(done), queries - done))
        if not found:
            return
        search.add(found, evaluate(found))
        after_round()


class Ensemble(nn.Module):
    """Predictors of what cells compute. config, error: as those of a Predictor, so that likelihood.py takes it.

    They read CellBatch.computed: trained on 32, 64 and 128 random cells of NAS-Bench-201, a predictor then has a
    Kendall's tau of 0.54, 0.65 and 0.68 with the signal of the others, and of 0.42, 0.48 and 0.57 when it reads cells
    as they are written (means of 3 or 4 seeds).
    """

    def __init__(self, space: SearchSpace, settings: SearchSettings):
        super().__init__()
        self.space = space
        self.members = nn.ModuleList(
            Predictor(1, vertex_size=settings.predictor_size, space=space) for _ in range(settings.members)
        )
        self.config = self.members[0].config
        self.register_buffer("error", torch.full((1,), 0.2))

    def forward(self, cells: tuple[CellBatch, ...]) -> Tensor:
        """The mean of the predicted quantiles (B, 1)."""
        return torch.stack(self.of_members(tuple(batch.computed(self.space) for batch in cells))).mean(0)

    def of_members(self, computed: tuple[CellBatch, ...]) -> list[Tensor]:
        return [member(computed) for member in self.members]


class PredictorSearch:
    """A search by the predictor alone: it ranks all the candidates that there are. The generator is left out.

    candidates: all genotypes of the space, or of a table. Of those that are the same, as strings of NAS-Bench-201 that
    compute the same function, one is queried: a second query would tell little more than the noise of the training, and
    take the place of something new.
    """

    def __init__(
        self,
        space: SearchSpace,
        max_vertices: int,
        seed: int,
        settings: SearchSettings = SearchSettings(),
        candidates: "Candidates | None" = None,
    ):
        self.space, self.max_vertices, self.seed, self.settings = space, max_vertices, seed, settings
        self.candidates = candidates
        self.genotypes: list[Genotype] = []
        self.scores: list[float] = []
        self.rounds = 0
        self.known: set[Genotype] = set()  # canonical forms of what was queried
        set_seed(derive_seed(seed, 0))
        self.ensemble = Ensemble(space, settings)
        self.optimizers = [torch.optim.AdamW(self.ensemble.parameters(), settings.predictor_lr, weight_decay=0.1)]

    # ------------------------------------------------------------------------------------------------ queries

    def add(self, genotypes: list[Genotype], scores: list[float]) -> None:
        """Add what was queried. The predictor's error is that on these, before it learns from them."""
        new = slice(len(self.genotypes), None)
        self.genotypes += genotypes
        self.scores += scores
        self.known |= {genotype.canonical() for genotype in genotypes}
        if self.rounds:
            missed = self.ensemble(self.encode(genotypes)).detach()[:, 0] - self.quantiles()[new]
            self.ensemble.error.fill_(max(0.05, float(missed.square().mean().sqrt())))

    def quantiles(self) -> Tensor:
        """The place of each score among all of them (n,), 0 to 1."""
        return torch.tensor((rankdata(self.scores) - 0.5) / len(self.scores), dtype=torch.float32)

    def encode(self, genotypes: list[Genotype]) -> tuple[CellBatch, ...]:
        return encode(genotypes, self.max_vertices)

    def propose(self, n: int) -> list[Genotype]:
        """n genotypes to query next; fewer where so many new ones are not found, see new_genotypes."""
        ranked = self.new_genotypes()
        explore = min(self.settings.explore, n // 4)
        chosen, rest = ranked[: n - explore], ranked[n - explore :]
        picks = np.random.default_rng([self.seed, self.rounds]).permutation(len(rest))[: n - len(chosen)]
        return chosen + [rest[i] for i in picks]

    def new_genotypes(self) -> list[Genotype]:
        """Genotypes that were not queried, the best by the predictor first."""
        order, ranked = np.argsort(-self.predict(self.candidates.cells), kind="stable"), list(self.candidates.by_key)
        new = [ranked[i] for i in order if ranked[i] not in self.known]
        return [self.candidates.by_key[key] for key in new[: self.settings.draws]]

    @torch.no_grad()
    def predict(self, cells: tuple[CellBatch, ...]) -> np.ndarray:
        """Predicted quantiles (n,)."""
        parts = torch.arange(len(cells[0])).split(CHUNK)
        return torch.cat([self.ensemble(tuple(batch[part] for batch in cells))[:, 0] for part in parts]).numpy()

    # ------------------------------------------------------------------------------------------------ learning

    def learn(self) -> None:
        """One round of training on all that was queried, from the weights of the round before."""
        set_seed(derive_seed(self.seed, 1, self.rounds))
        self.learn_ranking()
        self.rounds += 1

    def learn_ranking(self) -> None:
        settings, optimizer = self.settings, self.optimizers[0]
        cells = tuple(batch.computed(self.space) for batch in self.encode(self.genotypes))
        quantiles, steps = self.quantiles(), settings.predictor_steps[self.rounds > 0]
        for step in range(steps):
            set_lr(optimizer, cosine(step, steps, settings.predictor_lr))
            index = torch.randperm(len(quantiles))[: settings.predictor_batch]
            predicted = self.ensemble.of_members(tuple(batch[index] for batch in cells))
            loss = sum(F.mse_loss(one[:, 0], quantiles[index]) for one in predicted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    # ---------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict:
        """All that a search goes on from, as tensors and plain data."""
        return {
            "genotypes": [genotype.to_dict() for genotype in self.genotypes],
            "scores": self.scores,
            "rounds": self.rounds,
            "networks": [network.state_dict() for network in self.networks()],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict) -> None:
        self.genotypes = [Genotype.from_dict(data, self.space) for data in state["genotypes"]]
        self.known = {genotype.canonical() for genotype in self.genotypes}
        self.scores, self.rounds = list(state["scores"]), state["rounds"]
        for network, saved in zip(self.networks(), state["networks"], strict=True):
            network.load_state_dict(saved)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def networks(self) -> list[nn.Module]:
        return [self.ensemble]


class GeneratorSearch(PredictorSearch):
    """NAG: the generator is trained beside the predictor and says which genotypes the predictor is asked about.

    is_candidate: whether a genotype may be queried, e.g. is in a table; None: every valid one.
    """

    def __init__(
        self,
        space: SearchSpace,
        max_vertices: int,
        seed: int,
        settings: SearchSettings = SearchSettings(),
        is_candidate: Callable[[Genotype], bool] | None = None,
    ):
        super().__init__(space, max_vertices, seed, settings)
        self.is_candidate = is_candidate or (lambda genotype: True)
        self.generator = Generator(
            space=space,
            max_vertices=max_vertices,
            latent_dim=settings.latent_dim,
            vertex_size=settings.generator_size,
            graph_size=settings.graph_size,
            num_layers=1,
            dropout=0.0,
            num_classes=(settings.num_classes,),
            chain_cells=True,
            autoregressive_edges=True,
            temperature=1.0,
        )
        self.optimizers.append(torch.optim.Adam(self.generator.parameters(), settings.generator_lr))

    def networks(self) -> list[nn.Module]:
        return [self.ensemble, self.generator]

    def learn(self) -> None:
        set_seed(derive_seed(self.seed, 1, self.rounds))
        self.learn_ranking()
        self.learn_to_generate()
        self.rounds += 1

    def objective(self) -> Objective:
        """Accuracy, cut into classes of equally many of the queried genotypes."""
        shares = tuple(k / self.settings.num_classes for k in range(1, self.settings.num_classes))
        cuts = tuple(np.quantile(self.scores, shares).tolist())
        return Objective("accuracy", cuts, shares, min(self.scores), max(self.scores))

    def learn_to_generate(self) -> None:
        """Raise the likelihood of random genotypes, chosen for each class by the predictor's probabilities."""
        settings, optimizer = self.settings, self.optimizers[1]
        source = torch.Generator().manual_seed(derive_seed(self.seed, 2, self.rounds))
        steps = settings.generator_steps[self.rounds > 0]
        pool = random_batch(settings.pool_size, source, self.space, self.max_vertices)
        pool = tuple(batch.pad(self.max_vertices) for batch in pool)
        labels = torch.randint(settings.num_classes, (steps * settings.generator_batch, 1), generator=source)
        labels[::2] = settings.num_classes - 1  # half of them, since no other class is asked for
        examples = choose_for_labels(
            pool, labels, settings.inverse_temperature, [self.objective()], self.ensemble, source
        )
        self.generator.train()
        for step in range(steps):
            part = examples.part(step, settings.generator_batch)
            z, _ = self.generator.draw_noise(settings.generator_batch, source, temperature=0)
            loss = -likelihood_pass(self.generator, z, part, None).of_examples.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.generator.eval()

    @torch.no_grad()
    def new_genotypes(self) -> list[Genotype]:
        """What the generator draws for the highest class and was not queried, the best by the predictor first."""
        source = torch.Generator().manual_seed(derive_seed(self.seed, 3, self.rounds))
        z, noise = self.generator.draw_noise(self.settings.draws, source)
        labels = torch.full((len(z), 1), self.settings.num_classes - 1)
        drawn = [batch.straight_through() for batch in self.generator.draw(z, labels, noise)[0]]
        found, seen = [], set(self.known)
        for cells in zip(*(batch.decode(self.space) for batch in drawn), strict=True):
            genotype = Genotype(*cells, space=self.space).prune()
            key = None if genotype is None else genotype.canonical()
            if key is not None and key not in seen and self.is_candidate(genotype):
                seen.add(key)
                found.append(genotype)
        if not found:
            found = self.random_new_genotypes(seen)
        order = np.argsort(-self.predict(self.encode(found)), kind="stable") if found else []
        return [found[i] for i in order]

    def random_new_genotypes(self, known: set[Genotype]) -> list[Genotype]:
        """Where the generator draws nothing new any more: random genotypes that were not queried, or none at all."""
        rng = np.random.default_rng([self.seed, self.rounds, 1])
        drawn = {g.canonical(): g for g in (random_genotype(rng, self.space, self.max_vertices) for _ in range(1000))}
        return [genotype for key, genotype in drawn.items() if key not in known and self.is_candidate(genotype)]


class Candidates:
    """All genotypes that a search by the predictor alone ranks.

    by_key: the valid ones by their canonical form, one for each. cells: they, as CellBatches of max_vertices.
    """

    def __init__(self, genotypes: Sequence[Genotype], max_vertices: int):
        self.by_key: dict[Genotype, Genotype] = {}
        for genotype in genotypes:
            key = genotype.canonical()
            if key is not None:
                self.by_key.setdefault(key, genotype)
        self.cells = encode(list(self.by_key.values()), max_vertices)


def encode(genotypes: list[Genotype], max_vertices: int) -> tuple[CellBatch, ...]:
    """One CellBatch for each cell of the space, padded to max_vertices."""
    names = genotypes[0].space.cells
    return tuple(CellBatch.encode([genotype[name] for genotype in genotypes], max_vertices) for name in names)
