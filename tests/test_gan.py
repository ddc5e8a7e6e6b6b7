"""gan.py: its flags and recipes, and runs that go on after a stop."""

import json

import pytest
import torch

import gan
from build_nas_dataset.random_cells import random_pool
from build_nas_dataset.records import Record, write_records
from generation.recipes import PAPER, ROBUST
from generation.training import Trainer
from models.cost import genotype_cost
from models.generator import Generator
from plumbing.checkpoint_files import load_checkpoint
from plumbing.run_folder import code_version
from tests.small_training import refused


def write_dataset(folder, n):
    """A NAS dataset of n genotypes. Returns its path."""
    records = [Record(i, g, 0.1 + i / 50, *genotype_cost(g)) for i, g in enumerate(random_pool(n, seed=6))]
    write_records(folder / "a.jsonl", records, {})
    return folder / "a.jsonl"


def test_the_reference_policy_is_the_generator_as_the_warm_up_left_it(tmp_path, monkeypatch):
    def add_one(trainer, epoch):
        for parameter in trainer.networks.generator.parameters():
            parameter.data.add_(1)
        return {}

    monkeypatch.setattr(Trainer, "train_epoch", add_one)
    flags = f"--nasbench_data {write_dataset(tmp_path, 16)} --output_dir {tmp_path / 'run'} --pool_size 1000"
    flags += " --n_epochs 4 --warmup_epochs 2 --g_emb_size 8 --batch_size 8 --eval_size 3"
    gan.main(gan.parse_args(flags.split()))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    for name, weight in state["generator"].items():
        torch.testing.assert_close(state["reference"][name], weight - 2, rtol=0, atol=1e-5)


def test_a_run_stopped_within_its_schedule_goes_on_as_if_it_had_not(tmp_path, monkeypatch):
    flags = f"--nasbench_data {write_dataset(tmp_path, 16)} --batch_size 4 --g_emb_size 8 --d_emb_size 8 --eval_size 6"
    flags += " --n_epochs 3 --warmup_epochs 1 --adversarial_weight 1 --policy_gradient_cells 6 --pool_size 1000"
    train_epoch = Trainer.train_epoch

    def stopped(*args):
        if args[-1] == 2:
            raise KeyboardInterrupt
        return train_epoch(*args)

    gan.main(gan.parse_args(f"{flags} --output_dir {tmp_path / 'whole'}".split()))
    monkeypatch.setattr(Trainer, "train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        gan.main(gan.parse_args(f"{flags} --output_dir {tmp_path / 'part'}".split()))
    monkeypatch.undo()
    gan.main(gan.parse_args(["--resume", str(tmp_path / "part")]))
    whole, part = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "part"))
    for name in ("generator", "reference", "discriminator", "predictor"):
        assert all(torch.equal(whole[name][key], part[name][key]) for key in whole[name])
    assert any(not torch.equal(part["reference"][key], part["generator"][key]) for key in part["generator"])
    assert Generator.from_checkpoint(tmp_path / "part" / "generator.pt").sample((1,), 3, seed=0)


def test_snapshots_of_the_generator_are_kept_and_are_those_of_their_epochs(tmp_path):
    flags = f"--nasbench_data {write_dataset(tmp_path, 16)} --batch_size 4 --g_emb_size 8 --eval_size 6 --eval_every 9"
    flags += " --pool_size 1000 --n_epochs 3 --warmup_epochs 1 --policy_gradient_cells 6 --lr_schedule constant"
    gan.main(gan.parse_args(f"{flags} --output_dir {tmp_path / 'every'} --save_every 2".split()))
    gan.main(gan.parse_args(["--resume", str(tmp_path / "every"), "--n_epochs", "4", "--save_every", "1"]))
    names = sorted(path.name for path in (tmp_path / "every").glob("generator*.pt"))
    assert names == ["generator-0002.pt", "generator-0004.pt", "generator.pt"]
    second, last, final = (load_checkpoint(tmp_path / "every" / name, "gan") for name in names)
    assert (second["epoch"], last["epoch"]) == (2, 4) and last.keys() == final.keys()
    known = {"seed": 1997, "recipe": "robust", "n_epochs": 4, "warmup_epochs": 1, "lr_schedule": "constant"}
    assert known.items() <= final["args"].items() and {"output_dir", "resume"}.isdisjoint(final["args"])
    assert {name: final[name] for name in ("commit", "clean")} == code_version()
    assert all(torch.equal(last["generator"][key], final["generator"][key]) for key in final["generator"])
    assert any(not torch.equal(second["generator"][key], final["generator"][key]) for key in final["generator"])
    assert Generator.from_checkpoint(tmp_path / "every" / names[0]).sample((1,), 3, seed=0)


