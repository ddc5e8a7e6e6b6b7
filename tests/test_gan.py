"""gan.py: likelihoods, how obedience is counted, what is taught, that training trains, and runs that go on."""

import copy
import json
import math
from collections import Counter
from itertools import combinations, product

import numpy as np
import pytest
import torch

import gan
from build_nas_dataset.random_cells import random_batch, random_genotype, random_pool
from build_nas_dataset.records import Record, write_records
from generation.metrics import cell_distributions, total_variation
from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace
from models.cost import genotype_cost
from models.generator import Generator
from models.graph import CellBatch
from models.predictor import Predictor
from utils import save_checkpoint, set_seed

TOY_SPACE = SearchSpace("toy", cells=("cell",), inputs=("input",), ops=("conv3x3", "maxpool"), max_vertices=4)


def all_cells(space):
    """Every cell that growth can end with, valid or not."""
    for size in range(space.min_vertices, space.max_vertices + 1):
        free = [(i, j) for j in range(space.num_inputs, size) for i in range(j)]
        for ops in product(space.ops, repeat=size - space.num_inputs - 1):
            for edges in product((0, 1), repeat=len(free)):
                matrix = [[0] * size for _ in range(size)]
                for (i, j), edge in zip(free, edges, strict=True):
                    matrix[i][j] = edge
                yield CellSpec(matrix, [*space.inputs, *ops, space.output], space)


@pytest.mark.parametrize("edges_in_turn", [False, True])
def test_cells_are_drawn_as_often_as_their_likelihoods_say_which_sum_to_one(edges_in_turn):
    torch.manual_seed(0)
    generator = Generator(5, 12, 6, label_sizes=(4,), edges_in_turn=edges_in_turn, space=TOY_SPACE).double().eval()
    cells, n = list(all_cells(TOY_SPACE)), 20_000
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.mul_(3)
        z, labels = torch.randn(1, 5, dtype=torch.float64), torch.ones(1, 1).long()
        given = (CellBatch.encode(cells, dtype=torch.float64),)
        values = generator.likelihood(z.expand(len(cells), -1), labels.expand(len(cells), -1), given)
        _, noise = generator.draw_noise(n, torch.Generator().manual_seed(0), temperature=1.0)
        drawn = generator(z.expand(n, -1), labels.expand(n, -1), tuple(part.double() for part in noise))[0]
    assert values.shape == (len(cells),) and len(cells) == 2 + 2 * 8 + 4 * 64
    share = values.exp()
    assert share.sum().item() == pytest.approx(1, abs=1e-9)
    assert share.max() < 0.9  # not all on one cell
    counts = Counter(drawn.decode(TOY_SPACE))
    assert counts.keys() <= set(cells)
    found = torch.tensor([counts[cell] for cell in cells]) / n
    assert ((found - share).abs() < 5 * (share / n).sqrt() + 1 / n).all()


def boundaries(**values):
    return {name: torch.tensor(bounds, dtype=torch.float64) for name, bounds in values.items()}


def test_obedience_counts_the_labels_that_were_met():
    pool = random_pool(30, seed=5)
    params = sorted(genotype_cost(genotype)[0] for genotype in pool)
    macs = sorted(genotype_cost(genotype)[1] for genotype in pool)
    bounds = boundaries(params=[params[10], params[20]], macs=[macs[15]])  # values on a boundary among them
    cells = [CellBatch.encode([genotype[name] for genotype in pool]) for name in ("normal", "reduction")]
    truth = torch.tensor([[(p >= params[10]) + (p >= params[20]), m >= macs[15]] for p, m in map(genotype_cost, pool)])
    predictor = Predictor(2, vertex_size=8)
    assert gan.obedience(cells, truth, bounds, predictor).tolist() == [2.0] * 30
    wrong = truth.clone()
    wrong[:10, 1] = 1 - wrong[:10, 1]
    wrong[5:10, 0] = (wrong[5:10, 0] + 1) % 3
    assert gan.obedience(cells, wrong, bounds, predictor).tolist() == [1.0] * 5 + [0.0] * 5 + [2.0] * 20
    cells[0].adj[3] = 0  # no path to the output
    assert gan.obedience(cells, truth, bounds, predictor).tolist() == [2.0] * 3 + [-1.0] + [2.0] * 26


