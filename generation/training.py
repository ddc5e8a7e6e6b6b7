"""One epoch of training a generator, whatever the recipe: what is drawn for each step, and the step itself."""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from build_nas_dataset.objectives import labels_of, objectives_of
from build_nas_dataset.random_cells import random_batch
from build_nas_dataset.records import Record
from generation.adversarial import discriminator_loss, generate, generator_loss, update
from generation.likelihood import ExamplePool, choose_for_labels, likelihood_pass, policy_gradient_loss, reward
from models.discriminator import Discriminator
from models.fast.cuda_graphs import Recorded, can_record, side_by_side
from models.generator import Generator, Request
from models.graph import CellBatch, LabelledCells, MessagePassing
from models.predictor import Predictor
from plumbing.console import pace
from utils import cosine, derive_seed, set_lr, set_seed


class TrainingData:
    """The NAS dataset as tensors on a device.

    space: the search space. cells: one CellBatch of N cells for each cell of it. max_vertices: of the largest cell.
    objectives: how each is cut into classes. labels: (N, K) long. quantiles: places in the ranking, (N, K) in 0..1.
    """

    def __init__(self, records: list[Record], num_classes: dict[str, int], max_vertices: int, device: torch.device):
        """num_classes: of each objective, by name. max_vertices: to which cells are padded.

        Raises ValueError when a class would hold no record.
        """
        self.space = records[0].genotype.space
        self.cells = tuple(
            CellBatch.encode([record.genotype[name] for record in records], max_vertices).to(device)
            for name in self.space.cells
        )
        self.max_vertices = max(int(cells.num_nodes.max()) for cells in self.cells)
        self.objectives = objectives_of(records, num_classes)
        self.labels = torch.tensor(labels_of(records, self.objectives), device=device)
        ranks = [rankdata(objective.values(records)) for objective in self.objectives]
        quantiles = (np.stack(ranks, axis=1) - 0.5) / len(records)
        self.quantiles = torch.tensor(quantiles, dtype=torch.float32, device=device)

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> LabelledCells:
        """The records at some positions (n,)."""
        return LabelledCells(tuple(cells[index] for cells in self.cells), self.labels[index])

    def random_labels(self, n: int, source: torch.Generator) -> Tensor:
        """Labels to ask the generator for, uniform over the classes of each objective: (n, K)."""
        device = self.labels.device
        columns = [torch.randint(o.num_classes, (n,), generator=source, device=device) for o in self.objectives]
        return torch.stack(columns, dim=1)


@dataclass
class Networks:
    """The networks of a run, and the optimizers of those that are trained, by name.

    predictor: trained before the generator. discriminator: None in a recipe that does not train it.
    reference: the policy that the KL term compares with; None in a recipe without it.
    """

    generator: Generator
    optimizers: dict[str, torch.optim.Optimizer]
    predictor: Predictor | None = None
    discriminator: Discriminator | None = None
    reference: Generator | None = None

    def set_reference(self) -> None:
        """Let the reference policy be the generator as it is now."""
        self.reference.load_state_dict(self.generator.state_dict())

    @staticmethod
    def frozen_copy(generator: Generator) -> Generator:
        return copy.deepcopy(generator).requires_grad_(False).eval()


class StepInputs(NamedTuple):
    """What one training step works on. Parts that the recipe or the warm-up leaves out are None.

    real: records for the discriminator's step. for_discriminator: the generated cells of that step.
    for_generator: the generated cells that the generator's loss asks the discriminator about.
    examples: genotypes whose likelihood is raised, given the noise examples_z (B, latent_dim).
    for_policy: the generated cells of the policy gradient.
    """

    real: LabelledCells | None = None
    for_discriminator: Request | None = None
    for_generator: Request | None = None
    examples: LabelledCells | None = None
    examples_z: Tensor | None = None
    for_policy: Request | None = None


