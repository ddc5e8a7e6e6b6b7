"""Train, or evaluate, the stand-alone network of one genotype on CIFAR-10, CIFAR-100 or a folder of small images.

    python train_cifar.py                                               # NAG_HIGH_ACC on CIFAR-10, as published
    python train_cifar.py --arch runs/generate_archs-.../genotypes.json:3 --dataset cifar100
    python train_cifar.py --dataset folder --data DIR --image_size 32 --epochs 10 --layers 1 --channels 16
    python train_cifar.py --epochs 50 --schedule_epochs 600 --holdout 5000       # the start of the long recipe
    python train_cifar.py --resume runs/train_cifar-...                          # go on after a stop
    python train_cifar.py --evaluate runs/train_cifar-.../checkpoint.pt
    python train_cifar.py --evaluate A.pt B.pt C.pt --voting hard                # an ensemble
    python train_cifar.py --evaluate CHECKPOINT --export FILE.safetensors        # or FILE.onnx, FILE.pt2
    torchrun --standalone --nproc_per_node=2 train_cifar.py ...                  # several GPUs, or CPU processes

--batch_size and --lr_max are those of one step, over all processes and --accumulate parts together. Every process draws
the same augmented batch and takes its part of it, so that two processes equal one with --accumulate 2, but for dropout
and drop path, which draw from streams of their own, and for the running statistics of batch norms, which are averaged.
--optimizer adabelief is that of the reference's later code, instead of the published SGD.
Writes checkpoint.pt, metrics.jsonl, TensorBoard events, config.json and, at the end, result.json with the test error.
The test images are used once, after the last epoch; what is chosen along the way is chosen on --holdout images.
NAG paper, section 4.2.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from genotypes import Genotype, load_genotype
from models.cost import genotype_cost
from models.export import check_export, export_network
from models.network import CifarNetwork
from training import distributed
from training.images import ImageSet, balanced_batch, check_classes, eval_batches, load_images, split, train_batches
from training.steps import (
    ADABELIEF_DECAY,
    ADABELIEF_LR,
    Step,
    add_step_flags,
    build_network,
    check_image_size,
    check_network_flags,
    check_step_flags,
    check_sync_bn,
    evaluate,
    go_on_from,
    network_from_checkpoint,
    open_log,
    own_part,
    train_steps,
    vote,
)
from training.steps import build_optimizer as make_optimizer
from utils import (
    ArgumentParser,
    add_common_flags,
    autocast,
    cosine,
    derive_seed,
    device_name,
    explicit_flags,
    fail,
    load_checkpoint,
    number,
    output_folder,
    parse_resumable,
    prepare,
    refuse_used,
    save_checkpoint,
    set_seed,
    shown,
    user_input,
    versions,
    write_json,
)

SGD_LR, SGD_DECAY = 0.025, 3e-4


def build_optimizer(network: CifarNetwork, args: argparse.Namespace) -> torch.optim.Optimizer:
    return make_optimizer(args.optimizer, network, args.lr_max, momentum=0.9, weight_decay=args.l2_reg)


def train(
    network: CifarNetwork,
    images: ImageSet,
    args: argparse.Namespace,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
    start_epoch: int = 0,
    after_epoch: Callable[[int, dict], None] = lambda epochs_done, values: None,
) -> dict[str, float]:
    """Train up to epoch args.epochs of a schedule of args.schedule_epochs. Returns the values of the last epoch.

    after_epoch(epochs_done, values): called after each epoch with its mean loss, training accuracy and so on.
    """
    optimizer = optimizer or build_optimizer(network, args)
    step = Step(network, optimizer, args, device)
    values = {}
    for epoch in range(start_epoch, args.epochs):
        started = time.monotonic()
        values = train_epoch(step, images, args, epoch, device)
        values |= {"lr": float(optimizer.param_groups[0]["lr"]), "seconds": time.monotonic() - started}
        after_epoch(epoch + 1, values)
    return values


def train_epoch(step: Step, images: ImageSet, args, epoch: int, device) -> dict[str, float]:
    """One epoch over the training images. Returns mean loss and training accuracy.

    Every random stream starts anew from the seed and the epoch.
    """
    set_seed(derive_seed(args.seed, epoch, 0, distributed.rank()))  # dropout and drop path: one stream a process
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    steps = len(images) // args.batch_size
    first, all_steps = epoch * steps, args.schedule_epochs * steps
    progress = torch.arange(first + 1, first + steps + 1, device=device) / all_steps  # a number would be compiled in
    part = distributed.share(args.batch_size)
    batches = train_batches(images, args.batch_size, generator, args.cutout_size, args.image_size // 8)
    own_parts = ((x[part], labels[part]) for x, labels in batches)

    def learning_rate(step: int) -> float:
        return cosine(first + step, all_steps, args.lr_max, args.lr_min)

    return train_steps(step, own_parts, progress, learning_rate, f"epoch {epoch + 1}")


def accuracy(network: CifarNetwork, images: ImageSet, batch_size: int = 500, amp: str = "auto") -> float:
    """Share of the images that the network, in eval mode, classifies correctly; the processes share the work."""
    return evaluate(network, eval_batches(own_part(images), batch_size), images.labels.device, amp)["top1"]


def load_data(
    args: argparse.Namespace, device: torch.device, classes: list[str] | None = None
) -> tuple[ImageSet, ImageSet, ImageSet]:
    """(training, held-out, test) images; the held-out part is empty without --holdout. Ends the script on bad input.

    classes: those that they must have, of the run to resume.
    """
    with user_input("--data"), distributed.first_process_first():  # it downloads and decodes, the others find the files
        images, test = load_images(args.dataset, args.data, args.image_size, args.cache_dir, args.skip_bad, device)
        if classes:
            check_classes(images, classes, args.resume)
    with user_input("--holdout"):
        images, held_out = split(images, args.holdout, args.seed)
    if args.num_images:
        with user_input("--num_images"):
            images = balanced_batch(images, args.num_images, args.seed)
    if args.batch_size > len(images):
        fail(f"--batch_size: expected at most the {len(images)} training images, got {args.batch_size}")
    return images, held_out, test


# ------------------------------------------------------------------------------------------------------- flags


def add_training_flags(
    parser: argparse.ArgumentParser, epochs: int = 600, schedule_epochs: int | None = None, holdout: int = 0
) -> None:
    """The flags about images, network and training, which eval_archs has too; the defaults that differ are given."""
    add = parser.add_argument
    count, rate, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1, above=True)
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "folder"])
    add("--data", default="data", help="folder of the images (CIFAR: downloaded into it)")
    add("--cache_dir", help="where decoded image folders are kept (default: beside them)")
    add("--skip_bad", action="store_true", help="leave out images that cannot be read")
    add("--image_size", type=number(int, 8), default=32, help="pixels")
    add("--num_images", type=number(int, 0), default=0, help="train on that many images only (0: all)")
    add("--holdout", type=number(int, 0), default=holdout, help="training images kept out, to select on")
    add("--epochs", type=count, default=epochs)
    length = "that of --epochs" if schedule_epochs is None else schedule_epochs
    add(
        "--schedule_epochs",
        type=count,
        default=schedule_epochs,
        help=f"of learning rate, drop path (default: {length})",
    )
    add("--batch_size", type=number(int, 2), default=96)
    add("--eval_batch_size", type=count, default=500)
    add("--layers", type=count, default=6, help="normal cells per stack")
    add("--channels", type=number(int, 2), default=36)
    add("--cutout_size", type=number(int, 0), default=16, help="pixels; 0: off")
    add("--grad_clip", type=rate, default=5.0, help="largest norm of the gradient")
    add("--lr_max", type=rate, help=f"(default: {SGD_LR}; AdaBelief {ADABELIEF_LR})")
    add("--lr_min", type=number(float, 0), default=0.0)
    add("--keep_prob", type=share, default=0.6, help="of the classifier's dropout")
    add("--drop_path_keep_prob", type=share, default=0.8)
    decay = ADABELIEF_DECAY["cifar"]
    add("--l2_reg", type=number(float, 0), help=f"weight decay (default: {SGD_DECAY}; AdaBelief {decay})")
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help="0: no auxiliary head")
    add_step_flags(parser)


def check_training_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, processes: int) -> None:
    """Refuse what flags do not allow together; settle the defaults that depend on other flags.

    processes: that share a batch.
    """
    args.schedule_epochs = args.schedule_epochs or args.epochs
    lr, decay = (SGD_LR, SGD_DECAY) if args.optimizer == "sgd" else (ADABELIEF_LR, ADABELIEF_DECAY["cifar"])
    args.lr_max = lr if args.lr_max is None else args.lr_max
    args.l2_reg = decay if args.l2_reg is None else args.l2_reg
    check_step_flags(parser, args, processes)
    check_image_size(parser, args, CifarNetwork.auxiliary_sizes)
    if args.lr_min > args.lr_max:
        parser.error("argument --lr_min: expected at most --lr_max")
    if args.epochs > args.schedule_epochs:
        parser.error(f"argument --epochs: expected at most the {args.schedule_epochs} of the schedule")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--arch", default="NAG_HIGH_ACC", help="a published genotype's name, FILE.json or FILE.json:INDEX")
    add_training_flags(parser)
    add("--eval_every", type=number(int, 1), default=1, help="epochs between accuracies of the held-out images")
    add("--save_every", type=number(int, 1), default=1, help="epochs between checkpoints")
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", help="run folder or checkpoint to go on with")
    going_on.add_argument(
        "--evaluate", nargs="+", metavar="CHECKPOINT", help="only measure its test error; of several, the joint one too"
    )
    add("--voting", default="hard", choices=["hard", "soft"], help="of several: majority, or mean of logits")
    add("--export", metavar="FILE", help="with --evaluate: the network as FILE.safetensors, FILE.onnx or FILE.pt2")
    add_common_flags(parser)
    may_change = (
        "data",
        "cache_dir",
        "epochs",
        "eval_every",
        "save_every",
        "eval_batch_size",
        "compile",
        "cuda_graphs",
        "accumulate",
    )
    args = parse_resumable(parser, argv, "cifar", may_change, ("network", "optimizer", "classes", "epoch"))
    if "voting" in explicit_flags(parser, argv) and len(args.evaluate or ()) < 2:
        parser.error("argument --voting: needs --evaluate with several checkpoints")
    if args.evaluate:
        return evaluation_args(parser, argv, args)
    if args.export:
        parser.error("argument --export: needs --evaluate CHECKPOINT")
    check_training_flags(parser, args, distributed.planned_world())
    return args


def evaluation_args(parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace):
    """With --evaluate, the images are by default those that the networks were trained for."""
    if args.export:
        if len(args.evaluate) > 1:
            parser.error("argument --export: expected one checkpoint in --evaluate")
        with user_input("--export"):
            check_export(args.export)
    given = explicit_flags(parser, argv)
    kept = {"dataset", "data", "cache_dir", "skip_bad", "image_size", "amp"} - given
    with user_input("--evaluate"):
        needed = ("args", "genotype", "network", "network_config")
        states = [load_checkpoint(path, "cifar", needed) for path in args.evaluate]
    for path, state in zip(args.evaluate, states, strict=True):
        check_network_flags(args, given, state, path)
    saved = [state["args"] for state in states]
    with user_input("--evaluate"):
        for path, other in zip(args.evaluate, saved, strict=True):
            for name in sorted(kept & {"dataset", "image_size"}):
                if other[name] != saved[0][name]:
                    raise ValueError(
                        f"{path} was trained with --{name} {other[name]}, {args.evaluate[0]} with {saved[0][name]}"
                    )
    return argparse.Namespace(**{**vars(args), **{name: saved[0][name] for name in kept}})


# -------------------------------------------------------------------------------------------------- evaluation


def evaluate_checkpoints(args: argparse.Namespace, device: torch.device) -> None:
    """Measure the test error of a checkpoint, or of several and of their vote."""
    path = output_folder(args) / "evaluation.json"
    refuse_used(path.parent, path.name)
    with user_input("--evaluate"):
        states = [load_checkpoint(path, "cifar") for path in args.evaluate]
    with user_input("--data"), distributed.first_process_first():
        _, test = load_images(args.dataset, args.data, args.image_size, args.cache_dir, args.skip_bad, device)
        for checkpoint, state in zip(args.evaluate, states, strict=True):
            check_classes(test, state["classes"], checkpoint)
    with user_input("--evaluate"):
        networks = [network_from_checkpoint(*found, device) for found in zip(states, args.evaluate, strict=True)]
    correct = count_correct(networks, states, test, args)
    results = []
    for checkpoint, state, count in zip(args.evaluate, states, correct, strict=False):  # the last count: the vote's
        result = outcome(state["genotype"], count / len(test), state["args"], args, len(test.classes))
        results.append(result | {"checkpoint": checkpoint, "epochs": state["epoch"], "images": {"test": len(test)}})
    joint = {
        "voting": args.voting,
        "test_accuracy": correct[-1] / len(test),
        "test_error": 1 - correct[-1] / len(test),
        "params": sum(result["params"] for result in results),
        "macs": sum(result["macs"] for result in results),
        "images": {"test": len(test)},
        "members": results,
    }
    if not distributed.is_main():
        return
    with user_input("--output_dir"):
        write_json(path, joint if len(states) > 1 else results[0])
    for result in results:
        print(f"{describe(result)} ({len(test)} images, after epoch {result['epochs']}): {result['checkpoint']}")
    if len(states) > 1:
        print(f"{args.voting} voting of {len(states)}: {describe(joint)}")
    print(f"wrote {path}")
    if args.export:
        with user_input("--export"):
            written = export_network(networks[0], args.export, description(states[0], args))
        print(f"wrote {' and '.join(map(str, written))}")


def description(state: dict, args: argparse.Namespace) -> dict:
    """What the file beside an exported network says of it."""
    known = {name: state[name] for name in ("genotype", "network_config", "classes", "mean", "std")}
    return {"kind": "cifar", "arch": state["args"]["arch"], "image_size": args.image_size, **known}


@torch.inference_mode()
def count_correct(
    networks: list[CifarNetwork], states: list[dict], test: ImageSet, args: argparse.Namespace
) -> list[int]:
    """How many test images each network classifies correctly, and, last, their vote; the processes share the work."""
    own = own_part(test)
    views = [
        replace(own, mean=tuple(state["mean"]), std=tuple(state["std"])) for state in states
    ]  # as each was trained
    counts = torch.zeros(len(networks) + 1, dtype=torch.long, device=test.labels.device)
    for batches in zip(*(eval_batches(view, args.eval_batch_size) for view in views), strict=True):
        logits = []
        for network, (x, _) in zip(networks, batches, strict=True):
            with autocast(args.amp, x.device):
                logits.append(network.eval()(x)[0].float())
        logits, labels = torch.stack(logits), batches[0][1]  # (networks, B, classes), (B,)
        winners = torch.cat([logits.argmax(2), vote(logits, args.voting)[None]])
        counts += (winners == labels).sum(1)
    return distributed.sum_over_ranks(counts).tolist()


def outcome(genotype: dict, test_accuracy: float, trained: dict, args: argparse.Namespace, num_classes: int) -> dict:
    """#params and MACs beside the accuracy. trained: the flags that the network was trained with."""
    size = (trained["layers"], trained["channels"], args.image_size)
    params, macs = genotype_cost(Genotype.from_dict(genotype), num_classes, *size)
    measured = {"test_accuracy": test_accuracy, "test_error": 1 - test_accuracy}
    return {"arch": trained["arch"], "genotype": genotype, "params": params, "macs": macs, **measured}


