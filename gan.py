"""Train the generator against the discriminator on a NAS dataset, conditioned on accuracy classes.

    python gan.py                                          # data/nasdata.jsonl, as published
    python gan.py --n_epochs 20 --device cpu
    python gan.py --nasbench_data runs/build_nas_dataset-.../nasdata.jsonl
    python gan.py --resume runs/gan-...                    # go on after a stop; --n_epochs may be raised

Writes checkpoint.pt (what generate_archs.py reads), metrics.jsonl, TensorBoard events, config.json and
samples/*.json, cells drawn along the way. NAG paper, section 3.2; losses and defaults of its section 4.1.
"""

import argparse
import time

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from build_nas_dataset.records import Record, class_boundaries, class_of, read_records
from genotypes import NAG_SPACE, Genotype
from metrics import cell_statistics, generation_metrics
from models.discriminator import Discriminator
from models.generator import Generator
from models.graph import CellBatch
from utils import (
    RunLog,
    add_common_flags,
    derive_seed,
    load_checkpoint,
    number,
    output_folder,
    parse_resumable,
    prepare,
    progress_bar,
    save_checkpoint,
    set_seed,
    user_input,
    write_json,
)


class TrainingData:
    """The NAS dataset as tensors on the device: one CellBatch per cell of the space, and the labels.

    objectives: what later stages need of each objective, plain data that travels with the checkpoint.
    """

    def __init__(self, records: list[Record], objectives: dict[str, int], max_vertices: int, device: torch.device):
        genotypes = [record.genotype for record in records]
        self.cells = tuple(
            CellBatch.encode([genotype[name] for genotype in genotypes], max_vertices).to(device)
            for name in NAG_SPACE.cells
        )
        self.objectives, columns = [], []
        for name, num_classes in objectives.items():
            values = [getattr(record, name) for record in records]
            boundaries = class_boundaries(values, num_classes)
            columns.append([class_of(value, boundaries) for value in values])
            self.objectives.append(
                {"name": name, "boundaries": boundaries, "minimum": min(values), "maximum": max(values)}
            )
        self.labels = torch.tensor(columns, device=device).T.contiguous()  # (N, K)
        self.num_classes = tuple(objectives.values())

    def __len__(self) -> int:
        return len(self.labels)

    def random_labels(self, n: int, generator: torch.Generator) -> Tensor:
        """Labels to ask the generator for, uniform over the classes: (n, K)."""
        device = self.labels.device
        columns = [torch.randint(c, (n,), generator=generator, device=device) for c in self.num_classes]
        return torch.stack(columns, dim=1)


