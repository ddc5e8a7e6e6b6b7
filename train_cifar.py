"""Train or evaluate the network of one genotype on CIFAR-10, CIFAR-100 or a folder of images.

    python train_cifar.py --arch NAG_HIGH_ACC                                  # as published: 600 epochs
    python train_cifar.py --arch runs/generate_archs-.../genotypes.json:0 --dataset folder --data DIR
    python train_cifar.py --resume runs/train_cifar-...                        # go on after a stop
    python train_cifar.py --evaluate runs/train_cifar-.../checkpoint.pt        # test error of a trained network

Writes checkpoint.pt, result.json, metrics.jsonl, TensorBoard events and config.json. NAG paper, section 4.2.
The test images are read once, at the end; choose between networks on --holdout images.
"""

import argparse
import time

import torch
from torch import nn
from torch.nn import functional as F

from genotypes import Genotype, load_genotype
from images import ImageSet, balanced_batch, eval_batches, load_images, split, train_batches
from models.network import CifarNetwork, count_parameters, genotype_cost
from utils import (
    RunLog,
    add_common_flags,
    autocast,
    cosine,
    derive_seed,
    load_checkpoint,
    number,
    output_folder,
    parse_resumable,
    prepare,
    progress_bar,
    save_checkpoint,
    set_lr,
    set_seed,
    user_input,
    write_json,
)


def train_epoch(network: nn.Module, optimizer, images: ImageSet, args: argparse.Namespace, epoch: int) -> dict:
    """One epoch of the recipe. Returns mean loss and training accuracy."""
    device = images.labels.device
    set_seed(derive_seed(args.seed, epoch))  # dropout and drop path
    generator = torch.Generator(device).manual_seed(derive_seed(args.seed, epoch, 1))
    steps = len(images) // args.batch_size
    total_steps = steps * max(args.schedule_epochs, args.epochs)
    totals = torch.zeros(2, device=device)
    network.train()
    batches = train_batches(images, args.batch_size, generator, args.cutout_size)
    for step, (x, labels) in enumerate(progress_bar(batches, total=steps, desc=f"epoch {epoch + 1}"), epoch * steps):
        set_lr(optimizer, cosine(step, total_steps, args.lr_max, args.lr_min))
        with autocast(args.amp, device):
            logits, auxiliary = network(x, progress=(step + 1) / total_steps)
            loss = F.cross_entropy(logits, labels)
            total = loss if auxiliary is None else loss + args.auxiliary_weight * F.cross_entropy(auxiliary, labels)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), args.grad_clip)
        optimizer.step()
        totals += torch.stack([loss.detach(), (logits.argmax(1) == labels).float().mean()])
    loss, accuracy = (totals / steps).tolist()
    return {"loss": loss, "train_accuracy": accuracy}


@torch.inference_mode()
def accuracy(network: nn.Module, images: ImageSet, batch_size: int, amp: str = "off") -> float:
    """Share of the images that the network, in eval mode, puts into the right class."""
    network.eval()
    correct = torch.zeros((), device=images.labels.device)
    for x, labels in eval_batches(images, batch_size):
        with autocast(amp, x.device):
            logits, _ = network(x)
        correct += (logits.argmax(1) == labels).sum()
    return correct.item() / len(images)


def evaluate(args: argparse.Namespace) -> None:
    """Test error of a checkpoint; the network is rebuilt from it, not from flags."""
    device = prepare(args)
    with user_input("--evaluate"):
        checkpoint = load_checkpoint(args.evaluate, "cifar")
    saved = checkpoint["args"]
    with user_input("--data"):
        _, test = load_images(args.dataset, args.data, saved["image_size"], args.cache_dir, args.skip_bad, device)
        if test.classes != checkpoint["classes"]:
            raise ValueError(f"the network knows the classes {checkpoint['classes']}, the images are of {test.classes}")
    test.mean, test.std = tuple(checkpoint["mean"]), tuple(checkpoint["std"])
    network = build_network(checkpoint["genotype"], len(test.classes), saved).to(device)
    network.load_state_dict(checkpoint["network"])
    result = accuracy(network.to(memory_format=torch.channels_last), test, args.eval_batch_size, args.amp)
    print(f"test error {100 * (1 - result):.2f} % on {len(test)} images, {count_parameters(network):,} parameters")


