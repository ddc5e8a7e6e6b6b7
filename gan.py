"""Train the generator on a NAS dataset, conditioned on classes of accuracy (gan_multiobj.py: and of #params).

    python gan.py                                          # data/nasdata.jsonl
    python gan.py --recipe paper                           # as published; explicit flags win over a recipe's
    python gan.py --n_epochs 20 --device cpu
    python gan.py --nasbench_data runs/build_nas_dataset-.../nasdata.jsonl
    python gan.py --resume runs/gan-...                    # go on after a stop

Writes checkpoint.pt (what --resume reads), generator.pt (what generate_archs.py needs of it), metrics.jsonl,
TensorBoard events, config.json and samples/*.json, cells drawn along the way. NAG paper, section 3.2; losses and
defaults of its section 4.1 with --recipe paper.

The recipe "paper" trains the generator against the discriminator alone: invalid or few different cells, which ignore
their labels. The recipe "robust", the default, trains it by
  --likelihood_weight  the log-likelihood of cells given their labels, decision by decision (teacher forcing):
                       generated cells are as varied as these, and like them. They come from a
  --pool               of random genotypes, drawn anew every epoch as the NAS dataset's were. For every combination of
                       labels, genotypes are taught with weights exp(--tilt x obedience): the expected number of the
                       labels that a genotype has. #params and MACs are counted; for accuracy, a predictor that is
                       trained on the NAS dataset first gives the probability of the class;
  --control_weight     a policy gradient, after --warmup_epochs of likelihood alone: of the --draws cells drawn in a
                       step, those that obey better than the rest become likelier;
  --kl_weight          of the divergence from the generator as the warm-up left it, against unlike cells, fewer
                       different ones, and cells that please the predictor only;
  --temperature 1      decisions that are drawn with their probabilities, not rounded;
  --chain_cells        a reduction cell that is grown in view of the normal cell;
  --edges_in_turn      edges that are decided one after the other, each in view of those before.
Each is a flag of its own, on top of either recipe; --adversarial_weight 1 adds the discriminator to the robust one.
"""

import argparse
import copy
import math
import time

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

from build_nas_dataset.objectives import class_of, objectives_of
from build_nas_dataset.random_cells import random_batch
from build_nas_dataset.records import Record, read_records
from build_nas_dataset.statistics import tau
from generation.metrics import cell_statistics, generation_metrics, obtained_classes
from genotypes import NAG_SPACE
from models.cost import batch_cost
from models.discriminator import Discriminator
from models.fast.cuda_graphs import Branch, Recorded
from models.generator import Generator, MessagePassing, forcing_noise
from models.graph import CellBatch
from models.predictor import Predictor
from utils import (
    ArgumentParser,
    RunLog,
    add_common_flags,
    add_cuda_graphs_flag,
    cosine,
    derive_seed,
    explicit_flags,
    fail,
    load_checkpoint,
    load_optimizer,
    number,
    of_this_version,
    on_device,
    output_folder,
    parse_resumable,
    prepare,
    progress_bar,
    save_checkpoint,
    set_lr,
    set_seed,
    shown,
    user_input,
    write_json,
)

# Objective -> the flags for its number of classes and the width of its label embedding.
OBJECTIVES = {
    "accuracy": ("n_perf_classes", "cls_perf_embedding_size"),
    "params": ("n_params_classes", "cls_params_embedding_size"),
    "macs": ("n_macs_classes", "cls_macs_embedding_size"),
}

ROBUST = {
    "likelihood_weight": 1.0,
    "control_weight": 15.0,
    "kl_weight": 0.05,
    "draws": 256,
    "pool": 65536,
    "tilt": 10.0,
    "adversarial_weight": 0.0,
    "temperature": 1.0,
    "chain_cells": True,
    "edges_in_turn": True,
    "straight_through": True,
    "g_emb_size": 64,
    "d_emb_size": 64,
    "g_hidden_size": 32,
    "d_hidden_size": 32,
    "g_dropout": 0.0,
    "d_gnn_dropout": 0.1,
    "d_mlp_dropout": 0.1,
    "lr": 2e-3,
    "b1": 0.9,
    "lr_schedule": "cosine",
    "clip_value": 1.0,
    "warmup_epochs": 18,
    "n_epochs": 28,
}

