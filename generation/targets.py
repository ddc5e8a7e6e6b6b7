"""What cells are asked for: the classes that flags name, and hard limits on #params and MACs."""

import argparse
from itertools import product

from build_nas_dataset.objectives import ACCURACIES, Objective
from genotypes import NAG_SPACE, CellSpec, Genotype, SearchSpace
from models.cost import Cost, network_cost
from models.network import CifarConfig, ImageNetConfig
from models.ops import OPS, has_network
from utils import fail

# What --limits_for takes -> the network whose #params and MACs are counted, at its published size.
COUNTED_NETWORKS = {"cifar": CifarConfig, "imagenet": ImageNetConfig}
RECORDS_NETWORK = CifarConfig()  # whose counts the NAS dataset has
LABEL_FLAGS = {**dict.fromkeys(ACCURACIES, "perf_label"), "params": "params_label", "macs": "macs_label"}


def wanted_labels(args: argparse.Namespace, objectives: list[Objective]) -> list[tuple[int, ...]]:
    """The combinations of classes to draw cells for. Ends the script when the GAN was not trained on what is asked."""
    names = [objective.name for objective in objectives]
    needs = {flag: {name for name, own in LABEL_FLAGS.items() if own == flag} for flag in LABEL_FLAGS.values()}
    needs |= {"target_acc": {"accuracy"}, "target_quantile": set(ACCURACIES)}
    for flag, wanted in needs.items():
        if getattr(args, flag) is not None and not wanted & set(names):
            fail(f"--{flag}: the GAN was trained on {', '.join(names)} only")
    return list(product(*(wanted_classes(args, objective) for objective in objectives)))


def wanted_classes(args: argparse.Namespace, objective: Objective) -> list[int]:
    """The classes of one objective to draw cells for."""
    low, high, highest = objective.minimum, objective.maximum, objective.num_classes - 1
    flag = LABEL_FLAGS[objective.name]
    label = getattr(args, flag)
    if label is not None:
        if label > highest:
            fail(f"--{flag}: expected 0 (lowest {objective.name}) to {highest} (highest), got {label}")
        return [label]
    if objective.name == "accuracy" and args.target_acc is not None:
        if not low <= args.target_acc <= high:
            fail(
                f"--target_acc: expected {low:.4f} to {high:.4f}, the accuracies of the NAS dataset that the GAN was "
                f"trained on (by a supernet, below those of trained networks), got {args.target_acc:g}"
            )
        return [objective.class_of(args.target_acc)]
    if objective.name in ACCURACIES and args.target_quantile is not None:
        return [objective.class_of_quantile(args.target_quantile)]
    return list(range(highest + 1))


class Limits:
    """Hard limits on the exact #params and MACs of a network, from the flags.

    network: the CifarConfig or ImageNetConfig of --limits_for, --layers, --channels and --num_classes.
    Ends the script when no cell of up to max_vertices vertices can keep them, and where there are limits in a space
    whose genotypes have no such network.
    """

    def __init__(self, args: argparse.Namespace, max_vertices: int, space: SearchSpace = NAG_SPACE):
        self.space, self.counted = space, has_network(space)
        self.network = COUNTED_NETWORKS[args.limits_for](args.num_classes, args.layers, args.channels)
        self.bounds = {
            "params": (args.min_params or 0, args.max_params or float("inf")),
            "macs": (args.min_macs or 0, args.max_macs or float("inf")),
        }
        self.given = any((args.min_params, args.max_params, args.min_macs, args.max_macs))
        if self.given and not self.counted:
            names = [f"--{end}_{name}" for name in self.bounds for end in ("min", "max")]
            flags = ", ".join(flag for flag in names if getattr(args, flag[2:]))
            fail(f"{flags}: genotypes of the space {space.name} have no #params and MACs that could be counted")
        if self.given:
            self._check_reachable(max_vertices)

    def _check_reachable(self, max_vertices: int) -> None:
        extremes = [self.cost(genotype) for genotype in extreme_genotypes(max_vertices, self.space)]
        network = self.network
        for name, costs in zip(self.bounds, zip(*extremes, strict=True), strict=True):
            low, high = self.bounds[name]
            size = f"--layers {network.layers} --channels {network.channels}"
            size += " --limits_for imagenet" if isinstance(network, ImageNetConfig) else ""
            reach = f"cells have {min(costs):,} to {max(costs):,} at {size}"
            if low > high:
                fail(f"--min_{name}: expected at most --max_{name} {si(high)}, got {si(low)}; {reach}")
            if high < min(costs):
                fail(f"--max_{name}: no cell is that small: {reach}")
            if low > max(costs):
                fail(f"--min_{name}: no cell is that large: {reach}")

    def allow(self, labels: tuple[int, ...], objectives: list[Objective]) -> bool:
        """Whether the classes of #params and MACs have cells within the limits."""
        if self.network != RECORDS_NETWORK:
            return True  # the classes are of other counts
        for objective, label in zip(objectives, labels, strict=True):
            low, high = self.bounds.get(objective.name, (0, float("inf")))
            edges = [0, *objective.boundaries, float("inf")]
            if edges[label] > high or low >= edges[label + 1]:
                return False
        return True

    def cost(self, genotype: Genotype) -> Cost:
        """#params and MACs of the network that is counted, for images of the size that it is made for."""
        return network_cost(genotype, self.network)

    def keep(self, genotype: Genotype) -> bool:
        """Whether the genotype is within the limits."""
        if not self.given:
            return True
        counts = self.cost(genotype)
        return all(low <= n <= high for n, (low, high) in zip(counts, self.bounds.values(), strict=True))