def test_obedience_to_an_accuracy_label_is_its_probability_given_the_predictors_error():
    pool = random_pool(40, seed=7)
    cells = [CellBatch.encode([genotype[name] for genotype in pool]) for name in ("normal", "reduction")]
    torch.manual_seed(0)
    predictor = Predictor(1, vertex_size=8)
    predictor.error.fill_(0.2)
    bounds = boundaries(accuracy=[0.3, 0.4])
    every = [torch.full((len(pool), 1), label) for label in range(3)]
    low, middle, high = (gan.obedience(cells, labels, bounds, predictor) for labels in every)
    torch.testing.assert_close(low + middle + high, torch.ones(len(pool)))
    for i, quantile in enumerate(predictor.quantiles(pool)[:3, 0]):
        true = quantile + 0.2 * torch.randn(200_000)
        assert low[i].item() == pytest.approx((true < 1 / 3).double().mean().item(), abs=0.01)
        assert high[i].item() == pytest.approx((true >= 2 / 3).double().mean().item(), abs=0.01)


def test_quantiles_and_labels_rise_with_the_value():
    accuracies, params = (0.5, 0.2, 0.4, 0.2, 0.9), (30, 10, 50, 20, 40)
    records = [Record(i, g, accuracies[i], params[i], 0) for i, g in enumerate(random_pool(5, seed=1))]
    data = gan.TrainingData(records, {"accuracy": 2, "params": 2}, 10, torch.device("cpu"))
    quantiles = [[0.7, 0.5], [0.2, 0.1], [0.5, 0.9], [0.2, 0.3], [0.9, 0.7]]  # fifths, from their middles
    torch.testing.assert_close(data.quantiles, torch.tensor(quantiles))
    assert data.labels.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]]


def test_the_predictor_is_measured_on_records_it_was_not_trained_on(monkeypatch):
    pool, trained_on = random_pool(50, seed=6), set()
    rng = np.random.default_rng(0)
    records = [Record(i, g, rng.random(), *genotype_cost(g)) for i, g in enumerate(pool)]
    data = gan.TrainingData(records, {"accuracy": 2, "params": 2}, 10, torch.device("cpu"))

    class Spy(Predictor):
        def forward(self, cells):
            if any(parameter.requires_grad for parameter in self.parameters()):
                trained_on.update(Genotype(*specs) for specs in zip(*(batch.decode() for batch in cells), strict=True))
            return super().forward(cells)

    monkeypatch.setattr(gan, "Predictor", Spy)
    predictor, taus = gan.train_predictor(data, 16, seed=3)
    held_out = [i for i, genotype in enumerate(pool) if genotype not in trained_on]
    assert len(held_out) == 5
    predicted, truth = predictor.quantiles([pool[i] for i in held_out]), data.quantiles[held_out].numpy()
    np.testing.assert_allclose(predictor.error, ((predicted - truth) ** 2).mean(0) ** 0.5, rtol=1e-5)
    for k in range(2):
        signs = [
            np.sign((predicted[i] - predicted[j]) * (truth[i] - truth[j]))[k] for i, j in combinations(range(5), 2)
        ]
        assert taus[k] == pytest.approx(np.mean(signs))


@pytest.mark.parametrize("max_vertices", [None, 6])
def test_a_random_batch_is_random_genotypes(max_vertices):
    n = 4000
    batch = random_batch(2 * n, torch.Generator().manual_seed(0), max_vertices=max_vertices)
    again = random_batch(2 * n, torch.Generator().manual_seed(0), max_vertices=max_vertices)
    assert all(torch.equal(a.adj, b.adj) and torch.equal(a.ops, b.ops) for a, b in zip(batch, again, strict=True))
    drawn = [Genotype(*specs) for specs in zip(*(cells[:n].decode() for cells in batch), strict=True)]
    assert len(set(drawn)) == n and all(genotype.prune() == genotype for genotype in drawn)
    rng = np.random.default_rng(0)
    others = list({random_genotype(rng, max_vertices=max_vertices): None for _ in range(2 * n)})[:n]
    ours, theirs = cell_distributions(drawn), cell_distributions(others)
    for name in ours:
        assert total_variation(ours[name], theirs[name]) < 0.02, name
    for name in NAG_SPACE.cells:  # normal and reduction cell alike
        first, second = ([g[name].num_vertices for g in those] for those in (drawn, others))
        assert np.mean(first) == pytest.approx(np.mean(second), abs=0.15)