# What of a checkpoint is needed to draw cells.
FOR_SAMPLING = (
    "generator",
    "generator_config",
    "predictor",
    "predictor_config",
    "predictor_tau",
    "objectives",
    "epoch",
)

Request = tuple[Tensor, Tensor, tuple[Tensor, ...] | None]  # what cells are generated from: z, labels, noise

HELD_OUT = 0.1  # share of the NAS dataset that the predictor is measured on
PREDICTOR_EPOCHS = 20


class TrainingData:
    """The NAS dataset as tensors on the device: one CellBatch per cell of the space, and of each objective the labels.

    max_vertices: of its largest cell.
    objectives: as in build_nas_dataset.records.objectives_of. Raises ValueError when a class holds no record.
    """

    def __init__(self, records: list[Record], objectives: dict[str, int], max_vertices: int, device: torch.device):
        genotypes = [record.genotype for record in records]
        self.cells = tuple(
            CellBatch.encode([genotype[name] for genotype in genotypes], max_vertices).to(device)
            for name in NAG_SPACE.cells
        )
        self.max_vertices = max(int(cells.num_nodes.max()) for cells in self.cells)
        self.objectives, columns, quantiles = objectives_of(records, objectives), [], []
        for objective in self.objectives:
            values = [getattr(record, objective["name"]) for record in records]
            columns.append([class_of(value, objective["boundaries"]) for value in values])
            quantiles.append((rankdata(values) - 0.5) / len(values))
        self.labels = torch.tensor(columns, device=device).T.contiguous()  # (N, K)
        self.quantiles = torch.tensor(np.stack(quantiles, 1), dtype=torch.float32, device=device)  # (N, K) in 0..1
        self.boundaries = {
            o["name"]: torch.tensor(o["boundaries"], dtype=torch.float64, device=device) for o in self.objectives
        }
        self.num_classes = tuple(objectives.values())

    def __len__(self) -> int:
        return len(self.labels)

    def random_labels(self, n: int, generator: torch.Generator) -> Tensor:
        """Labels to ask the generator for, uniform over the classes: (n, K)."""
        device = self.labels.device
        columns = [torch.randint(c, (n,), generator=generator, device=device) for c in self.num_classes]
        return torch.stack(columns, dim=1)


