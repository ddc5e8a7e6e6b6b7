"""Train, or evaluate, the ImageNet network of one genotype on a tree of images.

    python train_imagenet.py --data DIR                                  # NAG_HIGH_ACC, as published
    torchrun --standalone --nproc_per_node=8 train_imagenet.py --data DIR --workers 12
    python train_imagenet.py --data DIR --image_size 64 --auxiliary_weight 0 --layers 1 --channels 8 --epochs 2
    python train_imagenet.py --resume runs/train_imagenet-...            # go on after a stop
    python train_imagenet.py --evaluate runs/train_imagenet-.../best.pt

DIR holds train and test (or val, valid, validation), each a tree of class folders or a .zip of one, read in place.
--batch_size and --lr are those of one step, over all processes and accumulated parts together.
Writes checkpoint.pt (last epoch), best.pt (best on held-out training images), metrics.jsonl, TensorBoard events,
config.json and, at the end, result.json. The test images are used after the last epoch only, unless --select_on_val.
NAG paper, section 4.3.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from genotypes import Genotype, load_genotype
from models.export import check_export, export_network
from models.network import ImageNetNetwork, count_macs, count_parameters
from training import distributed
from training.image_stream import MEAN, STD, EvalStream, ImageFiles, TrainStream, find_jpeg_decoder, open_images
from training.images import balanced_batch, check_classes, split
from training.steps import (
    ADABELIEF_DECAY,
    ADABELIEF_LR,
    Step,
    add_step_flags,
    build_network,
    build_optimizer,
    check_image_size,
    check_network_flags,
    check_step_flags,
    check_sync_bn,
    go_on_from,
    network_from_checkpoint,
    open_log,
    train_steps,
)
from training.steps import evaluate as evaluate_network
from utils import (
    ArgumentParser,
    RunLog,
    add_common_flags,
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

HELD_OUT_PER_CLASS = 10  # default of --holdout, but at most a tenth of the training images
SGD_LR, SGD_DECAY = 0.1, 3e-5


# ---------------------------------------------------------------------------------------- training and evaluation


def optimizer_for(network: ImageNetNetwork, args: argparse.Namespace) -> torch.optim.Optimizer:
    return build_optimizer(args.optimizer, network, args.lr, args.momentum, args.l2_reg, decoupled=True)


def train_epoch(step: Step, stream: TrainStream, args, epoch: int, device) -> dict[str, float]:
    """One epoch over the training images. Returns mean loss, training accuracy and the share of time without data.

    Every random stream starts anew from the seed and the epoch.
    """
    started, waited = time.monotonic(), stream.waited
    set_seed(derive_seed(args.seed, epoch, stream.rank))  # dropout and drop path
    steps, lr = len(stream), args.lr * args.gamma ** (epoch // args.decay_period)
    progress = torch.arange(epoch * steps + 1, (epoch + 1) * steps + 1, device=device) / (args.epochs * steps)
    batches, title = readable(stream, epoch, device), f"epoch {epoch + 1}"
    values = train_steps(step, batches, progress, lambda _: lr, title)
    seconds = time.monotonic() - started
    return values | {"lr": lr, "seconds": seconds, "data_wait": (stream.waited - waited) / seconds}


def readable(stream: TrainStream | EvalStream, epoch: int, device: torch.device) -> Iterator:
    """The batches of a stream; an image that cannot be read ends the script by its name."""
    with user_input("--data", everywhere=True):  # each process reads other images
        yield from stream.epoch(epoch, device)


def accuracy(network: ImageNetNetwork, stream: EvalStream, device: torch.device, amp: str = "auto") -> dict[str, float]:
    """Top-1 and top-5 accuracy in eval mode over the images of all processes, and how many these are."""
    with user_input(f"--data: {stream.files.part.path}"):
        return evaluate_network(network, readable(stream, 0, device), device, amp)


# ---------------------------------------------------------------------------------------------------------- data


def load_data(args: argparse.Namespace, classes: list[str] | None = None) -> tuple[ImageFiles, ImageFiles, ImageFiles]:
    """(training, selection, test) images; selection is the held-out part, or the test part with --select_on_val.

    classes: those that they must have, of the run to resume.
    """
    with user_input("--data"):
        train, test = open_images(args.data)
        if classes:
            check_classes(train, classes, args.resume)
    selection = test
    if not args.select_on_val:
        if args.holdout is None:
            args.holdout = min(HELD_OUT_PER_CLASS * len(train.classes), len(train) // 10)
            if not args.holdout:
                fail(f"--data: a tenth of {len(train)} training images is none to choose the best epoch on; "
                     "give --holdout or --select_on_val")  # fmt: skip
        with user_input("--holdout"):
            train, selection = split(train, args.holdout, args.seed)
    if args.num_images:
        with user_input("--num_images"):
            train = balanced_batch(train, args.num_images, args.seed)
    if args.batch_size > len(train):
        fail(f"--batch_size: expected at most the {len(train)} training images, got {args.batch_size}")
    return train, selection, test


def streams(args: argparse.Namespace, device: torch.device):
    """A function (class, images, batch size) -> Stream, with what all streams of a run have in common."""
    with user_input("--decoder"):
        decoder = find_jpeg_decoder(args.decoder)
    common = {"workers": args.workers, "seed": args.seed, "skip_bad": args.skip_bad, "decode_jpeg": decoder}
    common |= {"rank": distributed.rank(), "world": distributed.world(), "pin_memory": device.type == "cuda"}
    return lambda kind, files, batch_size: kind(files, args.image_size, batch_size, **common)


# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    count, rate, share = number(int, 1), number(float, 0, above=True), number(float, 0, 1, above=True)
    add("--arch", default="NAG_HIGH_ACC", help="a published genotype's name, FILE.json or FILE.json:INDEX")
    add("--data", default="data/imagenet", help="folder that holds train and test (or val): folders or .zip files")
    add("--image_size", type=number(int, 32), default=224, help="pixels of the crops")
    add("--num_images", type=number(int, 0), default=0, help="train on that many images only (0: all)")
    add("--holdout", type=count, help="training images kept out, to select on (default: 10 a class, a tenth at most)")
    add("--select_on_val", action="store_true", help="choose the best epoch on the validation part instead")
    add("--skip_bad", action="store_true", help="go on without images that cannot be read")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # of the processes on this machine
    add("--workers", type=number(int, 0), default=workers, help="decode images, for each training process and part")
    add("--decoder", default="auto", choices=["auto", "pil", "torchcodec"], help="of JPEG (auto: torchcodec if there)")
    add("--epochs", type=count, default=250)
    add("--batch_size", type=number(int, 2), default=256, help="of all processes together")
    add("--eval_batch_size", type=count, default=256, help="of one process")
    add("--layers", type=count, default=4, help="normal cells per stack")
    add("--channels", type=number(int, 2), default=42)
    add("--lr", type=rate, help=f"of the first epoch, for a whole batch (default: {SGD_LR}; AdaBelief {ADABELIEF_LR})")
    add("--gamma", type=share, default=0.97, help="factor of the learning rate ...")
    add("--decay_period", type=count, default=1, help="... after that many epochs")
    add("--momentum", type=number(float, 0, 1), default=0.9, help="of SGD")
    decay = ADABELIEF_DECAY["imagenet"]
    add("--l2_reg", type=number(float, 0), help=f"weight decay (default: {SGD_DECAY}; AdaBelief {decay}, decoupled)")
    add("--label_smooth", type=number(float, 0, 1), default=0.1)
    add("--grad_clip", type=number(float, 0), default=0.0, help="largest norm of the gradient; 0: off")
    add("--keep_prob", type=share, default=1.0, help="of the classifier's dropout")
    add("--drop_path_keep_prob", type=share, default=1.0)
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help="0: no auxiliary head")
    add_step_flags(parser)
    going_on = parser.add_mutually_exclusive_group()
    going_on.add_argument("--resume", help="run folder or checkpoint.pt to go on with")
    going_on.add_argument("--evaluate", metavar="CHECKPOINT", help="only measure its test accuracy")
    add("--export", metavar="FILE", help="with --evaluate: the network as FILE.safetensors, FILE.onnx or FILE.pt2")
    add_common_flags(parser)
    may_change = ("data", "workers", "decoder", "eval_batch_size", "compile", "cuda_graphs", "accumulate")
    args = parse_resumable(parser, argv, "imagenet", may_change, ("network", "optimizer", "best", "classes"))
    if args.export and not args.evaluate:
        parser.error("argument --export: needs --evaluate CHECKPOINT")
    if args.evaluate:
        if args.export:
            with user_input("--export"):
                check_export(args.export)
        with user_input("--evaluate"):
            state = load_checkpoint(args.evaluate, "imagenet", ("args", "genotype", "network", "network_config"))
        given, saved = explicit_flags(parser, argv), state["args"]
        check_network_flags(args, given, state, args.evaluate)
        kept = {"data", "image_size", "skip_bad", "amp"} - given
        return argparse.Namespace(**{**vars(args), **{name: saved[name] for name in kept}})
    check_flags(parser, args)
    return args


def check_flags(parser: ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what flags do not allow together; settle the defaults that depend on --optimizer."""
    lr, decay = (SGD_LR, SGD_DECAY) if args.optimizer == "sgd" else (ADABELIEF_LR, ADABELIEF_DECAY["imagenet"])
    args.lr = lr if args.lr is None else args.lr
    args.l2_reg = decay if args.l2_reg is None else args.l2_reg
    check_step_flags(parser, args, distributed.planned_world())
    check_image_size(parser, args, ImageNetNetwork.auxiliary_sizes)
    if args.select_on_val and args.holdout:
        parser.error("argument --holdout: not with --select_on_val")


