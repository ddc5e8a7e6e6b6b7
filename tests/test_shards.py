"""shards.py: scores found by several processes are those of one, and parts that do not belong together are refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_training import ROOT, as_by_torchrun, make_images, other_process, refused

from build_nas_dataset import build_nas_dataset, scoring, shards
from build_nas_dataset.build_nas_dataset import main, parse_args
from build_nas_dataset.supernet_training import train_epoch
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint
from plumbing.locks import release_folder

FLAGS = """
    --dataset folder --layers 1 --channels 4 --batch_size 8 --device cpu --amp off --holdout 24 --num_images 16
    --epochs 3 --scorings 2 --score_images 12 --score_batch_size 12 --auxiliary_weight 0 --image_size 16 --max_step 5
""".split()


def build(*flags) -> None:
    main(parse_args(list(map(str, flags))))


def dataset(run: Path) -> str:
    """nasdata.jsonl without the seconds that the run took."""
    return re.sub(r'"seconds": {[^}]*}', "", (run / "nasdata.jsonl").read_text())


def logged(run: Path) -> list[str]:
    """The lines of metrics.jsonl in any order, without the seconds."""
    return sorted(re.sub(r', "seconds": [^,}]*', "", line) for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


@pytest.fixture(scope="module")
def one(images, tmp_path_factory) -> Path:
    """A run of 7 genotypes, of one process from its beginning to its end."""
    folder = tmp_path_factory.mktemp("one") / "run"
    build(*FLAGS, "--pool_size", 7, "--data", images, "--output_dir", folder)
    return folder


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The same up to the end of training: 14 scores are left to be found."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    build(*FLAGS, "--pool_size", 7, "--data", images, "--output_dir", folder, "--score_later")
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_shards_in_any_order_find_what_one_process_finds_and_the_last_one_merges(one, run, capsys):
    for i in (2, 0, 3):
        build("--resume", run, "--score_only", "--shard", f"{i}/4")
    assert "10 of 14 scores are there" in capsys.readouterr().out and not (run / "nasdata.jsonl").exists()
    build("--resume", run, "--score_only", "--shard", "1/4")
    assert dataset(run) == dataset(one)
    assert logged(run) == logged(one)
    assert (run / "supernet.pt").read_bytes() == (one / "supernet.pt").read_bytes()
    states = [load_checkpoint(folder, "supernet") for folder in (run, one)]
    assert states[0]["scores"].equal(states[1]["scores"]) and states[0]["args"]["shard"] is None
    assert all(map(torch.equal, states[0]["supernet"].values(), states[1]["supernet"].values()))
    assert not (run / "scoring").exists()
    build("--resume", run, "--score_only", "--shard", "1/4")  # a job that is started again
    assert "nothing is left to be scored" in capsys.readouterr().out and dataset(run) == dataset(one)


def test_a_shard_that_is_killed_loses_what_it_has_not_saved_and_nothing_else(one, run, monkeypatch):
    """It saves after each score here, and is killed in its fifth of seven; the other shard works meanwhile."""
    score, scored = scoring.score, []

    def count_or_die(supernet, genotype, *args):
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.append(genotype)
        return score(supernet, genotype, *args)

    monkeypatch.setattr(scoring, "SAVE_SECONDS", -1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "score", count_or_die)
        build("--resume", run, "--score_only", "--shard", "0/2")
    release_folder(shards.part_file(run, 0, 2).parent)
    build("--resume", run, "--score_only", "--shard", "1/2")
    again = []
    monkeypatch.setattr(scoring, "score", lambda *args: again.append(args[1]) or score(*args))
    build("--resume", run, "--score_only", "--shard", "0/2")
    assert len(scored) == 4 and len(again) == 3
    assert dataset(run) == dataset(one)


def test_a_stop_before_the_parts_are_merged_is_made_good_by_resume(one, run, monkeypatch, capsys):
    """Killed as the merged scores are saved, and then as supernet.pt is: their lines are in the log already."""
    build("--resume", run, "--score_only", "--shard", "0/2")
    save, kinds = build_nas_dataset.save_checkpoint, []

    for dying, flags in (("supernet", ["--score_only", "--shard", "1/2"]), ("supernet weights", [])):

        def die(path, kind, state, dying=dying):
            kinds.append(kind)
            if kind == dying:
                raise KeyboardInterrupt
            save(path, kind, state)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(build_nas_dataset, "save_checkpoint", die)
            build("--resume", run, *flags)
        release_folder(run)
    assert kinds == ["supernet", "supernet", "supernet weights"] and not (run / "nasdata.jsonl").exists()
    build("--resume", run)
    assert dataset(run) == dataset(one) and logged(run) == logged(one) and not (run / "scoring").exists()


def change(path: Path, **values) -> None:
    """Replace entries of a part file."""
    save_checkpoint(path, "scores", {**load_checkpoint(path, "scores"), **values})


def test_parts_that_do_not_belong_together_are_refused_by_name_and_nothing_is_written(run, capsys):
    part, other = shards.part_file(run, 0, 2), shards.part_file(run, 1, 2)
    build("--resume", run, "--score_only", "--shard", "0/2")
    assert "7 of 14 scores are there" in (line := refused(capsys, build_nas_dataset, ["--resume", run]))
    assert "--score_only" in line and "--shard I/N" in line
    assert "has parts of 2 shards, not of 3" in refused(
        capsys, build_nas_dataset, ["--resume", run, "--score_only", "--shard", "0/3"]
    )
    assert "has parts of 2 shards, not of 1" in refused(capsys, build_nas_dataset, ["--resume", run, "--score_only"])
    whole, state = part.read_bytes(), load_checkpoint(part, "scores")
    shutil.copytree(part.parent, other.parent)
    assert f"{other} has a score that {part} has too" in refused(capsys, build_nas_dataset, ["--resume", run])
    shutil.rmtree(other.parent)
    for name in ("images", "genotypes", "settings"):
        change(part, of={**state["of"], name: "another"})
        assert f"{part} is of other {name} than the run" in refused(capsys, build_nas_dataset, ["--resume", run])
        part.write_bytes(whole)
    change(part, items=state["items"] + 8)
    assert f"{part} has a score that the run does not lack" in refused(capsys, build_nas_dataset, ["--resume", run])
    change(part, items=state["items"], scores=state["scores"] + 1)
    assert f"{part} has scores that are no accuracies" in refused(capsys, build_nas_dataset, ["--resume", run])
    part.write_bytes(b"")
    assert f"{part} is not a readable checkpoint" in refused(capsys, build_nas_dataset, ["--resume", run])
    part.write_bytes(whole)
    weights = load_checkpoint(shards.weights_file(run, 0), "supernet to score")
    weights["supernet"] = {name: value + 1 for name, value in weights["supernet"].items()}
    save_checkpoint(shards.weights_file(run, 0), "supernet to score", weights)
    for flags in ([], ["--score_only", "--shard", "1/2"]):
        assert f"{part} is of another supernet" in refused(capsys, build_nas_dataset, ["--resume", run, *flags])
    assert not (run / "nasdata.jsonl").exists() and not (run / "supernet.pt").exists()
    assert load_checkpoint(run, "supernet")["scores"].isnan().all()


def test_shards_work_side_by_side_but_one_process_at_each(one, run, capsys):
    """Another process holds shard 0; the run's own lock is taken for the merging only."""
    with other_process(shards.part_file(run, 0, 2).parent) as other:
        line = refused(capsys, build_nas_dataset, ["--resume", run, "--score_only", "--shard", "0/2"])
        assert "--shard: " in line and f"is in use: process {other.pid} " in line
        build("--resume", run, "--score_only", "--shard", "1/2")
    build("--resume", run, "--score_only", "--shard", "0/2")
    assert dataset(run) == dataset(one)