def train_predictor(data: TrainingData, batch_size: int, seed: int) -> tuple[Predictor, list[float]]:
    """A frozen predictor of the objectives' quantiles, and its Kendall tau on held-out records, for each objective.

    Its error on these is kept in it.
    """
    device = data.labels.device
    set_seed(derive_seed(seed, 2))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).to(device)
    held_out, train = order.split([num := max(2, int(HELD_OUT * len(data))), len(data) - num])
    batch_size = min(batch_size, len(train))
    predictor = Predictor(len(data.num_classes)).to(device)
    steps = PREDICTOR_EPOCHS * (len(train) // batch_size)
    optimizer = torch.optim.AdamW(predictor.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for _ in progress_bar(range(PREDICTOR_EPOCHS), desc="predictor"):
        shuffled = train[torch.randperm(len(train), device=device)]
        for index in shuffled[: len(train) // batch_size * batch_size].split(batch_size):
            loss = F.mse_loss(predictor(tuple(cells[index] for cells in data.cells)), data.quantiles[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    predictor.requires_grad_(False)
    predicted = predictor(tuple(cells[held_out] for cells in data.cells)).cpu()
    truth = data.quantiles[held_out].cpu()
    predictor.error.copy_((predicted - truth).square().mean(0).sqrt())
    return predictor, [tau(predicted[:, k], truth[:, k]) for k in range(len(data.num_classes))]


def discriminator_loss(discriminator, real, real_labels, fake, fake_labels) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares, 1 for real and 0 for generated, mean of both. Returns loss, mean scores of real and generated."""
    both = tuple(CellBatch.cat(pair) for pair in zip(real, fake, strict=True))  # one pass: a score sees one genotype
    scores = discriminator(both, torch.cat([real_labels, fake_labels]))
    real_scores, fake_scores = scores.split([len(real_labels), len(fake_labels)])
    loss = (real_scores.sub(1).square().mean() + fake_scores.square().mean()) / 2
    return loss, real_scores.mean(), fake_scores.mean()


def class_shares(
    cells: tuple[CellBatch, ...], boundaries: dict[str, Tensor], predictor: Predictor
) -> tuple[list[Tensor], Tensor]:
    """The probability of each class of each objective, (B, C) of B hard genotypes, and which of these are valid (B,).

    boundaries: of the classes of each objective, (C - 1,) float64.
    #params and MACs are counted: one class is sure. For accuracy, it is the probability that the true quantile is in
    the class, when the predictor's errors are normal, and as large as on records that it was not trained on.
    """
    pruned, valid = zip(*(batch.prune() for batch in cells), strict=True)
    quantiles = predictor(pruned) if "accuracy" in boundaries else None
    cost = batch_cost(*pruned) if boundaries.keys() - {"accuracy"} else None
    shares = []
    for k, (name, bounds) in enumerate(boundaries.items()):
        classes = torch.arange(len(bounds) + 1, device=bounds.device)
        if name == "accuracy":
            cuts = classes[1:] / len(classes)
            below = torch.special.ndtr((cuts - quantiles[:, k, None]) / predictor.error[k])
            shares.append(F.pad(F.pad(below, (0, 1), value=1.0), (1, 0)).diff(dim=1))
        else:
            found = torch.bucketize(getattr(cost, name).double(), bounds, right=True)
            shares.append((found[:, None] == classes).to(predictor.error.dtype))
    return shares, torch.stack(valid).all(0)


def obedience(
    cells: tuple[CellBatch, ...], labels: Tensor, boundaries: dict[str, Tensor], predictor: Predictor
) -> Tensor:
    """Expected number of the K labels asked for that each of B hard genotypes has (B,); -1 where it is not valid."""
    shares, valid = class_shares(cells, boundaries, predictor)
    met = sum(share.gather(1, label[:, None]) for share, label in zip(shares, labels.unbind(1), strict=True))
    return torch.where(valid, met.squeeze(1), -1.0)


class Trainer:
    """The networks of a run, their optimizers, and an epoch of training.

    reference: the generator as the warm-up left it; None without --kl_weight or --control_weight.
    The parts of a step that are functions of tensors are recorded on CUDA, where their kernels are small and many.
    """

    def __init__(self, generator, reference, discriminator, predictor, optimizers, data: TrainingData, args):
        self.generator, self.reference, self.discriminator = generator, reference, discriminator
        self.predictor, self.optimizers, self.data, self.args = predictor, optimizers, data, args
        recorded = Recorded if data.labels.is_cuda and args.cuda_graphs else lambda function: function
        self.update_discriminator = recorded(self._update_discriminator)
        # Of the warm-up, and of the epochs after it: other terms, so another graph.
        self.step = recorded(self._step), recorded(self._step)

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the NAS dataset. Returns the means of losses and scores."""
        args, data = self.args, self.data
        set_seed(derive_seed(args.seed, epoch))  # dropout
        source = torch.Generator(data.labels.device).manual_seed(derive_seed(args.seed, epoch, 1))
        steps = len(data) // args.batch_size  # an incomplete last batch is dropped
        order = torch.randperm(len(data), generator=source, device=source.device)[: steps * args.batch_size]
        judged, draws = epoch >= args.warmup_epochs, args.draws or args.batch_size
        adversarial, control = judged and args.adversarial_weight > 0, judged and args.control_weight > 0
        history: dict[str, list[Tensor]] = {}
        self.generator.train()
        self.discriminator.train()
        if args.pool:
            size = args.batch_size + (0 if control else draws)  # where no cells are drawn, as many more are taught
            pool, chosen, chosen_labels = self.choose_from_pool(steps * size, source)
            taught = list(zip(chosen.split(size), chosen_labels.split(size), strict=True))

        def request(n: int, temperature: float) -> Request:
            z, noise = self.generator.draw_noise(n, source, temperature)
            return z, data.random_labels(n, source), noise

        def record(values: dict[str, Tensor]) -> None:
            for name, value in values.items():
                history.setdefault(name, []).append(value.clone())

        for step, index in enumerate(progress_bar(order.split(args.batch_size), desc=f"epoch {epoch + 1}")):
            done = epoch * steps + step
            if args.lr_schedule == "cosine":
                for optimizer in self.optimizers.values():
                    set_lr(optimizer, cosine(done, args.n_epochs * steps, args.lr))
            real = tuple(cells[index] for cells in data.cells), data.labels[index]
            criticised = (real, request(args.batch_size, args.temperature)) if adversarial else None
            if (done + 1) % args.n_critic:
                if adversarial:
                    record(self.update_discriminator(*criticised))
            else:
                if args.pool:
                    index, labels = taught[step]
                    real = tuple(cells[index] for cells in pool), labels
                judged_request = request(args.batch_size, args.temperature) if adversarial else None
                z, controlled = None, None
                if args.likelihood_weight or control:
                    z, _ = self.generator.draw_noise(len(real[1]), source, temperature=0)
                if control:
                    controlled = request(draws, 1.0)
                record(self.step[judged](criticised, real, z, judged_request, controlled))
        return {name: torch.stack(values).mean().item() for name, values in history.items()}

    @torch.no_grad()
    def choose_from_pool(self, n: int, source: torch.Generator) -> tuple[tuple[CellBatch, ...], Tensor, Tensor]:
        """A pool of random genotypes, and n of them (n,) chosen for labels (n, K) that are uniform over the classes.

        For each combination of labels with weights exp(tilt x obedience).
        """
        data, args = self.data, self.args
        pool = random_batch(args.pool, source, NAG_SPACE, data.max_vertices)  # cells that the predictor knows
        pool = tuple(cells.pad(args.max_step) for cells in pool)
        parts = [
            class_shares(tuple(cells[part] for cells in pool), data.boundaries, self.predictor)[0]
            for part in torch.arange(len(pool[0]), device=source.device).split(4096)
        ]
        shares = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        labels = data.random_labels(n, source)
        chosen = torch.empty(n, dtype=torch.long, device=source.device)
        for combination in labels.unique(dim=0):
            asking = (labels == combination).all(1)
            met = sum(share[:, label] for share, label in zip(shares, combination, strict=True))
            weights = (args.tilt * met).softmax(0)
            chosen[asking] = torch.multinomial(weights, int(asking.sum()), replacement=True, generator=source)
        return pool, chosen, labels

    def _generate(self, z: Tensor, labels: Tensor, noise, hard: bool) -> tuple[CellBatch, ...]:
        cells = self.generator(z, labels, noise)
        return tuple(batch.straight_through() for batch in cells) if hard else cells

    def _update_discriminator(self, real: tuple[tuple[CellBatch, ...], Tensor], request: Request) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self._generate(*request, self.args.straight_through)
        loss, real_score, fake_score = discriminator_loss(self.discriminator, *real, fake, request[1])
        update(self.optimizers["discriminator"], loss, self.args.clip_value)
        return {"d_loss": loss.detach(), "real_score": real_score.detach(), "fake_score": fake_score.detach()}

    def _step(
        self,
        criticised: tuple[tuple[tuple[CellBatch, ...], Tensor], Request] | None,
        real: tuple[tuple[CellBatch, ...], Tensor],
        z: Tensor | None,
        judged: Request | None,
        controlled: Request | None,
    ) -> dict[str, Tensor]:
        """A step of the discriminator, if it is trained, and one of the generator on all that the recipe asks for.

        criticised: of _update_discriminator. real: cells that are made likelier given z and their labels.
        judged: cells to generate for the discriminator. controlled: cells to draw for the policy gradient.
        """
        args, values = self.args, {}
        loss = torch.zeros((), device=self.data.labels.device)
        if judged is not None:
            growth = Branch("growth", loss)  # does not wait for the discriminator's update
        if criticised is not None:
            values = self._update_discriminator(*criticised)
        if judged is not None:
            with growth.work(judged):
                fake = self._generate(*judged, args.straight_through)
            growth.join(fake)
            self.discriminator.requires_grad_(False)  # no gradients for weights that this step leaves alone
            scores = self.discriminator(fake, judged[1])
            self.discriminator.requires_grad_(True)
            g_loss = F.mse_loss(scores, torch.ones_like(scores))
            loss = loss + args.adversarial_weight * g_loss
            values["g_loss"] = g_loss
        if z is not None:
            size, labels, noise = len(z), real[1], forcing_noise(real[0])
            weight = torch.full_like(z[:, 0], args.likelihood_weight / size)
            if controlled is not None:  # one pass for both
                drawn_z, asked, drawn_noise = controlled
                z, labels = torch.cat([z, drawn_z]), torch.cat([labels, asked])
                noise = tuple(torch.cat(pair) for pair in zip(noise, drawn_noise, strict=True))
            cells, likelihood = self.generator.draw(z, labels, noise)
            values["nll"] = -likelihood[:size].mean()
            if controlled is not None:  # policy gradient: what obeys better than the rest becomes likelier
                with torch.no_grad():
                    drawn = tuple(batch[size:].straight_through() for batch in cells)
                    if self.reference is not None:
                        retracing = Branch("retracing", asked)
                        with retracing.work(drawn_z, asked, drawn):
                            before = self.reference.likelihood(drawn_z, asked, drawn)
                    reward = obedience(drawn, asked, self.data.boundaries, self.predictor)
                    values["reward"] = reward.mean()
                    if self.reference is not None:
                        retracing.join(before)
                        divergence = likelihood[size:] - before
                        values["divergence"] = divergence.mean()  # estimates the KL
                        reward = reward - args.kl_weight * divergence
                    advantage = reward - reward.mean()
                weight = torch.cat([weight, args.control_weight / len(reward) * advantage])
            loss = loss - (weight * likelihood).sum()
        update(self.optimizers["generator"], loss, args.clip_value)
        return {name: value.detach() for name, value in values.items()}


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip_value: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clip_value:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_value)
    optimizer.step()


def evaluate(generator, predictor, data: TrainingData, n: int, seed: int, known) -> tuple[dict, list[dict]]:
    """Metrics of n genotypes spread over all label combinations, and the valid ones with their labels.

    Among them, for each objective, how often the class obtained is the class asked for: by exact counts, but for
    accuracy by the predictor. An invalid genotype has no class.
    """
    combinations = list(np.ndindex(*data.num_classes))
    drawn, asked = [], []
    for i, labels in enumerate(combinations):
        drawn += generator.sample(labels, -(-n // len(combinations)), derive_seed(seed, i))
        asked += [labels] * (len(drawn) - len(asked))
    valid = [(genotype, labels) for genotype, labels in zip(drawn, asked, strict=True) if genotype is not None]
    values = generation_metrics(drawn, known)
    if valid:
        values |= cell_statistics(genotype for genotype, _ in valid)
    shares = (obtained_classes(drawn, data.objectives, predictor) == np.array(asked)).mean(0)
    values |= {f"obeys_{o['name']}": share.item() for o, share in zip(data.objectives, shares, strict=True)}
    return values, [{**genotype.to_dict(), "labels": list(map(int, labels))} for genotype, labels in valid]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    size, rate, share = number(int, 1, 10**6), number(float, 0, above=True), number(float, 0, 0.99)
    add("--nasbench_data", default="data/nasdata.jsonl", help="NAS dataset: JSON lines, or a file of the reference")
    add("--n_epochs", type=size, default=200)
    add("--batch_size", type=number(int, 2), default=64)
    add("--lr", type=rate, default=2e-4, help="of Adam, for both networks")
    add("--b1", type=share, default=0.5, help="Adam's decay of the mean gradient")
    add("--b2", type=number(float, 0, 0.99999), default=0.999, help="Adam's decay of the squared gradient")
    add("--latent_dim", type=size, default=100)
    add("--g_emb_size", type=size, default=250, help="vertex state of the generator")
    add("--g_hidden_size", type=size, default=56, help="graph state of the generator")
    add("--g_num_layers", type=size, default=3, help="message-passing layers")
    add("--g_dropout", type=share, default=0.5)
    add("--g_aggr", default="gsum", choices=["gsum", "mean"], help="vertex states to graph state, in both networks")
    add("--max_step", type=number(int, NAG_SPACE.min_vertices, NAG_SPACE.max_vertices), default=10, help="vertices")
    add("--d_emb_size", type=size, default=250, help="vertex state of the discriminator")
    add("--d_hidden_size", type=size, default=56, help="graph state of the discriminator")
    add("--d_gnn_num_layers", type=size, default=3, help="graph convolutions")
    add("--d_mlp_num_layers", type=size, default=4)
    add("--d_gnn_dropout", type=share, default=0.5)
    add("--d_mlp_dropout", type=share, default=0.5)
    add("--n_critic", type=size, default=1, help="discriminator steps for each generator step")
    add("--objectives", type=objectives_list, default=("accuracy",), help=f"some of {','.join(OBJECTIVES)}")
    for name, (classes, embedding) in OBJECTIVES.items():
        add(f"--{classes}", type=number(int, 2), default=3, help=f"{name} classes")
        add(f"--{embedding}", type=size, default=10, help="of the label's embedding")
    # Not in the paper, see the top of this file.
    switch, weight = argparse.BooleanOptionalAction, number(float, 0, 1e6)
    add("--recipe", choices=["paper", "robust"], default="robust", help="sets the defaults of many flags")
    add("--adversarial_weight", type=weight, default=1.0, help="of the discriminator's verdict")
    add("--likelihood_weight", type=weight, default=0.0, help="of the negative log-likelihood of taught cells")
    add("--control_weight", type=weight, default=0.0, help="of the policy gradient towards the labels asked for")
    add("--draws", type=number(int, 0, 10**6), default=0, help="cells a step for the policy gradient (0: --batch_size)")
    add("--pool", type=number(int, 0, 10**7), default=0, help="random genotypes to choose taught ones from (0: none)")
    add("--tilt", type=number(float, 0, 1000), default=0.0, help="teach genotypes by exp(tilt x obedience)")
    add("--kl_weight", type=weight, default=0.0, help="of the divergence, in nats, in the policy gradient's reward")
    add("--warmup_epochs", type=number(int, 0), default=0, help="first epochs, of likelihood alone")
    add(
        "--temperature",
        type=number(float, 0, 1000),
        default=0.0,
        help="0: the likelier decision; 1: drawn with its probability",
    )
    add("--straight_through", action=switch, default=False, help="show the judges hard decisions, not probabilities")
    add("--chain_cells", action=switch, default=False, help="grow the reduction cell in view of the normal cell")
    add("--edges_in_turn", action=switch, default=False, help="decide every edge in view of those decided before it")
    add("--lr_schedule", choices=["constant", "cosine"], default="constant", help="cosine: to 0 at --n_epochs")
    add("--clip_value", type=number(float, 0), default=0.01, help="largest norm of a gradient; 0: not clipped")
    add("--eval_every", type=size, default=5, help="epochs between evaluations of generated cells")
    add("--eval_size", type=size, default=300, help="genotypes drawn in an evaluation")
    add("--compile", action="store_true", help="torch.compile message passing and discriminator; needs a C++ compiler")
    add("--resume", help="run folder or checkpoint to go on with")
    add_cuda_graphs_flag(parser)
    add_common_flags(parser)


def objectives_list(text: str) -> tuple[str, ...]:
    """An argparse type: "accuracy,params" -> ("accuracy", "params")."""
    names = tuple(text.split(","))
    if not set(names) <= set(OBJECTIVES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(OBJECTIVES)}, each once, got {text!r}")
    return names


def parse_args(argv: list[str] | None = None, description: str = __doc__, **defaults) -> argparse.Namespace:
    """defaults: of flags where another script wants others (gan_multiobj.py)."""
    parser = ArgumentParser(description)
    add_flags(parser)
    parser.set_defaults(**defaults)
    chosen = parser.parse_args(argv)
    if chosen.recipe == "robust":
        parser.set_defaults(**ROBUST)
    may_change = ("nasbench_data", "n_epochs", "eval_every", "eval_size", "compile", "cuda_graphs")
    keys = ("reference", "discriminator", "optimizers", *FOR_SAMPLING)
    args = parse_resumable(parser, argv, "gan", may_change, keys, before={"draws": 0, "pool": 0, "tilt": 0.0})
    if not args.likelihood_weight and (args.warmup_epochs or not args.adversarial_weight + args.control_weight):
        parser.error("argument --likelihood_weight: expected above 0 with --warmup_epochs, or if nothing else trains")
    if args.draws == 1 and args.control_weight and not args.resume:
        parser.error("argument --draws: expected 0 or from 2, since they are compared with each other, got 1")
    if 0 < args.pool < 1000:
        parser.error(f"argument --pool: expected 0 or from 1000, got {args.pool}")
    if args.pool and not args.likelihood_weight:
        parser.error("argument --pool: expected 0 without --likelihood_weight, by which it is taught")
    if args.kl_weight and args.control_weight and not args.warmup_epochs:
        parser.error("argument --kl_weight: expected 0 without --warmup_epochs, which teach the reference")
    if args.n_epochs <= args.warmup_epochs and args.adversarial_weight + args.control_weight and not args.resume:
        parser.error(
            f"argument --n_epochs: expected more than the {args.warmup_epochs} --warmup_epochs of likelihood alone"
        )
    given = explicit_flags(parser, argv)
    for name, *wanted in (("tilt", "pool"), ("kl_weight", "control_weight"), ("draws", "pool", "control_weight")):
        if name in given and getattr(args, name) and not any(getattr(args, other) for other in wanted):
            parser.error(f"argument --{name}: expected 0 without {' or '.join(f'--{other}' for other in wanted)}")
    if args.n_critic > 1 and not args.adversarial_weight:
        parser.error("argument --n_critic: expected 1 without --adversarial_weight, where no discriminator is trained")
    return args


def read_training_data(args: argparse.Namespace, objectives: dict[str, int]) -> list[Record]:
    """The NAS dataset. Ends the script when it cannot be trained on."""
    with user_input("--nasbench_data"):
        records = read_records(args.nasbench_data)
        needed = max(args.batch_size, 4, *objectives.values())  # 4: two to train the predictor, two to measure it
        if len(records) < needed:
            raise ValueError(f"{args.nasbench_data} holds {len(records)} records, at least {needed} are needed")
        largest = max(cell.num_vertices for record in records for cell in record.genotype.cells)
        if largest > args.max_step:
            raise ValueError(f"{args.nasbench_data} has cells of {largest} vertices, --max_step is {args.max_step}")
    return records


def build_networks(args: argparse.Namespace, num_classes: tuple[int, ...]) -> tuple[Generator, Discriminator]:
    label_sizes = tuple(getattr(args, OBJECTIVES[name][1]) for name in args.objectives)
    labels = {"num_classes": num_classes, "label_sizes": label_sizes}
    generator = Generator(
        args.latent_dim,
        args.g_emb_size,
        args.g_hidden_size,
        args.g_num_layers,
        args.g_dropout,
        args.g_aggr,
        max_vertices=args.max_step,
        chain_cells=args.chain_cells,
        edges_in_turn=args.edges_in_turn,
        temperature=args.temperature,
        **labels,
    )
    discriminator = Discriminator(
        args.d_emb_size,
        args.d_hidden_size,
        args.d_gnn_num_layers,
        args.d_mlp_num_layers,
        args.d_gnn_dropout,
        args.d_mlp_dropout,
        args.g_aggr,
        **labels,
    )
    return generator, discriminator


def compile_parts(*networks: torch.nn.Module) -> None:
    """Compile what most of the time goes to: once for all message-passing layers and sizes of cells, and once for the
    discriminator (and again where there are no gradients). The growth loop as a whole would be unrolled into a graph of
    thousands of operations.
    """
    for network in networks:
        for module in network.modules():
            if isinstance(module, (MessagePassing, Discriminator)):
                module.compile(dynamic=True)  # vertices are added one by one


def build_optimizer(network: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    device = parameters[0].device
    lr, betas = on_device(args.lr, device), (args.b1, args.b2)
    return torch.optim.Adam(parameters, lr, betas, fused=True, capturable=device.type == "cuda")


def main(args: argparse.Namespace) -> None:
    objectives = {name: getattr(args, OBJECTIVES[name][0]) for name in args.objectives}
    device = prepare(args)
    records = read_training_data(args, objectives)
    with user_input("--nasbench_data"):
        data = TrainingData(records, objectives, args.max_step, device)
    if args.n_critic > (steps := args.n_epochs * (len(data) // args.batch_size)):
        fail(f"--n_critic: expected at most the {steps} steps of the run, after which the generator has its first")
    known = {record.genotype.canonical() for record in records}
    real = cell_statistics(record.genotype for record in records)

    generator, discriminator = (network.to(device) for network in build_networks(args, data.num_classes))
    optimizers = {
        name: build_optimizer(network, args)
        for name, network in (("generator", generator), ("discriminator", discriminator))
    }
    has_reference = args.kl_weight > 0 and args.control_weight > 0
    reference = copy.deepcopy(generator).requires_grad_(False).eval() if has_reference else None
    start_epoch = 0
    if args.resume:
        with user_input("--resume"):
            state = load_checkpoint(args.resume, "gan")
            if state["objectives"] != data.objectives:
                raise ValueError(f"{args.nasbench_data} is not the NAS dataset that the run was started with")
            if args.n_epochs < state["epoch"]:
                raise ValueError(f"the run has done {state['epoch']} epochs already, more than --n_epochs")
            with of_this_version(args.resume):
                generator.load_state_dict(state["generator"])
                discriminator.load_state_dict(state["discriminator"])
                if reference is not None:
                    reference.load_state_dict(state["reference"])
            predictor = Predictor.from_checkpoint(args.resume, device)
        for name, optimizer in optimizers.items():
            load_optimizer(optimizer, state["optimizers"][name])
        start_epoch, predictor_tau = state["epoch"], state["predictor_tau"]

    folder = output_folder(args)
    log = RunLog(folder, args, device, start_epoch if args.resume else None)
    if not args.resume:
        predictor, predictor_tau = train_predictor(data, args.batch_size, args.seed)
    if args.compile:
        compile_parts(*filter(None, (generator, discriminator, reference)))
    trainer = Trainer(generator, reference, discriminator, predictor, optimizers, data, args)
    print(f"{len(records)} genotypes, {len(data) // args.batch_size} steps an epoch, on {device}: {folder}")
    print(f"real cells: {real['vertices']:.2f} vertices, density {real['density']:.2f}")
    measured = zip(objectives, predictor_tau, predictor.error.tolist(), strict=True)
    words = ", ".join(f"{name} {value:.3f} (error {error:.3f})" for name, value, error in measured)
    print(f"predictor, Kendall tau and error of the quantile on held-out records: {words}")
    for epoch in range(start_epoch + 1, args.n_epochs + 1):
        started = time.monotonic()
        if reference is not None and epoch - 1 == args.warmup_epochs:
            reference.load_state_dict(generator.state_dict())
        values = trainer.train_epoch(epoch - 1)
        seconds = time.monotonic() - started
        for name, value in values.items():
            if not math.isfinite(value):
                fail(f"epoch {epoch}: {name} is {value}, training diverged; try a lower --lr or lower weights")
        line = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"epoch {epoch}/{args.n_epochs}: {line} ({seconds:.0f} s)")
        if epoch % args.eval_every == 0 or epoch == args.n_epochs:
            quality, samples = evaluate(generator, predictor, data, args.eval_size, args.seed, known)
            write_json(folder / "samples" / f"epoch-{epoch:04d}.json", samples)
            values |= quality
            print("  generated: " + ", ".join(f"{name} {value:.2f}" for name, value in quality.items()))
        state = {
            "generator": generator.state_dict(),
            "generator_config": generator.config,
            "reference": None if reference is None else reference.state_dict(),
            "discriminator": discriminator.state_dict(),
            "predictor": predictor.state_dict(),
            "predictor_config": predictor.config,
            "predictor_tau": predictor_tau,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "epoch": epoch,
            "objectives": data.objectives,
            "args": vars(args),
        }
        log.log(epoch, **values, seconds=seconds)  # first: RunLog drops lines of epochs that are done again
        save_checkpoint(folder / "checkpoint.pt", "gan", state)
    log.close()
    for_sampling = {name: state[name] for name in FOR_SAMPLING} | {"args": {"nasbench_data": args.nasbench_data}}
    for name in ("generator", "predictor"):  # for machines without CUDA, whatever they are read with
        for_sampling[name] = {key: tensor.cpu() for key, tensor in state[name].items()}
    save_checkpoint(folder / "generator.pt", "gan", for_sampling)
    script = "generate_archs.py" if len(objectives) == 1 else "generate_archs_multiobj.py"
    print(f"wrote {folder / 'checkpoint.pt'} and {folder / 'generator.pt'}, all that is needed to draw cells")
    print(f"next: python {script} --checkpoint {shown(folder / 'generator.pt')}")


if __name__ == "__main__":
    main(parse_args())
