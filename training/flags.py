"""The flags that the training scripts share, by argument group, and the checks of what flags do not allow together.

    network = parser.add_argument_group("network")
    add_network_flags(network, CifarConfig())
    add_step_flags(parser.add_argument_group("training step"))

Every check ends the script with one line that names the flag.
"""

import argparse
import importlib.util

import torch

from genotypes import Genotype, load_genotype
from models.export import check_export
from models.network import NetworkConfig
from plumbing.checkpoint_files import LARGEST, MOST_LAYERS, load_checkpoint
from plumbing.flags import add_cuda_graphs_flag, explicit_flags, number
from training.distributed import planned_world
from training.own_images import say
from training.predicting import find_images
from utils import fail, user_input

ALREADY_SO = " "  # in a table of the reference's flags: what the flag asks for is so in any case, and it is dropped


def add_arch_flag(group: argparse._ActionsContainer) -> None:
    """The flag of the genotype to train."""
    text = "genotype: a published name, FILE.json, FILE.json:INDEX, FILE.jsonl:INDEX, or a run folder (its best)"
    group.add_argument("--arch", default="NAG_HIGH_ACC", help=text)


def add_network_flags(group: argparse._ActionsContainer, config: NetworkConfig) -> None:
    """The flags of a stand-alone network; `config` has the defaults."""
    layers, share = number(int, 1, MOST_LAYERS), number(float, 0, 1, above=True)
    add = group.add_argument
    add("--layers", type=layers, default=config.layers, help="normal cells per stack, N of the paper")
    add("--channels", type=number(int, 2, LARGEST), default=config.channels, help="channels C of the first stack")
    add("--keep_prob", type=share, default=config.keep_prob, help="probability that the classifier's dropout keeps")
    drop_path = "probability that drop path keeps a branch in the last cell at the end of training"
    add("--drop_path_keep_prob", type=share, default=config.drop_path_keep_prob, help=drop_path)
    auxiliary = "weight of the auxiliary head's loss; 0: no auxiliary head"
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help=auxiliary)


def add_step_flags(group: argparse._ActionsContainer) -> None:
    """The flags of how a training step is computed."""
    add = group.add_argument
    add("--optimizer", default="sgd", choices=["sgd", "adabelief"], help="sgd as published, or adabelief as the later "
        "code of the authors (needs the package pytorch-optimizer)")  # fmt: skip
    add("--accumulate", type=number(int, 1), default=1, help="parts in which a batch is computed, to save memory")
    add("--sync_bn", action="store_true", help="batch norm over the images of all processes (CUDA only)")
    add("--amp", default="auto", choices=["auto", "off", "bf16"], help="mixed precision; auto: bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the cells for training; needs a C++ compiler")
    add_cuda_graphs_flag(group)


def check_step_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, processes: int) -> None:
    """Refuse what flags and installed packages do not allow together, for a batch that `processes` processes share."""
    if args.optimizer == "adabelief" and importlib.util.find_spec("pytorch_optimizer") is None:
        parser.error("argument --optimizer: adabelief comes from a package: pip install pytorch-optimizer")
    parts = args.accumulate * processes
    if args.batch_size % parts or args.batch_size < 2 * parts:
        parser.error(f"argument --batch_size: expected at least 2 for each of {parts} equal parts (processes times "
                     f"--accumulate), got {args.batch_size}")  # fmt: skip


def check_image_size(
    parser: argparse.ArgumentParser, args: argparse.Namespace, sizes: tuple[int, int], given: set[str]
) -> None:
    """Switch the auxiliary head off for images that it does not take, or refuse them where its weight was given.

    sizes: the smallest and the largest that it takes, in px. given: the flags that were given.
    """
    low, high = sizes
    if not args.auxiliary_weight or low <= args.image_size <= high:
        return
    if "auxiliary_weight" in given or args.resume:
        parser.error(f"argument --image_size: the auxiliary head takes {low} to {high} px; add --auxiliary_weight 0")
    args.auxiliary_weight = 0.0
    say(f"--auxiliary_weight 0: no auxiliary head, which takes images of {low} to {high} px, not {args.image_size}")


