"""The plain forms in benchmarks/ as oracles of the fast ones, and the benchmarks themselves at tiny sizes."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import all as all_benchmarks
from benchmarks import plain_images
from benchmarks.common import Comparison, Report, count_flops, interleave
from benchmarks.gan import Step, force, full_cells, plain_network
from benchmarks.supernet import random_images
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record
from build_nas_dataset.scoring import score
from generation.recipes import PAPER, ROBUST
from models.generator import Generator
from models.graph import CellBatch
from models.network import CifarNetwork
from models.supernet import Supernet
from tests.small_training import start
from training.images import normalize

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_forced_growth_gives_the_cells_that_it_is_forced_to():
    torch.manual_seed(0)
    generator = Generator().eval()
    pool = random_pool(12, seed=0)
    force(generator, tuple(CellBatch.encode([g[name] for g in pool]) for name in ("normal", "reduction")))
    assert generator.sample((1,), len(pool), seed=0) == pool


@pytest.mark.parametrize("recipe", ["paper", "robust"])
def test_a_step_with_plain_networks_leaves_the_weights_of_one_with_fast_ones(recipe, monkeypatch):
    for name in ("g_dropout", "d_gnn_dropout", "d_mlp_dropout"):
        monkeypatch.setitem(PAPER if recipe == "paper" else ROBUST, name, 0.0)
    records = [Record(i, g, i / 8, 1000 * i, 1000 * i) for i, g in enumerate(random_pool(8, seed=0))]
    weights = []
    for change in (lambda network: network, plain_network):
        genotypes, changed = [record.genotype for record in records], []
        step = Step(recipe, genotypes, records, argparse.Namespace(quick=True), CPU)
        before = [p.detach().clone() for p in step.networks.generator.parameters()]
        step.runs_with(lambda network, c=change, done=changed: done.append(c(network)) or done[-1])()
        networks = changed[: len(step.networks.optimizers)]
        weights.append({(i, name): p.detach() for i, n in enumerate(networks) for name, p in n.named_parameters()})
    after = [p for (i, _), p in weights[0].items() if i == 0]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=2e-5 if recipe == "paper" else 1e-4)


def test_full_cells_have_ten_vertices():
    pool = random_pool(40, seed=0)
    full = full_cells([Record(i, g, 0.5, 1, 1) for i, g in enumerate(pool)], 6)
    assert len(full) == 6 and all(cell.num_vertices == 10 for genotype in full for cell in genotype.cells)


# ----------------------------------------------------------------------------------------------------- images


def test_contiguous_supernet_gives_the_same_logits_and_gradients():
    torch.manual_seed(0)
    fast = Supernet(layers=1, channels=4, drop_path_keep_prob=1.0).double()
    plain = plain_images.contiguous(fast)
    fast = fast.to(memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    for genotype in random_pool(4, seed=0):
        results = []
        for network, images in ((fast, x.to(memory_format=torch.channels_last)), (plain, x)):
            network.zero_grad(set_to_none=True)
            logits, auxiliary = network(images, genotype)
            (logits.sin().sum() + auxiliary.sin().sum()).backward()
            results.append([logits, auxiliary, *(p.grad for p in network.parameters() if p.grad is not None)])
        torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-8)


def test_contiguous_network_gives_the_same_logits():
    torch.manual_seed(0)
    fast = CifarNetwork(random_pool(1, seed=3)[0], layers=1, channels=4).double().eval()
    plain = plain_images.contiguous(fast)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(x)[0]
        logits = fast.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))[0]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_scores_are_those_of_a_data_loader_for_every_scoring():
    torch.manual_seed(0)
    supernet = Supernet(layers=1, channels=4).eval()
    images = random_images(40, 16, CPU)
    x = normalize(images.images, images.mean, images.std)
    batches = list(zip(x.split(20), images.labels.split(20), strict=True))
    plain, fast = plain_images.contiguous(supernet), supernet.to(memory_format=torch.channels_last)
    scores = [score(fast, genotype, batches).item() for genotype in random_pool(6, seed=0)]
    expected = [plain_images.score(plain, genotype, images, 20, workers=0) for genotype in random_pool(6, seed=0)]
    assert scores == pytest.approx(expected) and len(set(scores)) > 1


def test_plain_augmentation_crops_flips_and_cuts_out():
    images = random_images(4, 16, CPU)
    whole = plain_images.Images(images)
    torch.testing.assert_close(whole[1][0], normalize(images.images, images.mean, images.std)[1])
    torch.manual_seed(0)
    data = plain_images.Images(images, train=True, cutout_size=8)
    views = torch.stack([data[1][0] for _ in range(50)])
    assert views.shape == (50, 3, 16, 16) and len({view.sum().item() for view in views}) > 40
    cut = (views == 0).all(1).sum((1, 2))
    assert (cut >= 16).all() and cut.float().mean() < 130


# --------------------------------------------------------------------------------------------- the machinery


def test_variants_are_timed_in_turn():
    calls = []
    times = interleave({"plain": lambda: calls.append("a"), "fast": lambda: calls.append("b")}, 3, CPU)
    assert calls == ["a", "a", "b", "b"] * 4  # the first round is not counted, nor is the first of two runs
    assert all(len(values) == 3 and min(values) > 0 for values in times.values())


def test_floating_point_operations_and_shares_are_counted(monkeypatch):
    a = torch.rand(30, 20)
    args = argparse.Namespace(quick=True, rounds=2, json=None)
    report = Report("test", args, CPU)
    monkeypatch.setattr("benchmarks.common.has_bf16", lambda device: False)

    def build():
        return lambda: a @ a.T

    report.compare(Comparison("product", build, {"float32": build, "bf16": build}, {"float32": "fast"}, (2, "things")))
    (row,) = report.rows
    assert row["work"] == "product, float32" and row["goal"] == "fast"
    assert float(row["GFLOP"]) == pytest.approx(2 * 30 * 30 * 20 / 1e9)
    assert float(row["peak GiB, plain / fast"].split(" / ")[0]) == 0
    ratio, low, _, high = row["ratio"].replace("(", "").replace(")", "").split()
    assert float(low) <= float(ratio) <= float(high)


@pytest.mark.parametrize("groups", [1, 6])
def test_training_a_convolution_takes_three_times_its_forward_pass(groups):
    conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=groups, bias=False)
    x = torch.randn(2, 6, 8, 8, requires_grad=True)
    forward = 2 * (2 * 8 * 8) * 6 * (6 // groups) * 9
    assert count_flops(lambda: conv(x)) == forward
    assert count_flops(lambda: conv(x).sum().backward()) == 3 * forward
    assert count_flops(lambda: conv(x.detach()).sum().backward()) == 2 * forward


SLOW = pytest.mark.slow


@SLOW
def test_peak_memory_is_that_of_a_process_for_the_variant():
    ballast = torch.ones(2**28)  # 1 GiB of this process, which must not count
    command = [sys.executable, "-m", "benchmarks.gan", "--quick", "--device", "cpu", "--memory_of"]
    work = "paper recipe, real cells' sizes, batch 4|float32"
    result = subprocess.run([*command, work], capture_output=True, text=True, cwd=ROOT, check=True)
    assert 100 < float(result.stdout.split()[-1]) < ballast.nbytes / 2**20


@SLOW
@pytest.mark.parametrize("script", ["train_cifar", "supernet", "image_stream"])
def test_scripts_run_as_files_and_results_are_merged_by_device(script, tmp_path):
    flags = ["--quick", "--rounds", 1, "--device", "cpu", "--only", script]
    kept = {"gan": {"cuda": json_result("step", "1.5")}, script: {"cuda": json_result("other", "2.5")}}
    (tmp_path / "results.json").write_text(json.dumps(kept))
    start("benchmarks/all.py", *flags, "--output_dir", tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["gan"] == kept["gan"] and results[script]["cuda"] == kept[script]["cuda"]
    rows, figures = results[script]["cpu"]["rows"], results[script]["cpu"]["figures"]
    assert all(float(row["GFLOP"]) > 0 and float(row["ratio"].split()[0]) > 0 for row in rows)
    assert bool(rows) == (script != "image_stream") and figures
    text = (tmp_path / "speed.md").read_text()
    assert all(text.index("GAN: one D + G step") < text.index(figure["what"]) for figure in figures)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["results.json", "speed.md"]
    assert f"python benchmarks/{script}.py" in start(f"benchmarks/{script}.py", "--help")


def test_a_run_replaces_the_results_of_its_script_and_device_only(tmp_path, monkeypatch):
    kept = {"gan": {"cpu": json_result("step", "1.5")}, "generate": {"cuda": json_result("drawing", "2.5")}}
    (tmp_path / "results.json").write_text(json.dumps(kept | {"startup": {"cpu": json_result("old", "9.5")}}))
    found = {"kind": "cpu"} | json_result("new", "0.5")
    monkeypatch.setattr(all_benchmarks, "run_script", lambda script, args: found | {"note": script})
    flags = ["--quick", "--only", "generate", "startup", "--output_dir", str(tmp_path)]
    all_benchmarks.main(flags)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["gan"] == kept["gan"] and results["generate"]["cuda"] == kept["generate"]["cuda"]
    assert [results[script]["cpu"]["note"] for script in ("generate", "startup")] == ["generate", "startup"]
    text = (tmp_path / "speed.md").read_text()
    assert text.index("| step") < text.index("| drawing") < text.index("| new") and "| old" not in text


def json_result(work: str, seconds: str) -> dict:
    row = {"work": work, "goal": "", "GFLOP": "1", "fast, s": seconds}
    about = {"device": "a GPU", "cpu": "a CPU", "torch": "2", "python": "3", "date": "today", "rounds": 5}
    return {**about, "quick": False, "rows": [row], "figures": []}


def test_results_have_a_column_for_each_device():
    own = {"cpu": json_result("step", "3"), "cuda": json_result("step", "0.1")}
    text = all_benchmarks.render({"gan": own})
    (line,) = [line for line in text.splitlines() if line.startswith("| step")]
    header = next(line for line in text.splitlines() if line.startswith("| work")).split("|")
    cells = dict(zip(map(str.strip, header), map(str.strip, line.split("|")), strict=True))
    assert (cells["CPU: fast, s"], cells["CUDA: fast, s"], cells["CUDA: ratio"]) == ("3", "0.1", "")
