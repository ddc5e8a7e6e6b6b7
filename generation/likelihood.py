"""What the robust recipe trains the generator by: likelihood, and a policy gradient held by a KL term.

1. Likelihood. Before every epoch a pool of random genotypes is drawn as those of the NAS dataset were. For each
   combination of labels, genotypes are chosen from it with weights exp(inverse temperature x reward), and the generator
   learns to give them a high likelihood, decision by decision (teacher forcing).
2. Policy gradient (REINFORCE). The generator draws cells of its own, and those with more reward than the rest become
   likelier. So that the cells stay varied and like real ones, the reward is lowered by their divergence (KL) from the
   reference policy, the generator as the first part of the training left it.

So with weights w, a step minimises

    w_likelihood x mean -log p(example) + w_policy x mean -(r - mean r) log p(drawn),   r = reward - w_kl log(p / p_ref)

where p_ref is the reference policy. The warm-up has the first term only, with more examples in a step, so that it too
is of --batch_size + --policy_gradient_cells genotypes.

The reward of a genotype is the expected number of the labels asked for that it has. #params and MACs are counted; of
accuracy, a predictor that was trained on the NAS dataset gives the probability of the class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from build_nas_dataset.objectives import Objective, cuts_as_tensor
from models.cost import batch_cost
from models.generator import Generator, Request, forcing_noise
from models.graph import CellBatch, LabelledCells
from models.predictor import Predictor

CHUNK = 4096  # genotypes of a pool that the predictor looks at together


def class_probabilities(
    cells: tuple[CellBatch, ...], objectives: Sequence[Objective], predictor: Predictor
) -> tuple[list[Tensor], Tensor]:
    """For each objective the probability of each class (B, C) of B hard genotypes, and which genotypes are valid (B,).

    #params and MACs are counted: one class is sure. The true quantile of the accuracy is taken to be normal around the
    predicted one, with the predictor's error on records that it was not trained on; a class has the mass between its
    cuts. Where #params and MACs cannot be counted, because the space has no networks, they are predicted likewise.
    """
    space = predictor.config.space
    pruned, valid = zip(*(batch.prune(space) for batch in cells), strict=True)
    counted = [objective.is_counted(space) for objective in objectives]
    predicted = None if all(counted) else predictor(pruned)  # quantiles (B, K)
    cost = batch_cost(*pruned, space) if any(counted) else None
    probabilities = []
    for k, objective in enumerate(objectives):
        if not counted[k]:
            cuts = cuts_as_tensor(objective.quantiles, predicted.device, predicted.dtype)
            below = torch.special.ndtr((cuts - predicted[:, k, None]) / predictor.error[k])  # (B, C - 1)
            probabilities.append(F.pad(F.pad(below, (0, 1), value=1.0), (1, 0)).diff(dim=1))
        else:
            found = objective.class_of(getattr(cost, objective.name))
            classes = torch.arange(objective.num_classes, device=found.device)
            probabilities.append((found[:, None] == classes).to(predictor.error.dtype))
    return probabilities, torch.stack(valid).all(0)


def reward(
    cells: tuple[CellBatch, ...], labels: Tensor, objectives: Sequence[Objective], predictor: Predictor
) -> Tensor:
    """Expected number of the K labels asked for (B, K) that each of B hard genotypes has (B,); -1 if it is invalid."""
    probabilities, valid = class_probabilities(cells, objectives, predictor)
    columns = zip(probabilities, labels.unbind(1), strict=True)
    met = sum(of_classes.gather(1, label[:, None]) for of_classes, label in columns)
    return torch.where(valid, met.squeeze(1), -1.0)


class ExamplePool(NamedTuple):
    """Random genotypes, and which of them are examples for which labels.

    cells: of all genotypes. chosen: positions of n genotypes (n,). labels: what they are examples for (n, K).
    """

    cells: tuple[CellBatch, ...]
    chosen: Tensor
    labels: Tensor

    def part(self, step: int, size: int) -> LabelledCells:
        """The genotypes of one training step, `size` of them."""
        part = slice(step * size, (step + 1) * size)
        return LabelledCells(tuple(cells[self.chosen[part]] for cells in self.cells), self.labels[part])


@torch.no_grad()
def choose_for_labels(
    cells: tuple[CellBatch, ...],
    labels: Tensor,
    inverse_temperature: float,
    objectives: Sequence[Objective],
    predictor: Predictor,
    source: torch.Generator,
) -> ExamplePool:
    """For each row of labels (n, K) one genotype of a pool, which may be chosen several times.

    A genotype is chosen for a combination of labels with a probability in proportion to
    exp(inverse_temperature x reward). cells: the genotypes of the pool, all valid. source: draws the choices.
    """
    parts = [
        class_probabilities(tuple(batch[part] for batch in cells), objectives, predictor)[0]
        for part in torch.arange(len(cells[0]), device=source.device).split(CHUNK)
    ]
    probabilities = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    chosen = torch.empty(len(labels), dtype=torch.long, device=source.device)
    for combination in labels.unique(dim=0):
        asked = (labels == combination).all(1)
        rewards = sum(of_classes[:, label] for of_classes, label in zip(probabilities, combination, strict=True))
        weights = (inverse_temperature * rewards).softmax(0)
        chosen[asked] = torch.multinomial(weights, int(asked.sum()), replacement=True, generator=source)
    return ExamplePool(cells, chosen, labels)


class LikelihoodPass(NamedTuple):
    """What one pass of the generator gives for the likelihood and the policy gradient.

    of_examples: log-likelihood of the examples (B,). drawn: the genotypes drawn, hard, and the labels asked for.
    of_drawn: their log-likelihood (D,).
    """

    of_examples: Tensor
    drawn: LabelledCells
    of_drawn: Tensor


def likelihood_pass(
    generator: Generator, z: Tensor, examples: LabelledCells, request: Request | None
) -> LikelihoodPass:
    """One call of the generator for both: the likelihood of the examples, and genotypes that are drawn.

    The examples are had by adding to the logits of each decision a noise that forces it (teacher forcing); the
    likelihood is that of the logits alone. z: the latent noise (B, latent_dim) that the generator starts from for each
    example. request: D genotypes to draw; None: none are drawn.
    """
    forced = Request(z, examples.labels, forcing_noise(examples.cells))
    together = forced if request is None else Request.cat(forced, request)
    cells, log_likelihood = generator.draw(*together)
    drawn = tuple(batch[len(z) :].straight_through().detach() for batch in cells)
    return LikelihoodPass(
        log_likelihood[: len(z)], LabelledCells(drawn, together.labels[len(z) :]), log_likelihood[len(z) :]
    )


def policy_gradient_loss(log_likelihood: Tensor, rewards: Tensor) -> Tensor:
    """Minus the mean of advantage times log-likelihood (both (D,)), whose gradient raises the expected reward.

    The advantage is the reward less the mean reward, taken as given.
    """
    advantage = (rewards - rewards.mean()).detach()
    return -(advantage * log_likelihood).mean()
