"""How eval_archs.py trains one candidate: its stand-alone network, up to the last epoch of a round."""

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from genotypes import Genotype
from models.cost import genotype_cost
from models.network import CifarNetwork
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from training.checkpoints import Checkpoints
from training.cifar import accuracy, build_optimizer, train
from training.images import ImageSet
from training.steps import build_network, go_on_from
from utils import all_finite, user_input


class Weights(NamedTuple):
    """The files with a candidate's weights.

    before: the one to go on from, if any. after: the one to leave for the next round, if any.
    unfinished: the one for checkpoints within the round; None: there are none.
    """

    before: Path | None = None
    after: Path | None = None
    unfinished: Path | None = None


NO_WEIGHTS = Weights()


def train_candidate(
    genotype: Genotype,
    known: dict,
    images: ImageSet,
    held_out: ImageSet,
    args: argparse.Namespace,
    device: torch.device,
    before: dict | None = None,
    weights: Weights = NO_WEIGHTS,
) -> dict:
    """Train one candidate up to epoch args.epochs. Returns its result, see candidates.py.

    known: what the file of the candidates knows of it. before: its result of the round before, None in the first.
    """
    started, state = time.monotonic(), {"epoch": 0}
    if args.compile:
        torch.compiler.reset()  # else it gives up after a few networks
    network = build_network(CifarNetwork, genotype, len(images.classes), args, device)
    optimizer = build_optimizer(network, args)
    stopped = weights.unfinished and weights.unfinished.exists()
    if source := weights.unfinished if stopped else weights.before:
        with user_input("--resume", everywhere=True):  # each process has candidates of its own
            state = load_checkpoint(source, "candidate", ("network", "optimizer", "epoch"))
            go_on_from(state, source, network, optimizer)
    started -= state.get("seconds", 0.0)

    def save(path: Path, part: dict) -> None:
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(path, "candidate", state | part)

    def save_within(part: dict) -> None:
        save(weights.unfinished, part | {"seconds": time.monotonic() - started})

    checkpoints = Checkpoints(args.checkpoint_minutes, network, save_within if weights.unfinished else None, state)
    loss = train(network, images, args, device, optimizer, state["epoch"], checkpoints=checkpoints)["loss"]
    with checkpoints.interruptible():
        measured = accuracy(network, held_out, args.eval_batch_size, args.amp)
    if weights.after:
        save(weights.after, {"epoch": args.epochs})
    earlier = before["training"] if before else {"rounds": [], "seconds": 0.0}
    this_round = {
        "epochs": args.epochs,
        "held_out_accuracy": measured,
        "loss": loss if math.isfinite(loss) and all_finite(network) else None,
        "seconds": earlier["seconds"] + time.monotonic() - started,
    }
    training = describe_training(genotype, images, held_out, args, [*earlier["rounds"], this_round])
    return {**known, "held_out_accuracy": measured, "training": training}


def describe_training(
    genotype: Genotype, images: ImageSet, held_out: ImageSet, args: argparse.Namespace, rounds: list[dict]
) -> dict:
    """What a result says of the network that was trained, of how it was trained, and of the rounds.

    Its #params and MACs are those of this network; those of the file of the candidates are of another one.
    """
    params, macs = genotype_cost(genotype, len(images.classes), args.layers, args.channels, args.image_size)
    return {
        "params": params,
        "macs": macs,
        "loss": rounds[-1]["loss"],
        "epochs": args.epochs,
        "schedule_epochs": args.schedule_epochs,
        "layers": args.layers,
        "channels": args.channels,
        "image_size": args.image_size,
        "seed": args.seed,
        "training_images": len(images),
        "held_out_images": len(held_out),
        "rounds": rounds,
        "seconds": rounds[-1]["seconds"],
    }
