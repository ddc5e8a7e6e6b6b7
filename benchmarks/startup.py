"""Time from the start of each script to its first training step, or first result, on what is shipped.

    python benchmarks/startup.py

Stated is what is left after the time of `import torch`, measured in turn with it. build_nas_dataset and train_cifar get
400 small images that are made here. What ends the time is the first call of the network, not the end of the step.
"""

if not __package__:
    from as_module import restart

    restart()

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import Report, begin, parse_args

MOST_ROUNDS = 3  # a start takes seconds, and differs little

# Runs a script up to the first call of a network of the class named.
UNTIL_CALL = """
import os, runpy, sys
from torch.nn.modules.module import register_module_forward_pre_hook
name, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
def stop(module, *_):
    if type(module).__name__ == name:
        os._exit(0)
register_module_forward_pre_hook(stop)
runpy.run_path(script, run_name="__main__") if script.endswith(".py") else runpy.run_module(script, run_name="__main__")
sys.exit("there was no step")
"""


def make_images(folder: Path, n: int = 400) -> None:
    """Random images in folder/train and folder/test, of ten classes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("test", 20)):
        for i in range(count):
            path = folder / part / str(i % 10) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(256, size=(32, 32, 3), dtype=np.uint8)).save(path)


def until_call(network: str, *command: str) -> float:
    """Seconds from the start of a script to the beginning of its first step with that network."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", UNTIL_CALL, network, *command], check=True, capture_output=True)
    return time.perf_counter() - started


def until_output(start: str, *command: str) -> float:
    """Seconds from the start of a script to its first line of output that begins with `start`."""
    started, elapsed = time.perf_counter(), None
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if elapsed is None and line.startswith(start):
                elapsed = time.perf_counter() - started
    if elapsed is None:
        raise RuntimeError(f"{command[0]} printed no line that begins with {start!r}")
    return elapsed


def measurements(folder: Path, args: argparse.Namespace, device: str) -> dict:
    """What is measured, by name; every one returns seconds."""
    numbers = itertools.count()

    def common() -> list[str]:
        return ["--device", device, "--output_dir", str(folder / f"out{next(numbers)}")]

    images = ["--dataset", "folder", "--data", str(folder / "images"), "--cache_dir", str(folder / "cache")]
    holdout = ["--holdout", "100", "--score_images", "100", "--score_batch_size", "100"]
    figures = ["visualize.py", "--arch", "NAG_HIGH_ACC", "--output_dir", str(folder / "figures")]
    quick = {
        "import torch": lambda: until_output("", "-c", "import torch; print(torch.__version__)"),
        "generate_archs.py, first class": lambda: until_output("class", "generate_archs.py", *common()),
    }
    full = {
        "generate_archs_multiobj.py, first class": lambda: until_output(
            "class", "generate_archs_multiobj.py", *common()
        ),
        "visualize.py, first figure": lambda: until_output("", *figures),
        "gan.py, first step, of the predictor": lambda: until_call("Predictor", "gan.py", *common()),
        "gan.py, first step of the generator, after the predictor's training": lambda: until_call(
            "CellGenerator", "gan.py", *common()
        ),
        "gan_multiobj.py, first step, of the predictor": lambda: until_call("Predictor", "gan_multiobj.py", *common()),
        "build_nas_dataset, first step": lambda: until_call(
            "Supernet", "build_nas_dataset", *common(), *images, *holdout
        ),
        "train_cifar.py, first step": lambda: until_call("CifarNetwork", "train_cifar.py", *common(), *images),
    }
    return quick if args.quick else {**quick, **full}


def main(args: argparse.Namespace) -> None:
    device = begin(args)
    report = Report("startup", args, device)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder, "images"))
        runs = measurements(Path(folder), args, args.device)
        times = {name: [] for name in runs}
        for _ in range(min(args.rounds, MOST_ROUNDS)):
            for name, run in runs.items():
                times[name].append(run())
    medians = {name: statistics.median(values) for name, values in times.items()}
    baseline = medians.pop("import torch")
    report.figure("python and import torch", f"{baseline:.1f} s")
    for name, value in medians.items():
        report.figure(name, f"{value - baseline:.1f} s beyond that", "5 s")
    report.finish()


if __name__ == "__main__":
    main(parse_args(__doc__))
