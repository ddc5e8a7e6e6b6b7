"""Scoring by several processes or jobs, each of which scores a share of what a trained supernet run lacks.

    python -m build_nas_dataset ... --score_later --output_dir RUN              # one process trains
    torchrun --standalone --nproc_per_node=4 -m build_nas_dataset --resume RUN --score_only
    python -m build_nas_dataset --resume RUN --score_only --shard 0/4           # or: one job of four, in any order

Training leaves the supernet of each scoring in RUN/scoring/weights-K.pt. Shard I of N keeps its scores in a part file,
RUN/scoring/shard-I-of-N/scores.pt, saved every minute, in a folder with a lock of its own. When all parts are whole,
they are checked and merged; the NAS dataset is that of one process.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from build_nas_dataset.scoring import score_pool, scoring_batches, settings_of
from genotypes import Genotype
from models.supernet import Supernet
from plumbing.checkpoint_files import load_checkpoint, of_this_version, save_checkpoint
from plumbing.locks import hold_folder, try_to_hold_folder
from plumbing.run_folder import clear_temporary, device_name
from plumbing.signals import signals
from training import distributed
from training.images import ImageSet
from utils import shown, user_input

MOST_SHARDS = 100_000
PART_KEYS = ("shard", "of", "supernets", "items", "scores", "seconds", "device")


def shard(text: str) -> tuple[int, int]:
    """An argparse type: "2/8" is (2, 8), the third of eight shards."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count) <= MOST_SHARDS):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 0 to N - 1, got {text!r}")
    return int(index), int(count)


def this_shard(given: tuple[int, int] | None) -> tuple[int, int]:
    """Which shard this process is, of how many. given: that of --shard, which the processes of torchrun divide."""
    index, count = given or (0, 1)
    return index * distributed.world() + distributed.rank(), count * distributed.world()


def scoring_folder(run: Path) -> Path:
    return run / "scoring"


def weights_file(run: Path, scoring: int) -> Path:
    """The file in which the supernet waits for a scoring, from 0."""
    return scoring_folder(run) / f"weights-{scoring}.pt"


def part_file(run: Path, index: int, count: int) -> Path:
    return scoring_folder(run) / f"shard-{index}-of-{count}" / "scores.pt"


def keep_weights(run: Path, scoring: int, supernet: Supernet) -> None:
    """Leave the supernet, as it is now, for a scoring."""
    save_checkpoint(weights_file(run, scoring), "supernet to score", {"supernet": supernet.state_dict()})


def has_weights(run: Path, scores: Tensor) -> bool:
    """Whether a supernet was left for each scoring that `scores` (scorings, P), NaN where there is none, lacks."""
    return all(weights_file(run, scoring).exists() for scoring in scores.isnan().any(1).nonzero().flatten().tolist())


