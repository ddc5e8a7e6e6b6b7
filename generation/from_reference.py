"""Make a generator of the public reference (github.com/kunjing96/NAG) one that generate_archs.py reads.

    python -m generation.from_reference models/generator.pkl --nasbench_data nasdata_150 --output_dir runs/theirs
    python generate_archs.py --checkpoint runs/theirs/generator.pt

The weights, a file that torch.save wrote of the generator's state_dict, are taken over under other names; all sizes are
read off them. What else a generator needs here comes from the NAS dataset that it was trained on, the reference's own
file or one of JSON lines: the boundaries of the classes, and a predictor, which is trained (a minute).
With two label embeddings it is a generator of accuracy and #params: generate_archs_multiobj.py draws its cells.

The cells are not those that the reference draws with the same noise: there, an edge is decided in view of other samples
of the batch, and dropout stays on. See docs/from_the_reference.md.
"""

import argparse
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from build_nas_dataset.records import read_records
from generation.training import TrainingData
from genotypes import NAG_SPACE
from models.generator import Generator, GeneratorConfig
from models.predictor import train_predictor
from plumbing.checkpoint_files import check_tensors, save_checkpoint
from plumbing.flags import ArgumentParser, add_common_flags, number
from plumbing.run_folder import code_version, output_folder, refuse_used, write_config
from plumbing.start import prepare
from utils import all_finite, one_line, shipped, shown, user_input

# Parts of parameter names: ours -> the reference's.
NAMES = {
    "labels.tables.0": "perf_label_embedding",
    "labels.tables.1": "param_label_embedding",
    "cells.normal": "conv_generator.stepGenerator",
    "cells.reduction": "reduc_generator.stepGenerator",
    ".tokens.": ".nodeInit.NodeInits.",
    ".start.0": ".nodeInit.f_start",
    ".start.2": ".nodeInit.f_start_2",
    ".init_vertex.0": ".nodeInit.f_init",
    ".init_vertex.2": ".nodeInit.f_init_2",
    ".add_vertex.0": ".nodeAdd.f_an",
    ".add_vertex.2": ".nodeAdd.f_an_2",
    ".add_edge.0": ".edgeAdd.f_s_1",
    ".add_edge.2": ".edgeAdd.f_s_2",
    ".graph_state.": ".prop.GraphEmb.",
    ".graph_state_init.": ".prop.GraphEmb_init.",
    ".layers.": ".prop.NodeEmb.GNNLayers.",
    ".message.": ".msg.",
    ".message_reversed.": ".msg_rev.",
    ".update.": ".upd.",
    ".value.": ".f_m.",
    ".gate.": ".g_m.",
}
TABLES = {"accuracy": "perf_label_embedding.weight", "params": "param_label_embedding.weight"}  # of labels
STEP = "conv_generator.stepGenerator."
LAYER = re.compile(re.escape(STEP) + r"prop\.NodeEmb\.GNNLayers\.(\d{1,2})\.")


