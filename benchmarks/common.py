"""What the benchmarks share: variants timed in turn, the rate of a matrix product beside them, FLOPs, memory, tables.

Every script compares a plain with one or more fast variants of the same work, in one process: plain, fast, matrix
product, plain, fast, matrix product, ... so that whatever else the machine does falls on all of them alike. Reported
are the median, and the ratio of the two variants in each round with its smallest and largest value. The floor is the
time that the FLOPs of the fast variant would take at the rate of a large matrix product of the same precision.
"""

import argparse
import ctypes
import math
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.fast.cuda_graphs import WARM_UP
from plumbing.files import write_json
from plumbing.flags import ArgumentParser, number
from plumbing.run_folder import code_version, device_name
from utils import keep_freed_memory, select_device, settle_amp, user_input

Run = Callable[[], object]
Build = Callable[[], Run]  # makes networks and data, and returns what is to be timed

CUDA_STEPS = 10  # in a run on CUDA, where a step is short and what an epoch begins and ends with is not
GROWTH_ROUNDS = 3  # at most, where only the growth of cost with size is shown
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "float64": torch.float64}


@dataclass
class Comparison:
    """One piece of work, in a plain and in fast variants.

    work: what is done, sizes included. fast: by precision, "bf16" or "bf16, and what else". goals: likewise.
    per: how many things (images, genotypes) one run handles, of what name; 0: none worth a rate.
    repeats: times that a run of a fast variant does the work; figures are of one.
    once: does it once, in float32 and without a recording that was made before: what FLOPs are counted of. Default: the
        first of the fast variants.
    """

    work: str
    plain: Build
    fast: dict[str, Build]
    goals: dict[str, str] = field(default_factory=dict)
    per: tuple[int, str] = (0, "")
    repeats: int = 1
    once: Build | None = None

    def variants(self) -> dict[str, Build]:
        return {"plain": self.plain, **self.fast}


def steps_of(device: torch.device) -> int:
    """In a run of a fast variant."""
    return CUDA_STEPS if device.type == "cuda" else 1


def parse_args(doc: str, argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(doc)
    add = parser.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--rounds", type=number(int, 1), default=5)
    add("--quick", action="store_true", help="tiny sizes: does it run? The figures mean nothing")
    add("--json", metavar="FILE", help="write the results there too (all.py reads them)")
    add("--memory_of", metavar="WORK|VARIANT", help="only run that variant once, and print the peak memory in MiB")
    return parser.parse_args(argv)


def begin(args: argparse.Namespace) -> torch.device:
    with user_input("--device"):
        device = select_device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    keep_freed_memory()
    return device


# --------------------------------------------------------------------------------------------------- measuring


def default_malloc() -> None:
    """Undo utils.keep_freed_memory, for the plain variants: glibc as it is after a while with large tensors.

    Its thresholds adapt to what is freed, up to these values; setting them ends the adaptation.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # malloc.h
        mallopt(M_MMAP_MAX, 65536)
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        mallopt(M_TOP_PAD, 128 * 2**10)
        ctypes.CDLL(None).malloc_trim(0)


def set_memory(variant: str) -> None:
    """The malloc settings that a variant runs with."""
    default_malloc() if variant == "plain" else keep_freed_memory()


def seconds(run: Run, device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every variant in each of the rounds, after a round that is not counted.

    On the CPU a variant runs twice in a row, and the second run counts: memory that the one before has left is of
    other sizes, or gone (the plain variant returns it to the kernel), and the page faults of getting it back are none
    in a series of its own.
    """
    if device.type == "cuda":  # until the steps are recorded
        for name, run in runs.items():
            for _ in range(WARM_UP if name != "plain" else 0):
                run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for count in range(rounds + 1):
        for name, run in runs.items():
            for _ in range(2 if device.type == "cpu" else 1):
                set_memory(name)
                value = seconds(run, device)
            if count:
                times[name].append(value)
    return times


def matmul_runs(args: argparse.Namespace, device: torch.device, precisions: set[str]) -> tuple[dict[str, Run], int]:
    """A square matrix product in each precision, and its FLOPs. bf16 only where the hardware multiplies it."""
    size = 64 if args.quick else 2048 if device.type == "cpu" else 8192

    def product(dtype: torch.dtype) -> Run:
        a, b, out = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(3))
        return lambda: torch.mm(a, b, out=out)

    return {f"matmul {p}": product(PRECISIONS[p]) for p in sorted(precisions)}, 2 * size**3


def precision_of(variant: str) -> str:
    return variant.partition(",")[0]


def has_bf16(device: torch.device) -> bool:
    return settle_amp("auto", device) == "bf16"


def count_flops(run: Run) -> int:
    """The floating-point operations of the matrix products and convolutions in one run."""
    with FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: backward_flops}
    ) as counter:
        run()
    return counter.get_total_flops()


