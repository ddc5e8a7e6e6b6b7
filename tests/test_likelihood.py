"""generation/likelihood.py: likelihoods, rewards, and what the policy gradient's loss is."""

from collections import Counter
from itertools import product

import pytest
import torch
from small_objectives import objective

from build_nas_dataset.random_cells import random_pool
from generation.likelihood import class_probabilities, likelihood_pass, policy_gradient_loss, reward
from generation.metrics import obtained_classes
from genotypes import NAG_SPACE, NASBENCH101, CellSpec, SearchSpace
from models.cost import genotype_cost
from models.generator import Generator, Request
from models.graph import CellBatch, LabelledCells
from models.predictor import Predictor

TOY_SPACE = SearchSpace("toy", cells=("cell",), inputs=("input",), ops=("conv3x3", "maxpool"), max_vertices=4)
FIXED_SPACE = SearchSpace(
    "fixed",
    ("cell",),
    ("input",),
    ("conv3x3", "maxpool", "none"),
    5,
    wiring=((0, 1, 1, 0, 1), (0, 0, 0, 1, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1), (0,) * 5),
    none_op="none",
)


def all_cells(space):
    """Every cell that growth can end with, valid or not."""
    if space.wiring is not None:
        for ops in product(space.ops, repeat=space.max_vertices - space.num_inputs - 1):
            yield CellSpec(space.wiring, [*space.inputs, *ops, space.output], space)
        return
    for size in range(space.min_vertices, space.max_vertices + 1):
        free = [(i, j) for j in range(space.num_inputs, size) for i in range(j)]
        for ops in product(space.ops, repeat=size - space.num_inputs - 1):
            for edges in product((0, 1), repeat=len(free)):
                matrix = [[0] * size for _ in range(size)]
                for (i, j), edge in zip(free, edges, strict=True):
                    matrix[i][j] = edge
                yield CellSpec(matrix, [*space.inputs, *ops, space.output], space)


@pytest.mark.parametrize(
    ("space", "autoregressive_edges"), [(TOY_SPACE, False), (TOY_SPACE, True), (FIXED_SPACE, True)]
)
def test_cells_are_drawn_as_often_as_their_likelihoods_say_which_sum_to_one(space, autoregressive_edges):
    torch.manual_seed(0)
    generator = Generator(5, 12, 6, label_sizes=(4,), autoregressive_edges=autoregressive_edges, space=space)
    generator = generator.double().eval()
    cells, n = list(all_cells(space)), 20_000
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
        z, labels = torch.randn(1, 5, dtype=torch.float64), torch.ones(1, 1).long()
        given = (CellBatch.encode(cells, dtype=torch.float64),)
        values = generator.log_likelihood(z.expand(len(cells), -1), labels.expand(len(cells), -1), given)
        _, noise = generator.draw_noise(n, torch.Generator().manual_seed(0), temperature=1.0)
        drawn = generator(z.expand(n, -1), labels.expand(n, -1), tuple(part.double() for part in noise))[0]
    assert values.shape == (len(cells),) and len(cells) == (3**3 if space is FIXED_SPACE else 2 + 2 * 8 + 4 * 64)
    share = values.exp()
    assert share.sum().item() == pytest.approx(1, abs=1e-9)
    assert share.max() < 0.9  # not all on one cell
    counts = Counter(drawn.decode(space))
    assert counts.keys() <= set(cells)
    found = torch.tensor([counts[cell] for cell in cells]) / n
    assert ((found - share).abs() < 5 * (share / n).sqrt() + 1 / n).all()


def test_params_are_predicted_where_they_cannot_be_counted():
    predictor = Predictor(2, vertex_size=8, space=NASBENCH101)
    predictor.error.fill_(0.3)
    pool = random_pool(20, seed=0, space=NASBENCH101)
    cells = (CellBatch.encode([genotype["cell"] for genotype in pool]),)
    objectives = [objective("params", 1e6, minimum=0, maximum=2e6), objective("accuracy", 0.5)]
    (params, accuracy), valid = class_probabilities(cells, objectives, predictor)
    expected = torch.distributions.Normal(predictor(cells)[:, 0], 0.3).cdf(torch.tensor(0.5))  # its quantile is 0.5
    torch.testing.assert_close(params[:, 0], expected)
    torch.testing.assert_close(params.sum(1), torch.ones(20))
    assert valid.all() and not torch.equal(params, accuracy)
    obtained = obtained_classes(pool, objectives, predictor)
    assert (obtained[:, 0] == (predictor(cells)[:, 0] >= 0.5).numpy()).all()


