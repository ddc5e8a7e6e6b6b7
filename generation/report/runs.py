"""What a run folder holds, whichever script wrote it, for those who read runs: report.py.

    run = read_run("runs/demo")
    run.kind, run.command, run.seconds, run.metrics[-1]

A folder is read as it is: a run that is not finished, or that an older version wrote, gives what is there, and
`missing` says in sentences what is not.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plumbing.files import from_json, whole_lines

LARGEST_FILE = 2**30  # bytes of a JSON file that is read

# kind -> (a flag that only this script has, files by which the folder is known without config.json, what it did)
KINDS = {
    "build_nas_dataset": ("scorings", ("nasdata.jsonl",), "NAS dataset"),
    "gan": ("n_critic", ("generator.pt",), "Training of a generator"),
    "generate_archs": ("max_draws", ("genotypes.json",), "Generated cells"),
    "eval_archs": ("halving", ("best.json",), "Brief training of candidates"),
    "train_imagenet": ("select_on_val", (), "Training on ImageNet"),
    "train_cifar": ("voting", ("result.json",), "Training of a network"),
    "search": ("queries", ("results.json",), "Search"),
}


@dataclass
class Run:
    """One run. name: its folder's, made longer where two runs have the same. config: {} where there is none."""

    kind: str
    folder: Path
    name: str
    config: dict
    metrics: list[dict]
    missing: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        return KINDS[self.kind][2]

    @property
    def args(self) -> dict:
        return self.config.get("args") if isinstance(self.config.get("args"), dict) else {}

    @property
    def command(self) -> str:
        return str(self.config.get("command") or "")

    @property
    def commit(self) -> str:
        """The git commit that the run recorded, with what is known of changes to it; "" where none is."""
        found = self.config.get("commit") or self.config.get("git_commit") or self.config.get("git")
        if isinstance(found, dict):
            clean = found.get("clean", True)
            found = f"{found.get('commit') or ''}{'' if clean else ', with changes'}"
        elif found and self.config.get("clean") is False:
            found = f"{found}, with changes"
        return str(found or "")

    @property
    def seconds(self) -> float | None:
        """How long the run has computed, as far as it was recorded."""
        known = self.json("result.json")
        if isinstance(known, dict) and isinstance(known.get("seconds"), (int, float)):
            return known["seconds"]
        spent = [line["seconds"] for line in self.metrics if isinstance(line.get("seconds"), (int, float))]
        return sum(spent) if spent and self.kind != "eval_archs" else None

    @property
    def settings(self) -> str:
        """Optimizer, learning rate, batch and epochs of a training, in words; "" where the run is none."""
        words = {"recipe": "recipe {}", "optimizer": "{}", "lr": "learning rate {}", "lr_max": "learning rate {}",
                 "batch_size": "batch {}", "l2_reg": "weight decay {}", "epochs": "{} epochs", "n_epochs": "{} epochs",
                 "schedule_epochs": "schedule of {} epochs"}  # fmt: skip
        known = {name: self.args[name] for name in words if self.args.get(name) is not None}
        if "batch_size" not in known or self.kind in ("generate_archs", "search"):
            return ""
        if known.get("schedule_epochs") == known.get("epochs"):
            known.pop("schedule_epochs", None)
        return ", ".join(words[name].format(value) for name, value in known.items())

    def json(self, name: str) -> Any:
        """The content of a JSON file of the run; None where it is not there or cannot be read, which `missing` says."""
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            if path.stat().st_size > LARGEST_FILE:
                raise ValueError("it is larger than 1 GiB")
            return from_json(path.read_bytes())
        except (ValueError, OSError, RecursionError) as error:
            self.miss(f"{name} cannot be read: {' '.join(str(error).split())[:200]}.")
            return None

    def objects(self, name: str) -> list[dict]:
        """The objects of a JSON file that holds a list of them, or one."""
        content = self.json(name)
        return [entry for entry in (content if isinstance(content, list) else [content]) if isinstance(entry, dict)]

    def column(self, name: str) -> tuple[list, list]:
        """(steps, values) of a logged number, where it was logged."""
        found = [(line["step"], line[name]) for line in self.metrics if name in line and "step" in line]
        return [step for step, _ in found], [value for _, value in found]

    def miss(self, sentence: str) -> None:
        if sentence not in self.missing:
            self.missing.append(sentence)


def read_run(path: str | Path) -> Run:
    """The run in a folder, or in a NAS dataset file FILE.jsonl alone. Raises ValueError when it is no run."""
    path = Path(path)
    if path.is_file() and path.suffix == ".jsonl":
        return Run("build_nas_dataset", path, path.name, {}, [])
    if not path.is_dir():
        raise ValueError(f"no such run folder: {path}")
    run = Run("", path, path.resolve().name, {}, [])
    config = run.json("config.json")
    run.config = config if isinstance(config, dict) else {}
    run.kind = kind_of(run)
    if not run.kind:
        raise ValueError(f"{path} is no run folder: expected config.json of one of the scripts, or its results")
    if not run.config:
        run.miss("config.json is missing: command, versions and device are not known.")
    try:
        run.metrics = [line for line in whole_lines(path / "metrics.jsonl") if isinstance(line, dict)]
    except (ValueError, OSError) as error:
        run.miss(f"metrics.jsonl cannot be read: {error}.")
    return run


def kind_of(run: Run) -> str:
    """Which script wrote a run, by the flags in its config.json, else by its results; "" for none."""
    for kind, (flag, _, _) in KINDS.items():
        if flag in run.args:
            return kind
    if run.args:
        return ""
    for kind, (_, files, _) in KINDS.items():
        if any((run.folder / name).is_file() for name in files):
            return kind
    return ""


def name_apart(runs: Iterable[Run]) -> None:
    """Give runs of the same name longer names, of as many parent folders as it takes.

    Raises ValueError when one folder is given twice.
    """
    runs = list(runs)
    folders = [run.folder.resolve() for run in runs]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ValueError(f"{runs[i].folder} is given twice")
    for parts in range(1, max((len(folder.parts) for folder in folders), default=1) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    for run, name in zip(runs, names if runs else (), strict=True):
        run.name = name