# -------------------------------------------------------------------------------------------------------- main


def cost(genotype: Genotype, config: dict, image_size: int) -> dict[str, int]:
    """#params and MACs, auxiliary head left out."""
    with torch.device("meta"):
        network = ImageNetNetwork(genotype, **{**config, "auxiliary": False})
    return {"params": count_parameters(network), "macs": count_macs(network, image_size)}


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Measure the test accuracy of a checkpoint, and export its network if asked for."""
    path = output_folder(args) / "evaluation.json"
    refuse_used(path.parent, path.name)
    with user_input("--evaluate"):
        state = load_checkpoint(args.evaluate, "imagenet")
    with user_input("--data"):
        _, test = open_images(args.data)
        check_classes(test, state["classes"], args.evaluate)
    stream = streams(args, device)(EvalStream, test, args.eval_batch_size)
    with user_input("--evaluate"):
        network = network_from_checkpoint(state, args.evaluate, device)
    measured, skipped = accuracy(network, stream, device, args.amp), distributed.merged(stream.broken)
    if not distributed.is_main():
        return
    size = cost(Genotype.from_dict(state["genotype"]), state["network_config"], args.image_size)
    result = {"arch": state["args"]["arch"], "genotype": state["genotype"], **size, "test": measured}
    result |= {"checkpoint": args.evaluate, "epochs": state["epoch"], "skipped": skipped}
    with user_input("--output_dir"):
        write_json(path, result)
    print(f"{describe(measured)}, after epoch {state['epoch']}\nwrote {path}")
    if args.export:
        known = {"kind": "imagenet", "arch": state["args"]["arch"], "image_size": args.image_size}
        known |= {name: state[name] for name in ("genotype", "network_config", "classes")}
        with user_input("--export"):
            written = export_network(network, args.export, known | {"mean": MEAN, "std": STD})
        print(f"wrote {' and '.join(map(str, written))}")


def describe(measured: dict) -> str:
    return (
        f"test error top-1 {1 - measured['top1']:.2%}, top-5 {1 - measured['top5']:.2%} ({measured['images']} images)"
    )


def start(args: argparse.Namespace, state: dict | None, train: ImageFiles, device: torch.device):
    """(network, optimizer, what was reached so far) of a new run, or of one resumed from `state`."""
    with user_input("--resume" if args.resume else "--arch"):
        genotype = Genotype.from_dict(state["genotype"]) if state else load_genotype(args.arch)
        if not genotype.is_valid:
            raise ValueError(f"{args.arch} is not valid: a cell has no path from an input to the output")
    network = build_network(ImageNetNetwork, genotype, len(train.classes), args, device)
    optimizer = optimizer_for(network, args)
    if not state:
        return network, optimizer, {"epoch": 0, "seconds": 0.0, "best": {"top1": -1.0}, "skipped": {}}
    with user_input("--data"):
        if len(train) != state["training_images"]:
            raise ValueError(f"{len(train)} training images, the run to resume has {state['training_images']}")
    with user_input("--resume"):  # not at the end of the run, which needs it
        best = Path(args.output_dir) / "best.pt"
        epochs = state["best"]["epoch"], state["epoch"] + 1  # the latter: killed before checkpoint.pt was saved too
        if load_checkpoint(best, "imagenet")["epoch"] not in epochs:
            raise ValueError(f"{best} is not of epoch {epochs[0]}, the best one so far")
        go_on_from(state, args.resume, network, optimizer)
    reached = {name: state[name] for name in ("epoch", "seconds", "best")}
    return network, optimizer, reached | {"skipped": state.get("skipped", {})}


def main(args: argparse.Namespace) -> None:
    device = distributed.start(prepare(args, shared=True))
    if args.evaluate:
        evaluate(args, device)
    else:
        train(args, device)
    distributed.finish()


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The whole run. Only process 0 writes."""
    check_sync_bn(args, device)
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "imagenet") if args.resume else None
    images, selection, test = load_data(args, state and state["classes"])
    network, optimizer, reached = start(args, state, images, device)
    make = streams(args, device)
    stream = make(TrainStream, images, args.batch_size)
    selecting = make(EvalStream, selection, args.eval_batch_size)
    config = asdict(network.config)
    size = cost(network.genotype, config, args.image_size)
    folder = Path(distributed.same_everywhere(str(output_folder(args))))
    log = open_log(folder, args, device, reached["epoch"] if args.resume else None)
    if log:
        print(
            f"{args.arch}: {size['params'] / 1e6:.3f} M parameters, {size['macs'] / 1e6:.1f} M MACs; {len(images)} "
            f"training, {len(selection)} {'validation' if args.select_on_val else 'held-out'} images, "
            f"{len(stream)} steps an epoch, {distributed.processes()} on {device}: {folder}"
        )
    step = Step(network, optimizer, args, device, args.label_smooth)
    for epoch in range(reached["epoch"], args.epochs):
        values = train_epoch(step, stream, args, epoch, device)
        if not math.isfinite(values["loss"]):
            fail(f"the loss is not finite in epoch {epoch + 1}; a smaller --lr may help")
        selected = accuracy(network, selecting, device, args.amp)
        improved = selected["top1"] > reached["best"]["top1"]
        best = {"epoch": epoch + 1, **selected} if improved else reached["best"]
        skipped = {
            name: reached["skipped"].get(name, {}) | distributed.merged(part.broken)
            for name, part in (("train", stream), ("selection", selecting))
        }
        seconds = reached["seconds"] + values["seconds"]
        reached = {"epoch": epoch + 1, "seconds": seconds, "best": best, "skipped": skipped}
        if distributed.is_main():
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), **reached}
            state |= {"network_config": config, "genotype": network.genotype.to_dict(), "classes": images.classes}
            state |= {"training_images": len(images), "args": vars(args)}
            log.log(epoch + 1, **values, top1=selected["top1"], top5=selected["top5"])
            if improved:
                save_checkpoint(folder / "best.pt", "imagenet", state)
            save_checkpoint(folder / "checkpoint.pt", "imagenet", state)
            print(
                f"epoch {epoch + 1}/{args.epochs}: loss {values['loss']:.3f}, accuracy {values['train_accuracy']:.4f}, "
                f"top-1 {selected['top1']:.4f}, top-5 {selected['top5']:.4f} ({values['seconds']:.0f} s, "
                f"waited for data {values['data_wait']:.0%}, {len(skipped['train'])} skipped)"
            )
    distributed.barrier()  # until best.pt is there
    finish(args, network, make(EvalStream, test, args.eval_batch_size), device, folder, log, reached | size)


