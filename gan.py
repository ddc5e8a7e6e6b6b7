"""Train the generator on a NAS dataset, conditioned on classes of accuracy (gan_multiobj.py: and of #params).

    python gan.py                                          # data/nasdata.jsonl, the robust recipe
    python gan.py --recipe paper                           # as published; explicit flags win over a recipe's
    python gan.py --n_epochs 2 --device cpu                # a quick look
    python gan.py --nasbench_data runs/build_nas_dataset-.../nasdata.jsonl
    python gan.py --resume runs/gan-...                    # go on after a stop

The published recipe trains the generator against the discriminator alone: generation/adversarial.py. The default one,
robust, trains it by likelihood and a policy gradient: generation/likelihood.py. generation/recipes.py has the values of
both side by side; each part is a flag of its own, on top of either recipe, and --adversarial_weight 1 adds the
discriminator to the robust one.
Writes checkpoint.pt (what --resume reads), generator.pt (what generate_archs.py needs of it), metrics.jsonl,
TensorBoard events, config.json and samples/*.json, cells drawn along the way; with --save_every N also the generator of
every N-th epoch, since the published recipe swings and its last epoch is no better than others. NAG paper, sections 3.2
and 4.1.
"""

import argparse
import time
from dataclasses import asdict
from pathlib import Path

import torch

from build_nas_dataset.records import Record, check_held_out, read_records
from generation.flags import OBJECTIVES, REFERENCE_FLAGS, add_flags, check_flags
from generation.metrics import cell_statistics, sample_and_measure
from generation.pictures import show_nas_dataset, show_samples
from generation.recipes import PAPER, ROBUST, warmup_for
from generation.training import Networks, Trainer, TrainingData, compile_parts
from genotypes import NAG_SPACE, SearchSpace, find_space
from models.discriminator import Discriminator, DiscriminatorConfig
from models.generator import Generator, GeneratorConfig
from models.predictor import Predictor, split_records, train_predictor
from plumbing.checkpoint_files import load_checkpoint, of_this_version, save_checkpoint
from plumbing.console import pace
from plumbing.files import write_json
from plumbing.flags import ArgumentParser, explicit_flags, parse_resumable
from plumbing.run_folder import RunLog, code_version, output_folder
from plumbing.signals import signals
from plumbing.start import prepare
from utils import all_finite, fail, load_optimizer, on_device, shipped, shown, user_input

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

# Flags that say how a generator was trained, which generator.pt keeps.
OF_TRAINING = {
    *("nasbench_data", "accuracy_column", "objectives", "recipe", "seed", "batch_size", "b2", "n_critic"),
    *(name for name in ROBUST if not name.startswith(("g_", "d_"))),  # which are sizes of the networks
}

DIVERGED = 1e6  # no loss, score or reward of a training that works has a mean as large

# ------------------------------------------------------------------------------------------------------- flags


def parse_args(
    argv: list[str] | None = None,
    description: str = __doc__,
    objectives: tuple[str, ...] = ("accuracy",),
    paper: dict | None = None,
) -> argparse.Namespace:
    """The flags. objectives, paper: defaults, and values of the paper's recipe, where another script has others."""
    recipes = {"robust": ROBUST, "paper": PAPER | (paper or {})}
    parser = ArgumentParser(description, recipes, REFERENCE_FLAGS)
    add_flags(parser)
    parser.set_defaults(objectives=objectives)
    recipe = recipes[parser.parse_args(argv).recipe]
    parser.set_defaults(**(recipe | {"warmup_epochs": None}))  # it depends on the epochs
    may_change = ("nasbench_data", "n_epochs", "eval_every", "eval_size", "save_every", "compile", "cuda_graphs")
    keys = ("reference", "discriminator", "optimizers", *FOR_SAMPLING)
    args = parse_resumable(parser, argv, "gan", may_change, keys)
    if args.warmup_epochs is None:
        args.warmup_epochs = warmup_for(args.n_epochs, recipe) if args.likelihood_weight else 0
    elif (
        args.n_epochs <= args.warmup_epochs
        and args.adversarial_weight + args.policy_gradient_weight
        and not args.resume
    ):
        parser.error(
            f"argument --n_epochs: expected more than the {args.warmup_epochs} --warmup_epochs of likelihood alone"
        )
    check_flags(parser, args, explicit_flags(parser, argv))
    return args


# -------------------------------------------------------------------------------------------- data and networks


def read_training_records(args: argparse.Namespace, num_classes: dict[str, int]) -> list[Record]:
    """The NAS dataset. Ends the script when it cannot be trained on. Sets --space and --max_step to its space's."""
    with user_input("--nasbench_data"):
        space = find_space(args.space) if args.space else None
        records = read_records(args.nasbench_data, space, args.accuracy_column)
    if args.held_out_cells:
        with user_input("--held_out_cells"):
            check_held_out(records, args.nasbench_data, args.held_out_cells)
    space = records[0].genotype.space
    args.space, args.max_step = space.name, space.max_vertices if args.max_step is None else args.max_step
    if not space.min_vertices <= args.max_step <= space.max_vertices:
        fail(f"--max_step: expected {space.min_vertices} to {space.max_vertices}, got {args.max_step}")
    with user_input("--nasbench_data"):
        needed = max(args.batch_size, *num_classes.values())
        if len(records) < needed:
            raise ValueError(f"{args.nasbench_data} holds {len(records)} records, at least {needed} are needed")
        largest = max(cell.num_vertices for record in records for cell in record.genotype.cells)
        if largest > args.max_step:
            raise ValueError(f"{args.nasbench_data} has cells of {largest} vertices, --max_step is {args.max_step}")
    return records