class Trainer:
    """Trains the networks of a run, epoch by epoch, by the flags of gan.py.

    An epoch depends on its number, the seed and the networks only, so that a run goes on after a stop as if there had
    been none.
    """

    def __init__(self, networks: Networks, data: TrainingData, args: argparse.Namespace):
        self.networks, self.data, self.args = networks, data, args
        fast = args.cuda_graphs and can_record(data.labels.device)
        self.discriminator_step = Recorded(self._discriminator_step) if fast else self._discriminator_step
        # The warm-up and the epochs after it compute different things, so each has a recording of its own.
        self.warmup_step = Recorded(self._step) if fast else self._step
        self.step = Recorded(self._step) if fast else self._step

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """len(data) // batch_size steps; epochs count from 0. Returns the means of losses, scores and rewards.

        Where the discriminator, or the likelihood (--pool_size 0), takes its real cells from the NAS dataset, an epoch
        sees each record once, in random order.
        """
        args, optimizers = self.args, self.networks.optimizers
        set_seed(derive_seed(args.seed, epoch))  # dropout
        source = torch.Generator(self.data.labels.device).manual_seed(derive_seed(args.seed, epoch, 1))
        steps = len(self.data) // args.batch_size  # an incomplete last batch is dropped
        for network in filter(None, (self.networks.generator, self.networks.discriminator)):
            network.train()
        step = self.step if epoch >= args.warmup_epochs else self.warmup_step
        history: dict[str, list[Tensor]] = {}
        inputs = pace.steps(self.inputs(epoch, steps, source), total=steps, desc=f"epoch {epoch + 1}")
        for done, x in enumerate(inputs, start=epoch * steps):
            if args.lr_schedule == "cosine":
                for optimizer in optimizers.values():
                    set_lr(optimizer, cosine(done, args.n_epochs * steps, args.lr))
            if self.generator_is_trained(done):
                values = step(x)
            elif x.real is not None:
                values = self.discriminator_step(x.real, x.for_discriminator)
            else:
                continue
            for name, value in values.items():
                history.setdefault(name, []).append(value.clone())
        return {name: torch.stack(values).mean().item() for name, values in history.items()}

    def generator_is_trained(self, step: int) -> bool:
        """Whether the generator is trained in a step of the run, from 0: in every n_critic-th."""
        return (step + 1) % self.args.n_critic == 0

    def inputs(self, epoch: int, steps: int, source: torch.Generator) -> Iterator[StepInputs]:
        """Draw what each step of an epoch works on."""
        args, data, generator = self.args, self.data, self.networks.generator
        after_warmup = epoch >= args.warmup_epochs
        adversarial = after_warmup and args.adversarial_weight > 0
        policy_gradient = after_warmup and args.policy_gradient_weight > 0
        draws = args.policy_gradient_cells or args.batch_size
        # without a policy gradient, examples take the place of the cells that it would draw
        example_count = args.batch_size + (0 if policy_gradient else draws)

        def request(n: int, temperature: float) -> Request:
            z, noise = generator.draw_noise(n, source, temperature)
            return Request(z, data.random_labels(n, source), noise)

        order = torch.randperm(len(data), generator=source, device=source.device)[: steps * args.batch_size]
        pool = self.draw_pool(steps * example_count, source) if args.pool_size else None
        for step, index in enumerate(order.split(args.batch_size)):
            x = StepInputs()
            if adversarial:
                x = x._replace(real=data.at(index), for_discriminator=request(args.batch_size, args.temperature))
            if self.generator_is_trained(epoch * steps + step):
                if adversarial:
                    x = x._replace(for_generator=request(args.batch_size, args.temperature))
                if args.likelihood_weight or policy_gradient:
                    examples = pool.part(step, example_count) if pool else data.at(index)
                    z, _ = generator.draw_noise(len(examples.labels), source, temperature=0)
                    x = x._replace(examples=examples, examples_z=z)
                if policy_gradient:
                    x = x._replace(for_policy=request(draws, 1.0))
            yield x

    def draw_pool(self, n: int, source: torch.Generator) -> ExamplePool:
        """The pool of an epoch, and n of its genotypes as examples, for labels that are uniform over the classes.

        Its cells have no more vertices than those of the NAS dataset, since the predictor knows no larger ones.
        """
        args, data, predictor = self.args, self.data, self.networks.predictor
        drawn, size = random_batch(args.pool_size, source, data.space, data.max_vertices), data.cells[0].adj.shape[1]
        cells, labels = tuple(batch.pad(size) for batch in drawn), data.random_labels(n, source)
        return choose_for_labels(cells, labels, args.inverse_temperature, data.objectives, predictor, source)

    def _discriminator_step(self, real: LabelledCells, request: Request) -> dict[str, Tensor]:
        networks = self.networks
        with torch.no_grad():
            fake = generate(networks.generator, request, self.args.straight_through)
        loss, values = discriminator_loss(networks.discriminator, real, fake)
        update(networks.optimizers["discriminator"], loss, self.args.clip_value)
        return {name: value.detach() for name, value in values.items()}

    def _step(self, x: StepInputs) -> dict[str, Tensor]:
        """A step of the discriminator, if it is trained, and one of the generator.

        The generator minimises adversarial_weight x generator_loss + likelihood_weight x NLL of the examples +
        policy_gradient_weight x policy_gradient_loss, as far as the recipe and the warm-up have these terms. The KL
        term is in the last one: _rewards lowers rewards by kl_weight x the divergence from the reference policy.
        """
        args, networks, values, loss = self.args, self.networks, {}, 0.0
        if x.real is not None:
            values, fake = side_by_side(
                (self._discriminator_step, x.real, x.for_discriminator), (self._asked_cells, x.for_generator)
            )
            g_loss = generator_loss(networks.discriminator, fake)
            loss = loss + args.adversarial_weight * g_loss
            values["g_loss"] = g_loss
        if x.examples is not None:
            found = likelihood_pass(networks.generator, x.examples_z, x.examples, x.for_policy)
            nll = -found.of_examples.mean()
            loss = loss + args.likelihood_weight * nll
            values["nll"] = nll
            if x.for_policy is not None:
                rewards, of_rewards = self._rewards(found.drawn, found.of_drawn, x.for_policy.z)
                loss = loss + args.policy_gradient_weight * policy_gradient_loss(found.of_drawn, rewards)
                values |= of_rewards
        update(networks.optimizers["generator"], loss, args.clip_value)
        return {name: value.detach() for name, value in values.items()}

    def _asked_cells(self, request: Request) -> LabelledCells:
        return generate(self.networks.generator, request, self.args.straight_through)

    @torch.no_grad()
    def _rewards(self, drawn: LabelledCells, log_likelihood: Tensor, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The rewards of drawn genotypes (D,), less the weighted divergence from the reference; and means to record.

        log_likelihood: of the genotypes (D,), by the generator that drew them from z (D, latent_dim). The difference to
        that by the reference is an estimate of the KL divergence, in nats.
        """
        networks = self.networks
        calls = [(self._reward, drawn)]
        if networks.reference is not None:
            calls.append((networks.reference.log_likelihood, z, drawn.labels, drawn.cells))
        rewards, *by_reference = side_by_side(*calls)
        values = {"reward": rewards.mean()}
        for before in by_reference:
            divergence = log_likelihood - before
            values["divergence"] = divergence.mean()
            rewards = rewards - self.args.kl_weight * divergence
        return rewards, values

    def _reward(self, drawn: LabelledCells) -> Tensor:
        return reward(*drawn, self.data.objectives, self.networks.predictor)


def compile_parts(networks: Networks) -> None:
    """torch.compile what most of the time goes to: once for all message-passing layers and sizes of cells, and once
    for the discriminator (and again where there are no gradients). The growth loop as a whole would be unrolled into a
    graph of thousands of operations.
    """
    for network in filter(None, (networks.generator, networks.discriminator, networks.reference)):
        for module in network.modules():
            if isinstance(module, (MessagePassing, Discriminator)):
                module.compile(dynamic=True)  # vertices are added one by one
