"""Train, or evaluate, the stand-alone network of one genotype on CIFAR-10, CIFAR-100 or a folder of small images.

    python train_cifar.py                                               # NAG_HIGH_ACC on CIFAR-10, as published
    python train_cifar.py --arch runs/generate_archs-.../genotypes.json:3 --dataset cifar100
    python train_cifar.py --dataset folder --data DIR --image_size 32 --epochs 10 --layers 1 --channels 16
    python train_cifar.py --epochs 50 --schedule_epochs 600 --holdout 5000       # the start of the long recipe
    python train_cifar.py --resume runs/train_cifar-...                          # go on after a stop
    python train_cifar.py --evaluate runs/train_cifar-.../checkpoint.pt
    python train_cifar.py --evaluate A.pt B.pt C.pt --voting hard                # an ensemble
    python train_cifar.py --evaluate CHECKPOINT --predict PATH                   # classes of images, one or a folder
    python train_cifar.py --evaluate CHECKPOINT --export FILE.safetensors        # or FILE.onnx, FILE.pt2
    torchrun --standalone --nproc_per_node=2 train_cifar.py ...                  # several GPUs, or CPU processes

DIR holds train and test (or val, valid, validation), each a folder of class folders or a .zip of one; or DIR is such a
folder or .zip itself, of which --test_share is kept to test on.
--batch_size and --lr_max are those of one step, over all processes and --accumulate parts together. Every process draws
the same augmented batch and takes its part of it, so that two processes equal one with --accumulate 2, but for dropout
and drop path, which draw from a stream of each process, and for the running statistics of batch norms, which are
averaged.
Writes checkpoint.pt, metrics.jsonl, TensorBoard events, config.json and, at the end, result.json with the test error
and predictions.npz with the class chosen for each test image, which report.py reads.
The test images are used once, after the last epoch; what is chosen along the way is chosen on --holdout images.
NAG paper, section 4.2.
"""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from generation.pictures import show_confusions
from genotypes import Genotype
from models.cost import genotype_cost
from models.network import CifarNetwork
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.console import pace, progress_bar
from plumbing.files import write_json
from plumbing.flags import (
    ArgumentParser,
    add_checkpoint_minutes_flag,
    add_common_flags,
    explicit_flags,
    number,
    parse_resumable,
)
from plumbing.run_folder import RunLog, device_name, output_folder, refuse_used, versions
from plumbing.signals import signals
from plumbing.start import prepare
from training import distributed
from training.checkpoints import Checkpoints
from training.cifar import (
    REFERENCE_FLAGS,
    accuracy,
    add_training_flags,
    build_optimizer,
    check_training_flags,
    load_data,
    load_parts,
    train_epoch,
    write_predictions,
)
from training.flags import add_arch_flag, add_predict_flag, check_sync_bn, evaluation_args
from training.images import ImageSet, check_classes, eval_batches
from training.own_images import OF_A_SPLIT
from training.predicting import Member, pixels_of, predict_and_write
from training.steps import (
    Step,
    build_network,
    check_training_images,
    export_trained,
    genotype_to_train,
    go_on_from,
    network_from_checkpoint,
    network_state,
    open_log,
    own_part,
    vote,
)
from utils import autocast, fail, shipped, shown, stop_if_diverged, user_input

MAY_CHANGE = """
    data cache_dir epochs eval_every save_every eval_batch_size compile cuda_graphs accumulate
""".split()  # the flags that a resumed run need not keep


# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, reference_flags=REFERENCE_FLAGS)
    add_arch_flag(parser.add_argument_group("genotype"))
    add_training_flags(parser)
    add_checkpoint_flags(parser)
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "cifar", tuple(MAY_CHANGE), ("network", "optimizer", "classes", "epoch"))
    if "voting" in explicit_flags(parser, argv) and len(args.evaluate or ()) < 2:
        parser.error("argument --voting: needs --evaluate with several checkpoints")
    if args.evaluate:
        of_the_images = {"dataset", "data", "cache_dir", "skip_bad", "image_size", "amp", *OF_A_SPLIT}
        return evaluation_args(parser, argv, args, "cifar", args.evaluate, of_the_images)
    for name in ("export", "predict"):
        if getattr(args, name):
            parser.error(f"argument --{name}: needs --evaluate CHECKPOINT")
    check_training_flags(parser, args, distributed.planned_world(), explicit_flags(parser, argv))
    return args


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about what is saved, resumed and evaluated."""
    group = parser.add_argument_group("checkpoints and evaluation")
    add, count = group.add_argument, number(int, 1)
    add("--eval_every", type=count, default=1, help="epochs between evaluations on the held-out images")
    add("--save_every", type=count, default=1, help="epochs between checkpoints")
    add_checkpoint_minutes_flag(group)
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", help="run folder, or its checkpoint.pt, to go on with")
    evaluated = "only measure the test error; of several checkpoints, that of their vote too"
    either.add_argument("--evaluate", nargs="+", metavar="CHECKPOINT", help=evaluated)
    voting = "how an ensemble decides: hard, by majority; soft, by the mean of logits"
    add("--voting", default="hard", choices=["hard", "soft"], help=voting)
    add_predict_flag(group)
    add("--export", metavar="FILE", help="with --evaluate: write the network to FILE.safetensors, .onnx or .pt2")


# --------------------------------------------------------------------------------------------------- evaluation


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Measure the test error of a checkpoint, or of several and of their vote, or classify the images of --predict, or
    both; export the network if asked for.
    """
    folder = output_folder(args)
    results = {"evaluation.json": args.data is not None, "predictions.csv": args.predict}
    refuse_used(folder, *(name for name, wanted in results.items() if wanted))
    with user_input("--evaluate"):
        states = [load_checkpoint(checkpoint, "cifar") for checkpoint in args.evaluate]
    test = None if args.data is None else load_parts(args, device)[1]
    for checkpoint, state in zip(args.evaluate, states, strict=True):
        if state["classes"] != states[0]["classes"]:
            fail(f"--evaluate: {checkpoint} was trained on other classes than {args.evaluate[0]}")
    if test is not None:
        with user_input("--data"):
            check_classes(test, states[0]["classes"], args.evaluate[0])
    with user_input("--evaluate"):
        networks = [network_from_checkpoint(*found, device) for found in zip(states, args.evaluate, strict=True)]
    if test is not None:
        measure(args, states, networks, test, folder / "evaluation.json")
    if args.predict:
        pairs = zip(networks, states, strict=True)
        members = [Member(network, state["mean"], state["std"]) for network, state in pairs]
        prepare = partial(pixels_of, image_size=args.image_size)
        predict_and_write(args, device, prepare, members, states[0]["classes"], folder / "predictions.csv")
    if args.export and distributed.is_main():
        export_trained(networks[0], states[0], args, "cifar", states[0]["mean"], states[0]["std"])


def measure(
    args: argparse.Namespace, states: list[dict], networks: list[CifarNetwork], test: ImageSet, path: Path
) -> None:
    """Measure the test error of networks, whose checkpoints are `states`, and write it to the file `path`."""
    *correct, correct_votes = count_correct(networks, states, test, args)
    if not distributed.is_main():
        return
    members = []
    for checkpoint, state, count in zip(args.evaluate, states, correct, strict=True):
        member = outcome(state, count / len(test), args.image_size)
        members.append(member | {"checkpoint": checkpoint, "epochs": state["epoch"], "images": {"test": len(test)}})
    result = members[0] if len(members) == 1 else joint_outcome(members, correct_votes / len(test), args.voting)
    refuse_used(path.parent, path.name)  # again, as another evaluation may have been quicker
    write_json(path, result)
    for member in members:
        print(f"{describe(member)} ({len(test)} images, after epoch {member['epochs']}): {member['checkpoint']}")
    if len(members) > 1:
        print(f"{args.voting} voting of {len(members)}: {describe(result)}")
    print(f"wrote {path}")