def test_what_is_taught_obeys_the_more_the_higher_the_tilt():
    records = [Record(i, g, 0.1 + i / 90, *genotype_cost(g)) for i, g in enumerate(random_pool(60, seed=6))]
    data = gan.TrainingData(records, {"accuracy": 3, "params": 2}, 10, torch.device("cpu"))
    predictor = Predictor(2, vertex_size=8)
    predictor.error.fill_(0.2)
    met = {}
    for tilt in (0.0, 3.0, 300.0):
        flags = ["--objectives", "accuracy,params", "--pool", "8000", "--tilt", str(tilt)]
        trainer = gan.Trainer(None, None, None, predictor, {}, data, gan.parse_args(flags))
        pool, chosen, labels = trainer.choose_from_pool(3000, torch.Generator().manual_seed(1))
        cells = tuple(batch[chosen] for batch in pool)
        met[tilt] = gan.obedience(cells, labels, data.boundaries, predictor)
        assert (met[tilt] >= 0).all() and len(labels.unique(dim=0)) == 6
        assert len(chosen.unique()) > (2000 if tilt == 0 else 20)
    assert met[0.0].mean() + 0.1 < met[3.0].mean() < met[300.0].mean()
    assert met[300.0].min() > 0.999  # #params are counted: of that label one can be sure


def small_trainer(*flags, largest=None):
    """A Trainer of a small generator of #params, on 64 genotypes."""
    pool = random_pool(64, seed=6, max_vertices=largest)
    records = [Record(i, g, 0.1 + i / 100, *genotype_cost(g)) for i, g in enumerate(pool)]
    data = gan.TrainingData(records, {"params": 2}, 10, torch.device("cpu"))
    small = ["--objectives", "params", "--g_emb_size", "16", "--g_hidden_size", "8", "--batch_size", "16"]
    args = gan.parse_args([*small, "--kl_weight", "0", "--lr", "0.01", *flags])
    set_seed(0)
    networks = gan.build_networks(args, data.num_classes)
    optimizers = {"generator": gan.build_optimizer(networks[0], args)}
    return gan.Trainer(networks[0], None, networks[1], Predictor(1, vertex_size=8), optimizers, data, args)


