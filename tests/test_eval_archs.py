"""build_nas_dataset/eval_archs.py, started as a user would, on a tiny folder of images."""

import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import NAMES, TINY, make_images, refused, start, white_images, words

import train_cifar
from build_nas_dataset import candidate_training, candidates, eval_archs
from build_nas_dataset.candidate_training import train_candidate
from build_nas_dataset.records import Record, write_records
from genotypes import GENOTYPES, load_genotype, read_genotypes
from plumbing.checkpoint_files import load_checkpoint, save_checkpoint

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "two", {"dark": 60, "light": 180})


def candidate_flags(images: Path, output_dir: Path, archs: Path) -> list[str]:
    line = "--data IMAGES --epochs 1 --holdout 16 --archs ARCHS --output_dir OUT"
    return [*TINY, *words(line, IMAGES=images, ARCHS=archs, OUT=output_dir)]


@pytest.fixture(scope="module")
def archs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("archs") / "genotypes.json"
    entries = [{**GENOTYPES[name].to_dict(), "name": name, "accuracy": 0.3 + i / 10} for i, name in enumerate(NAMES)]
    path.write_text(json.dumps(entries))
    return path


def run_script(*flags) -> dict[str, dict]:
    """What a run in this process found of each candidate, by name."""
    args = eval_archs.parse_args(list(map(str, flags)))
    eval_archs.main(args)
    results = json.loads((Path(args.output_dir) / "results.json").read_text())
    return {result["name"]: result for result in results}


def test_candidates_are_ranked_and_finished_ones_are_skipped(capsys, images, archs, tmp_path):
    folder = tmp_path / "run"
    flags = [*candidate_flags(images, folder, archs), "--num_archs", 2]
    start("build_nas_dataset/eval_archs.py", *flags)
    command = json.loads((folder / "config.json").read_text())["command"]
    assert "python build_nas_dataset/eval_archs.py --dataset folder " in command
    first = {result["name"]: result for result in json.loads((folder / "results.json").read_text())}
    assert set(first) == set(NAMES[:2])

    line = refused(capsys, eval_archs, flags)  # not trained again for want of --resume
    assert f"go on with that run by --resume {folder}" in line
    metrics = folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 3, "held_out_acc')  # a kill while it was written
    results = list(run_script("--resume", folder, "--num_archs", 0).values())
    output = capsys.readouterr().out
    assert "3 candidates, 2 of them done" in output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]  # the last one is the taus
    accuracies = [result["held_out_accuracy"] for result in results]
    assert accuracies == sorted(accuracies, reverse=True)
    assert {result["name"] for result in results} == set(NAMES)
    for result in results:  # the finished ones as they were, to the second of their training
        assert first.get(result["name"], result) == result
    best = json.loads((folder / "best.json").read_text())
    assert best == results[0]
    assert load_genotype(str(folder / "best.json")) == GENOTYPES[best["name"]]
    assert [genotype for genotype, _ in read_genotypes(folder / "results.json")]
    following = shlex.split(output[output.index("next: ") :])
    assert following[2:5] == ["train_cifar.py", "--arch", str(folder / "best.json")]
    assert train_cifar.parse_args(following[3:]).data == str(images)


def test_candidates_are_ranked_by_their_accuracy_on_held_out_images(images, archs, tmp_path, monkeypatch):
    """One image, seven times, of either class in turn: right 3 or 4 times of 7, as no share of 48 training images is.

    Which, is recomputed from the network that was trained.
    """
    flags = [*candidate_flags(images, tmp_path, archs), "--num_archs", 2]
    training, _, test = train_cifar.load_data(train_cifar.parse_args([*TINY, "--data", str(images)]), CPU)
    held_out = replace(test, images=test.images[:1].expand(7, -1, -1, -1), labels=torch.arange(7) % 2)
    networks, build = [], candidate_training.build_network
    monkeypatch.setattr(eval_archs, "load_data", lambda *args: (training, held_out, test))
    monkeypatch.setattr(
        candidate_training, "build_network", lambda *args: networks.append(build(*args)) or networks[-1]
    )
    results = run_script(*flags)
    mean, std = (torch.tensor(values)[:, None, None] for values in (training.mean, training.std))
    assert len(networks) == len(results) == 2
    for name, network in zip(NAMES, networks, strict=False):
        with torch.no_grad():
            predicted = network.eval()((test.images[:1] / 255 - mean) / std)[0].argmax().item()
        assert results[name]["held_out_accuracy"] == (3 if predicted else 4) / 7
        assert results[name]["training"]["rounds"][0]["held_out_accuracy"] == results[name]["held_out_accuracy"]
    ranks = [r["held_out_accuracy"] for r in json.loads((tmp_path / "results.json").read_text())]
    assert ranks == sorted(ranks, reverse=True)