def describe(result: dict) -> str:
    size = f"{result['params'] / 1e6:.3f} M parameters, {result['macs'] / 1e6:.1f} M MACs"
    return f"test error {result['test_error']:.2%}, {size}"


def main(args: argparse.Namespace) -> None:
    device = distributed.start(prepare(args, shared=True))
    if args.evaluate:
        evaluate_checkpoints(args, device)
    else:
        run(args, device)
    distributed.finish()


def run(args: argparse.Namespace, device: torch.device) -> None:
    """Train, then measure the test error. Process 0 writes and prints."""
    check_sync_bn(args, device)
    with user_input("--resume" if args.resume else "--arch"):
        state = load_checkpoint(args.resume, "cifar") if args.resume else None
        genotype = Genotype.from_dict(state["genotype"]) if state else load_genotype(args.arch)
        if not genotype.is_valid:
            raise ValueError(f"{args.arch} is not valid: a cell has no path from an input to the output")
    images, held_out, test = load_data(args, device, state and state["classes"])
    network = build_network(CifarNetwork, genotype, len(images.classes), args, device)
    optimizer = build_optimizer(network, args)
    start_epoch, seconds = 0, 0.0
    if state:
        with user_input("--data"):
            if len(images) != state["training_images"]:
                raise ValueError(f"{len(images)} training images, the run to resume has {state['training_images']}")
        if state["epoch"] > args.epochs:
            fail(f"--epochs: the run to resume has {state['epoch']} epochs already, got {args.epochs}")
        with user_input("--resume"):
            go_on_from(state, args.resume, network, optimizer)
        start_epoch, seconds = state["epoch"], state["seconds"]

    folder = output_folder(args)
    log = open_log(folder, args, device, start_epoch if args.resume else None)
    counts = {"train": len(images), "held_out": len(held_out), "test": len(test)}
    params, macs = genotype_cost(genotype, len(images.classes), args.layers, args.channels, args.image_size)
    if log:
        print(
            f"{args.arch}: {params / 1e6:.3f} M parameters, {macs / 1e6:.1f} M MACs; {len(images)} training, "
            f"{len(held_out)} held-out images, {len(images) // args.batch_size} steps an epoch, "
            f"{distributed.processes()} on {device}: {folder}"
        )

    def after_epoch(epoch: int, values: dict) -> None:
        nonlocal seconds
        if not math.isfinite(values["loss"]):
            fail(f"the loss is not finite in epoch {epoch}; a smaller --lr_max may help")
        seconds += values["seconds"]
        line = f"epoch {epoch}/{args.epochs}: loss {values['loss']:.3f}, accuracy {values['train_accuracy']:.4f}"
        last = epoch == args.epochs
        if args.holdout and (epoch % args.eval_every == 0 or last):
            values["held_out_accuracy"] = accuracy(network, held_out, args.eval_batch_size, args.amp)
            line += f", held-out {values['held_out_accuracy']:.4f}"
        if log is None:
            return
        print(f"{line} ({values['seconds']:.0f} s)")
        log.log(epoch, **values)
        if epoch % args.save_every == 0 or last:
            state = {
                "network": network.state_dict(),
                "network_config": asdict(network.config),
                "genotype": genotype.to_dict(),
                "optimizer": optimizer.state_dict(),
                "epoch": epoch,
                "seconds": seconds,
                "classes": images.classes,
                "mean": images.mean,
                "std": images.std,
                "training_images": len(images),
                "args": vars(args),
            }
            save_checkpoint(folder / "checkpoint.pt", "cifar", state)

    train(network, images, args, device, optimizer, start_epoch, after_epoch)
    test_accuracy = accuracy(network, test, args.eval_batch_size, args.amp)
    result = outcome(genotype.to_dict(), test_accuracy, vars(args), args, len(test.classes))
    if args.holdout:
        result["held_out_accuracy"] = accuracy(network, held_out, args.eval_batch_size, args.amp)
    if log is None:
        return
    result |= {"epochs": args.epochs, "schedule_epochs": args.schedule_epochs, "seed": args.seed, "seconds": seconds}
    result |= {"images": counts, "versions": versions(), "device": device_name(device)}
    write_json(folder / "result.json", result)
    log.close()
    print(
        f"{describe(result)} ({len(test)} images, after epoch {args.epochs}, {seconds:.0f} s of training)\n"
        f"wrote {folder / 'result.json'} and {folder / 'checkpoint.pt'}\n"
        f"next: python train_cifar.py --evaluate {shown(folder / 'checkpoint.pt')}"
    )


if __name__ == "__main__":
    main(parse_args())