def reference_name(name: str) -> str:
    """What a parameter of a generator is called in the reference."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """A state_dict of the reference's generator, in either of torch's formats. Raises ValueError for other files."""
    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        check_tensors(weights)
    except Exception as error:  # foreign or truncated files raise all sorts
        reason = one_line(error, 120)
        raise ValueError(f"{path} is not a torch file of tensors ({reason})") from None
    if not isinstance(weights, Mapping) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path}: expected the state_dict of the reference's generator, names and tensors")
    return dict(weights)


def config_of(weights: Mapping[str, Tensor], max_vertices: int) -> GeneratorConfig:
    """The settings of the generator that has these weights; the shapes have all but max_vertices.

    Raises KeyError for a name that is missing, and ValueError for a tensor that is no matrix.
    """
    tables = [weights[name] for name in TABLES.values() if name == TABLES["accuracy"] or name in weights]
    sizes = tuple(table.shape[1] for table in tables)
    _, vertex_size = weights[f"{STEP}nodeInit.NodeInits.weight"].shape
    graph_size, of_add_vertex = weights[f"{STEP}nodeAdd.f_an.weight"].shape
    layers = {match[1] for match in map(LAYER.match, weights) if match}
    return GeneratorConfig(
        latent_dim=of_add_vertex - graph_size - sum(sizes),
        vertex_size=vertex_size,
        graph_size=graph_size,
        num_layers=len(layers),
        aggregation="gsum" if f"{STEP}prop.GraphEmb.g_m.weight" in weights else "mean",
        num_classes=tuple(table.shape[0] for table in tables),
        label_sizes=sizes,
        max_vertices=max_vertices,
    )


def convert(weights: Mapping[str, Tensor], max_vertices: int = NAG_SPACE.max_vertices) -> Generator:
    """The generator of the reference's weights, in eval mode. Raises ValueError when they are not one's."""
    what = "the weights are not those of a generator of the reference"
    try:
        config = config_of(weights, max_vertices)
        with torch.device("meta"):  # takes no memory, whatever the sizes
            generator = Generator(**asdict(config))
        names = {name: reference_name(name) for name in generator.state_dict()}
        if unknown := sorted(weights.keys() - names.values()):
            raise ValueError(f"unknown name {unknown[0]}")
        generator.load_state_dict({ours: weights[theirs].float() for ours, theirs in names.items()}, assign=True)
    except KeyError as error:
        raise ValueError(f"{what}: {error.args[0]} is missing") from None
    except (ValueError, IndexError, RuntimeError) as error:
        raise ValueError(f"{what}: {one_line(error, 120)}") from None
    if not all_finite(generator):
        raise ValueError(f"{what}: they are not all finite numbers")
    whole = Generator(**asdict(config))  # with the constants that a state_dict does not hold
    whole.load_state_dict(generator.state_dict())
    return whole.eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.prog = "python -m generation.from_reference"
    add = parser.add_argument_group("generator").add_argument
    add("weights", help="file of the reference: models/generator.pkl or models/generator_N.pkl")
    vertices = number(int, NAG_SPACE.min_vertices, NAG_SPACE.max_vertices)
    add("--max_step", type=vertices, default=NAG_SPACE.max_vertices, help="vertices of a cell at most, as there")
    add = parser.add_argument_group("NAS dataset").add_argument
    add("--nasbench_data", required=True, help="what it was trained on: a file of the reference, or JSON lines")
    add("--batch_size", type=number(int, 2), default=64, help="genotypes a step of the predictor's training")
    add_common_flags(parser)
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    device = prepare(args)
    with user_input("weights"):
        generator = convert(read_weights(args.weights), args.max_step)
    folder = output_folder(args)
    refuse_used(folder, "checkpoint.pt", "generator.pt")
    num_classes = dict(zip(TABLES, generator.config.num_classes, strict=False))
    with user_input("--nasbench_data"):
        records = read_records(args.nasbench_data)
        data = TrainingData(records, num_classes, NAG_SPACE.max_vertices, device)
        canonical = [record.genotype.canonical() for record in records]
        predictor, tau = train_predictor(data.cells, data.quantiles, canonical, args.batch_size, args.seed)
    state = {
        "generator": generator.state_dict(),
        "generator_config": asdict(generator.config),
        "predictor": predictor.cpu().state_dict(),
        "predictor_config": asdict(predictor.config),
        "predictor_tau": tau,
        "objectives": [objective.to_dict() for objective in data.objectives],
        "epoch": None,  # a file of the reference does not say
        "args": {"nasbench_data": args.nasbench_data, "weights": args.weights, "seed": args.seed},
        **code_version(),
    }
    write_config(folder, args, device)
    save_checkpoint(folder / "generator.pt", "gan", state)
    script = "generate_archs.py" if len(data.objectives) == 1 else "generate_archs_multiobj.py"
    print(f"wrote {folder / 'generator.pt'}")
    print(f"next: python {shown(shipped(script))} --checkpoint {shown(folder / 'generator.pt')}")


if __name__ == "__main__":
    main(parse_args())
