"""Train, or evaluate, the ImageNet network of one genotype on a tree of images.

    python train_imagenet.py --data DIR                                  # NAG_HIGH_ACC, as published
    torchrun --standalone --nproc_per_node=8 train_imagenet.py --data DIR --workers 12
    python train_imagenet.py --data DIR --image_size 64 --layers 1 --channels 8 --epochs 2
    python train_imagenet.py --resume runs/train_imagenet-...            # go on after a stop
    python train_imagenet.py --resume runs/train_imagenet-... --epochs 300       # or for more epochs
    python train_imagenet.py --evaluate runs/train_imagenet-.../best.pt
    python train_imagenet.py --evaluate CHECKPOINT --predict PATH                   # classes of images, one or a folder
    python train_imagenet.py --evaluate CHECKPOINT --export FILE.safetensors        # or FILE.onnx, FILE.pt2

DIR holds train and test (or val, valid, validation), each a folder of class folders or a .zip of one, read in place; or
DIR is such a folder or .zip itself, of which --test_share is kept to test on.
--batch_size and --lr are those of one step, over all processes and --accumulate parts together.
Writes checkpoint.pt (last epoch), best.pt (best on held-out training images), metrics.jsonl, TensorBoard events,
config.json and, at the end, result.json and predictions.npz with what the last epoch's network takes each
test image for, for report.py. The test images are used after the last epoch only, unless --select_on_val.
NAG paper, section 4.3.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from generation.pictures import show_confusions
from genotypes import Genotype
from models.network import ImageNetNetwork, count_macs, count_parameters
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.console import pace
from plumbing.files import write_json
from plumbing.flags import (
    ArgumentParser,
    add_checkpoint_minutes_flag,
    add_common_flags,
    explicit_flags,
    parse_resumable,
)
from plumbing.run_folder import RunLog, device_name, output_folder, refuse_used, versions
from plumbing.signals import signals
from plumbing.start import prepare
from training import distributed
from training.checkpoints import Checkpoints
from training.flags import add_arch_flag, add_predict_flag, check_sync_bn, evaluation_args
from training.image_stream import MEAN, STD, EvalStream, ImageFiles, TrainStream, workers_alive
from training.imagenet import (
    REFERENCE_FLAGS,
    accuracy,
    add_training_flags,
    build_optimizer,
    centre_crop,
    check_training_flags,
    load_data,
    load_parts,
    stream_options,
    train_epoch,
)
from training.images import check_classes
from training.own_images import OF_A_SPLIT
from training.predicting import Choices, Member, predict_and_write, write_choices
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
)
from utils import fail, shipped, shown, stop_if_diverged, user_input

MAY_CHANGE = """
    data workers decoder epochs eval_batch_size compile cuda_graphs accumulate
""".split()  # the flags that a resumed run need not keep

# ------------------------------------------------------------------------------------------------------- flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__, reference_flags=REFERENCE_FLAGS)
    add_arch_flag(parser.add_argument_group("genotype"))
    add_training_flags(parser)
    add_checkpoint_flags(parser)
    add_common_flags(parser)
    needed = ("network", "optimizer", "best", "skipped", "classes")
    args = parse_resumable(parser, argv, "imagenet", tuple(MAY_CHANGE), needed)
    if args.evaluate:
        of_the_images = {"data", "image_size", "skip_bad", "amp", *OF_A_SPLIT}
        return evaluation_args(parser, argv, args, "imagenet", [args.evaluate], of_the_images)
    for name in ("export", "predict"):
        if getattr(args, name):
            parser.error(f"argument --{name}: needs --evaluate CHECKPOINT")
    if args.resume and args.schedule_epochs is None:  # a run of an older version
        with user_input("--resume"):
            args.schedule_epochs = load_checkpoint(args.resume, "imagenet")["args"]["epochs"]
    check_training_flags(parser, args, distributed.planned_world(), explicit_flags(parser, argv))
    return args


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags about what is saved, resumed and evaluated."""
    group = parser.add_argument_group("checkpoints and evaluation")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", help="run folder, or its checkpoint.pt, to go on with")
    either.add_argument("--evaluate", metavar="CHECKPOINT", help="only measure the test accuracy")
    add_checkpoint_minutes_flag(group)
    add_predict_flag(group)
    exported = "with --evaluate: write the network to FILE.safetensors, .onnx or .pt2"
    group.add_argument("--export", metavar="FILE", help=exported)