def discriminator_loss(discriminator, real, real_labels, fake, fake_labels) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares, 1 for real and 0 for generated, mean of both. Returns loss, mean scores of real and generated."""
    real_scores, fake_scores = discriminator(real, real_labels), discriminator(fake, fake_labels)
    loss = (real_scores.sub(1).square().mean() + fake_scores.square().mean()) / 2
    return loss, real_scores.mean(), fake_scores.mean()


def train_epoch(generator, discriminator, optimizers, data: TrainingData, args, epoch: int) -> dict[str, float]:
    """One pass over the NAS dataset. Returns the means of losses and scores."""
    device = data.labels.device
    set_seed(derive_seed(args.seed, epoch))  # dropout
    noise = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    steps = len(data) // args.batch_size  # an incomplete last batch is dropped
    order = torch.randperm(len(data), generator=noise, device=device)[: steps * args.batch_size]
    totals = torch.zeros(4, device=device)
    generator.train()
    discriminator.train()

    def draw() -> tuple[Tensor, Tensor]:
        z = torch.randn(args.batch_size, args.latent_dim, generator=noise, device=device)
        return z, data.random_labels(args.batch_size, noise)

    def generate(z: Tensor, labels: Tensor) -> tuple[CellBatch, ...]:
        cells = generator(z, labels)
        return tuple(batch.straight_through() for batch in cells) if args.straight_through else cells

    for step, index in enumerate(progress_bar(order.split(args.batch_size), desc=f"epoch {epoch + 1}")):
        z, labels = draw()
        with torch.no_grad():
            fake = generate(z, labels)
        real = tuple(cells[index] for cells in data.cells)
        d_loss, real_score, fake_score = discriminator_loss(discriminator, real, data.labels[index], fake, labels)
        update(optimizers["discriminator"], d_loss, args.clip_value)

        if (epoch * steps + step + 1) % args.n_critic == 0:
            z, labels = draw()
            discriminator.requires_grad_(False)  # no gradients for weights that this step leaves alone
            g_loss = F.mse_loss(discriminator(generate(z, labels), labels), torch.ones(len(z), 1, device=device))
            update(optimizers["generator"], g_loss, args.clip_value)
            discriminator.requires_grad_(True)
        totals += torch.stack([d_loss, g_loss, real_score, fake_score]).detach()
    means = (totals / steps).tolist()
    return dict(zip(("d_loss", "g_loss", "real_score", "fake_score"), means, strict=True))


def update(optimizer: torch.optim.Optimizer, loss: Tensor, clip_value: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    if clip_value:
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip_value)
    optimizer.step()


def evaluate(generator: Generator, n: int, seed: int, known: set[Genotype]) -> tuple[dict, list[dict]]:
    """Metrics of n genotypes spread over all label combinations, and the valid ones with their labels."""
    combinations = list(np.ndindex(*generator.config["num_classes"]))
    drawn, valid = [], []
    for i, labels in enumerate(combinations):
        genotypes = generator.sample(labels, -(-n // len(combinations)), derive_seed(seed, i))
        drawn += genotypes
        valid += [(genotype, labels) for genotype in genotypes if genotype is not None]
    values = generation_metrics(drawn, known) | cell_statistics(genotype for genotype, _ in valid)
    return values, [{**genotype.to_dict(), "labels": list(map(int, labels))} for genotype, labels in valid]


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    size, rate, share = number(int, 1), number(float, 0, above=True), number(float, 0, 0.99)
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
    add("--n_perf_classes", type=number(int, 2), default=3, help="accuracy classes")
    add("--cls_perf_embedding_size", type=size, default=10)
    # Not in the paper, where the discriminator can tell real from generated cells by their being 0/1.
    add("--straight_through", action="store_true", help="show the discriminator the hard decisions, not probabilities")
    add("--clip_value", type=number(float, 0), default=0.01, help="largest norm of a gradient; 0: not clipped")
    add("--eval_every", type=size, default=5, help="epochs between evaluations of generated cells")
    add("--eval_size", type=size, default=300, help="genotypes drawn in an evaluation")
    add("--resume", help="run folder or checkpoint to go on with")
    add_common_flags(parser)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    return parse_resumable(parser, argv, "gan", may_change=("nasbench_data", "n_epochs", "eval_every", "eval_size"))


def read_training_data(args: argparse.Namespace, objectives: dict[str, int]) -> list[Record]:
    """The NAS dataset. Ends the script when it cannot be trained on."""
    with user_input("--nasbench_data"):
        records = read_records(args.nasbench_data)
        needed = max(args.batch_size, *objectives.values())
        if len(records) < needed:
            raise ValueError(f"{args.nasbench_data} holds {len(records)} records, at least {needed} are needed")
        largest = max(cell.num_vertices for record in records for cell in record.genotype.cells)
        if largest > args.max_step:
            raise ValueError(f"{args.nasbench_data} has cells of {largest} vertices, --max_step is {args.max_step}")
    return records


def build_networks(args: argparse.Namespace, num_classes: tuple[int, ...], label_sizes: tuple[int, ...]):
    labels = {"num_classes": num_classes, "label_sizes": label_sizes}
    generator = Generator(
        args.latent_dim,
        args.g_emb_size,
        args.g_hidden_size,
        args.g_num_layers,
        args.g_dropout,
        args.g_aggr,
        max_vertices=args.max_step,
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


def main(args: argparse.Namespace) -> None:
    objectives = {"accuracy": args.n_perf_classes}
    device = prepare(args)
    records = read_training_data(args, objectives)
    data = TrainingData(records, objectives, args.max_step, device)
    known = {record.genotype.canonical() for record in records}
    real = cell_statistics(record.genotype for record in records)

    networks = build_networks(args, data.num_classes, (args.cls_perf_embedding_size,))
    generator, discriminator = (network.to(device) for network in networks)
    optimizers = {
        name: torch.optim.Adam(network.parameters(), args.lr, (args.b1, args.b2), fused=device.type == "cuda")
        for name, network in (("generator", generator), ("discriminator", discriminator))
    }
    start_epoch = 0
    if args.resume:
        state = load_checkpoint(args.resume, "gan")
        generator.load_state_dict(state["generator"])
        discriminator.load_state_dict(state["discriminator"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        start_epoch = state["epoch"]

    folder = output_folder(args)
    log = RunLog(folder, args, device, start_epoch if args.resume else None)
    print(f"{len(records)} genotypes, {len(data) // args.batch_size} steps an epoch, on {device}: {folder}")
    print(f"real cells: {real['vertices']:.2f} vertices, density {real['density']:.2f}")
    for epoch in range(start_epoch + 1, args.n_epochs + 1):
        started = time.monotonic()
        values = train_epoch(generator, discriminator, optimizers, data, args, epoch - 1)
        seconds = time.monotonic() - started
        line = " ".join(f"{name} {value:.3f}" for name, value in values.items())
        print(f"epoch {epoch}/{args.n_epochs}: {line} ({seconds:.0f} s)", flush=True)
        if epoch % args.eval_every == 0 or epoch == args.n_epochs:
            quality, samples = evaluate(generator, args.eval_size, args.seed, known)
            write_json(folder / "samples" / f"epoch-{epoch:04d}.json", samples)
            values |= quality
            print("  generated: " + ", ".join(f"{name} {value:.2f}" for name, value in quality.items()), flush=True)
        state = {
            "generator": generator.state_dict(),
            "generator_config": generator.config,
            "discriminator": discriminator.state_dict(),
            "discriminator_config": discriminator.config,
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "epoch": epoch,
            "objectives": data.objectives,
            "args": vars(args),
        }
        save_checkpoint(folder / "checkpoint.pt", "gan", state)
        log.log(epoch, **values, seconds=seconds)
    log.close()
    print(f"wrote {folder / 'checkpoint.pt'}\nnext: python generate_archs.py --checkpoint {folder / 'checkpoint.pt'}")


if __name__ == "__main__":
    main(parse_args())
