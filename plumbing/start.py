"""What every script does first."""

import argparse

import torch

from plumbing.console import keep_printing, pace
from plumbing.run_folder import RUNS, check_writable
from plumbing.signals import signals
from utils import check_compiler, fail, keep_freed_memory, select_device, set_seed, this_process, user_input


def prepare(args: argparse.Namespace, shared: bool = False) -> torch.device:
    """What every script does first: listen to signals, settle the device, seed, keep memory, print at once.

    shared: whether processes of torchrun can share the script's work.
    Exits with status 2 for a wrong --device, an --output_dir that cannot be written to, --compile where that does not
    work, or torchrun where it is no use.
    """
    signals.listen()
    pace.expect(0)
    keep_printing()
    process = this_process()
    if not shared and process.world > 1:
        fail("torchrun: this script works in one process; start it with python")
    if process.note:
        print(f"note: {process.note}")
    with user_input("--device"):
        device = select_device(args.device)
    with user_input("--output_dir"):
        check_writable(args.output_dir or RUNS)
    if device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are the current device's
    if getattr(args, "compile", False):
        with user_input("--compile"):
            check_compiler(device)
    if args.tf32 and device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    set_seed(args.seed)
    return device