def configs_of(args: argparse.Namespace, space: SearchSpace) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    """The settings of both networks that the flags give."""
    common = {
        "space": space,
        "num_classes": tuple(getattr(args, OBJECTIVES[name][0]) for name in args.objectives),
        "label_sizes": tuple(getattr(args, OBJECTIVES[name][1]) for name in args.objectives),
    }
    generator = GeneratorConfig(
        latent_dim=args.latent_dim,
        vertex_size=args.g_emb_size,
        graph_size=args.g_hidden_size,
        num_layers=args.g_num_layers,
        dropout=args.g_dropout,
        aggregation=args.g_aggr,
        max_vertices=args.max_step,
        chain_cells=args.chain_cells,
        autoregressive_edges=args.autoregressive_edges,
        temperature=args.temperature,
        **common,
    )
    discriminator = DiscriminatorConfig(
        vertex_size=args.d_emb_size,
        graph_size=args.d_hidden_size,
        num_layers=args.d_gnn_num_layers,
        mlp_layers=args.d_mlp_num_layers,
        gcn_dropout=args.d_gnn_dropout,
        mlp_dropout=args.d_mlp_dropout,
        aggregation=args.g_aggr,
        **common,
    )
    return generator, discriminator


def build_networks(args: argparse.Namespace, device: torch.device, space: SearchSpace = NAG_SPACE) -> Networks:
    """What the recipe trains, and nothing else. The predictor is added when it is trained or loaded."""
    of_generator, of_discriminator = configs_of(args, space)
    generator = Generator(**asdict(of_generator)).to(device)
    networks = Networks(generator, {"generator": build_optimizer(generator, args)})
    if args.adversarial_weight:
        networks.discriminator = Discriminator(**asdict(of_discriminator)).to(device)
        networks.optimizers["discriminator"] = build_optimizer(networks.discriminator, args)
    if args.kl_weight and args.policy_gradient_weight:
        networks.reference = networks.frozen_copy(generator)
    return networks


def build_optimizer(network: torch.nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    parameters = list(network.parameters())
    lr = on_device(args.lr, parameters[0].device)
    return torch.optim.Adam(parameters, lr, (args.b1, args.b2), fused=True, capturable=isinstance(lr, torch.Tensor))


# ------------------------------------------------------------------------------------------------- checkpoints


def go_on_from(args: argparse.Namespace, networks: Networks, data: TrainingData, device: torch.device) -> dict:
    """Load a run's weights, its optimizers and its predictor into the networks. Returns the checkpoint.

    The caller takes the epoch from it. Random numbers need none: every epoch seeds them from --seed and its own number.
    Ends the script when it is not that of a run on the same NAS dataset.
    """
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "gan")
        if state["objectives"] != [objective.to_dict() for objective in data.objectives]:
            raise ValueError(f"{args.nasbench_data} is not the NAS dataset that the run was started with")
        if args.n_epochs < state["epoch"]:
            raise ValueError(f"the run has done {state['epoch']} epochs already, more than --n_epochs")
        with of_this_version(args.resume):
            for name in ("generator", "discriminator", "reference"):
                if (network := getattr(networks, name)) is not None:
                    network.load_state_dict(state[name])
        networks.predictor = Predictor.from_checkpoint(args.resume, device)
    for name, optimizer in networks.optimizers.items():
        load_optimizer(optimizer, state["optimizers"][name])
    return state


def state_of(networks: Networks, data: TrainingData, predictor_tau: list[float], epoch: int, args) -> dict:
    """What a checkpoint holds after an epoch."""
    optional = {name: getattr(networks, name) for name in ("discriminator", "reference")}
    return {
        "generator": networks.generator.state_dict(),
        "generator_config": asdict(networks.generator.config),
        **{name: None if network is None else network.state_dict() for name, network in optional.items()},
        "predictor": networks.predictor.state_dict(),
        "predictor_config": asdict(networks.predictor.config),
        "predictor_tau": predictor_tau,
        "optimizers": {name: optimizer.state_dict() for name, optimizer in networks.optimizers.items()},
        "epoch": epoch,
        "objectives": [objective.to_dict() for objective in data.objectives],
        "args": vars(args),
    }


