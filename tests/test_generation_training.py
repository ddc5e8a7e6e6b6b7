"""generation/training.py: what a step is given, what it minimises, and that training trains."""

import math
from itertools import combinations

import pytest
import torch

import gan
from build_nas_dataset.random_cells import random_batch, random_pool
from build_nas_dataset.records import Record
from generation.likelihood import reward
from generation.training import Networks, StepInputs, Trainer, TrainingData
from genotypes import Genotype
from models.cost import genotype_cost
from models.generator import Request
from models.predictor import Predictor
from utils import set_seed


def test_quantiles_and_labels_rise_with_the_value():
    accuracies, params = (0.5, 0.2, 0.4, 0.2, 0.9), (30, 10, 50, 20, 40)
    records = [Record(i, g, accuracies[i], params[i], 0) for i, g in enumerate(random_pool(5, seed=1))]
    data = TrainingData(records, {"accuracy": 2, "params": 2}, 10, torch.device("cpu"))
    quantiles = [[0.7, 0.5], [0.2, 0.1], [0.5, 0.9], [0.2, 0.3], [0.9, 0.7]]  # fifths, from their middles
    torch.testing.assert_close(data.quantiles, torch.tensor(quantiles))
    assert data.labels.tolist() == [[1, 1], [0, 0], [1, 1], [0, 0], [1, 1]]


def test_examples_have_the_labels_the_more_the_higher_the_inverse_temperature():
    records = [Record(i, g, 0.1 + i / 90, *genotype_cost(g)) for i, g in enumerate(random_pool(60, seed=6))]
    data = TrainingData(records, {"accuracy": 3, "params": 2}, 10, torch.device("cpu"))
    predictor = Predictor(2, vertex_size=8)
    predictor.error.fill_(0.2)
    rewards = {}
    for inverse_temperature in (0.0, 3.0, 300.0):
        flags = f"--objectives accuracy,params --pool_size 8000 --inverse_temperature {inverse_temperature}"
        networks = Networks(None, {}, predictor)
        trainer = Trainer(networks, data, gan.parse_args(flags.split()))
        pool = trainer.draw_pool(3000, torch.Generator().manual_seed(1))
        examples = pool.part(0, 3000)
        found = rewards[inverse_temperature] = reward(*examples, data.objectives, predictor)
        assert (found >= 0).all() and len(pool.labels.unique(dim=0)) == 6
        assert len(pool.chosen.unique()) > (2000 if inverse_temperature == 0 else 20)
    assert rewards[0.0].mean() + 0.1 < rewards[3.0].mean() < rewards[300.0].mean()
    assert rewards[300.0].min() > 0.999  # #params are counted: of that label one can be sure


def small_trainer(flags, largest=None):
    """A Trainer of a small generator of #params, on 64 genotypes; of the robust recipe, without a KL term."""
    pool = random_pool(64, seed=6, max_vertices=largest)
    records = [Record(i, g, 0.1 + i / 100, *genotype_cost(g)) for i, g in enumerate(pool)]
    data = TrainingData(records, {"params": 2}, 10, torch.device("cpu"))
    small = "--objectives params --g_emb_size 16 --g_hidden_size 8 --batch_size 16 --kl_weight 0 --lr 0.01"
    args = gan.parse_args(f"{small} {flags}".split())
    set_seed(0)
    networks = gan.build_networks(args, torch.device("cpu"))
    networks.predictor = Predictor(1, vertex_size=8)
    return Trainer(networks, data, args)


def test_what_a_recipe_does_not_use_is_not_built():
    networks = small_trainer("--warmup_epochs 1").networks
    assert networks.discriminator is None and networks.reference is None
    assert list(networks.optimizers) == ["generator"]
    assert list(adversarial_trainer("").networks.optimizers) == ["generator", "discriminator"]