def test_recipes_set_defaults_and_flags_win():
    paper, robust = gan.parse_args(["--recipe", "paper"]), gan.parse_args("--lr 0.5 --no-chain-cells".split())
    assert (paper.likelihood_weight, paper.temperature, paper.lr, paper.clip_value) == (0, 0, 2e-4, 0.01)
    assert robust.likelihood_weight == 1 and robust.temperature == 1 and robust.autoregressive_edges
    assert robust.lr == 0.5 and not robust.chain_cells
    both = gan.parse_args(["--kl_weight", "0.1"], objectives=("accuracy", "params"))  # as gan_multiobj.py
    assert (robust.pool_size, robust.kl_weight, both.pool_size, both.kl_weight) == (65536, 0.05, 65536, 0.1)
    assert gan.parse_args(["--recipe", "paper"], paper={"clip_value": 0.0}).clip_value == 0
    assert gan.parse_args(["--objectives", "params,macs"]).objectives == ("params", "macs")
    assert PAPER.keys() == ROBUST.keys()
    for flags in (
        "--objectives speed",
        "--objectives params,params",
        "--recipe paper --warmup_epochs 2",
        "--warmup_epochs 0",  # nothing to diverge from
        "--pool_size 10",
        "--recipe paper --pool_size 2000",  # nothing that the examples are for
    ):
        with pytest.raises(SystemExit):
            gan.parse_args(flags.split())


def test_a_shorter_run_has_a_shorter_warm_up():
    warmups = [gan.parse_args(["--n_epochs", str(n)]).warmup_epochs for n in (1, 2, 9, 12, 28, 60)]
    assert warmups == [1, 1, 6, 8, 18, 18]
    assert gan.parse_args("--n_epochs 12 --warmup_epochs 3".split()).warmup_epochs == 3
    assert gan.parse_args("--recipe paper --n_epochs 12".split()).warmup_epochs == 0


def test_help_shows_the_defaults_of_both_recipes_and_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        gan.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "learning rate of Adam, for both networks (default: robust 0.002, paper 0.0002)" in text
    assert "genotypes a step (default: 64)" in text and "(default: robust on, paper off)" in text


def test_flags_of_the_reference_mean_here_what_they_mean_there(capsys):
    assert gan.parse_args("--gpu 3 --batch-size 8".split()).device == "cuda:3"
    for flag in ("--n_cpu", "--vocab-size"):
        with pytest.raises(SystemExit):
            gan.parse_args([flag, "8"])
        assert f"argument {flag}: the reference has this flag but never reads it" in capsys.readouterr().err


@pytest.mark.slow  # compiles for a minute
def test_compiled_parts_are_four_graphs_that_train_as_without(tmp_path, monkeypatch):
    """One for all message-passing layers and sizes of cells, one for the discriminator; and one each without gradients,
    of cells that the discriminator is shown, and of weights that are not trained.
    """
    torch._dynamo.reset()
    monkeypatch.setattr("plumbing.start.check_compiler", lambda device: None)  # makes a graph too
    monkeypatch.setattr(Generator, "fixed_shape", True)  # as on CUDA; no batch is as large as 1 or 4 x a cell
    flags = f"--recipe paper --nasbench_data {write_dataset(tmp_path, 12)} --batch_size 11 --n_epochs 2 --eval_size 3"
    flags += " --g_emb_size 8 --d_emb_size 8 --g_dropout 0 --d_gnn_dropout 0 --d_mlp_dropout 0 --lr 0.01 --clip_value 0"
    losses = []
    for compiled in ([], ["--compile"]):
        folder = tmp_path / f"run{len(compiled)}"
        gan.main(gan.parse_args([*flags.split(), *compiled, "--output_dir", str(folder)]))
        losses.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1]))
    for name in ("d_loss", "g_loss", "real_score"):
        assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


@pytest.mark.parametrize("network", ["generator", "discriminator"])
def test_weights_that_turn_nan_in_the_last_step_do_not_overwrite_the_checkpoint(tmp_path, monkeypatch, capsys, network):
    def last_step_diverges(trainer, epoch):
        if epoch == 1:
            next(getattr(trainer.networks, network).parameters()).data[0] = float("nan")
        return {"nll": 1.0}

    monkeypatch.setattr(Trainer, "train_epoch", last_step_diverges)
    flags = f"--nasbench_data {write_dataset(tmp_path, 16)} --output_dir {tmp_path / 'run'} --pool_size 1000"
    flags += " --n_epochs 3 --g_emb_size 8 --d_emb_size 8 --batch_size 8 --eval_size 3 --adversarial_weight 1"
    line = refused(capsys, gan, flags.split())
    assert "epoch 2: the weights are not all finite numbers, training diverged" in line
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["epoch"] == 1 and all(weight.isfinite().all() for weight in state[network].values())
    assert not (tmp_path / "run" / "generator.pt").exists()


@pytest.mark.parametrize("recipe", ["paper", "robust"])
@pytest.mark.parametrize("lr", ["1e3", "1e6"])
def test_a_learning_rate_at_which_nothing_is_learned_is_noticed(tmp_path, capsys, recipe, lr):
    flags = f"--nasbench_data {write_dataset(tmp_path, 40)} --output_dir {tmp_path / 'run'} --recipe {recipe} --lr {lr}"
    flags += " --n_epochs 2 --g_emb_size 8 --d_emb_size 8 --batch_size 8 --eval_size 3"
    flags += " --pool_size 1000" if recipe == "robust" else ""
    assert "training diverged" in refused(capsys, gan, flags.split())
    assert not list((tmp_path / "run").glob("*.pt"))