@torch.inference_mode()
def count_correct(
    networks: list[CifarNetwork], states: list[dict], test: ImageSet, args: argparse.Namespace
) -> list[int]:
    """How many test images each network classifies correctly and, last, their vote; the processes share the work.

    states: the checkpoint of each network, whose images are normalised as they were in its training.
    """
    own = own_part(test)
    views = [replace(own, mean=tuple(state["mean"]), std=tuple(state["std"])) for state in states]
    counts = torch.zeros(len(networks) + 1, dtype=torch.long, device=test.labels.device)
    views_of_batches = zip(*(eval_batches(view, args.eval_batch_size) for view in views), strict=True)
    total = -(-len(own) // args.eval_batch_size)
    for batches in progress_bar(views_of_batches, total=total, desc="evaluate"):
        logits = []
        for network, (x, _) in zip(networks, batches, strict=True):
            with autocast(args.amp, x.device):
                logits.append(network.eval()(x)[0].float())
        logits, labels = torch.stack(logits), batches[0][1]  # (networks, B, classes), (B,)
        chosen = torch.cat([logits.argmax(2), vote(logits, args.voting)[None]])  # (networks + 1, B)
        counts += (chosen == labels).sum(1)
    return distributed.sum_over_ranks(counts).tolist()


def outcome(state: dict, test_accuracy: float, image_size: int) -> dict:
    """What a trained network has reached, beside its #params and MACs.

    state: its checkpoint, of which "args", "genotype" and "network_config" are read.
    """
    config = state["network_config"]
    size = (config["num_classes"], config["layers"], config["channels"], image_size)
    params, macs = genotype_cost(Genotype.from_dict(state["genotype"]), *size)
    found = {"arch": state["args"]["arch"], "genotype": state["genotype"], "params": params, "macs": macs}
    return found | {"test_accuracy": test_accuracy, "test_error": 1 - test_accuracy}


def joint_outcome(members: list[dict], test_accuracy: float, voting: str) -> dict:
    """What an ensemble has reached by its votes. members: the outcomes of its networks."""
    return {
        "voting": voting,
        "test_accuracy": test_accuracy,
        "test_error": 1 - test_accuracy,
        "params": sum(member["params"] for member in members),
        "macs": sum(member["macs"] for member in members),
        "images": members[0]["images"],
        "members": members,
    }


def describe(result: dict) -> str:
    size = f"{result['params'] / 1e6:.3f} M parameters, {result['macs'] / 1e6:.1f} M MACs"
    return f"test error {result['test_error']:.2%}, {size}"


# ----------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a network, then measure its test error. Only process 0 writes and prints."""
    check_sync_bn(args, device)
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "cifar") if args.resume else None
    genotype = genotype_to_train(args, state)
    images, held_out, test = load_data(args, device, state and state["classes"])
    network = build_network(CifarNetwork, genotype, len(images.classes), args, device)
    optimizer = build_optimizer(network, args)
    reached = resume(state, args, images, network, optimizer) if state else {"epoch": 0, "seconds": 0.0}
    folder = output_folder(args)
    log = open_log(folder, args, device, reached["epoch"] if args.resume else None)
    if log:
        params, macs = genotype_cost(genotype, len(images.classes), args.layers, args.channels, args.image_size)
        print(
            f"{args.arch}: {params / 1e6:.3f} M parameters, {macs / 1e6:.1f} M MACs; {len(images)} training, "
            f"{len(held_out)} held-out images, {len(images) // args.batch_size} steps an epoch, "
            f"{distributed.processes()} on {device}: {folder}"
        )

    def save_run(part: dict) -> None:
        if log:
            save(folder, args, images, network_state(network, genotype, optimizer) | reached | part)

    step = Step(network, optimizer, args, device)
    checkpoints = Checkpoints(args.checkpoint_minutes, network, save_run, state)
    pace.expect((args.epochs - reached["epoch"]) * (len(images) // args.batch_size) - checkpoints.done)
    with signals.held():
        for epoch in range(reached["epoch"], args.epochs):
            values = train_epoch(step, images, args, epoch, device, checkpoints)
            stop_if_diverged(epoch + 1, values["loss"], network, advice="a smaller --lr_max may help")
            last = epoch + 1 == args.epochs
            if args.holdout and (last or (epoch + 1) % args.eval_every == 0):
                with checkpoints.interruptible():
                    values["held_out_accuracy"] = accuracy(network, held_out, args.eval_batch_size, args.amp)
            reached = {"epoch": epoch + 1, "seconds": reached["seconds"] + values["seconds"]}
            if log:
                log.log(epoch + 1, **values)
                if last or (epoch + 1) % args.save_every == 0:
                    save_run({})
                print(progress_line(epoch + 1, args.epochs, values))
    measured = {"test": accuracy(network, test, args.eval_batch_size, args.amp)}
    if args.holdout:
        measured["held_out"] = accuracy(network, held_out, args.eval_batch_size, args.amp)
    if log:
        counts = {"train": len(images), "held_out": len(held_out), "test": len(test)}
        state = network_state(network, genotype, optimizer) | reached
        write_predictions(folder / "predictions.npz", network, test, args)
        show_confusions(log, folder / "predictions.npz", args.epochs)
        finish(args, device, folder, log, state, measured, counts)


def resume(
    state: dict,
    args: argparse.Namespace,
    images: ImageSet,
    network: CifarNetwork,
    optimizer: torch.optim.Optimizer,
) -> dict:
    """Load the checkpoint `state` of the run to resume. Returns what it has reached: {"epoch", "seconds"}."""
    check_training_images(images, state)
    if state["epoch"] > args.epochs:
        fail(f"--epochs: the run to resume has {state['epoch']} epochs already, got {args.epochs}")
    with user_input("--resume"):
        go_on_from(state, args.resume, network, optimizer)
    return {"epoch": state["epoch"], "seconds": state["seconds"]}


def progress_line(epoch: int, epochs: int, values: dict) -> str:
    """What is printed after an epoch."""
    held_out = f", held-out {values['held_out_accuracy']:.4f}" if "held_out_accuracy" in values else ""
    reached = f"loss {values['loss']:.3f}, accuracy {values['train_accuracy']:.4f}{held_out}"
    return f"epoch {epoch}/{epochs}: {reached} ({values['seconds']:.0f} s){pace.left()}"


def save(folder: Path, args: argparse.Namespace, images: ImageSet, state: dict) -> None:
    """Write checkpoint.pt. state: network, optimizer and what was reached."""
    known = {"classes": images.classes, "mean": images.mean, "std": images.std, "training_images": len(images)}
    save_checkpoint(folder / "checkpoint.pt", "cifar", state | known | {"args": vars(args)})


def finish(
    args: argparse.Namespace,
    device: torch.device,
    folder: Path,
    log: RunLog,
    state: dict,
    measured: dict[str, float],
    counts: dict[str, int],
) -> None:
    """Write and print the result of a run.

    state: network and what was reached. measured: accuracy on the test and the held-out images. counts: of images.
    """
    result = outcome(state | {"args": vars(args)}, measured["test"], args.image_size)
    if "held_out" in measured:
        result["held_out_accuracy"] = measured["held_out"]
    result |= {"epochs": args.epochs, "schedule_epochs": args.schedule_epochs, "seed": args.seed}
    result |= {"seconds": state["seconds"], "images": counts, "versions": versions(), "device": device_name(device)}
    write_json(folder / "result.json", result)
    log.close()
    command = f"python {shown(shipped('train_cifar.py'))} --evaluate {shown(folder / 'checkpoint.pt')}"
    print(
        f"{describe(result)} ({counts['test']} images, after epoch {args.epochs}, {state['seconds']:.0f} s of training)"
        f"\nwrote {folder / 'result.json'} and {folder / 'checkpoint.pt'}\n"
        f"classify images by: {command} --predict PATH\n"
        f"next: {command}"
    )


# --------------------------------------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    device = distributed.start(prepare(args, shared=True))
    if args.evaluate:
        evaluate(args, device)
    else:
        train(args, device)
    distributed.finish()


if __name__ == "__main__":
    main(parse_args())