def test_every_candidate_is_trained_as_if_it_were_the_only_one(images, archs, tmp_path):
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(json.loads(archs.read_text())[1]))
    results = [run_script(*candidate_flags(images, tmp_path / path.stem, path)) for path in (archs, alone)]
    assert results[0][NAMES[1]]["training"]["loss"] == results[1][NAMES[1]]["training"]["loss"]


def test_candidates_are_not_trained_on_other_images_after_a_stop(capsys, halved, images, tmp_path):
    folder = shutil.copytree(halved[0], tmp_path / "run")
    other = shutil.copytree(images, tmp_path / "images")
    (other / "train" / "dark" / "0.png").unlink()
    line = refused(capsys, eval_archs, ["--resume", folder, "--data", other])
    assert f"--data: the images are not those of {folder}" in line


def rounds(result: dict) -> list[tuple]:
    """What was measured of a candidate in each round, but for the time, and for the loss, which varies with threads."""
    return [(r["epochs"], r["held_out_accuracy"]) for r in result["training"]["rounds"]]


HALVING = "--halving --epochs 4 --schedule_epochs 5 --eta 2".split()


@pytest.fixture(scope="module")
def halved(images, archs, tmp_path_factory) -> tuple[Path, dict[str, dict]]:
    """A finished run of three candidates in three rounds (3 to 1 epoch, 2 to 2, 1 to 4), and its results."""
    folder = tmp_path_factory.mktemp("halved")
    return folder, run_script(*candidate_flags(images, folder, archs), *HALVING)


def test_halving_goes_on_with_the_best_and_never_from_zero(halved, images, archs, tmp_path):
    """The winner has the very numbers of a training that was not interrupted, after every round."""
    folder, results = halved
    done = {name: [r["epochs"] for r in result["training"]["rounds"]] for name, result in results.items()}
    assert sorted(done.values()) == [[1], [1, 2], [1, 2, 4]]
    for k in (0, 1):  # who goes on did at least as well as who does not
        through = [result["training"]["rounds"] for result in results.values() if len(result["training"]["rounds"]) > k]
        stay = [rounds[k]["held_out_accuracy"] for rounds in through if len(rounds) > k + 1]
        leave = [rounds[k]["held_out_accuracy"] for rounds in through if len(rounds) == k + 1]
        assert min(stay) >= max(leave)
    best = json.loads((folder / "best.json").read_text())
    assert done[best["name"]] == [1, 2, 4] and best["accuracy"] == results[best["name"]]["accuracy"]
    assert not list(folder.glob("weights/*"))

    flags = [*candidate_flags(images, tmp_path, archs), *"--epochs 4 --schedule_epochs 5".split()]
    whole = run_script(*flags)[best["name"]]
    assert best["held_out_accuracy"] == whole["held_out_accuracy"]
    assert best["training"]["loss"] == whole["training"]["loss"]


def test_halving_goes_on_after_a_stop_in_any_round(halved, images, archs, tmp_path, monkeypatch):
    """Stopped before the first result and in each of three rounds, it finds what it finds without a stop."""
    _, expected = halved
    resumed = [*candidate_flags(images, tmp_path, archs), *HALVING]
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ".half-0.pt.1.tmp").touch()  # as a kill leaves it
    for allowed in (0, 2, 2, 1):  # candidates until the stop; six trainings in all

        def stopping(*args, left=[allowed]):  # noqa: B006
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return train_candidate(*args)

        monkeypatch.setattr(eval_archs, "train_candidate", stopping)
        with pytest.raises(KeyboardInterrupt):
            eval_archs.main(eval_archs.parse_args(list(map(str, resumed))))
        resumed = ["--resume", tmp_path]
    monkeypatch.setattr(eval_archs, "train_candidate", train_candidate)
    results = run_script("--resume", tmp_path)
    for name, result in results.items():
        assert rounds(result) == rounds(expected[name])
        assert result["training"]["loss"] == expected[name]["training"]["loss"]
    assert len(results) == 3 and not (tmp_path / "weights").exists()


