"""A run that is killed between logging and saving, at each of its checkpoints, has the lines of an unbroken one."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from small_training import TINY, make_images, words

from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from genotypes import GENOTYPES
from models.cost import genotype_cost
from plumbing.checkpoint_files import save_checkpoint
from plumbing.console import pace
from plumbing.locks import release_folder

SCRIPTS = {
    "build_nas_dataset.build_nas_dataset": "--data IMAGES --holdout 16 --pool_size 2 --epochs 2 --scorings 2"
    " --score_images 4 --score_batch_size 4 --score_amp off --max_step 4 --num_images 16 --auxiliary_weight 0",
    "gan": "--nasbench_data NASDATA --batch_size 4 --latent_dim 8 --g_emb_size 8 --g_hidden_size 8 --eval_size 6"
    " --pool_size 1000 --n_epochs 2 --warmup_epochs 1 --device cpu",
    "train_cifar": "--data IMAGES --arch NAG_FEW_PARAMS --epochs 3 --save_every 2 --holdout 16 --num_images 16",
    "build_nas_dataset.eval_archs": "--data IMAGES --archs ARCHS --epochs 3 --halving --eta 2 --holdout 16"
    " --num_images 16",
}
SLOW = ("gan", "build_nas_dataset.eval_archs")
TIMES = {"seconds", "data_wait"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    records = [Record(i, g, 0.1 * i, *genotype_cost(g)) for i, g in enumerate(random_pool(8, seed=1))]
    write_records(folder / "nasdata.jsonl", records, {})
    names = ["NAG_ENSEMBLE_A", "NAG_ENSEMBLE_B", "NAG_FEW_PARAMS"]
    (folder / "archs.json").write_text(json.dumps([GENOTYPES[name].to_dict() for name in names]))
    images = make_images(folder / "images", {"dark": 60, "light": 180})
    return {"IMAGES": images, "NASDATA": folder / "nasdata.jsonl", "ARCHS": folder / "archs.json"}


def lines(folder: Path) -> list[dict]:
    """What a run logged, but for the time that it took."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


def learning_rates(folder: Path) -> list[float]:
    """Those that the optimizers in checkpoint.pt hold, if there are any."""
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    states = state.get("optimizers", {"": state["optimizer"]} if "optimizer" in state else {}).values()
    return [float(group["lr"]) for optimizer in states for group in optimizer["param_groups"]]


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SCRIPTS]
)
def test_a_run_killed_before_any_of_its_checkpoints_logs_the_same_lines(script, files, tmp_path, monkeypatch):
    module, save = importlib.import_module(script), save_checkpoint

    def run(*flags, kill_at: int = -1) -> int:
        """Run the script up to its save number `kill_at`. Returns how many there were."""
        saves = 0

        def save_or_die(*args) -> None:
            nonlocal saves
            if saves == kill_at:
                raise KeyboardInterrupt
            saves += 1
            save(*args)

        monkeypatch.setattr(module, "save_checkpoint", save_or_die)
        args = module.parse_args(list(map(str, flags)))
        try:
            module.main(args)
            assert pace.done == pace.expected  # what the time left is reckoned from
        except KeyboardInterrupt:
            release_folder(Path(args.output_dir))
        return saves

    flags = [*(TINY if "IMAGES" in SCRIPTS[script] else []), *words(SCRIPTS[script], **files), "--output_dir"]
    count = run(*flags, tmp_path / "whole")
    assert count >= 2 and (expected := lines(tmp_path / "whole"))
    for kill_at in range(1, count):  # before the first there is nothing to go on from
        folder = tmp_path / str(kill_at)
        assert run(*flags, folder, kill_at=kill_at) == kill_at
        run("--resume", folder)
        assert lines(folder) == expected, kill_at
        assert learning_rates(folder) == learning_rates(tmp_path / "whole"), kill_at
