"""The commands of README.md, docs/reproduce.md and the Makefile's demo run in the order of their page, at small sizes.

What is put in the place of what: IMAGES stands for CIFAR-10 and for DIR, the tables of NAS-Bench-101 and -201 and the
NAS dataset of gan.py are made up, and the flags of SMALLER follow those of the page. The commands of
docs/own_images.md, docs/own_space.md and docs/from_the_reference.md, and those of docs/faq.md for several processes,
are run by test_own_images.py, test_own_space.py, test_from_reference.py and test_shards.py.
"""

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import readme_figures
from tests.small_training import ROOT, make_images
from tests.test_documents import commands_of, script_of
from tests.test_own_images import make_tree
from tests.test_scripts import SMALL_GAN, SMALL_SUPERNET, nasdata, run
from tests.test_search import small_settings, small_table
from tests.test_tabular import STRINGS, csv_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
__all__ = ["nasdata", "small_settings"]  # fixtures

SMALL = "--layers 1 --channels 4 --image_size 32 --auxiliary_weight 0 --epochs 1 --batch_size 8 --device cpu --amp off"
FEW_GENOTYPES = (
    "--data IMAGES --epochs 2 --image_size 16 --auxiliary_weight 0 --auxiliary_weight 0 --pool_size 24 --device cpu"
)
FEW_CANDIDATES = "--dataset folder --data IMAGES --num_archs 2 --holdout 8 --schedule_epochs 1"
SMALLER = {
    "gan": [*SMALL_GAN, "--n_epochs", "2"],
    "gan_multiobj": [*SMALL_GAN, "--n_epochs", "2"],
    "generate_archs": "--num_archs 4".split(),
    "generate_archs_multiobj": "--num_archs 4".split(),
    "train_cifar": [*"--dataset folder --data IMAGES".split(), *SMALL.split()],
    "train_imagenet": [*"--data IMAGES --workers 0".split(), *SMALL.split()],
    "build_nas_dataset.build_nas_dataset": [*SMALL_SUPERNET, *FEW_GENOTYPES.split()],
    "build_nas_dataset.eval_archs": [*FEW_CANDIDATES.split(), *SMALL.split()],
    "generation.search_benchmark": "--queries 22 --repeats 1 --workers 1".split(),
    "benchmarks.nasbench201": "--num_archs 4 --max_draws 40".split(),
    "build_nas_dataset.tabular": [],
    "visualize": [],
    "report": [],
    "benchmarks.sampling_seeds": [],
    "benchmarks.readme_figures": [],
}
NOT_RUN = ("pip", "make", "wget", "sha256sum", ".", "tensorboard")  # networks, installation, and what has tests
WORDS = {"DIR": "IMAGES", "data/supernet.pt": "runs/nasdata/supernet.pt"}  # that supernet knows the images by number


def smaller(words: list[str]) -> tuple[str, list[str]]:
    """The script of a command and its arguments at small size; ("", []) for what is not run."""
    script, arguments = script_of(words)
    if words[0] in NOT_RUN or not script:
        return "", []
    arguments = [WORDS.get(word, word) for word in arguments]
    more = list(SMALLER[script])
    if script.startswith("train_") and {"--evaluate", "--resume"} & {*arguments}:
        more = ["--device", "cpu"]
    elif "photos" in arguments:
        more[more.index("IMAGES")] = "photos"
    if script.startswith("gan") and not {"--resume", "--nasbench_data"} & {*arguments}:
        more += ["--nasbench_data", "nasdata.jsonl"]
    if script.startswith("gan") and "paper" not in arguments:
        more += "--warmup_epochs 1 --pool_size 1000".split()
    if "--sampling_seeds" in arguments:
        more += ["--sampling_seeds", "2"]
    if "--sample" in arguments:
        more += ["--sample", "40" if "--nasbench101" in arguments else "200"]
    if "--score_images" in arguments:
        more += "--scorings 2 --score_images 8".split()
    if "--evaluate_with" in arguments:
        place = arguments.index("--evaluate_with") + 1
        command = arguments[place].replace("python", sys.executable, 1).replace("DIR", "IMAGES")
        arguments[place] = f"{command} {SMALL} --schedule_epochs 1 --holdout 8"
        more = ["--queries", "3"]
    return script, arguments + more


def run_all(commands: list[list[str]]) -> int:
    """Run commands one after the other. Returns how many there were."""
    done = 0
    for words in commands:
        script, arguments = smaller(words)
        if script.startswith("benchmarks."):
            importlib.import_module(script).main(arguments)
        elif script:
            run(f"{script}.py", *arguments)
        done += bool(script)
    return done


@pytest.fixture
def folder(tmp_path, monkeypatch, nasdata, small_settings):
    """A folder to be in, with what the commands read."""
    make_images(tmp_path / "IMAGES", {"dark": 60, "light": 190})
    make_tree(tmp_path / "photos", {"cat": 15, "dog": 15})
    make_tree(tmp_path / "new_photos", {"a": 2})
    (tmp_path / "nasdata.jsonl").write_bytes(nasdata.read_bytes())
    (tmp_path / "accuracies.csv.gz").write_bytes(gzip.compress("\n".join(csv_of(STRINGS)).encode()))
    for name in ("nasbench_full.tfrecord", "upto5vertices_4epochs.tfrecord"):
        small_table(tmp_path).rename(tmp_path / name)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    monkeypatch.setattr(readme_figures, "COUNTS", tmp_path / "docs" / "results" / "asked_obtained.json")
    monkeypatch.setattr(readme_figures, "FOLDER", tmp_path / "docs" / "figures")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the command of --evaluate_with
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands_of_the_readme_run(folder):
    assert run_all(commands_of("README.md")) >= 8
    assert (folder / "runs" / "new_photos" / "predictions.csv").exists()


def test_the_commands_of_the_paper_and_of_the_results_run(folder):
    assert run_all(commands_of("docs/reproduce.md")) >= 30
    for name in ("search201/summary.json", "medium-brief/best.json", "nag-search/genotypes.json"):
        assert (folder / "runs" / name).exists(), name
    assert (folder / "results.json").exists() and (folder / "docs" / "figures" / "asked_obtained.svg").exists()
    assert json.loads((folder / "docs" / "results" / "sampling_seeds.json").read_text())["runs"]


def test_the_demo_ends_with_a_page(folder):
    dry = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line.split() for line in dry.splitlines() if ".py " in line and not line.startswith("echo")]
    assert run_all([["python", *words[1:]] for words in commands]) == 4
    assert Path("runs/demo/report.html").stat().st_size > 10**4