def test_flags_for_several_processes_are_checked(one, monkeypatch, capsys):
    for flags, message in {
        "--score_only": "argument --score_only: needs --resume RUN",
        "--shard 0/2": "argument --shard: needs --score_only",
        "--shard 2/2": "argument --shard: expected I/N with I from 0 to N - 1, got '2/2'",
        "--shard half": "argument --shard: expected I/N",
    }.items():
        assert message in refused(capsys, build_nas_dataset, flags.split())
    as_by_torchrun(monkeypatch, rank=0, world=2)
    line = refused(capsys, build_nas_dataset, ["--epochs", "3"])
    assert "torchrun: one process trains, with --score_later" in line and "--score_only" in line


def test_a_run_that_is_not_trained_for_it_is_not_scored_by_shards(images, tmp_path, monkeypatch, capsys):
    """It stopped in its last epoch; by --score_later it goes on, and leaves what it has not scored yet."""
    folder = tmp_path / "run"

    def stop_in_third_epoch(*args):
        if args[5] == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build_nas_dataset, "train_epoch", stop_in_third_epoch)
        build(*FLAGS, "--pool_size", 7, "--data", images, "--output_dir", folder)
    release_folder(folder)
    line = refused(capsys, build_nas_dataset, ["--resume", folder, "--score_only"])
    assert f"{folder} is not trained to its end with --score_later" in line
    build("--resume", folder, "--score_later")
    assert "7 scores are left" in capsys.readouterr().out  # the first scoring was done
    build("--resume", folder, "--score_only")
    assert len((folder / "nasdata.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
def test_four_processes_score_200_genotypes_as_one_does_one_of_them_killed(images, tmp_path):
    """One is killed by SIGKILL half-way, which ends the others too, by torchrun; the run is resumed."""
    flags = [*FLAGS, "--pool_size", "200", "--data", images]
    build(*flags, "--output_dir", tmp_path / "one")
    build(*flags, "--output_dir", tmp_path / "run", "--score_later")
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    several = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "-m"]
    several += ["build_nas_dataset", "--score_only", "--resume"]
    subprocess.run([*several, tmp_path / "run"], cwd=ROOT, check=True, timeout=300)
    assert dataset(tmp_path / "run") == dataset(tmp_path / "one")

    jobs = [subprocess.Popen([sys.executable, "-c", JOB, tmp_path / "killed", f"{i}/4"], cwd=ROOT) for i in range(4)]
    part = shards.part_file(tmp_path / "killed", 2, 4)
    deadline = time.monotonic() + 200
    while not (part.exists() and saved(part) > 20) and time.monotonic() < deadline:
        time.sleep(0.05)
    jobs[2].send_signal(signal.SIGKILL)
    assert [job.wait(300) for job in jobs] == [0, 0, -signal.SIGKILL, 0]
    assert 20 < saved(part) < 100
    build("--resume", tmp_path / "killed", "--score_only", "--shard", "2/4")
    assert dataset(tmp_path / "killed") == dataset(tmp_path / "one")
    assert json.loads((tmp_path / "killed" / "config.json").read_text())["processes"] == 1


# A job that saves its scores ten times a second.
JOB = """if True:
    import sys
    from build_nas_dataset import scoring
    from build_nas_dataset.build_nas_dataset import main, parse_args
    scoring.SAVE_SECONDS = 0.1
    main(parse_args(["--resume", sys.argv[1], "--score_only", "--shard", sys.argv[2]]))
"""


def saved(part: Path) -> int:
    """How many scores a part file has."""
    return int((~load_checkpoint(part, "scores")["scores"].isnan()).sum())