def test_the_warm_up_teaches_the_pools_cells_which_become_likelier(monkeypatch):
    trainer = small_trainer("--pool", "1000", "--draws", "48", "--warmup_epochs", "4", "--n_epochs", "5")
    pools, taught, choose = [], [], trainer.choose_from_pool
    monkeypatch.setattr(trainer, "choose_from_pool", lambda *args: pools.append(choose(*args)) or pools[-1])
    step = trainer.step[False]
    trainer.step = (lambda critic, real, *rest: taught.append(real) or step(critic, real, *rest)), None
    unseen = random_batch(500, torch.Generator().manual_seed(9))
    n = len(unseen[0])
    request = torch.zeros(n, 100), torch.arange(n)[:, None] % 2, unseen
    before = trainer.generator.likelihood(*request).mean().item()
    for epoch in range(4):
        trainer.train_epoch(epoch)
    after = trainer.generator.likelihood(*request).mean().item()
    assert after > before + 4, (before, after)
    assert len(pools) == 4 and len(taught) == 4 * (64 // 16)
    for i, (cells, labels) in enumerate(taught):  # in every step others of the epoch's
        pool, chosen, chosen_labels = pools[i // 4]
        part = slice(i % 4 * (16 + 48), (i % 4 + 1) * (16 + 48))
        assert torch.equal(labels, chosen_labels[part])
        for batch, given in zip(pool, cells, strict=True):
            assert torch.equal(batch.adj[chosen[part]], given.adj) and torch.equal(batch.ops[chosen[part]], given.ops)


def test_the_pool_has_no_larger_cells_than_the_nas_dataset():
    trainer = small_trainer("--pool", "1000", "--warmup_epochs", "1", "--n_epochs", "2", largest=5)
    pool, *_ = trainer.choose_from_pool(10, torch.Generator().manual_seed(0))
    assert max(int(batch.num_nodes.max()) for batch in pool) == 5
    warm_up, after = (trainer.train_epoch(epoch) for epoch in range(2))  # the generator's can have ten vertices
    assert warm_up.keys() == {"nll"} and after.keys() == {"nll", "reward"}


def test_the_policy_gradient_alone_makes_the_cells_obey():
    flags = ["--pool", "0", "--likelihood_weight", "1e-6", "--warmup_epochs", "0", "--draws", "128", "--n_epochs", "8"]
    trainer = small_trainer(*flags)
    rewards = [trainer.train_epoch(epoch)["reward"] for epoch in range(8)]
    assert min(rewards[-3:]) > rewards[0] + 0.15


def adversarial_trainer(*flags):
    """As small_trainer, with a discriminator that is trained from the first epoch on."""
    trainer = small_trainer("--adversarial_weight", "1", "--warmup_epochs", "0", *flags)
    trainer.optimizers["discriminator"] = gan.build_optimizer(trainer.discriminator, trainer.args)
    return trainer


def recorded_updates(trainer, monkeypatch):
    """Takes the work of the updates away; returns the list of what each is given, in the order of their calls."""
    updates = []

    def recorder(network):
        def update(real, *drawn):
            genotypes = [Genotype(*specs) for specs in zip(*(batch.decode() for batch in real[0]), strict=True)]
            z = [(part if isinstance(part, torch.Tensor) else part[0]).sum().item() for part in drawn]
            lr = trainer.optimizers[network].param_groups[0]["lr"]
            dropout = torch.rand(()).item()
            updates.append({"network": network, "genotypes": genotypes, "z": z, "lr": lr, "dropout": dropout})
            return {"loss": torch.zeros(())}

        return update

    update_discriminator, update_generator = recorder("discriminator"), recorder("generator")

    def step(criticised, *drawn):
        values = {} if criticised is None else update_discriminator(*criticised)
        return values | update_generator(*drawn)

    monkeypatch.setattr(trainer, "update_discriminator", update_discriminator)
    monkeypatch.setattr(trainer, "step", (step, step))
    return updates


def test_the_discriminator_wants_1_for_real_and_0_for_generated():
    def labels_as_scores(cells, labels):
        assert [batch.num_nodes.tolist() for batch in cells] == both
        return labels

    pool = random_pool(5, seed=2)
    cells = tuple(CellBatch.encode([genotype[name] for genotype in pool]) for name in NAG_SPACE.cells)
    both = [batch.num_nodes.tolist() for batch in cells]
    real, fake = (tuple(batch[part] for batch in cells) for part in (slice(2), slice(2, 5)))
    scores = torch.tensor([[1.0], [0.5]]), torch.tensor([[0.0], [0.3], [0.9]])
    values = gan.discriminator_loss(labels_as_scores, real, scores[0], fake, scores[1])
    assert [value.item() for value in values] == pytest.approx([((0.5**2) / 2 + (0.3**2 + 0.9**2) / 3) / 2, 0.75, 0.4])


@pytest.mark.parametrize("hard", [True, False])
def test_losses_are_what_the_flags_weigh(hard, monkeypatch):
    flags = ["--adversarial_weight", "0.3", "--likelihood_weight", "0.7", "--control_weight", "2", "--kl_weight", "0.2"]
    flags += ["--warmup_epochs", "1", "--straight_through" if hard else "--no-straight_through"]
    trainer, losses = adversarial_trainer(*flags), []
    monkeypatch.setattr(gan, "update", lambda optimizer, loss, clip_value: losses.append(loss))
    generator, discriminator, data = trainer.generator, trainer.discriminator.eval(), trainer.data
    trainer.reference = reference = copy.deepcopy(generator)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)
    source = torch.Generator().manual_seed(0)
    requests = []
    for n in (6, 32):
        z, noise = generator.draw_noise(n, source, 1.0)
        requests.append((z, data.random_labels(n, source), noise))
    judged, controlled = requests
    real, z = (tuple(cells[:5] for cells in data.cells), data.labels[:5]), torch.randn(5, 100, generator=source)
    values = trainer._step((real, judged), real, z, judged, controlled)

    fake, drawn = generator(*judged), tuple(batch.straight_through() for batch in generator(*controlled))
    scores = discriminator(tuple(batch.straight_through() for batch in fake) if hard else fake, judged[1])
    likelihood, before = (network.likelihood(*controlled[:2], drawn) for network in (generator, reference))
    reward = []
    for *specs, label in zip(*(batch.decode() for batch in drawn), controlled[1].tolist(), strict=True):
        genotype = Genotype(*specs).prune()
        params = None if genotype is None else genotype_cost(genotype)[0]
        reward.append(-1.0 if genotype is None else float((params >= data.boundaries["params"]) == label[0]))
    assert set(reward) == {-1, 0, 1}
    advantage = torch.tensor(reward) - 0.2 * (likelihood - before).detach()
    advantage = advantage - advantage.mean()
    g_loss, nll = (scores - 1).square().mean(), -generator.likelihood(z, real[1], real[0]).mean()
    expected = 0.3 * g_loss + 0.7 * nll - 2 * (advantage * likelihood).mean()
    of_discriminator = ((discriminator(*real) - 1).square().mean() + scores.square().mean()) / 2
    torch.testing.assert_close(losses, [of_discriminator, expected], rtol=1e-4, atol=1e-5)
    divergence, reward = (likelihood - before).mean(), torch.tensor(reward).mean()
    terms = {"g_loss": g_loss, "nll": nll, "reward": reward, "divergence": divergence}
    assert values.pop("d_loss") == losses[0]
    del values["real_score"], values["fake_score"]
    torch.testing.assert_close(values, terms, rtol=1e-4, atol=1e-5)
    ours, theirs = list(generator.parameters()), list(discriminator.parameters())
    grads = [torch.autograd.grad(loss, ours, retain_graph=True) for loss in (losses[1], expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert set(torch.autograd.grad(losses[1], theirs, allow_unused=True)) == {None}
    assert set(torch.autograd.grad(losses[0], ours, retain_graph=True, allow_unused=True)) == {None}
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(losses[0], theirs))


@pytest.mark.parametrize(("clip_value", "length"), [(0, 5.0), (10, 5.0), (0.5, 0.5)])
def test_gradients_are_clipped_to_a_norm_or_not_at_all(clip_value, length):
    weight, gradient = torch.zeros(2, requires_grad=True), torch.tensor([3.0, 4.0])
    optimizer = torch.optim.SGD([weight], lr=1)
    for steps in (1, 2):
        gan.update(optimizer, (weight * gradient).sum(), clip_value)
        torch.testing.assert_close(weight.detach(), -steps * length * gradient / 5)


def test_adam_has_the_rates_of_the_flags():
    for optimizer in adversarial_trainer("--b1", "0.3", "--b2", "0.7").optimizers.values():
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (0.01, (0.3, 0.7))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_falls_and_the_generator_steps_at_every_nth_step_of_the_whole_run(schedule, monkeypatch):
    trainer = adversarial_trainer("--n_critic", "3", "--n_epochs", "3", "--pool", "0", "--lr_schedule", schedule)
    updates = recorded_updates(trainer, monkeypatch)
    for epoch in range(3):
        trainer.train_epoch(epoch)  # of four steps
    names = [("discriminator",) * 3 + ("generator",)] * 4
    assert [update["network"] for update in updates] == [name for part in names for name in part]
    falling = [0.01 * (1 + math.cos(math.pi * step / 12)) / 2 for step in range(12)]
    rates = falling if schedule == "cosine" else [0.01] * 12
    for name, steps in (("discriminator", slice(None)), ("generator", slice(2, None, 3))):
        found = [update["lr"] for update in updates if update["network"] == name]
        assert found == pytest.approx(rates[steps], abs=1e-9)


def test_every_epoch_has_an_order_a_pool_noise_and_dropout_of_its_own(monkeypatch):
    trainer, epochs = adversarial_trainer("--pool", "1000"), []
    updates = recorded_updates(trainer, monkeypatch)
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (1, 0)):
        trainer.args.seed = seed
        trainer.train_epoch(epoch)
        epochs.append(updates.copy())
        updates.clear()
    *others, again = epochs
    assert again == others[0]  # so that a run goes on after a stop
    drawn = [value for epoch in others for update in epoch for value in (update["dropout"], *update["z"])]
    assert len(set(drawn)) == len(drawn) == 3 * 4 * (2 + 4)
    orders, taught = (
        [[g for update in epoch if update["network"] == name for g in update["genotypes"]] for epoch in others]
        for name in ("discriminator", "generator")
    )
    for i, k in combinations(range(3), 2):
        assert orders[i] != orders[k] and set(orders[i]) == set(orders[k]) and len(set(orders[i])) == 64
        assert len(set(taught[i]) & set(taught[k])) < 0.3 * len(set(taught[i]))


def test_the_reference_is_the_generator_as_the_warm_up_left_it(tmp_path, monkeypatch):
    def add_one(trainer, epoch):
        for parameter in trainer.generator.parameters():
            parameter.data.add_(1)
        return {}

    monkeypatch.setattr(gan.Trainer, "train_epoch", add_one)
    pool = random_pool(16, seed=6)
    write_records(tmp_path / "a.jsonl", [Record(i, g, 0.1 + i / 50, *genotype_cost(g)) for i, g in enumerate(pool)], {})
    flags = ["--nasbench_data", tmp_path / "a.jsonl", "--output_dir", tmp_path / "run", "--batch_size", "8"]
    flags += ["--n_epochs", "4", "--warmup_epochs", "2", "--g_emb_size", "8", "--eval_size", "3"]
    gan.main(gan.parse_args(list(map(str, flags))))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name, weight in state["generator"].items():
        torch.testing.assert_close(state["reference"][name], weight - 2, rtol=0, atol=1e-5)


def test_the_place_of_an_objective_makes_no_difference_to_its_classes():
    pool = random_pool(20, seed=7)
    cells = tuple(CellBatch.encode([genotype[name] for genotype in pool]) for name in NAG_SPACE.cells)
    torch.manual_seed(0)
    predictor = Predictor(2, vertex_size=8)
    predictor.error.copy_(torch.tensor([0.1, 0.3]))
    params = sorted(genotype_cost(genotype)[0] for genotype in pool)[10]
    bounds = boundaries(params=[params], accuracy=[0.3, 0.4])
    (of_params, of_accuracy), valid = gan.class_shares(cells, bounds, predictor)
    assert valid.all() and of_params.tolist() == [
        [float(genotype_cost(g)[0] < params), float(genotype_cost(g)[0] >= params)] for g in pool
    ]
    cuts = torch.tensor([1 / 3, 2 / 3])
    below = torch.special.ndtr((cuts - torch.tensor(predictor.quantiles(pool))[:, 1, None]) / 0.3)
    torch.testing.assert_close(of_accuracy[:, :2].cumsum(1), below)


def test_a_run_stopped_within_its_schedule_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    pool = random_pool(16, seed=6)
    write_records(tmp_path / "a.jsonl", [Record(i, g, 0.1 + i / 50, *genotype_cost(g)) for i, g in enumerate(pool)], {})
    flags = [
        "--nasbench_data",
        str(tmp_path / "a.jsonl"),
        "--batch_size",
        "4",
        "--g_emb_size",
        "8",
        "--d_emb_size",
        "8",
    ]
    flags += ["--n_epochs", "3", "--warmup_epochs", "1", "--adversarial_weight", "1", "--eval_size", "6"]
    flags += ["--draws", "6", "--pool", "1000"]
    train_epoch = gan.Trainer.train_epoch

    def stopped(*args):
        if args[-1] == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)

    gan.main(gan.parse_args([*flags, "--output_dir", str(tmp_path / "whole")]))
    monkeypatch.setattr(gan.Trainer, "train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        gan.main(gan.parse_args([*flags, "--output_dir", str(tmp_path / "part")]))
    monkeypatch.undo()
    gan.main(gan.parse_args(["--resume", str(tmp_path / "part")]))
    whole, part = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "part"))
    for name in ("generator", "reference", "discriminator", "predictor"):
        assert all(torch.equal(whole[name][key], part[name][key]) for key in whole[name])
    assert any(not torch.equal(part["reference"][key], part["generator"][key]) for key in part["generator"])
    assert Generator.from_checkpoint(tmp_path / "part" / "generator.pt").sample((1,), 3, seed=0)