def check_sync_bn(args: argparse.Namespace, device: torch.device) -> None:
    """Refuse --sync_bn where torch does not have it."""
    if args.sync_bn and device.type == "cpu":
        fail("--sync_bn: torch has it for CUDA devices only")


def optimizer_defaults(args: argparse.Namespace, defaults: dict[str, tuple[float, float]], rate: str) -> None:
    """Fill in the learning rate (flag `rate`) and --l2_reg, where they are not given, with those of the optimizer.

    defaults: name of the optimizer -> (learning rate, weight decay).
    """
    lr, decay = defaults[args.optimizer]
    setattr(args, rate, lr if getattr(args, rate) is None else getattr(args, rate))
    args.l2_reg = decay if args.l2_reg is None else args.l2_reg


def shown_defaults(defaults: dict[str, tuple[float, float]], index: int) -> str:
    """The learning rates (index 0) or weight decays (1) of the optimizers, as --help shows them."""
    return "(default: " + ", ".join(f"{name} {values[index]:g}" for name, values in defaults.items()) + ")"


# --------------------------------------------------------------------------------------------------- evaluation


def add_predict_flag(group: argparse._ActionsContainer) -> None:
    """The flag of single images to classify."""
    text = "with --evaluate: classify an image, or all in a folder; the test error is then measured only with --data"
    group.add_argument("--predict", metavar="PATH", help=text)


def evaluation_args(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    args: argparse.Namespace,
    kind: str,
    checkpoints: list[str],
    names: set[str],
) -> argparse.Namespace:
    """The flags of an evaluation. Those of `names` that are not given are taken from the training of the networks;
    --data is None where it only classifies the images of --predict.

    args: the flags as parsed. checkpoints: the files of --evaluate. kind: what they are checkpoints of.
    Ends the script when a flag asks for another network, or when networks were trained for images of other sizes.
    """
    if args.predict:
        if planned_world() > 1:
            parser.error("argument --predict: works in one process; start it with python")
        with user_input("--predict"):
            find_images(args.predict)
    if args.export:
        if len(checkpoints) > 1:
            parser.error("argument --export: expected one checkpoint in --evaluate")
        with user_input("--export"):
            check_export(args.export)
    given = explicit_flags(parser, argv)
    inherited = names - given
    with user_input("--evaluate"):
        needed = ("args", "genotype", "network", "network_config")
        states = [load_checkpoint(path, kind, needed) for path in checkpoints]
    for path, state in zip(checkpoints, states, strict=True):
        check_network_flags(args, given, state, path)
    first = states[0]["args"]
    for path, state in zip(checkpoints, states, strict=True):
        for name in sorted(inherited & {"dataset", "image_size"}):
            if (other := state["args"].get(name)) != first.get(name):
                fail(f"--evaluate: {path} was trained with --{name} {other}, {checkpoints[0]} with {first.get(name)}")
    split = {path: state["args"].get("test_checksum") for path, state in zip(checkpoints, states, strict=True)}
    measured = "data" in given or not args.predict
    if measured and (other := next((path for path in checkpoints if split[path] != split[checkpoints[0]]), None)):
        fail(f"--evaluate: {other} was trained on images that {checkpoints[0]} is to be tested on")
    kept = {name: first[name] for name in inherited if name in first}
    if not measured:
        kept["data"] = None
    return argparse.Namespace(**{**vars(args), **kept})


def check_network_flags(args: argparse.Namespace, given: set[str], state: dict, path: str) -> None:
    """Refuse to evaluate another network than the flags ask for.

    given: the names of the flags on the command line. state: the checkpoint in the file `path`.
    """
    if "arch" in given:
        with user_input("--arch"):
            asked, saved = load_genotype(args.arch), Genotype.from_dict(state["genotype"])
            if asked.canonical() != saved.canonical():
                raise ValueError(f"{args.arch} is another genotype than that of {path}, {state['args']['arch']}")
    for name in given & {"layers", "channels"}:
        if getattr(args, name) != state["args"][name]:
            fail(f"--{name}: {path} was trained with {state['args'][name]}, got {getattr(args, name)}")