def build_network(genotype: dict, num_classes: int, settings: dict) -> CifarNetwork:
    return CifarNetwork(
        Genotype.from_dict(genotype),
        num_classes,
        settings["layers"],
        settings["channels"],
        settings["keep_prob"],
        settings["drop_path_keep_prob"],
        auxiliary=settings["auxiliary_weight"] > 0,
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, number(int, 1)
    add("--arch", default="NAG_HIGH_ACC", help="name of a published genotype, FILE.json or FILE.json:INDEX")
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100", "folder"])
    add("--data", default="data", help="folder of the images (CIFAR: downloaded into it)")
    add("--cache_dir", help="where decoded image folders are kept (default: beside them)")
    add("--skip_bad", action="store_true", help="leave out images that cannot be read")
    add("--image_size", type=number(int, 8), default=32, help="pixels")
    add("--num_images", type=number(int, 0), default=0, help="train on that many images only (0: all)")
    add("--holdout", type=number(int, 0), default=0, help="training images kept out, to choose networks by")
    add("--epochs", type=count, default=600)
    add("--schedule_epochs", type=number(int, 0), default=0, help="length of the schedule, where longer than --epochs")
    add("--batch_size", type=number(int, 2), default=96)
    add("--eval_batch_size", type=count, default=500)
    add("--layers", type=count, default=6, help="normal cells per stack")
    add("--channels", type=number(int, 2), default=36)
    add("--cutout_size", type=number(int, 0), default=16, help="pixels; 0: off")
    add("--grad_clip", type=number(float, 0, above=True), default=5.0, help="largest norm of the gradient")
    add("--lr_max", type=number(float, 0, above=True), default=0.025)
    add("--lr_min", type=number(float, 0), default=0.0)
    add("--keep_prob", type=number(float, 0, 1, above=True), default=0.6, help="of the classifier's dropout")
    add("--drop_path_keep_prob", type=number(float, 0, 1, above=True), default=0.8)
    add("--l2_reg", type=number(float, 0), default=3e-4, help="weight decay")
    add("--auxiliary_weight", type=number(float, 0), default=0.4, help="0: no auxiliary head")
    add("--amp", default="auto", choices=["auto", "off", "bf16"])
    add("--evaluate", metavar="CHECKPOINT", help="only measure the test error of a trained network")
    add("--resume", help="run folder or checkpoint to go on with")
    add_common_flags(parser)
    args = parse_resumable(parser, argv, "cifar", may_change=("data", "cache_dir", "eval_batch_size"))
    if args.auxiliary_weight and not 29 <= args.image_size <= 40:
        parser.error("argument --image_size: the auxiliary head takes 29 to 40 px; add --auxiliary_weight 0")
    return args


def main(args: argparse.Namespace) -> None:
    if args.evaluate:
        return evaluate(args)
    device = prepare(args)
    with user_input("--arch"):
        genotype = load_genotype(args.arch).prune()
        if genotype is None:
            raise ValueError(f"{args.arch} is not valid: a cell has no path from an input to the output")
    with user_input("--data"):
        train, test = load_images(args.dataset, args.data, args.image_size, args.cache_dir, args.skip_bad, device)
    with user_input("--holdout"):
        train, held_out = split(train, args.holdout, args.seed)
    if args.num_images:
        with user_input("--num_images"):
            train = balanced_batch(train, args.num_images, args.seed)
    with user_input("--batch_size"):
        if args.batch_size > len(train):
            raise ValueError(f"expected at most the {len(train)} training images, got {args.batch_size}")

    network = build_network(genotype.to_dict(), len(train.classes), vars(args))
    network = network.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), args.lr_max, momentum=0.9, weight_decay=args.l2_reg)
    start_epoch, seconds = 0, 0.0
    if args.resume:
        state = load_checkpoint(args.resume, "cifar")
        genotype = Genotype.from_dict(state["genotype"])  # the file behind --arch may have changed
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        start_epoch, seconds = state["epoch"], state["seconds"]

    folder = output_folder(args)
    log = RunLog(folder, args, device, start_epoch if args.resume else None)
    params, macs = genotype_cost(genotype, len(train.classes), args.layers, args.channels, args.image_size)
    print(f"{args.arch}: {params:,} parameters, {macs / 1e6:.1f} M MACs, {len(train)} images, on {device}: {folder}")
    held_out_accuracy = None
    for epoch in range(start_epoch, args.epochs):
        started = time.monotonic()
        values = train_epoch(network, optimizer, train, args, epoch)
        seconds += time.monotonic() - started
        if args.holdout:
            values["held_out_accuracy"] = accuracy(network, held_out, args.eval_batch_size, args.amp)
        line = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"epoch {epoch + 1}/{args.epochs}: {line} ({time.monotonic() - started:.0f} s)", flush=True)
        state = {
            "network": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "epoch": epoch + 1,
            "seconds": seconds,
            "genotype": genotype.to_dict(),
            "classes": train.classes,
            "mean": list(train.mean),
            "std": list(train.std),
            "args": vars(args),
        }
        save_checkpoint(folder / "checkpoint.pt", "cifar", state)
        log.log(epoch + 1, **values, lr=optimizer.param_groups[0]["lr"], seconds=seconds)
    log.close()
    if args.holdout:
        held_out_accuracy = accuracy(network, held_out, args.eval_batch_size, args.amp)
    test_accuracy = accuracy(network, test, args.eval_batch_size, args.amp)
    result = {
        **genotype.to_dict(),
        "arch": args.arch,
        "params": params,
        "macs": macs,
        "epochs": args.epochs,
        "held_out_accuracy": held_out_accuracy,
        "test_accuracy": test_accuracy,
        "test_images": len(test),
        "training_seconds": round(seconds, 1),
    }
    write_json(folder / "result.json", result)
    print(f"test error {100 * (1 - test_accuracy):.2f} % on {len(test)} images\nwrote {folder / 'result.json'}")
    print(f"next: python train_cifar.py --evaluate {folder / 'checkpoint.pt'}  (with the same data flags)")


if __name__ == "__main__":
    main(parse_args())
