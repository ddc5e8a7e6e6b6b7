"""Drawing genotypes: growth, decoding, pruning and canonical form.

    python benchmarks/generate.py
    python benchmarks/generate.py --device cuda

"float32" is Generator.sample as it is: grown in float32, close decisions again in float64. "float64" and "bf16" grow
in that precision alone. Growth at default sizes is forced to real cells (see benchmarks/gan.py), so that no decision is
close; the shipped generators draw cells of their own.
"""

if not __package__:
    from as_module import restart

    restart()

import argparse
import copy
import statistics
import time

import torch

from benchmarks.common import Build, Comparison, Report, Run, begin, has_bf16, parse_args, print_memory
from benchmarks.gan import Autocast, force, repeated
from benchmarks.plain_gan import plain_generator
from build_nas_dataset.records import Record, read_records
from genotypes import NAG_SPACE, CellSpec, Genotype
from models.fast.sampling import CLOSE, margin
from models.generator import Generator
from models.graph import CellBatch
from utils import shipped

SHIPPED = {"data/generator.pt": (2,), "data/generator_multiobj.pt": (2, 0)}


def finish(cells: tuple[CellBatch, ...]) -> list[Genotype | None]:
    """Decode, prune, bring to canonical form: everything but growth."""
    drawn = [Genotype(*specs).prune() for specs in zip(*(batch.decode() for batch in cells), strict=True)]
    return [None if genotype is None else genotype.canonical() for genotype in drawn]


def grow(network, generator: Generator, labels: tuple[int, ...], n: int, dtype: torch.dtype) -> tuple[CellBatch, ...]:
    """n genotypes' cells by `network`, with the draw that Generator.sample makes for seed 0."""
    device = next(generator.parameters()).device
    z, noise = generator.draw_noise(n, torch.Generator().manual_seed(0))
    noise = None if noise is None else tuple(part.to(device, dtype) for part in noise)
    with torch.no_grad():
        return network(z.to(device, dtype), torch.tensor([labels], device=device).expand(n, -1), noise)


def builds(make, labels: tuple[int, ...], n: int) -> tuple[Build, dict[str, Build]]:
    """The plain build, and the fast ones by precision. make() -> a generator in eval mode."""

    def plain() -> Run:
        generator = make()
        return lambda: finish(grow(plain_generator(generator), generator, labels, n, torch.float32))

    def float32() -> Run:
        generator = make()
        return lambda: [g and g.canonical() for g in generator.sample(labels, n, seed=0)]

    def float64() -> Run:
        generator = make()
        double = copy.deepcopy(generator).double()
        return lambda: finish(grow(double, generator, labels, n, torch.float64))

    def bf16() -> Run:
        generator = make()
        network = Autocast(generator, next(generator.parameters()).device)
        return lambda: finish(grow(network, generator, labels, n, torch.float32))

    return plain, {"float32": float32, "float64": float64, "bf16": bf16}


def untrained(genotypes: list[Genotype], n: int, quick: bool, device: torch.device) -> Generator:
    """A generator of default size that is forced to the genotypes."""
    torch.manual_seed(0)
    generator = (Generator(vertex_size=16, graph_size=8) if quick else Generator()).to(device).eval()
    columns = [[genotype[name] for genotype in repeated(genotypes, n)] for name in NAG_SPACE.cells]
    force(generator, tuple(CellBatch.encode(column, 10) for column in columns))
    return generator


def comparisons(records: list[Record], args: argparse.Namespace, device: torch.device) -> list[Comparison]:
    n = 8 if args.quick else 512 if device.type == "cpu" else 4096
    real = [record.genotype for record in records]
    goals = {"float32": "200 genotypes/s", "bf16": "350 genotypes/s"}
    works = [
        ("default sizes, real cells' sizes", lambda: untrained(real, n, args.quick, device), (2,), goals),
        ("shipped generator", lambda: Generator.from_checkpoint(shipped("data/generator.pt"), device), (2,), {}),
    ]
    found = [
        Comparison(f"{n} genotypes, {work}", *builds(make, labels, n), goals, (n, "genotypes"))
        for work, make, labels, goals in works
    ]
    for comparison in found[1:]:
        del comparison.fast["float64"]  # once is enough
    return found