def test_seconds_are_those_of_all_rounds(monkeypatch):
    monkeypatch.setattr(candidate_training, "train", lambda *args, checkpoints: {"loss": 2.0})
    monkeypatch.setattr(candidate_training, "accuracy", lambda *args: 0.5)
    args = eval_archs.parse_args("--layers 1 --channels 4".split())
    first = {"epochs": 1, "held_out_accuracy": 0.4, "loss": 3.0, "seconds": 100.0}
    before = {"training": {"rounds": [first], "seconds": 100.0}}
    images, cpu = white_images(4), torch.device("cpu")
    training = train_candidate(GENOTYPES[NAMES[0]], {}, images, images, args, cpu, before)["training"]
    last = {"epochs": 50, "held_out_accuracy": 0.5, "loss": 2.0, "seconds": training["seconds"]}
    assert training["rounds"] == [first, last] and 100 < training["seconds"] < 200


def test_two_processes_find_what_one_finds(halved, images, archs, tmp_path):
    _, expected = halved
    flags = [*candidate_flags(images, tmp_path, archs), *HALVING]
    output = start("-m", "build_nas_dataset.eval_archs", *flags, processes=2)
    assert "-m build_nas_dataset.eval_archs " in json.loads((tmp_path / "config.json").read_text())["command"]
    results = {result["name"]: result for result in json.loads((tmp_path / "results.json").read_text())}
    found = {name: rounds(result) for name, result in results.items()}
    assert found == {name: rounds(result) for name, result in expected.items()}
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 5, 6]  # of all processes; one candidate left has no tau
    losses = sorted(r["loss"] for result in results.values() for r in result["training"]["rounds"])
    assert sorted(line["loss"] for line in logged) == losses
    assert output.count("round 1/3") == output.count("next:") == 1
    own = [load_checkpoint(tmp_path / name, "candidates")["results"] for name in ("checkpoint.pt", "checkpoint-1.pt")]
    assert all(own) and {result["name"] for results in own for result in results} == set(NAMES)
    assert run_script("--resume", tmp_path).keys() == set(NAMES)  # one process reads the parts of two
    again = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(line["loss"] for line in again) == losses


def test_a_candidate_that_diverged_is_ranked_below_all_others():
    def result(name, epochs, accuracy, loss):
        rounds = [{"epochs": epochs, "held_out_accuracy": accuracy, "loss": loss}]
        return {"name": name, "training": {"rounds": rounds}}

    results = [result("a", 1, 0.5, None), result("b", 1, 0.5, 3.0), result("c", 1, 0.6, 2.0), result("d", 2, 0.1, 1.0)]
    assert [r["name"] for r in candidates.by_accuracy(results)] == ["d", "c", "b", "a"]
    results[3]["training"]["rounds"][0]["loss"] = None  # the only one that was trained for two epochs
    assert [r["name"] for r in candidates.by_accuracy(results)] == ["c", "b", "d", "a"]
    by_name = {r["name"]: r for r in results}
    assert candidates.best_of_round(list("abc"), by_name, 0, 2) == ["c", "b"]


def test_of_each_candidate_the_latest_result_is_read_whichever_process_has_it(tmp_path):
    def result(name: str, rounds: int) -> dict:
        return {**GENOTYPES[name].to_dict(), "name": name, "training": {"rounds": [{"epochs": 1}] * rounds}}

    parts = [[result(NAMES[0], 2), result(NAMES[1], 1)], [result(NAMES[0], 1), result(NAMES[1], 2)]]
    for rank, results in enumerate(parts):
        save_checkpoint(candidates.part_file(tmp_path, rank), "candidates", {"results": results})
    keys = [candidates.key_of(GENOTYPES[name]) for name in NAMES]
    found = candidates.read_parts(tmp_path, order=keys[::-1])
    assert list(found) == [keys[1], keys[0]]
    assert list(found.values()) == [parts[1][1], parts[0][0]]


def test_when_all_candidates_diverge_the_file_says_so_and_there_is_no_best(capsys, images, archs, tmp_path):
    flags = [*candidate_flags(images, tmp_path, archs), *"--num_archs 1 --lr_max 1e30 --grad_clip 1e30".split()]
    assert "the training of every candidate diverged" in refused(capsys, eval_archs, flags)
    (result,) = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert result["training"]["loss"] is None and not (tmp_path / "best.json").exists()