def finish(args, network, stream: EvalStream, device, folder: Path, log: RunLog | None, result: dict) -> None:
    """Measure the last and the best network on the test images and write result.json."""
    result |= {"test": accuracy(network, stream, device, args.amp)}
    if result["best"]["epoch"] == result["epoch"]:
        result["best"]["test"] = result["test"]
    else:
        path = folder / "best.pt"
        with user_input("--output_dir"):
            best = network_from_checkpoint(load_checkpoint(path, "imagenet"), path, device)
        result["best"]["test"] = accuracy(best, stream, device, args.amp)
    result["skipped"]["test"] = distributed.merged(stream.broken)
    if log is None:
        return
    result |= {"arch": args.arch, "genotype": network.genotype.to_dict(), "seed": args.seed}
    result |= {"versions": versions(), "device": device_name(device)}
    write_json(folder / "result.json", result)
    log.close()
    print(
        f"last epoch: {describe(result['test'])}\nbest epoch ({result['best']['epoch']}): "
        f"{describe(result['best']['test'])}\nwrote {folder / 'result.json'}, checkpoint.pt and best.pt in {folder}\n"
        f"next: python train_imagenet.py --evaluate {shown(folder / 'best.pt')}"
    )


if __name__ == "__main__":
    main(parse_args())