# --------------------------------------------------------------------------------------------------- evaluation


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Measure the test accuracy of a checkpoint, or classify the images of --predict, or both; export the network if
    asked for.
    """
    folder = output_folder(args)
    results = {"evaluation.json": args.data is not None, "predictions.csv": args.predict}
    refuse_used(folder, *(name for name, wanted in results.items() if wanted))
    with user_input("--evaluate"):
        state = load_checkpoint(args.evaluate, "imagenet")
    stream = None
    if args.data is not None:
        with user_input("--data"):
            _, test = load_parts(args)
            check_classes(test, state["classes"], args.evaluate)
        stream = EvalStream(test, args.image_size, args.eval_batch_size, **stream_options(args, device))
    with user_input("--evaluate"):
        network = network_from_checkpoint(state, args.evaluate, device)
    if stream is not None:
        measure(args, state, network, stream, device, folder / "evaluation.json")
    if args.predict:
        prepare = centre_crop(args.image_size, args.decoder)
        members = [Member(network, MEAN, STD)]
        predict_and_write(args, device, prepare, members, state["classes"], folder / "predictions.csv")
    if args.export and distributed.is_main():
        export_trained(network, state, args, "imagenet", MEAN, STD)


def measure(
    args: argparse.Namespace,
    state: dict,
    network: ImageNetNetwork,
    stream: EvalStream,
    device: torch.device,
    path: Path,
) -> None:
    """Measure the test accuracy of a network, whose checkpoint is `state`, and write it to the file `path`."""
    measured, skipped = accuracy(network, stream, device, args.amp), distributed.merged(stream.broken)
    if not distributed.is_main():
        return
    size = cost(Genotype.from_dict(state["genotype"]), state["network_config"], args.image_size)
    result = {"arch": state["args"]["arch"], "genotype": state["genotype"], **size, "test": measured}
    result |= {"checkpoint": args.evaluate, "epochs": state["epoch"], "skipped": skipped}
    refuse_used(path.parent, path.name)  # again, as another evaluation may have been quicker
    write_json(path, result)
    print(f"{describe(measured)}, after epoch {state['epoch']}\nwrote {path}")


def cost(genotype: Genotype, config: dict, image_size: int) -> dict[str, int]:
    """#params and MACs of the network that a checkpoint's "network_config" describes, without the auxiliary head."""
    with torch.device("meta"):
        network = ImageNetNetwork(genotype, **{**config, "auxiliary": False})
    return {"params": count_parameters(network), "macs": count_macs(network, image_size)}


def describe(measured: dict) -> str:
    errors = f"top-1 {1 - measured['top1']:.2%}, top-5 {1 - measured['top5']:.2%}"
    return f"test error {errors} ({measured['images']} images)"