def test_recipes_set_defaults_and_flags_win():
    paper, robust = gan.parse_args(["--recipe", "paper"]), gan.parse_args(["--lr", "0.5", "--no-chain_cells"])
    assert (paper.likelihood_weight, paper.temperature, paper.lr, paper.clip_value) == (0, 0, 2e-4, 0.01)
    assert robust.likelihood_weight == 1 and robust.temperature == 1 and robust.edges_in_turn
    assert robust.lr == 0.5 and not robust.chain_cells
    both = gan.parse_args(["--kl_weight", "0.1"], objectives=("accuracy", "params"))  # as gan_multiobj.py
    assert (robust.pool, robust.kl_weight, both.pool, both.kl_weight) == (65536, 0.05, 65536, 0.1)
    assert gan.parse_args(["--objectives", "params,macs"]).objectives == ("params", "macs")
    for flags in (
        ["--objectives", "speed"],
        ["--objectives", "params,params"],
        ["--recipe", "paper", "--warmup_epochs", "2"],
        ["--warmup_epochs", "0"],  # nothing to diverge from
        ["--pool", "10"],
        ["--recipe", "paper", "--pool", "2000"],  # nothing that teaches it
    ):
        with pytest.raises(SystemExit):
            gan.parse_args(flags)


def test_a_run_from_before_draws_and_pool_goes_on_without(tmp_path):
    saved = vars(gan.parse_args(["--n_epochs", "40", "--control_weight", "5"])).copy()
    del saved["draws"], saved["pool"], saved["tilt"]
    state = dict.fromkeys(("reference", "discriminator", "optimizers", *gan.FOR_SAMPLING))
    save_checkpoint(tmp_path / "checkpoint.pt", "gan", {**state, "args": saved})
    args = gan.parse_args(["--resume", str(tmp_path)])
    assert (args.draws, args.pool, args.tilt, args.control_weight) == (0, 0, 0, 5)
    assert gan.ROBUST["draws"] and gan.ROBUST["pool"]


