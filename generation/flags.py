"""The flags of gan.py and gan_multiobj.py. The values of both recipes, which --help shows, are in recipes.py."""

import argparse

from build_nas_dataset.objectives import ACCURACIES
from genotypes import SPACES
from models.discriminator import DiscriminatorConfig
from models.generator import GeneratorConfig
from plumbing.checkpoint_files import LARGEST, MOST_LAYERS
from plumbing.flags import UNREAD, ArgumentParser, add_common_flags, add_cuda_graphs_flag, number
from utils import shipped

# Objective -> the flags for its number of classes and the width of its label embedding. The two of accuracy have the
# same ones, since a generator is trained on one of them at most.
OBJECTIVES = {
    **dict.fromkeys(ACCURACIES, ("n_perf_classes", "cls_perf_embedding_size")),
    "params": ("n_params_classes", "cls_params_embedding_size"),
    "macs": ("n_macs_classes", "cls_macs_embedding_size"),
}

REFERENCE_FLAGS = {
    "gpu": "--device cuda:{}",
    "n_cpu": UNREAD,
    "img_size": UNREAD,
    "channels": UNREAD,
    "sample_interval": UNREAD,
    "vocab_size": UNREAD,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """All flags of the script, in groups. Those in a recipe have no default here."""
    size, share = number(int, 1, LARGEST), number(float, 0, 0.99)
    add = parser.add_argument_group("data and labels").add_argument
    add("--nasbench_data", default=shipped("data/nasdata.jsonl"), help="NAS dataset: JSON lines, or a file of the "
        "reference")  # fmt: skip
    add("--accuracy_column", default="accuracy", metavar="NAME", help="column of the NAS dataset that is the accuracy")
    add("--held_out_cells", metavar="FILE", help="genotype file of cells that the NAS dataset must not hold, such as "
        "those that a result is tested on")  # fmt: skip
    add("--space", choices=tuple(SPACES), help="search space (default: the one that the header of the file names)")
    add("--objectives", type=objectives_list, default=("accuracy",), help=f"some of {','.join(OBJECTIVES)}; "
        "size_accuracy: how accuracy ranks among cells of about as many #params")  # fmt: skip
    for classes, embedding in dict.fromkeys(OBJECTIVES.values()):
        name = " or ".join(name for name, flags in OBJECTIVES.items() if flags[0] == classes)
        add(f"--{classes}", type=number(int, 2), default=3, help=f"classes that {name} is cut into")
        add(f"--{embedding}", type=size, default=10, help=f"width of the embedding of the {name} label")

    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=["paper", "robust"], default="robust", help="sets the defaults of many flags")
    add("--n_epochs", type=size, help="passes over the NAS dataset")
    add("--batch_size", type=number(int, 2), default=64, help="genotypes a step")
    add("--lr", type=number(float, 0, above=True), help="learning rate of Adam, for both networks")
    add("--b1", type=share, help="Adam's decay of the mean gradient")
    add("--b2", type=number(float, 0, 0.99999), default=0.999, help="Adam's decay of the squared gradient")
    add("--lr_schedule", choices=["constant", "cosine"], help="cosine: to 0 at --n_epochs")
    add("--clip_value", type=number(float, 0), help="largest norm of a gradient; 0: not clipped")
    add("--n_critic", type=size, default=1, help="discriminator steps for each generator step")
    add_loss_flags(parser)
    add_network_flags(parser)

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_every", type=size, default=5, help="epochs between evaluations of generated cells")
    add("--eval_size", type=size, default=300, help="genotypes drawn in an evaluation")
    run = parser.add_argument_group("speed and resuming")
    run.add_argument(
        "--compile", action="store_true", help="torch.compile message passing and discriminator; needs a C++ compiler"
    )
    add_cuda_graphs_flag(run)
    text = "epochs between snapshots generator-<epoch>.pt, which are kept (default: none)"
    run.add_argument("--save_every", type=size, metavar="N", help=text)
    run.add_argument("--resume", help="run folder or checkpoint to go on with")
    add_common_flags(parser)