def changed_decisions(report: Report) -> None:
    """Genotypes that come out otherwise than by decisions in float64."""
    n = 32 if report.args.quick else 1024
    generators = {
        path: (Generator.from_checkpoint(shipped(path), report.device), labels) for path, labels in SHIPPED.items()
    }
    torch.manual_seed(0)
    fresh = Generator(temperature=1.0, vertex_size=16 if report.args.quick else 250).to(report.device).eval()
    generators["untrained, default sizes, temperature 1"] = fresh, (2,)
    for name, (generator, labels) in generators.items():
        exact = decisions(grow(copy.deepcopy(generator).double(), generator, labels, n, torch.float64))
        networks = {"float32 without a second look": generator}
        if has_bf16(report.device):
            networks["bf16"] = Autocast(generator, report.device)
        for precision, network in networks.items():
            differs = decisions(grow(network, generator, labels, n, torch.float32)) != exact
            genotypes = differs.any(1).float().mean().item()
            share = f"{genotypes:.2%} of {n} genotypes, {differs.float().mean().item():.3%} of all decisions"
            report.figure(f"changed by {precision}, {name}", share)
        if generator is not fresh:
            margins = torch.stack([margin(batch) for batch in grow(generator, generator, labels, n, torch.float32)])
            close = (margins.amin(0) < CLOSE).float().mean().item()
            report.figure(f"grown again in float64, {name}", f"{close:.2%}")


def decisions(cells: tuple[CellBatch, ...]) -> torch.Tensor:
    """(B, all edges and tokens of all cells), those that a changed one brings about included."""
    parts = [part for c in cells for part in ((c.adj > 0.5).long().flatten(1), c.ops.argmax(-1))]
    return torch.cat(parts, dim=1)


def one_op_cells() -> dict[str, CellSpec]:
    """Cells of 7 interior vertices of one op: what colour refinement can tell least about."""
    inner = range(2, 9)
    edges = {
        "parallel": [(0, v) for v in inner] + [(v, 9) for v in inner],
        "a matching": [(0, v) for v in (2, 3, 4)] + [(2, 5), (3, 6), (4, 7)] + [(v, 8) for v in (5, 6, 7)] + [(8, 9)],
        "a hexagon": [(0, v) for v in (2, 3, 4)]
        + [(2, 5), (2, 6), (3, 6), (3, 7), (4, 7), (4, 5)]
        + [(v, 8) for v in (5, 6, 7)]
        + [(8, 9)],
    }
    cells = {}
    for name, pairs in edges.items():
        matrix = [[int((i, j) in pairs) for j in range(10)] for i in range(10)]
        cells[name] = CellSpec(matrix, [*NAG_SPACE.inputs, *["identity"] * 7, NAG_SPACE.output])
    return cells


def canonical_form(report: Report, records: list[Record]) -> None:
    """Its time for real genotypes and for cells of one op, and its share of drawing genotypes of real sizes."""
    genotypes = [record.genotype for record in records[: 20 if report.args.quick else 2000]]
    per_genotype = cpu_seconds(lambda: [g.canonical() for g in genotypes], report.args.rounds) / len(genotypes)
    work = next(key for key in report.seconds if key.endswith("real cells' sizes|float32"))
    drawing = report.seconds[work] / int(work.split()[0])
    share = f"{per_genotype * 1e3:.3f} ms, {per_genotype / drawing:.1%} of drawing a genotype"
    report.figure("canonical form of a real genotype", share, "under 20 %")
    for name, cell in one_op_cells().items():
        genotype = Genotype(cell, cell)
        own = cpu_seconds(lambda g=genotype: [g.canonical() for _ in range(20)], report.args.rounds) / 20
        share = f"{own * 1e3:.3f} ms, {own / drawing:.1%} of drawing a genotype"
        report.figure(f"canonical form of a genotype of 7 + 7 vertices of one op, {name}", share, "under 20 %")


def cpu_seconds(run: Run, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return statistics.median(times)


def main(args: argparse.Namespace) -> None:
    device = begin(args)
    records = read_records(shipped("data/nasdata.jsonl"))
    works = comparisons(records, args, device)
    if args.memory_of:
        print_memory(works, args.memory_of)
        return
    report = Report("generate", args, device)
    for work in works:
        report.compare(work)
    changed_decisions(report)
    canonical_form(report, records)
    report.finish()


if __name__ == "__main__":
    main(parse_args(__doc__))
