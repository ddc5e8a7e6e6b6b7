"""Every script is killed, stopped and starved, and goes on: the results are those of a run without a fault.

`make test` tries a few faults, `make test-all` all; `python -m tests.test_faults` writes docs/results/faults.json too.
"""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from genotypes import GENOTYPES
from models.cost import genotype_cost
from plumbing.files import whole_lines, write_json
from plumbing.run_folder import versions
from tests.small_training import NAMES, ROOT, TINY, make_images, make_photos
from tests.starting import Server, server

SMALL_GAN = """
    --batch_size 8 --latent_dim 8 --g_emb_size 16 --g_hidden_size 8 --eval_size 12 --pool_size 1000 --n_epochs 3
    --device cpu
""".split()
MODULES = (
    "training.cifar",
    "torch.utils.tensorboard",
    "training.imagenet",
    "generation.training",
    "generation.metrics",
    "build_nas_dataset.candidates",
)
# What the clock, the folder and the machine have to do with; git may not answer in time on a busy one.
TIMES = {"seconds", "data_wait", "versions", "device", "output_dir", "resume", "checkpoint_minutes", "commit", "clean"}
COUNT = {"do": "nothing", "at": "step", "n": 0}
EVERY_STEP = ("--checkpoint_minutes", "0")


@dataclass(frozen=True)
class Script:
    """A small run. command: without --output_dir. results: the files that it is for. checkpoint: None if it has none.

    within: whether it saves within an epoch.
    """

    command: tuple
    results: tuple[str, ...]
    checkpoint: str | None = "checkpoint.pt"
    within: bool = True


@dataclass
class Bench:
    """Scripts on small inputs, and a process that starts them, with faults, see tests/faults.py.

    whole, seconds, steps: of each script, what a run without a fault finds, what time it takes, and how many steps of
    optimizers it has.
    """

    folder: Path
    server: Server
    scripts: dict[str, Script] = field(default_factory=dict)
    whole: dict[str, dict] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    runs: int = 0

    def __post_init__(self):
        images, photos = self.folder / "images", self.folder / "photos"
        make_images(images, {"dark": 60, "light": 180})
        make_photos(photos)
        pool, nasdata = random_pool(24, seed=1), self.folder / "nasdata.jsonl"
        write_records(nasdata, [Record(i, g, 0.2 + 0.01 * i, *genotype_cost(g)) for i, g in enumerate(pool)], {})
        archs = self.folder / "archs.json"
        archs.write_text(json.dumps([GENOTYPES[name].to_dict() for name in NAMES[:2]]))
        supernet = (
            "--channels 4 --batch_size 6 --holdout 24 --score_images 8 --score_batch_size 4 --pool_size 4".split()
        )
        supernet += "--layers 1 --scorings 2 --epochs 3 --dataset folder --device cpu --amp off --score_amp off".split()
        photo_flags = [word for word in TINY if word not in ("--dataset", "folder")]
        photo_flags += "--image_size 32 --auxiliary_weight 0 --epochs 2 --holdout 6 --workers 1 --decoder pil".split()
        gan = ("--nasbench_data", nasdata, *SMALL_GAN)
        halving = "--epochs 4 --halving --eta 2 --holdout 16 --data".split()
        self.scripts = {
            "gan.py": Script(("gan.py", *gan), ("generator.pt",), within=False),
            "gan_multiobj.py": Script(
                ("gan_multiobj.py", *gan, "--adversarial_weight", 1), ("generator.pt",), within=False
            ),
            "build_nas_dataset": Script(
                ("-m", "build_nas_dataset", *supernet, "--data", images), ("nasdata.jsonl", "supernet.pt")
            ),
            "eval_archs": Script(
                ("-m", "build_nas_dataset.eval_archs", *TINY, *halving, images, "--archs", archs), ("results.json",)
            ),
            "train_cifar.py": Script(
                ("train_cifar.py", *TINY, "--data", images, "--epochs", 3, "--holdout", 8), ("result.json",)
            ),
            "train_imagenet.py": Script(
                ("train_imagenet.py", *photo_flags, "--data", photos), ("result.json", "best.pt")
            ),
            "generate_archs.py": Script(
                ("generate_archs.py", "--checkpoint", self.folder / "gan.py", "--num_archs", 12, "--evaluate"),
                ("genotypes.json", "best.json", "evaluation.json"),
                checkpoint=None,
                within=False,
            ),
        }

    def start(self, *command, fault: dict) -> tuple[int, str]:
        """Run a script: its exit status, less than 0 for a signal, and what it printed."""
        status, out, err = self.server.start(*command, fault=fault | {"count": str(self.folder / "count")})
        return status, out + err

    def unbroken(self, name: str) -> dict:
        """What a run without a fault finds; its folder is named after the script."""
        if name == "generate_archs.py":
            self.unbroken("gan.py")
        if name not in self.whole:
            started = time.monotonic()
            status, output = self.start(*self.scripts[name].command, "--output_dir", self.folder / name, fault=COUNT)
            assert status == 0, output
            self.seconds[name] = time.monotonic() - started
            self.steps[name] = int((self.folder / "count").read_text())
            self.whole[name] = findings(self.folder / name, self.scripts[name])
        return self.whole[name]

    def goes_on(self, name: str, folder: Path) -> None:
        """Resume the run in a folder, or start it anew where it was stopped before its first checkpoint; compare."""
        script = self.scripts[name]
        if script.checkpoint and (folder / script.checkpoint).exists():
            module = script.command[:2] if script.command[0] == "-m" else script.command[:1]
            status, output = self.start(*module, "--resume", folder, fault=COUNT)
        else:
            for path in (folder / "config.json", *(folder / result for result in script.results)):
                if script.checkpoint is None:  # what is there is whole, but the script does not write over it
                    assert not path.exists() or json.loads(path.read_text())
                    path.unlink(missing_ok=True)
            status, output = self.start(*script.command, "--output_dir", folder, fault=COUNT)
        assert status == 0, output
        assert not list(folder.rglob(".*.tmp"))
        found, expected = findings(folder, script), self.unbroken(name)
        assert found.keys() == expected.keys()
        for part, value in expected.items():
            assert found[part] == value, f"{name}: {part}"

    def endure(self, name: str, fault: dict, status: int, within: tuple = EVERY_STEP) -> int:
        """Let a fault happen in a run, which must end by that status, and go on; compare with a run without.

        A run may also end before the fault. Returns its status.
        """
        self.unbroken(name)
        self.runs += 1
        folder, script = Path(fault.get("path", self.folder / f"run{self.runs}")), self.scripts[name]
        flags = within if script.within else ()
        found, output = self.start(*script.command, *flags, "--output_dir", folder, fault=fault)
        assert found in (status, 0), output
        assert "Traceback" not in output, output
        if found > 0:
            last = output.strip().splitlines()[-1]
            assert ("error: cannot write" if found == 2 else "ended by SIG") in last, output
            if found > 2 and script.checkpoint and (folder / script.checkpoint).exists():
                assert last.endswith(f"--resume {folder}"), last
        (folder / "filler").unlink(missing_ok=True)
        if found or script.checkpoint:
            self.goes_on(name, folder)
        shutil.rmtree(folder, ignore_errors=True)
        return found