def add_loss_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the generator's losses, see generation/likelihood.py."""
    add, weight = parser.add_argument_group("losses of the generator").add_argument, number(float, 0, 1e6)
    add("--adversarial_weight", type=weight, help="weight of the loss by the discriminator's scores; 0: there is none")
    add("--likelihood_weight", type=weight, help="weight of the negative log-likelihood of examples, in nats")
    add("--pool_size", type=number(int, 0, 10**7), help="random genotypes drawn an epoch, to choose examples from; "
        "0: the examples are the NAS dataset's own genotypes")  # fmt: skip
    add("--inverse_temperature", type=number(float, 0, 1000), help="genotypes of the pool are examples for labels "
        "with weights of exp(inverse temperature x reward)")  # fmt: skip
    add(
        "--warmup_epochs", type=number(int, 0), help="first epochs, of likelihood alone; a shorter --n_epochs scales it"
    )
    add("--policy_gradient_weight", type=weight, help="weight of the policy gradient towards the labels asked for")
    add("--policy_gradient_cells", type=number(int, 0, 10**6), help="genotypes drawn a step for the policy gradient; "
        "0: --batch_size")  # fmt: skip
    add("--kl_weight", type=weight, help="reward lost for each nat of divergence from the generator after the warm-up")


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of the generator and the discriminator."""
    size, share, switch = number(int, 1, LARGEST), number(float, 0, 0.99), argparse.BooleanOptionalAction
    layers = number(int, 1, MOST_LAYERS)
    add = parser.add_argument_group("generator").add_argument
    add("--latent_dim", type=size, default=GeneratorConfig.latent_dim, help="width of the noise")
    add("--g_emb_size", type=size, help="width of a vertex state")
    add("--g_hidden_size", type=size, help="width of a graph state")
    add("--g_num_layers", type=layers, default=GeneratorConfig.num_layers, help="message-passing layers")
    add("--g_dropout", type=share, help="share of a vertex state that is dropped in message passing")
    add("--g_aggr", default=GeneratorConfig.aggregation, choices=["gsum", "mean"], help="how vertex states become a "
        "graph state, in both networks: gated sum or mean")  # fmt: skip
    add("--max_step", type=number(int, 2), help="vertices of a cell at most (default: those of the search space)")
    add("--temperature", type=number(float, 0, 1000), help="0: decisions take the likelier side; 1: they are drawn")
    add("--chain_cells", action=switch, help="grow the reduction cell in view of the normal cell")
    add("--autoregressive_edges", action=switch, help="decide every edge in view of those decided before it")
    add = parser.add_argument_group("discriminator, where --adversarial_weight is above 0").add_argument
    add("--d_emb_size", type=size, help="width of a vertex state")
    add("--d_hidden_size", type=size, help="width of a graph state")
    add("--d_gnn_num_layers", type=layers, default=DiscriminatorConfig.num_layers, help="graph convolutions")
    add("--d_mlp_num_layers", type=layers, default=DiscriminatorConfig.mlp_layers, help="layers that make the score")
    add("--d_gnn_dropout", type=share, help="share of a vertex state that is dropped before a graph convolution")
    add("--d_mlp_dropout", type=share, help="share that is dropped before each layer of the score but the last")
    add("--straight_through", action=switch, help="show it hard decisions, not probabilities")


def objectives_list(text: str) -> tuple[str, ...]:
    """An argparse type: "accuracy,params" -> ("accuracy", "params")."""
    names = tuple(text.split(","))
    if not set(names) <= set(OBJECTIVES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(OBJECTIVES)}, each once, got {text!r}")
    if set(names) >= set(ACCURACIES):
        raise argparse.ArgumentTypeError(f"expected one of {' and '.join(ACCURACIES)}, got both")
    return names


def check_flags(parser: ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """Refuse what flags do not allow together. given: names of the flags on the command line."""
    if not args.likelihood_weight and (args.warmup_epochs or not args.adversarial_weight + args.policy_gradient_weight):
        parser.error("argument --likelihood_weight: expected above 0 with --warmup_epochs, or if nothing else trains")
    if args.policy_gradient_cells == 1 and args.policy_gradient_weight and not args.resume:
        parser.error("argument --policy_gradient_cells: expected 0 or from 2, since rewards are compared, got 1")
    if 0 < args.pool_size < 1000:
        parser.error(f"argument --pool_size: expected 0 or from 1000, got {args.pool_size}")
    if args.pool_size and not args.likelihood_weight:
        parser.error("argument --pool_size: expected 0 without --likelihood_weight, which the pool is for")
    if args.kl_weight and args.policy_gradient_weight and not args.warmup_epochs:
        parser.error("argument --kl_weight: expected 0 without --warmup_epochs, which train the reference policy")
    needs = {
        "inverse_temperature": ("pool_size",),
        "kl_weight": ("policy_gradient_weight",),
        "policy_gradient_cells": ("pool_size", "policy_gradient_weight"),
    }
    for name, wanted in needs.items():
        if name in given and getattr(args, name) and not any(getattr(args, other) for other in wanted):
            parser.error(f"argument --{name}: expected 0 without {' or '.join(f'--{other}' for other in wanted)}")
    if args.n_critic > 1 and not args.adversarial_weight:
        parser.error("argument --n_critic: expected 1 without --adversarial_weight, where no discriminator is trained")
