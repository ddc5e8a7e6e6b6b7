"""Write what the networks of a checkout answer to the inputs of the golden files of tests/data.

Run by benchmarks/same_results.py within a checkout, which comes first on the module path:

    python -c PROGRAM golden_outputs.py DATA OUT.npz          # DATA: a folder like tests/data; cwd: the checkout

Writes one array for each output: logits of the CIFAR network, of the ImageNet network and of the supernet, in float64
and with weights from a formula; #params and MACs of the counted genotypes; cells of the generator and scores of the
discriminator with the weights of the golden file. Where a name has moved between modules, or is called otherwise, the
tables below say so; add a row when another one moves.
"""

import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

# Name -> the modules that have had it, newest first.
MODULES = {
    "Genotype": ("genotypes",),
    "NAG_SPACE": ("genotypes",),
    "CellBatch": ("models.graph",),
    "CifarNetwork": ("models.network",),
    "ImageNetNetwork": ("models.network",),
    "Supernet": ("models.supernet",),
    "genotype_cost": ("models.cost", "models.network"),
    "Generator": ("models.generator",),
    "Discriminator": ("models.discriminator",),
    "GeneratorConfig": ("models.generator",),
    "DiscriminatorConfig": ("models.discriminator",),
}
# Keyword of a constructor -> what it is called elsewhere.
KEYWORDS = {"label_sizes": "label_embedding_sizes"}
# Part of the name of a weight -> the same part in the golden file, of the generator and of the discriminator.
GENERATOR_NAMES = {
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
DISCRIMINATOR_NAMES = {
    "encoders.normal": "conv_discriminator",
    "encoders.reduction": "reduc_discriminator",
    "tokens.": "NodeEmb.embedding.",
    "convs.": "NodeEmb.gcns.",
    "graph_state.value": "GraphEmb.f_m",
    "graph_state.gate": "GraphEmb.g_m",
    "score.1.": "GetAcc.lin_layers.0.",
    "score.4.": "GetAcc.lin_layers.1.",
    "score.7.": "GetAcc.lin_layers.2.",
    "score.9.": "GetAcc.lin_layers.3.",
    "labels.tables.0": "perf_label_embedding",
    "labels.tables.1": "param_label_embedding",
}


def find(name: str):
    """The object of this name in the first module of the checkout that has it."""
    for module in MODULES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise SystemExit(f"{name} is in none of {', '.join(MODULES[name])}: add its module to benchmarks/golden_outputs.py")


def build(name: str, **settings) -> torch.nn.Module:
    """A network by keywords, or by its config dataclass where it takes none."""
    other = {KEYWORDS.get(key, key): value for key, value in settings.items()}
    for keywords in (settings, other):
        for make in (lambda **kw: find(name)(**kw), lambda **kw: find(name)(find(f"{name}Config")(**kw))):
            try:
                return make(**keywords)
            except TypeError as error:
                reason = error
    raise SystemExit(f"{name} cannot be built: {reason}")


def fill(network: torch.nn.Module) -> torch.nn.Module:
    """Weights by a formula: element k of each is sin(1 + 0.7 k) sqrt(2 / fan). Returns the network, in float64."""
    network.double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear):
                module.bias.zero_()
        for p in network.parameters():
            if p.ndim >= 2:
                k = torch.arange(p.numel(), dtype=torch.float64)
                p.copy_((torch.sin(1 + 0.7 * k) * math.sqrt(2 / p[0].numel())).view(p.shape))
    return network


def images(batch: int, size: int) -> torch.Tensor:
    k = torch.arange(batch * 3 * size * size, dtype=torch.float64)
    return torch.cos(0.3 + 0.11 * k).view(batch, 3, size, size)


