"""One D + G step of gan.py, by its own train_epoch.

    python benchmarks/gan.py
    python benchmarks/gan.py --device cuda --rounds 20

The cells of an untrained generator have no sizes to speak of. To measure growth at the real cells' sizes, the noise
that is added to every decision's logits is chosen such that growth is forced to cells of the NAS dataset (`force`): the
code that runs is that of training, decision by decision, and only the cost of drawing the noise is not in it.
"""

if not __package__:
    from as_module import restart

    restart()

import argparse
import copy
import statistics
from collections.abc import Callable

import torch

import gan
from benchmarks.common import (
    Comparison,
    Report,
    Run,
    begin,
    growth,
    interleave,
    parse_args,
    print_memory,
    steps_of,
)
from benchmarks.plain_gan import plain_discriminator, plain_generator
from build_nas_dataset.records import Record, read_records
from generation.adversarial import discriminator_loss, generator_loss, update
from generation.recipes import ROBUST
from generation.training import Trainer, TrainingData
from genotypes import NAG_SPACE, Genotype
from models.generator import Generator, forcing_noise
from models.graph import CellBatch, LabelledCells
from models.predictor import Predictor
from utils import shipped

FORCE = 6.0  # logits; those of an untrained generator are below 1, and no sigmoid of these is exactly 0 or 1


def force(generator: Generator, cells: tuple[CellBatch, ...]) -> None:
    """Make `generator.draw_noise` return noise that forces growth to `cells`, again and again where more are asked."""

    def draw_noise(n: int, source: torch.Generator, temperature: float | None = None):
        z = torch.randn(n, generator.config.latent_dim, generator=source, device=source.device)
        rows = torch.arange(n, device=source.device) % len(cells[0])
        return z, forcing_noise(tuple(batch[rows] for batch in cells), FORCE)

    generator.draw_noise = draw_noise


def full_cells(records: list[Record], n: int) -> list[Genotype]:
    """n genotypes of real cells that have all ten vertices."""
    columns = []
    for name in NAG_SPACE.cells:
        cells = (record.genotype[name] for record in records)
        columns.append(repeated([cell for cell in cells if cell.num_vertices == NAG_SPACE.max_vertices], n))
    return [Genotype(*pair) for pair in zip(*columns, strict=True)]


def repeated(items: list, n: int) -> list:
    return [items[i % len(items)] for i in range(n)]


class Step:
    """Everything that one step takes, or a few.

    recipe: of gan.py. genotypes: that growth is forced to, one a sample.
    """

    def __init__(
        self, recipe: str, genotypes: list[Genotype], records: list[Record], args, device: torch.device, steps: int = 1
    ):
        flags = ["--recipe", recipe, "--batch_size", str(len(genotypes))]
        if recipe == "robust":
            flags += ["--pool_size", "0"]  # drawn once an epoch, not once a step: pool_share
        if args.quick:
            flags += "--g_emb_size 16 --d_emb_size 16 --g_hidden_size 8 --d_hidden_size 8".split()
        self.args = gan.parse_args(flags)
        torch.manual_seed(0)
        self.data = TrainingData(repeated(records, steps * len(genotypes)), {"accuracy": 3}, 10, device)
        self.networks = gan.build_networks(self.args, device)
        self.networks.predictor = Predictor(1).to(device).requires_grad_(False)
        self.networks.predictor.error.fill_(0.2)
        columns = [[genotype[name] for genotype in genotypes] for name in NAG_SPACE.cells]
        self.cells = tuple(CellBatch.encode(column, 10, device=device) for column in columns)
        self.run = self.runs_with(lambda network: network)

    def runs_with(self, change: Callable[[torch.nn.Module], torch.nn.Module]) -> Run:
        """The step by changed networks: generator, discriminator and reference each go through `change`."""
        networks = copy.copy(self.networks)
        for name in ("generator", "discriminator", "reference"):
            if (network := getattr(self.networks, name)) is not None:
                setattr(networks, name, change(network))
        force(networks.generator, self.cells)
        trained = {name: getattr(networks, name) for name in self.networks.optimizers}
        networks.optimizers = {name: gan.build_optimizer(network, self.args) for name, network in trained.items()}
        trainer = Trainer(networks, self.data, self.args)
        return lambda: trainer.train_epoch(self.args.warmup_epochs)

    def run_discriminator(self) -> None:
        """The discriminator's part of a step of the paper's recipe: its own update, and its scores in the other."""
        discriminator, labels = self.networks.discriminator, self.data.labels[: len(self.cells[0])]
        fake = tuple(CellBatch(c.adj.clone(), c.ops.clone(), c.num_nodes) for c in self.cells)
        loss, _ = discriminator_loss(discriminator, LabelledCells(self.cells, labels), LabelledCells(fake, labels))
        update(self.networks.optimizers["discriminator"], loss, self.args.clip_value)
        for batch in fake:
            batch.adj.requires_grad_()
            batch.ops.requires_grad_()
        generator_loss(discriminator, LabelledCells(fake, labels)).backward()