def save_generator(state: dict, path: Path) -> None:
    """Write what of a checkpoint is needed to draw cells, for machines of any kind, and how it was trained.

    Its "args" are those of the training, seed and recipe among them; sizes of the generator are in "generator_config".
    """
    for_sampling = {name: state[name] for name in FOR_SAMPLING} | {
        "args": {name: value for name, value in state["args"].items() if name in OF_TRAINING},
        **code_version(),
    }
    for name in ("generator", "predictor"):
        for_sampling[name] = {key: tensor.cpu() for key, tensor in state[name].items()}
    save_checkpoint(path, "gan", for_sampling)


# -------------------------------------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    num_classes = {name: getattr(args, OBJECTIVES[name][0]) for name in args.objectives}
    device = prepare(args)
    records = read_training_records(args, num_classes)
    with user_input("--nasbench_data"):
        data = TrainingData(records, num_classes, args.max_step, device)
        canonical = [record.genotype.canonical() for record in records]
        split_records(canonical, args.seed)  # too few different genotypes are refused before anything is written
    if args.n_critic > (steps := args.n_epochs * (len(data) // args.batch_size)):
        fail(f"--n_critic: expected at most the {steps} steps of the run, after which the generator has its first")
    networks, start_epoch = build_networks(args, device, data.space), 0
    if args.resume:
        state = go_on_from(args, networks, data, device)
        start_epoch, predictor_tau = state["epoch"], state["predictor_tau"]

    folder = output_folder(args)
    log = RunLog(folder, args, device, start_epoch if args.resume else None)
    if not args.resume:
        with user_input("--nasbench_data"):
            networks.predictor, predictor_tau = train_predictor(
                data.cells, data.quantiles, canonical, args.batch_size, args.seed
            )
    if args.compile:
        compile_parts(networks)
    print(f"{len(records)} genotypes, {len(data) // args.batch_size} steps an epoch, on {device}: {folder}")
    print_start(records, data, networks, predictor_tau)
    if not args.resume:
        show_nas_dataset(log, records, data.objectives)
    known = set(canonical)
    trainer = Trainer(networks, data, args)
    pace.expect((args.n_epochs - start_epoch) * (len(data) // args.batch_size))
    for epoch in range(start_epoch + 1, args.n_epochs + 1):
        with signals.held():  # until the epoch is saved
            values = train_one_epoch(trainer, epoch)
            if epoch % args.eval_every == 0 or epoch == args.n_epochs:
                quality, samples = sample_and_measure(
                    networks.generator, networks.predictor, data.objectives, args.eval_size, args.seed, known
                )
                write_json(folder / "samples" / f"epoch-{epoch:04d}.json", samples)
                show_samples(log, samples, epoch)
                values |= quality
                print("  generated: " + ", ".join(f"{name} {value:.2f}" for name, value in quality.items()))
            state = state_of(networks, data, predictor_tau, epoch, args)
            log.log(epoch, **values)  # first: RunLog drops lines of epochs that are done again
            if args.save_every and epoch % args.save_every == 0:  # before the checkpoint: none is missing after a kill
                save_generator(state, folder / f"generator-{epoch:04d}.pt")
            save_checkpoint(folder / "checkpoint.pt", "gan", state)
    log.close()
    save_generator(state, folder / "generator.pt")
    script = "generate_archs.py" if len(args.objectives) == 1 else "generate_archs_multiobj.py"
    print(f"wrote {folder / 'checkpoint.pt'} and {folder / 'generator.pt'}, all that is needed to draw cells")
    print(f"next: python {shown(shipped(script))} --checkpoint {shown(folder / 'generator.pt')}")


def print_start(records: list[Record], data: TrainingData, networks: Networks, predictor_tau: list[float]) -> None:
    """What the run begins with: the NAS dataset, and how good the predictor is."""
    real = cell_statistics(record.genotype for record in records)
    print(f"real cells: {real['vertices']:.2f} vertices, density {real['density']:.2f}")
    measured = zip(data.objectives, predictor_tau, networks.predictor.error.tolist(), strict=True)
    words = ", ".join(f"{objective.name} {value:.3f} (error {error:.3f})" for objective, value, error in measured)
    print(f"predictor, Kendall tau and error of the quantile on held-out records: {words}")


def train_one_epoch(trainer: Trainer, epoch: int) -> dict[str, float]:
    """Train epoch `epoch`, from 1, and print its means. Ends the script when training has diverged."""
    args, networks, started = trainer.args, trainer.networks, time.monotonic()
    if networks.reference is not None and epoch - 1 == args.warmup_epochs:
        networks.set_reference()
    values = trainer.train_epoch(epoch - 1)
    seconds = time.monotonic() - started
    advice = "training diverged; try a lower --lr or lower weights"
    for name, value in values.items():
        if not abs(value) < DIVERGED:  # NaN too
            fail(f"epoch {epoch}: {name} is {value:g}, {advice}")
    if not all_finite(networks.generator, networks.discriminator):  # the last step's, which no mean shows
        fail(f"epoch {epoch}: the weights are not all finite numbers, {advice}")
    line = " ".join(f"{name} {value:.3f}" for name, value in values.items())
    print(f"epoch {epoch}/{args.n_epochs}: {line} ({seconds:.0f} s){pace.left()}")
    return values | {"seconds": seconds}


if __name__ == "__main__":
    main(parse_args())