def test_the_warm_up_raises_the_likelihood_of_the_pools_cells(monkeypatch):
    trainer = small_trainer("--pool_size 1000 --policy_gradient_cells 48 --warmup_epochs 4 --n_epochs 5")
    pools, examples, draw_pool, step = [], [], trainer.draw_pool, trainer.warmup_step
    monkeypatch.setattr(trainer, "draw_pool", lambda *args: pools.append(draw_pool(*args)) or pools[-1])
    trainer.warmup_step, trainer.step = (lambda x: examples.append(x.examples) or step(x)), None
    unseen, generator = random_batch(500, torch.Generator().manual_seed(9)), trainer.networks.generator
    n = len(unseen[0])
    request = torch.zeros(n, 100), torch.arange(n)[:, None] % 2, unseen
    before = generator.log_likelihood(*request).mean().item()
    for epoch in range(4):
        trainer.train_epoch(epoch)
    after = generator.log_likelihood(*request).mean().item()
    assert after > before + 4, (before, after)
    assert len(pools) == 4 and len(examples) == 4 * (64 // 16)
    for i, (cells, labels) in enumerate(examples):  # in every step others of the epoch's
        pool, part = pools[i // 4], slice(i % 4 * (16 + 48), (i % 4 + 1) * (16 + 48))
        assert torch.equal(labels, pool.labels[part])
        for batch, given in zip(pool.cells, cells, strict=True):
            assert torch.equal(batch.adj[pool.chosen[part]], given.adj)
            assert torch.equal(batch.ops[pool.chosen[part]], given.ops)


def test_the_pool_has_no_larger_cells_than_the_nas_dataset():
    trainer = small_trainer("--pool_size 1000 --warmup_epochs 1 --n_epochs 2", largest=5)
    pool = trainer.draw_pool(10, torch.Generator().manual_seed(0))
    assert max(int(batch.num_nodes.max()) for batch in pool.cells) == 5
    warm_up, after = (trainer.train_epoch(epoch) for epoch in range(2))  # the generator's can have ten vertices
    assert warm_up.keys() == {"nll"} and after.keys() == {"nll", "reward"}


def test_the_policy_gradient_alone_raises_the_reward():
    flags = "--pool_size 0 --likelihood_weight 1e-6 --warmup_epochs 0 --policy_gradient_cells 128 --n_epochs 8"
    trainer = small_trainer(flags)
    rewards = [trainer.train_epoch(epoch)["reward"] for epoch in range(8)]
    assert min(rewards[-3:]) > rewards[0] + 0.15


def adversarial_trainer(flags):
    """As small_trainer, with a discriminator that is trained from the first epoch on."""
    return small_trainer(f"--adversarial_weight 1 --warmup_epochs 0 {flags}")


def recorded_updates(trainer, monkeypatch):
    """Takes the work of the steps away; returns the list of what each network would be given, in the order of steps."""
    updates = []

    def record(network, cells, *drawn):
        genotypes = [Genotype(*specs) for specs in zip(*(batch.decode() for batch in cells), strict=True)]
        lr = trainer.networks.optimizers[network].param_groups[0]["lr"]
        dropout = torch.rand(()).item()
        z = [part.sum().item() for part in drawn]
        updates.append({"network": network, "genotypes": genotypes, "z": z, "lr": lr, "dropout": dropout})

    def discriminator_step(real, request):
        record("discriminator", real.cells, request.z)
        return {"loss": torch.zeros(())}

    def step(x):
        discriminator_step(x.real, x.for_discriminator)
        record("generator", x.examples.cells, x.examples_z, x.for_generator.z, x.for_policy.z)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(trainer, "discriminator_step", discriminator_step)
    monkeypatch.setattr(trainer, "step", step)
    return updates


@pytest.mark.parametrize("hard", [True, False])
def test_the_loss_is_what_the_flags_weigh(hard, monkeypatch):
    flags = "--likelihood_weight 0.7 --policy_gradient_weight 2 --warmup_epochs 1 --kl_weight 0.2"
    trainer = small_trainer(
        f"--adversarial_weight 0.3 {flags} {'--straight_through' if hard else '--no-straight_through'}"
    )
    losses = []
    monkeypatch.setattr("generation.training.update", lambda optimizer, loss, clip_value: losses.append(loss))
    networks, data = trainer.networks, trainer.data
    generator, discriminator, reference = networks.generator, networks.discriminator.eval(), networks.reference
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.5)
    source, requests = torch.Generator().manual_seed(0), []
    for n in (6, 32):
        z, noise = generator.draw_noise(n, source, 1.0)
        requests.append(Request(z, data.random_labels(n, source), noise))
    asked, drawn = requests
    real, z = data.at(torch.arange(5)), torch.randn(5, 100, generator=source)
    values = trainer._step(StepInputs(real, asked, asked, real, z, drawn))

    fake, cells = generator(*asked), tuple(batch.straight_through() for batch in generator(*drawn))
    scores = discriminator(tuple(batch.straight_through() for batch in fake) if hard else fake, asked.labels)
    likelihood, before = (n.log_likelihood(drawn.z, drawn.labels, cells) for n in (generator, reference))
    rewards, (objective,) = [], data.objectives
    for *specs, label in zip(*(batch.decode() for batch in cells), drawn.labels.tolist(), strict=True):
        genotype = Genotype(*specs).prune()
        params = None if genotype is None else genotype_cost(genotype)[0]
        rewards.append(-1.0 if genotype is None else float((params >= objective.boundaries[0]) == label[0]))
    assert set(rewards) == {-1, 0, 1}
    advantage = torch.tensor(rewards) - 0.2 * (likelihood - before).detach()
    advantage = advantage - advantage.mean()
    g_loss, nll = (scores - 1).square().mean(), -generator.log_likelihood(z, real.labels, real.cells).mean()
    expected = 0.3 * g_loss + 0.7 * nll - 2 * (advantage * likelihood).mean()
    of_discriminator = ((discriminator(*real) - 1).square().mean() + scores.square().mean()) / 2
    torch.testing.assert_close(losses, [of_discriminator, expected], rtol=1e-4, atol=1e-5)
    divergence, mean_reward = (likelihood - before).mean(), torch.tensor(rewards).mean()
    terms = {"g_loss": g_loss, "nll": nll, "reward": mean_reward, "divergence": divergence}
    assert values.pop("d_loss") == losses[0]
    del values["real_score"], values["fake_score"]
    torch.testing.assert_close(values, terms, rtol=1e-4, atol=1e-5)
    ours, theirs = list(generator.parameters()), list(discriminator.parameters())
    grads = [torch.autograd.grad(loss, ours, retain_graph=True) for loss in (losses[1], expected)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert set(torch.autograd.grad(losses[1], theirs, allow_unused=True)) == {None}
    assert set(torch.autograd.grad(losses[0], ours, retain_graph=True, allow_unused=True)) == {None}
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(losses[0], theirs))


def test_adam_has_the_rates_of_the_flags():
    for optimizer in adversarial_trainer("--b1 0.3 --b2 0.7").networks.optimizers.values():
        (group,) = optimizer.param_groups
        assert (group["lr"], group["betas"]) == (0.01, (0.3, 0.7))


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_rate_falls_and_the_generator_steps_at_every_nth_step_of_the_whole_run(schedule, monkeypatch):
    trainer = adversarial_trainer(f"--n_critic 3 --n_epochs 3 --pool_size 0 --lr_schedule {schedule}")
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
    trainer, epochs = adversarial_trainer("--pool_size 1000"), []
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
    orders, examples = (
        [[g for update in epoch if update["network"] == name for g in update["genotypes"]] for epoch in others]
        for name in ("discriminator", "generator")
    )
    for i, k in combinations(range(3), 2):
        assert orders[i] != orders[k] and set(orders[i]) == set(orders[k]) and len(set(orders[i])) == 64
        assert len(set(examples[i]) & set(examples[k])) < 0.3 * len(set(examples[i]))