def findings(folder: Path, script: Script) -> dict:
    """What a run has found: weights by the hash of their bytes, results and metrics without times."""
    found = {"metrics": [without_times(line) for line in whole_lines(folder / "metrics.jsonl")]}
    for name in (*filter(None, [script.checkpoint]), *script.results):
        path = folder / name
        if path.suffix == ".pt":
            found[name] = digest(torch.load(path, weights_only=True))
        elif path.suffix == ".jsonl":
            found[name] = [without_times(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = without_times(json.loads(path.read_text()))
    return found


def without_times(value):
    """A value of JSON without its entries of TIMES."""
    if isinstance(value, dict):
        return {name: without_times(part) for name, part in value.items() if name not in TIMES}
    return [without_times(part) for part in value] if isinstance(value, list) else value


def digest(value) -> object:
    """A value of a checkpoint with hashes in the place of tensors."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return {name: digest(part) for name, part in value.items() if name not in TIMES}
    return [digest(part) for part in value] if isinstance(value, (list, tuple)) else value


@contextmanager
def small_disk(path: Path, size: str = "64m"):
    """A file system of its own."""
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system of its own needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


KILLED, TERMINATED, INTERRUPTED, REFUSED = -9, 143, 130, 2


def faults_at_replaces(bench: Bench, name: str) -> dict[str, int]:
    """kill -9 before and after every os.replace of a run."""
    counts = Counter()
    for when in ("before", "after"):
        for n in range(1, 100):
            if bench.endure(name, {"do": "SIGKILL", "at": when, "n": n}, KILLED, within=()) == 0:
                break
            counts["kill -9 at os.replace"] += 1
    assert counts.total() > 2
    return counts


def faults_at_random(bench: Bench, name: str, most: int = 3) -> dict[str, int]:
    """kill -9, SIGTERM and SIGINT at random moments."""
    counts, draw = Counter(), random.Random(name)
    for do, status, n in (("SIGKILL", KILLED, most), ("SIGTERM", TERMINATED, 1), ("SIGINT", INTERRUPTED, 1)):
        for _ in range(n):
            bench.unbroken(name)
            seconds = draw.uniform(0.1, 0.9) * bench.seconds[name]
            while bench.endure(name, {"do": do, "at": "seconds", "n": seconds}, status) == 0:
                seconds /= 2  # it was done before
            counts[f"{do.replace('SIGKILL', 'kill -9')} at a random moment"] += 1
    return counts


def faults_at_steps(bench: Bench, name: str) -> dict[str, int]:
    """kill -9, SIGTERM and SIGINT after a step, with a checkpoint after every step or only at the end of epochs."""
    counts = Counter()
    bench.unbroken(name)
    steps, script = bench.steps[name], bench.scripts[name]
    for do, status, shares in (
        ("SIGKILL", KILLED, (0.2, 0.45, 0.7, 0.95)),
        ("SIGTERM", TERMINATED, (0.15, 0.5, 1.0)),
        ("SIGINT", INTERRUPTED, (0.35, 0.8)),
    ):
        for share in shares:
            fault = {"do": do, "at": "step", "n": max(1, round(share * steps))}
            assert bench.endure(name, fault, status, EVERY_STEP if do == "SIGKILL" else ()) == status
            counts[f"{do.replace('SIGKILL', 'kill -9')} after a step"] += 1
    if script.within:
        assert bench.endure(name, {"do": "SIGUSR1", "at": "step", "n": steps // 2}, 0, ()) == 0
        counts["SIGUSR1 after a step"] += 1
    assert bench.endure(name, {"do": "twice", "at": "step", "n": steps - 1}, -signal.SIGINT) == -signal.SIGINT
    counts["SIGINT twice after a step"] += 1
    return counts


def faults_in_evaluations(bench: Bench, name: str) -> dict[str, int]:
    """Signals while networks are evaluated, and while genotypes are scored."""
    counts = Counter()
    place = {"build_nas_dataset": "score", "train_cifar.py": "batch", "train_imagenet.py": "batch"}
    for n, do, status in ((1, "SIGTERM", TERMINATED), (2, "SIGINT", INTERRUPTED), (2, "SIGKILL", KILLED)):
        if name in place:
            assert bench.endure(name, {"do": do, "at": place[name], "n": n}, status, ()) == status
            counts[f"{do.replace('SIGKILL', 'kill -9')} in an evaluation"] += 1
    return counts


def faults_of_disks(bench: Bench, name: str) -> dict[str, int]:
    """A full disk, limits of file sizes, and a folder that is removed."""
    counts = Counter()
    bench.unbroken(name)
    steps = bench.steps[name]
    share = 0.3 if bench.scripts[name].within else 0.9  # by then, gan.py has trained its predictor
    place = {"at": "step", "n": round(share * steps)} if steps else {"at": "before", "n": 1}
    for size in (100, 20_000) if steps else (100,):
        assert bench.endure(name, {"do": "size", "bytes": size, **place}, REFUSED, ()) == REFUSED
        counts["file-size limit"] += 1
    disk = bench.folder / "disk"
    with small_disk(disk):
        assert bench.endure(name, {"do": "full", "path": str(disk / "run"), **place}, REFUSED) == REFUSED
    disk.rmdir()
    counts["full disk"] += 1
    if steps:
        path = str(bench.folder / "removed")
        assert bench.endure(name, {"do": "remove", "path": path, **place}, REFUSED, ()) == REFUSED
        counts["folder removed"] += 1
    return counts


SCRIPTS = (
    "gan.py gan_multiobj.py build_nas_dataset eval_archs train_cifar.py train_imagenet.py generate_archs.py".split()
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    server = Server(*MODULES)
    yield Bench(tmp_path_factory.mktemp("faults"), server)
    server.close()


def test_a_run_that_is_killed_goes_on_to_the_same_results(tmp_path):
    """A short form of the test below."""
    bench = Bench(tmp_path, server())
    script = bench.scripts["train_cifar.py"]
    smaller = (*script.command, *"--arch NAG_FEW_PARAMS --num_images 24 --epochs 2".split())
    bench.scripts["train_cifar.py"] = replace(script, command=smaller)  # two steps an epoch
    assert bench.endure("train_cifar.py", {"do": "SIGKILL", "at": "step", "n": 3}, KILLED) == KILLED


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_run_that_met_a_fault_goes_on_to_the_same_results(bench, name):
    assert sum(all_faults(bench, name).values()) >= 8


def all_faults(bench: Bench, name: str) -> Counter:
    """Let all faults happen to a script. Returns how many of each kind there were."""
    bench.unbroken(name)
    counts = Counter()
    for faults in (faults_at_steps, faults_in_evaluations, faults_of_disks, faults_at_replaces, faults_at_random):
        if bench.steps[name] or faults is not faults_at_steps:
            counts.update(faults(bench, name))
        print(f"{name}, {faults.__name__}: {counts.total()} up to now", file=sys.stderr, flush=True)
    return counts


def main(names: list[str]) -> None:
    """With the name of a script: print how many faults of each kind it has endured. Without: try all, and write."""
    if names:
        with TemporaryDirectory() as folder:
            server = Server(*MODULES)
            print(json.dumps(all_faults(Bench(Path(folder), server), *names)))
            server.close()
        return
    command = [sys.executable, "-m", "tests.test_faults"]
    processes = {name: subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in SCRIPTS}
    outputs = {name: process.communicate()[0] for name, process in processes.items()}
    found = {name: json.loads(output) for name, output in outputs.items() if output}
    write_json(ROOT / "docs" / "results" / "faults.json", {"faults": found, "versions": versions()})
    sys.exit(len(found) < len(SCRIPTS))


if __name__ == "__main__":
    main(sys.argv[1:])