def extreme_genotypes(max_vertices: int, space: SearchSpace = NAG_SPACE) -> list[Genotype]:
    """Genotypes among which are those of least and most #params and MACs: tiny ones, and the full one."""
    cells, kinds = [], {(OPS[op].pointwise, OPS[op].depthwise, OPS[op].pointwise_at(2)): op for op in space.ops}
    size = min(space.num_inputs + 2, max_vertices)
    free = [(i, j) for i in range(size - 1) for j in range(max(i + 1, space.num_inputs), size)]
    for op in (op for kind, op in kinds.items() if kind[:2] == min(kinds)[:2]):  # they differ at stride 2
        for chosen in product((0, 1), repeat=len(free)):
            matrix = [[0] * size for _ in range(size)]
            for (i, j), edge in zip(free, chosen, strict=True):
                matrix[i][j] = edge
            interior = [op] * (size - space.num_inputs - 1)
            cells.append(CellSpec(matrix, [*space.inputs, *interior, space.output], space).prune())
    cells = list({cell.canonical(): cell for cell in cells if cell is not None}.values())
    size = max_vertices
    matrix = [[int(j > i and j >= space.num_inputs) for j in range(size)] for i in range(size)]
    full = CellSpec(matrix, [*space.inputs, *[kinds[max(kinds)]] * (size - space.num_inputs - 1), space.output], space)
    pairs = [*product(cells, repeat=len(space.cells)), [full] * len(space.cells)]
    return [Genotype(*pair, space=space) for pair in pairs]


def count(text: str) -> int:
    """An argparse type: 3000000, 3.0M, 600M or 1.2G."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        value = float(digits) * {"": 1, "K": 1e3, "M": 1e6, "G": 1e9}[unit]
        if not 1 <= value < 1e15:
            raise ValueError
    except (ValueError, KeyError):
        what = "expected a number from 1 to 1e15, like 3000000 or 3.0M"
        raise argparse.ArgumentTypeError(f"{what}, got {text!r}") from None
    return round(value)


def si(value: float) -> str:
    return f"{value / 1e6:.3f}M"


def describe(labels: tuple[int, ...], objectives: list[Objective]) -> str:
    """class 2 (accuracy 0.4805 to 0.5180), or class 9 (size_accuracy 0.8975 to 0.9975)"""
    parts = []
    for label, objective in zip(labels, objectives, strict=True):
        edges = [objective.minimum, *objective.boundaries, objective.maximum]
        show = (lambda value: f"{value:.4f}") if objective.name in ACCURACIES else si
        parts.append(f"{objective.name} {show(edges[label])} to {show(edges[label + 1])}")
    return f"class {','.join(map(str, labels))} ({', '.join(parts)})"