def logits(entries: list[dict]) -> dict[str, torch.Tensor]:
    """Answers of the three kinds of networks that hold each genotype of network_logits.json."""
    found = {}
    no_dropout = {"keep_prob": 1.0, "drop_path_keep_prob": 1.0}
    for i, entry in enumerate(entries):
        genotype = find("Genotype").from_dict(entry)
        cifar = fill(find("CifarNetwork")(genotype, num_classes=10, layers=1, channels=4, **no_dropout))
        imagenet = fill(find("ImageNetNetwork")(genotype, num_classes=7, layers=1, channels=4))
        supernet = fill(find("Supernet")(num_classes=10, layers=1, channels=4, max_vertices=10, **no_dropout))
        with torch.no_grad():
            outputs = {
                "cifar_eval": cifar.eval()(images(2, 32))[:1],
                "cifar_train": cifar.train()(images(4, 32)),
                "supernet_train": supernet.train()(images(4, 32), genotype.prune()),
                "imagenet_eval": imagenet.eval()(images(1, 224))[:1],
                "imagenet_train": imagenet.train()(images(2, 224)),
            }
        for name, values in outputs.items():
            for which, value in zip(("logits", "auxiliary"), values, strict=False):
                found[f"logits/{name}_{which}/{i}"] = value
    return found


def counts(entries: list[dict]) -> dict[str, torch.Tensor]:
    """#params and MACs of the genotypes of param_counts.json, as a CIFAR network of default size."""
    cost, genotype = find("genotype_cost"), find("Genotype").from_dict
    return {"counts/params_and_macs": torch.tensor([tuple(cost(genotype(entry))) for entry in entries])}


def renamed(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def load(network: torch.nn.Module, data: dict, part: str, table: dict[str, str]) -> torch.nn.Module:
    """Fill a network with the weights of gan_outputs.npz. Returns it in eval mode, in float64."""
    state = {}
    for name, weight in network.double().eval().state_dict().items():
        golden = data[f"{part}/{renamed(name, table)}"]
        turned = ".convs." in name and part == "discriminator"  # the golden file has (in, out)
        state[name] = golden.T if turned else golden
        if state[name].shape != weight.shape:
            raise SystemExit(f"{part}: weight {name} has another shape than in the golden file")
    network.load_state_dict(state)
    return network


def adversaries(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """Cells that the generator grows from the golden noise and labels, and the golden cells' scores."""
    with np.load(path) as file:
        data = {key.removeprefix(f"{kind}/"): torch.from_numpy(file[key]) for key in file if key.startswith(kind)}
    classes = (3,) * data["labels"].shape[1]
    labels = {"num_classes": classes, "label_sizes": (4,) * len(classes)}
    generator = build("Generator", latent_dim=5, vertex_size=12, graph_size=6, **labels)
    load(generator, data, "generator", GENERATOR_NAMES)
    names = DISCRIMINATOR_NAMES | ({} if kind == "multi" else {"labels.tables.0": "label_embedding"})
    discriminator = build("Discriminator", vertex_size=12, graph_size=16, **labels)
    load(discriminator, data, "discriminator", names)
    names, found = find("NAG_SPACE").cells, {}
    batches = tuple(
        find("CellBatch")(data[f"{name}_edges"].mT, data[f"{name}_ops"], data[f"{name}_num_nodes"].squeeze(1))
        for name in names
    )
    with torch.no_grad():
        cells = generator(data["z"], data["labels"])
        found[f"discriminator/{kind}_scores"] = discriminator(batches, data["labels"])
    for name, batch in zip(names, cells, strict=True):
        for field in ("adj", "ops", "num_nodes"):
            found[f"generator/{kind}_{name}_{field}"] = getattr(batch, field)
    return found


def main(data: Path, out: Path) -> None:
    found = logits(json.loads((data / "network_logits.json").read_text()))
    found |= counts(json.loads((data / "param_counts.json").read_text()))
    for kind in ("single", "multi"):
        found |= adversaries(data / "gan_outputs.npz", kind)
    np.savez(out, **{name: value.numpy() for name, value in found.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