class Autocast(torch.nn.Module):
    """A network whose calls run in bf16, and return float32."""

    def __init__(self, network: torch.nn.Module, device: torch.device):
        super().__init__()
        self.network, self.kind, self.config = network, device.type, network.config

    def forward(self, *args):
        with torch.autocast(self.kind, torch.bfloat16):
            return as_float32(self.network(*args))

    def draw(self, *args):
        with torch.autocast(self.kind, torch.bfloat16):
            return as_float32(self.network.draw(*args))

    def log_likelihood(self, *args):
        with torch.autocast(self.kind, torch.bfloat16):
            return as_float32(self.network.log_likelihood(*args))

    def draw_noise(self, *args, **kwargs):
        return self.network.draw_noise(*args, **kwargs)


def plain_network(network: torch.nn.Module) -> torch.nn.Module:
    return plain_generator(network) if isinstance(network, Generator) else plain_discriminator(network)


def as_float32(output):
    if isinstance(output, tuple):
        return tuple(map(as_float32, output))
    if isinstance(output, CellBatch):
        return CellBatch(output.adj.float(), output.ops.float(), output.num_nodes)
    return output.float()


def comparison(work: str, recipe: str, genotypes, goals: dict[str, str], records, args, device) -> Comparison:
    steps = steps_of(device)

    def plain() -> Run:
        step = Step(recipe, genotypes, records, args, device)
        step.args.cuda_graphs = False
        return step.runs_with(plain_network)

    def float32(steps: int = steps) -> Run:
        return Step(recipe, genotypes, records, args, device, steps).run

    def tf32() -> Run:
        run = float32()

        def run_with_tf32() -> None:
            torch.backends.cuda.matmul.allow_tf32 = True
            run()
            torch.backends.cuda.matmul.allow_tf32 = False

        return run_with_tf32

    def bf16() -> Run:
        step = Step(recipe, genotypes, records, args, device, steps)
        return step.runs_with(lambda network: Autocast(network, device))

    fast = {"float32": float32, **({"float32, TF32": tf32} if device.type == "cuda" else {}), "bf16": bf16}
    return Comparison(work, plain, fast, goals, (1, "steps"), steps, lambda: float32(steps=1))


def comparisons(records: list[Record], args: argparse.Namespace, device: torch.device) -> list[Comparison]:
    size = 4 if args.quick else 64
    real = [record.genotype for record in records[:size]]
    full = full_cells(records, size)
    works = {
        "paper recipe, real cells' sizes": ("paper", real, {"float32": "110 GFLOP-eq", "bf16": "60 GFLOP-eq"}),
        "paper recipe, all cells of 10 vertices": ("paper", full, {"float32": "190 GFLOP-eq, plain 290 +- 25 %"}),
        "robust recipe, real cells' sizes": ("robust", real, {}),
    }
    return [
        comparison(f"{work}, batch {size}", recipe, cells, goals, records, args, device)
        for work, (recipe, cells, goals) in works.items()
    ]


def discriminator_share(report: Report, records: list[Record]) -> None:
    """The discriminator's part of a step, the two timed in turn."""
    size = 4 if report.args.quick else 64
    step = Step("paper", [record.genotype for record in records[:size]], records, report.args, report.device)
    step.args.cuda_graphs = False  # the part is not recorded either
    step.run = step.runs_with(lambda network: network)
    times = interleave({"step": step.run, "part": step.run_discriminator}, report.args.rounds, report.device)
    share = statistics.median(times["part"]) / statistics.median(times["step"])
    report.figure("the discriminator's share of a step of the paper's recipe, float32", f"{share:.1%}", "under 10 %")


def pool_share(report: Report, records: list[Record]) -> None:
    """Drawing an epoch's pool and choosing from it, against the steps of an epoch of 4,000 records."""
    step = Step("robust", [record.genotype for record in records[:64]], records, report.args, report.device)
    args = argparse.Namespace(**vars(step.args))
    args.pool_size, args.inverse_temperature = ROBUST["pool_size"], ROBUST["inverse_temperature"]
    args.pool_size = 1000 if report.args.quick else args.pool_size
    trainer = Trainer(step.networks, step.data, args)
    steps, source = 4000 // 64, torch.Generator(report.device).manual_seed(0)
    runs = {"step": step.run, "pool": lambda: trainer.draw_pool(steps * 64, source)}
    times = interleave(runs, report.args.rounds, report.device)
    pool, own = (statistics.median(times[name]) for name in ("pool", "step"))
    report.figure(
        "a pool of the robust recipe, once an epoch", f"{pool:.2f} s, {pool / (steps * own):.1%} of its steps"
    )


def linearity(report: Report, records: list[Record]) -> None:
    """Time of a step against the batch, relative to the smallest."""
    small = 4 if report.args.quick else 32 if report.device.type == "cpu" else 64
    sizes = [small * factor for factor in (1, 2, 4)]
    runs = {
        str(n): Step(
            "paper",
            [r.genotype for r in repeated(records, n)],
            records,
            report.args,
            report.device,
            steps_of(report.device),
        ).run
        for n in sizes
    }
    report.figure(f"step of the paper's recipe at batch {sizes}, relative to batch x smallest", growth(runs, report))


def main(args: argparse.Namespace) -> None:
    device = begin(args)
    records = read_records(shipped("data/nasdata.jsonl"))
    works = comparisons(records, args, device)
    if args.memory_of:
        print_memory(works, args.memory_of)
        return
    report = Report("gan", args, device)
    for work in works:
        report.compare(work)
    discriminator_share(report, records)
    pool_share(report, records)
    linearity(report, records)
    report.finish()


if __name__ == "__main__":
    main(parse_args(__doc__))