@pytest.mark.slow  # compiles for a minute
def test_compiled_parts_are_four_graphs_that_train_as_without(tmp_path, monkeypatch):
    """One for all message-passing layers and sizes of cells, one for the discriminator; and one each without gradients,
    of cells that the discriminator is shown, and of weights that are not trained.
    """
    torch._dynamo.reset()
    monkeypatch.setattr("utils.check_compiler", lambda device: None)  # makes a graph too
    monkeypatch.setattr(Generator, "fixed_shape", True)  # as on CUDA; no batch is as large as 1 or 4 x a cell
    pool = random_pool(12, seed=6)
    write_records(tmp_path / "a.jsonl", [Record(i, g, 0.1 + i / 50, *genotype_cost(g)) for i, g in enumerate(pool)], {})
    flags = ["--recipe", "paper", "--nasbench_data", str(tmp_path / "a.jsonl"), "--batch_size", "11"]
    flags += ["--g_emb_size", "8", "--d_emb_size", "8", "--g_dropout", "0", "--d_gnn_dropout", "0", "--eval_size", "3"]
    flags += ["--n_epochs", "2", "--d_mlp_dropout", "0", "--lr", "0.01", "--clip_value", "0"]
    losses = []
    for compiled in ([], ["--compile"]):
        folder = tmp_path / f"run{len(compiled)}"
        gan.main(gan.parse_args([*flags, *compiled, "--output_dir", str(folder)]))
        losses.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
    for name in ("d_loss", "g_loss", "real_score"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