def digest(*parts: Tensor | str) -> str:
    """A name for tensors and texts: others have another one."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            found.update(f"{part.dtype} {tuple(part.shape)}".encode())
            part = part.detach().cpu().contiguous().numpy()
        found.update(part.encode() if isinstance(part, str) else part.tobytes())
    return found.hexdigest()


class Work:
    """The scores that a trained run lacks, and what they depend on.

    run: its folder. scores (scorings, P): accuracies of the pool, NaN where they are to be found.
    items (n,): these places in the flattened scores. of: names (see digest) of what all scores depend on.
    """

    def __init__(
        self, run: Path, args: argparse.Namespace, held_out: ImageSet, pool: list[Genotype], scores: Tensor
    ) -> None:
        self.run, self.args, self.held_out, self.pool, self.scores = run, args, held_out, pool, scores
        self.items = scores.flatten().isnan().nonzero().flatten()
        self.of = {
            "genotypes": digest(*(json.dumps(genotype.to_dict()) for genotype in pool)),
            "images": digest(held_out.images, held_out.labels, str((held_out.mean, held_out.std))),
            "settings": digest(json.dumps(settings_of(args), sort_keys=True)),
        }

    def share(self, index: int, count: int) -> Tensor:
        """The items of shard `index`; those of all shards are contiguous, disjoint and together all."""
        n = len(self.items)
        return self.items[index * n // count : (index + 1) * n // count]

    def read_weights(self, scoring: int) -> tuple[dict, str]:
        """The weights of the supernet for a scoring, and their digest. Raises ValueError when they are not there."""
        weights = load_checkpoint(weights_file(self.run, scoring), "supernet to score", ("supernet",))["supernet"]
        return weights, digest(*(part for name in sorted(weights) for part in (name, weights[name])))

    # ------------------------------------------------------------------------------------------------- scoring

    def score(self, supernet: Supernet, index: int, count: int, device: torch.device) -> None:
        """Score the items of one shard that its part file lacks. supernet: of the run, whose weights are replaced.

        Ends the script when another process works on this shard, or the folder holds parts of something else.
        """
        path = part_file(self.run, index, count)
        with user_input("--shard", everywhere=True):
            if others := {n for n in map(_count, self._parts()) if n != count}:
                folder = scoring_folder(self.run)
                raise ValueError(f"{folder} has parts of {min(others)} shards, not of {count}; go on with as many")
            hold_folder(path.parent, "--shard")
            clear_temporary(path.parent)
            part = self._begin(path, index, count)
        part["device"] = device_name(device)
        save = self._saver(path, part)
        of_scoring = part["items"] // len(self.pool)
        for scoring in of_scoring.unique().tolist():
            first, end = (int(torch.searchsorted(of_scoring, scoring, right=right)) for right in (False, True))
            scores, items = part["scores"][first:end], part["items"][first:end]  # a view: score_pool fills it in
            if not scores.isnan().any():
                continue
            with user_input("--resume", everywhere=True), of_this_version(weights_file(self.run, scoring)):
                weights, name = self.read_weights(scoring)
                if part["supernets"].setdefault(scoring, name) != name:
                    raise ValueError(f"{path} is of another supernet than {weights_file(self.run, scoring)}")
                supernet.load_state_dict(weights)
            batches = scoring_batches(self.held_out, self.args, scoring)
            genotypes = [self.pool[item % len(self.pool)] for item in items.tolist()]
            later = int(part["scores"][end:].isnan().sum())
            score_pool(supernet, genotypes, batches, scores, self.args.score_amp, part["seconds"], save, later)
        save()

    def _begin(self, path: Path, index: int, count: int) -> dict:
        """The part of a shard, as its file has it or new. Raises ValueError when the file is of something else."""
        items = self.share(index, count)
        if not path.exists():
            part = {"shard": [index, count], "of": self.of, "supernets": {}, "seconds": {"scoring": 0.0}}
            return {**part, "items": items, "scores": torch.full((len(items),), torch.nan)}
        part = self._read(path)
        if not part["items"].equal(items):
            raise ValueError(f"{path} has other items than shard {index} of {count}")
        return part

    @staticmethod
    def _saver(path: Path, part: dict) -> Callable[[], None]:
        """What saves a part, and then ends the script if a signal asked for that."""

        def save() -> None:
            save_checkpoint(path, "scores", part)
            signals.save = False
            if signals.stop:
                signals.end()

        return save

    # ------------------------------------------------------------------------------------------------- merging

    def _parts(self) -> list[Path]:
        return sorted(scoring_folder(self.run).glob("shard-*-of-*/scores.pt"))

    def _read(self, path: Path) -> dict:
        """A part file. Raises ValueError when it is none, or its scores depend on something else."""
        part = load_checkpoint(path, "scores", PART_KEYS)
        items, scores = part["items"], part["scores"]
        whole = isinstance(items, Tensor) and isinstance(scores, Tensor) and items.dtype == torch.long
        if not (whole and scores.dtype == torch.float32 and items.ndim == 1 and items.shape == scores.shape):
            raise ValueError(f"{path} does not hold one score an item")
        if not ((scores >= 0) & (scores <= 1) | scores.isnan()).all():
            raise ValueError(f"{path} has scores that are no accuracies")
        for name, value in self.of.items():
            if part["of"].get(name) != value:
                raise ValueError(f"{path} is of other {name} than the run")
        return part

    def merge(self) -> tuple[Tensor, float, str]:
        """What all parts have found together: the scores of the whole run, (scorings, P), with NaN where an item is
        missing, the seconds that they took, and a note on the parts, "" if there is nothing to note.

        Raises ValueError naming the part that is of another supernet, of other images, genotypes or settings, or that
        has a score of another part or one that the run has already.
        """
        scores, lacking = self.scores.flatten().clone(), set(self.items.tolist())
        taken_by, names = {}, {}  # item -> part file; scoring -> digest of its supernet
        seconds, devices, counts = 0.0, set(), set()
        for path in self._parts():
            part = self._read(path)
            counts.add(_count(path))
            if len(counts) > 1:
                raise ValueError(f"{scoring_folder(self.run)} has parts of {min(counts)} and of {max(counts)} shards")
            for item in part["items"].tolist():
                if item not in lacking:
                    raise ValueError(f"{path} has a score that the run does not lack (item {item})")
                if item in taken_by:
                    raise ValueError(f"{path} has a score that {taken_by[item]} has too (item {item})")
                taken_by[item] = path
            for scoring in (part["items"][~part["scores"].isnan()] // len(self.pool)).unique().tolist():
                if scoring not in names:
                    names[scoring] = self.read_weights(scoring)[1]
                if part["supernets"].get(scoring) != names[scoring]:
                    raise ValueError(f"{path} is of another supernet than {weights_file(self.run, scoring)}")
            scores[part["items"]] = part["scores"]
            seconds += float(part["seconds"]["scoring"])
            devices.add(part["device"])
        note = ""
        if len(devices) > 1:
            note = f"shards were scored on {' and '.join(sorted(map(str, devices)))}: scores may differ by rounding"
        return scores.view_as(self.scores), seconds, note

    def command(self) -> str:
        """The commands by which the run's scores are found."""
        resumed = f"-m build_nas_dataset --resume {shown(self.run)} --score_only"
        return f"torchrun --standalone --nproc_per_node=4 {resumed}\n  or: python {resumed} --shard I/N"


def _count(path: Path) -> int:
    """The number of shards that a part file says, by its folder, it is one of."""
    count = path.parent.name.rpartition("-")[2]
    return int(count) if count.isdecimal() else 0


def wait_for_folder(run: Path, flag: str) -> None:
    """Hold the lock of a run folder; while another process does, wait. It merges for seconds at most."""
    told = False
    while holder := try_to_hold_folder(run, flag):
        if not told:
            print(f"waiting: {holder} writes to {run}")
        told = True
        time.sleep(1)


def remove_parts(run: Path) -> None:
    """Remove the weights and parts of a run whose scores are merged."""
    shutil.rmtree(scoring_folder(run), ignore_errors=True)