def test_the_reward_counts_the_labels_that_a_genotype_has():
    pool = random_pool(30, seed=5)
    params = sorted(genotype_cost(genotype)[0] for genotype in pool)
    macs = sorted(genotype_cost(genotype)[1] for genotype in pool)
    asked_for = [
        objective("params", params[10], params[20]),
        objective("macs", macs[15]),
    ]  # values on a boundary among them
    cells = [CellBatch.encode([genotype[name] for genotype in pool]) for name in ("normal", "reduction")]
    truth = torch.tensor([[(p >= params[10]) + (p >= params[20]), m >= macs[15]] for p, m in map(genotype_cost, pool)])
    predictor = Predictor(2, vertex_size=8)
    assert reward(cells, truth, asked_for, predictor).tolist() == [2.0] * 30
    wrong = truth.clone()
    wrong[:10, 1] = 1 - wrong[:10, 1]
    wrong[5:10, 0] = (wrong[5:10, 0] + 1) % 3
    assert reward(cells, wrong, asked_for, predictor).tolist() == [1.0] * 5 + [0.0] * 5 + [2.0] * 20
    cells[0].adj[3] = 0  # no path to the output
    assert reward(cells, truth, asked_for, predictor).tolist() == [2.0] * 3 + [-1.0] + [2.0] * 26


def test_the_reward_for_an_accuracy_label_is_its_probability_given_the_predictors_error():
    pool = random_pool(40, seed=7)
    cells = [CellBatch.encode([genotype[name] for genotype in pool]) for name in ("normal", "reduction")]
    torch.manual_seed(0)
    predictor = Predictor(1, vertex_size=8)
    predictor.error.fill_(0.2)
    asked_for = [objective("accuracy", 0.3, 0.4)]
    every = [torch.full((len(pool), 1), label) for label in range(3)]
    low, middle, high = (reward(cells, labels, asked_for, predictor) for labels in every)
    torch.testing.assert_close(low + middle + high, torch.ones(len(pool)))
    for i, quantile in enumerate(predictor.quantiles(pool)[:3, 0]):
        true = quantile + 0.2 * torch.randn(200_000)
        assert low[i].item() == pytest.approx((true < 1 / 3).double().mean().item(), abs=0.01)
        assert high[i].item() == pytest.approx((true >= 2 / 3).double().mean().item(), abs=0.01)


def test_the_place_of_an_objective_makes_no_difference_to_its_classes():
    pool = random_pool(20, seed=7)
    cells = tuple(CellBatch.encode([genotype[name] for genotype in pool]) for name in NAG_SPACE.cells)
    torch.manual_seed(0)
    predictor = Predictor(2, vertex_size=8)
    predictor.error.copy_(torch.tensor([0.1, 0.3]))
    params = sorted(genotype_cost(genotype)[0] for genotype in pool)[10]
    asked_for = [objective("params", params), objective("accuracy", 0.3, 0.4)]
    (of_params, of_accuracy), valid = class_probabilities(cells, asked_for, predictor)
    assert valid.all() and of_params.tolist() == [
        [float(genotype_cost(g)[0] < params), float(genotype_cost(g)[0] >= params)] for g in pool
    ]
    cuts = torch.tensor([1 / 3, 2 / 3])
    below = torch.special.ndtr((cuts - torch.tensor(predictor.quantiles(pool))[:, 1, None]) / 0.3)
    torch.testing.assert_close(of_accuracy[:, :2].cumsum(1), below)


def test_one_pass_gives_the_likelihoods_of_examples_and_the_cells_and_likelihoods_of_draws():
    torch.manual_seed(0)
    generator = Generator(5, 12, 6, label_sizes=(4,), chain_cells=True, autoregressive_edges=True).double().eval()
    pool = random_pool(6, seed=3)
    cells = tuple(CellBatch.encode([g[name] for g in pool], dtype=torch.float64) for name in NAG_SPACE.cells)
    examples, z = LabelledCells(cells, torch.arange(6)[:, None] % 3), torch.randn(6, 5, dtype=torch.float64)
    other_z, noise = generator.draw_noise(9, torch.Generator().manual_seed(1), temperature=1.0)
    noise = tuple(part.double() for part in noise)
    request = Request(other_z.double(), torch.arange(9)[:, None] % 3, noise)
    with torch.no_grad():
        found = likelihood_pass(generator, z, examples, request)
        torch.testing.assert_close(found.of_examples, generator.log_likelihood(z, examples.labels, cells))
        drawn, log_likelihood = generator.draw(*request)
        torch.testing.assert_close(found.of_drawn, log_likelihood)
        for batch, expected in zip(found.drawn.cells, drawn, strict=True):
            hard = expected.straight_through()
            assert torch.equal(batch.adj, hard.adj) and torch.equal(batch.ops, hard.ops)
        assert len(likelihood_pass(generator, z, examples, None).of_drawn) == 0


def test_the_policy_gradient_raises_the_likelihood_of_what_is_better_than_the_mean():
    log_likelihood = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    loss = policy_gradient_loss(log_likelihood, torch.tensor([1.0, 4.0, 1.0], requires_grad=True))
    assert loss.item() == pytest.approx(-(-1 * -1 + 2 * -2 + -1 * -3) / 3)
    (gradient,) = torch.autograd.grad(loss, log_likelihood)
    assert gradient.tolist() == pytest.approx([1 / 3, -2 / 3, 1 / 3])