# ----------------------------------------------------------------------------------------------------- training


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train a network, then measure its test accuracy. Only process 0 writes and prints."""
    check_sync_bn(args, device)
    with user_input("--resume"):
        state = load_checkpoint(args.resume, "imagenet") if args.resume else None
    images, selection, test = load_data(args, state and state["classes"])
    network = build_network(ImageNetNetwork, genotype_to_train(args, state), len(images.classes), args, device)
    optimizer = build_optimizer(network, args)
    reached = {"epoch": 0, "seconds": 0.0, "best": {"top1": -1.0}, "skipped": {}}
    reached = resume(state, args, images, network, optimizer) if state else reached
    options = stream_options(args, device)
    stream = TrainStream(images, args.image_size, args.batch_size, **options)
    selecting = EvalStream(selection, args.image_size, args.eval_batch_size, **options)
    folder = Path(distributed.same_everywhere(str(output_folder(args))))
    log = open_log(folder, args, device, reached["epoch"] if args.resume else None)
    size = cost(network.genotype, asdict(network.config), args.image_size)
    if log:
        print(
            f"{args.arch}: {size['params'] / 1e6:.3f} M parameters, {size['macs'] / 1e6:.1f} M MACs; {len(images)} "
            f"training, {len(selection)} {'validation' if args.select_on_val else 'held-out'} images, "
            f"{len(stream)} steps an epoch, {distributed.processes()} on {device}: {folder}"
        )

    def save_run(part: dict) -> None:
        skipped = all_skipped(reached, {"train": stream})
        if log:
            state = network_state(network, network.genotype, optimizer) | reached
            save(folder, args, images, state | {"skipped": skipped} | part)

    step = Step(network, optimizer, args, device, args.label_smooth)
    checkpoints = Checkpoints(args.checkpoint_minutes, network, save_run, state)
    pace.expect((args.epochs - reached["epoch"]) * len(stream) - checkpoints.done)
    with signals.held():
        for epoch in range(reached["epoch"], args.epochs):
            values = train_epoch(step, stream, args, epoch, device, checkpoints)
            stop_if_diverged(epoch + 1, values["loss"], network, advice="a smaller --lr may help")
            with checkpoints.interruptible():
                selected = accuracy(network, selecting, device, args.amp)
            reached = reached_after(epoch + 1, values, selected, reached, {"train": stream, "selection": selecting})
            if log:
                log.log(epoch + 1, **values, top1=selected["top1"], top5=selected["top5"])
            save_run({})
            if log:
                print(progress_line(args.epochs, values, selected, reached))
    distributed.barrier()  # until best.pt is there
    testing = EvalStream(test, args.image_size, args.eval_batch_size, **options)
    finish(args, device, folder, log, network, testing, reached | size)


def resume(
    state: dict,
    args: argparse.Namespace,
    images: ImageFiles,
    network: ImageNetNetwork,
    optimizer: torch.optim.Optimizer,
) -> dict:
    """Load the checkpoint `state` of the run to resume. Returns what it has reached, as reached_after does."""
    check_training_images(images, state)
    if state["epoch"] > args.epochs:
        fail(f"--epochs: the run to resume has {state['epoch']} epochs already, got {args.epochs}")
    with user_input("--resume"):  # now and not at the end of the run, which needs the best network
        best = Path(args.output_dir) / "best.pt"
        epochs = state["best"].get("epoch"), state["epoch"] + 1  # the latter: killed between best.pt and checkpoint.pt
        if state["epoch"] and load_checkpoint(best, "imagenet")["epoch"] not in epochs:
            raise ValueError(f"{best} is not of epoch {epochs[0]}, the best one so far")
        go_on_from(state, args.resume, network, optimizer)
    return {name: state[name] for name in ("epoch", "seconds", "best", "skipped")}


def reached_after(epoch: int, values: dict, selected: dict, before: dict, streams: dict) -> dict:
    """What a run has reached after an epoch.

    values: of train_epoch. selected: accuracy on the selection images. before: what it had reached an epoch earlier.
    streams: "train" and "selection" -> stream.
    Returns {"epoch", "seconds" of training, "best": {"epoch", "top1", "top5", "images"}, "skipped": {"train": {name of
    an image: reason}, "selection": ...}}; of equally good epochs, the first is the best.
    """
    improved = selected["top1"] > before["best"]["top1"]
    return {
        "epoch": epoch,
        "seconds": before["seconds"] + values["seconds"],
        "best": {"epoch": epoch, **selected} if improved else before["best"],
        "skipped": all_skipped(before, streams),
    }


def all_skipped(before: dict, streams: dict) -> dict:
    """The images that were skipped up to now, as in reached_after, where `before` and `streams` are explained too."""
    found = {part: distributed.merged(stream.broken) for part, stream in streams.items()}
    return before["skipped"] | {part: before["skipped"].get(part, {}) | broken for part, broken in found.items()}


def progress_line(epochs: int, values: dict, selected: dict, reached: dict) -> str:
    """What is printed after an epoch."""
    return (
        f"epoch {reached['epoch']}/{epochs}: loss {values['loss']:.3f}, accuracy {values['train_accuracy']:.4f}, "
        f"top-1 {selected['top1']:.4f}, top-5 {selected['top5']:.4f} ({values['seconds']:.0f} s, "
        f"waited for data {values['data_wait']:.0%}, {len(reached['skipped']['train'])} skipped){pace.left()}"
    )


def save(folder: Path, args: argparse.Namespace, images: ImageFiles, state: dict) -> None:
    """Write checkpoint.pt and, at the end of the best epoch so far, best.pt.

    state: network, optimizer and what was reached.
    """
    state = state | {"classes": images.classes, "training_images": len(images), "args": vars(args)}
    if "within" not in state and state["best"]["epoch"] == state["epoch"]:
        save_checkpoint(folder / "best.pt", "imagenet", state)
    save_checkpoint(folder / "checkpoint.pt", "imagenet", state)


def finish(
    args: argparse.Namespace,
    device: torch.device,
    folder: Path,
    log: RunLog | None,
    network: ImageNetNetwork,
    stream: EvalStream,
    result: dict,
) -> None:
    """Measure the last and the best network on the test images; write and print the result of a run.

    result: what was reached, #params and MACs, to which the accuracies are added.
    """
    choices = Choices(MEAN, STD)
    result |= {"test": accuracy(network, stream, device, args.amp, choices)}
    if result["best"]["epoch"] == result["epoch"]:
        result["best"]["test"] = result["test"]
    else:
        path = folder / "best.pt"
        with user_input("--output_dir"):
            best = network_from_checkpoint(load_checkpoint(path, "imagenet"), path, device)
        result["best"]["test"] = accuracy(best, stream, device, args.amp)
    result["skipped"]["test"] = distributed.merged(stream.broken)
    told = choices.arrays()
    if log is None:
        return
    write_choices(folder / "predictions.npz", told, stream.files.classes)
    show_confusions(log, folder / "predictions.npz", args.epochs)
    result |= {"arch": args.arch, "genotype": network.genotype.to_dict(), "seed": args.seed}
    result |= {"versions": versions(), "device": device_name(device)}
    write_json(folder / "result.json", result)
    log.close()
    command = f"python {shown(shipped('train_imagenet.py'))} --evaluate {shown(folder / 'best.pt')}"
    print(
        f"last epoch: {describe(result['test'])}\nbest epoch ({result['best']['epoch']}): "
        f"{describe(result['best']['test'])}\nwrote {folder / 'result.json'}, checkpoint.pt and best.pt in {folder}\n"
        f"classify images by: {command} --predict PATH\n"
        f"next: {command}"
    )


# --------------------------------------------------------------------------------------------------------- main


def main(args: argparse.Namespace) -> None:
    device = distributed.start(prepare(args, shared=True))
    with workers_alive():
        if args.evaluate:
            evaluate(args, device)
        else:
            train(args, device)
    distributed.finish()


if __name__ == "__main__":
    main(parse_args())