def backward_flops(grad_shape, x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
    """The floating-point operations of a convolution's backward pass: as many as the forward pass has, a gradient.

    The gradients are those of its input and of its weight, as far as they are asked for.

    torch's own formula takes a depthwise convolution for a full one.
    """
    output_mask = args[7]  # after bias, stride, padding, dilation, transposed, output padding and groups
    return 2 * math.prod(grad_shape) * math.prod(w_shape[1:]) * sum(output_mask[:2])


def print_memory(comparisons: list[Comparison], which: str) -> None:
    """What --memory_of does."""
    work, _, variant = which.rpartition("|")
    comparison = next(c for c in comparisons if c.work == work)
    set_memory(variant)
    comparison.variants()[variant]()()
    print(own_peak_memory())


def own_peak_memory() -> float:
    """Largest resident size of this process so far, in MiB.

    From /proc where there is one: ru_maxrss of a process counts its parent's memory at the time of the fork as well.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def growth(runs: dict[str, Run], report: "Report") -> str:
    """Median time of each run over that of the first, over the ratio of the sizes that name them: 1 where linear."""
    times = interleave(runs, min(report.args.rounds, GROWTH_ROUNDS), report.device)
    medians = {int(size): statistics.median(values) for size, values in times.items()}
    size, first = next(iter(medians.items()))
    return ", ".join(f"{(value / first) / (n / size):.2f}" for n, value in medians.items())


# --------------------------------------------------------------------------------------------------- reporting


class Report:
    """Results of one script on one device: printed as they come, as a table at the end, and to --json."""

    def __init__(self, script: str, args: argparse.Namespace, device: torch.device):
        self.script, self.args, self.device = script, args, device
        self.rows: list[dict[str, str]] = []
        self.figures: list[dict[str, str]] = []
        self.seconds: dict[str, float] = {}  # "work|variant" -> median

    def compare(self, comparison: Comparison) -> None:
        """Measure a comparison: one row for each fast variant."""
        variants = comparison.variants()
        if not has_bf16(self.device):
            variants = {name: build for name, build in variants.items() if precision_of(name) != "bf16"}
        runs = {name: build() for name, build in variants.items()}
        flops = count_flops(comparison.once() if comparison.once else runs[next(iter(comparison.fast))])
        memory = {name: self._cuda_memory(run) for name, run in runs.items()} if self.device.type == "cuda" else {}
        precisions = {"float32", *map(precision_of, variants)} & set(PRECISIONS)
        products, product_flops = matmul_runs(self.args, self.device, precisions)
        times = interleave({**runs, **products}, self.args.rounds, self.device)
        if not memory:
            runs = dict.fromkeys(runs)  # the networks are let go: the processes below need room
            default_malloc()
            memory = {name: self._cpu_memory(comparison, name) for name in runs}
        for name in comparison.fast.keys() & runs.keys():
            times[name] = [value / comparison.repeats for value in times[name]]
        rates = {name: product_flops / statistics.median(times[f"matmul {name}"]) for name in precisions}
        self.seconds[f"{comparison.work}|plain"] = statistics.median(times["plain"])
        for name in runs:
            if name == "plain":
                continue
            plain, fast = statistics.median(times["plain"]), statistics.median(times[name])
            self.seconds[f"{comparison.work}|{name}"] = fast
            ratios = [a / b for a, b in zip(times["plain"], times[name], strict=True)]
            count, unit = comparison.per
            row = {
                "work": f"{comparison.work}, {name}",
                "goal": comparison.goals.get(name, ""),
                "plain, s": f"{plain:.3g}",
                "fast, s": f"{fast:.3g}" + (f" ({count / fast:.4g} {unit}/s)" if count else ""),
                "ratio": f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                "GFLOP": f"{flops / 1e9:.4g}",
                "GFLOP-eq, plain / fast": " / ".join(f"{t * rates['float32'] / 1e9:.3g}" for t in (plain, fast)),
                "share of floor": "" if "TF32" in name else f"{flops / (fast * rates[precision_of(name)]):.2f}",
                "peak GiB, plain / fast": f"{memory['plain']:.2f} / {memory[name]:.2f}",
                "matmul, GFLOP/s": f"{rates[precision_of(name)] / 1e9:.0f}",
            }
            self.rows.append(row)
            print("  ".join(f"{k}: {v}" for k, v in row.items() if v), flush=True)

    def _cuda_memory(self, run: Run) -> float:
        """What the first two runs take of the device, in GiB: tensors beside the weights, and what recordings keep."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        run(), run()
        return (torch.cuda.max_memory_reserved(self.device) - before) / 2**30

    def _cpu_memory(self, comparison: Comparison, variant: str) -> float:
        """Peak of a process for this alone (Python, torch included), in GiB."""
        if self.args.quick:
            return 0.0  # a process for each takes longer than all the rest
        flags = ["--device", "cpu", "--memory_of", f"{comparison.work}|{variant}"]
        command = [sys.executable, "-m", f"benchmarks.{self.script}", *flags]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return float(result.stdout.split()[-1]) / 1024

    def figure(self, what: str, value: str, goal: str = "") -> None:
        self.figures.append({"what": what, "goal": goal, "value": value})
        print(f"{what}: {value}" + (f"  (goal {goal})" if goal else ""), flush=True)

    def finish(self) -> None:
        print(f"\n{self.script}, {device_name(self.device)}, torch {torch.__version__}\n")
        for rows in filter(None, (self.rows, self.figures)):
            print(table(rows) + "\n")
        if self.args.json:
            result = {
                "script": self.script,
                "device": device_name(self.device),
                "kind": self.device.type,
                "torch": torch.__version__,
                "python": platform.python_version(),
                **code_version(),
                "date": time.strftime("%Y-%m-%d"),
                "rounds": self.args.rounds,
                "rows": self.rows,
                "figures": self.figures,
            }
            write_json(self.args.json, result)


def table(rows: list[dict[str, str]]) -> str:
    """Markdown, columns aligned."""
    names = list(rows[0])
    width = {name: max(len(name), *(len(row.get(name, "")) for row in rows)) for name in names}
    lines = ["| " + " | ".join(name.ljust(width[name]) for name in names) + " |"]
    lines.append("|" + "|".join("-" * (width[name] + 2) for name in names) + "|")
    lines += ["| " + " | ".join(row.get(name, "").ljust(width[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)