def test_a_candidate_that_diverges_is_ranked_last_and_does_not_end_the_selection(
    capsys, images, archs, tmp_path, monkeypatch
):
    """Its weights turn NaN in its last step, which no mean loss shows."""
    train, accuracies = candidate_training.train, iter([0.9, 0.2, 0.8, 0.1, 0.3])

    def last_step_diverges(network, *args, **kwargs):
        values = train(network, *args, **kwargs)
        if network.genotype == GENOTYPES[NAMES[0]].prune():
            next(network.parameters()).data[0] = float("nan")
        return values

    monkeypatch.setattr(candidate_training, "train", last_step_diverges)
    monkeypatch.setattr(candidate_training, "accuracy", lambda *args: next(accuracies))
    flags = [*candidate_flags(images, tmp_path, archs), *"--num_archs 3 --halving --eta 2 --epochs 2".split()]
    results = run_script(*flags)
    assert list(results) == [NAMES[1], NAMES[2], NAMES[0]]  # 0.3 and 0.1 after two epochs, 0.9 after one
    losses = [results[name]["training"]["loss"] for name in NAMES]
    assert losses[0] is None and all(math.isfinite(loss) for loss in losses[1:])
    out = capsys.readouterr().out
    assert out.count("its training diverged, so it is ranked last (a smaller --lr_max may help)") == 1
    assert [line.split()[0] for line in out.splitlines() if line.endswith("diverged")] == ["2"]


@pytest.mark.parametrize(
    ("number", "epochs", "expected"),
    [
        (27, 27, [(27, 1), (9, 3), (3, 9), (1, 27)]),
        (50, 50, [(50, 1), (17, 5), (6, 16), (2, 50)]),
        (4, 50, [(4, 5), (2, 16), (1, 50)]),
        (1, 50, [(1, 50)]),
        (50, 3, [(50, 1), (17, 3)]),
    ],
)
def test_rounds_of_halving(number, epochs, expected):
    args = eval_archs.parse_args(f"--halving --epochs {epochs}".split())
    assert eval_archs.plan(number, args) == expected


def test_a_halving_run_keeps_its_candidates(capsys, halved):
    argv = ["--resume", halved[0], "--num_archs", 2]
    assert "the candidates that it was started with" in refused(capsys, eval_archs, argv)


def test_a_nas_dataset_is_sampled_evenly_over_its_ranking(tmp_path):
    names = ["NAG_HIGH_ACC", *NAMES]
    records = [Record(i, GENOTYPES[name], (0.9, 0.1, 0.5, 0.3)[i], 1, 1) for i, name in enumerate(names)]
    write_records(tmp_path / "nasdata.jsonl", records, {})
    picked = [known["accuracy"] for _, known in candidates.read_candidates(str(tmp_path / "nasdata.jsonl"), 2)]
    assert picked == [0.1, 0.9]
    assert len(candidates.read_candidates(str(tmp_path / "nasdata.jsonl"), 0)) == 4


def test_isomorphic_candidates_are_trained_once(tmp_path):
    entries = [GENOTYPES["NAG_ENSEMBLE_B"].to_dict(), GENOTYPES["NAG_ENSEMBLE_B"].canonical().to_dict()]
    (tmp_path / "twice.json").write_text(json.dumps(entries))
    assert len(candidates.read_candidates(str(tmp_path / "twice.json"), 0)) == 1


def test_rank_correlations_compare_brief_training_with_supernet_and_params():
    rows = [(0.1, 0.2, 30), (0.2, 0.3, 20), (0.3, 0.4, 10), (0.4, None, 5)]
    results = [
        {"held_out_accuracy": brief, "training": {"params": params}} | ({"accuracy": supernet} if supernet else {})
        for brief, supernet, params in rows
    ]
    correlations = candidates.rank_correlations(results)
    assert correlations["supernet accuracy"]["tau"] == 1
    assert correlations["supernet accuracy"]["n"] == 3
    assert correlations["#params"]["tau"] == -1
    assert correlations["#params"]["n"] == 4
    assert candidates.rank_correlations(results[2:]) == {}
    generated = [{"held_out_accuracy": x, "supernet_accuracy": -x, "training": {"params": 1}} for x in (0.1, 0.2, 0.3)]
    assert candidates.rank_correlations(generated)["supernet accuracy"]["tau"] == -1


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--archs missing.json", "missing.json"),
        ("--holdout 0", "--holdout"),
        ("--num_archs -1", "--num_archs"),
        ("--eta 1", "--eta"),
        ("--halving --epochs 2", "--epochs: expected at least --eta (3)"),
        ("--sync_bn", "--sync_bn: not here"),
        ("--resume missing", "missing"),
    ],
)
def test_eval_archs_refuses_bad_input(capsys, images, archs, tmp_path, flags, expected):
    argv = [*candidate_flags(images, tmp_path / "out", archs), *flags.split()]
    assert expected in refused(capsys, eval_archs, argv)
    assert not (tmp_path / "out").exists()
