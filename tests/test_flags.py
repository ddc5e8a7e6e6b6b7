"""Flags of the training scripts: those of the public reference, defaults, and help texts."""

import argparse
import importlib
from pathlib import Path

import pytest

import gan
import generate_archs
import generate_archs_multiobj
import train_cifar
import train_imagenet
from build_nas_dataset import eval_archs
from models.network import CifarConfig, ImageNetConfig
from plumbing.flags import ArgumentParser

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"train_cifar": train_cifar, "train_imagenet": train_imagenet, "eval_archs": eval_archs}


@pytest.fixture
def parser_of(monkeypatch):
    """A function from the name of a script to its parser."""
    made = []
    real = ArgumentParser.__init__
    monkeypatch.setattr(
        ArgumentParser, "__init__", lambda self, *args, **kw: made.append(self) or real(self, *args, **kw)
    )

    def find(script: str) -> argparse.ArgumentParser:
        SCRIPTS[script].parse_args([])
        return made[-1]

    return find


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_in_a_group_and_has_a_help_text(parser_of, script):
    parser = parser_of(script)
    grouped = [action for group in parser._action_groups[2:] for action in group._group_actions]
    for action in parser._actions:
        if action.dest != "help":
            assert action.help and action in grouped, action.option_strings


@pytest.mark.parametrize(("script", "config"), [("train_cifar", CifarConfig()), ("train_imagenet", ImageNetConfig())])
def test_defaults_of_the_network_are_those_of_its_config(script, config):
    args = SCRIPTS[script].parse_args([])
    for name in ("layers", "channels", "keep_prob", "drop_path_keep_prob"):
        assert getattr(args, name) == getattr(config, name)


@pytest.mark.parametrize(
    ("script", "texts"),
    [
        ("train_cifar", ["(default: 600)", "(default: as --epochs)", "(default: sgd 0.025, adabelief 0.001)"]),
        ("eval_archs", ["(default: 600)", "(default: 50)", "(default: sgd 0.0003, adabelief 0.0005)"]),
        ("train_imagenet", ["(default: 250)", "(default: 10 a class, a tenth at most)", "(default: sgd 3e-05, "]),
    ],
)
def test_help_shows_the_defaults_that_will_be_used(capsys, script, texts):
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].parse_args(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in texts), shown


# -------------------------------------------------------------------------------------------- the public reference


@pytest.mark.parametrize("script", SCRIPTS)
def test_use_aux_head_switches_the_auxiliary_head_off_as_in_the_reference(script):
    assert SCRIPTS[script].parse_args(["--use_aux_head"]).auxiliary_weight == 0
    assert SCRIPTS[script].parse_args([]).auxiliary_weight > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_batch_size_is_accepted_in_either_spelling(script):
    for flag in ("--eval_batch_size", "--eval-batch-size"):
        assert SCRIPTS[script].parse_args([flag, "123"]).eval_batch_size == 123


def test_the_reference_can_be_told_of_zip_files_which_are_found_here_without(capsys):
    args = train_imagenet.parse_args("--zip_file --lazy_load --epochs 3 --arch NAG_FEW_PARAMS".split())
    assert (args.epochs, args.arch) == (3, "NAG_FEW_PARAMS")
    assert vars(train_imagenet.parse_args(["--zip-file"])) == vars(train_imagenet.parse_args([]))


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("train_cifar", "--max_num_vertices 10"),
        ("eval_archs", "--max_num_vertices 10"),
        ("train_imagenet", "--max_num_vertices 10"),
        ("train_imagenet", "--mode test"),
        ("train_imagenet", "--cutout_size 16"),
    ],
)
def test_flags_that_the_reference_never_reads_are_refused(capsys, script, flags):
    with pytest.raises(SystemExit) as end:
        SCRIPTS[script].parse_args(flags.split())
    assert end.value.code == 2
    assert f"argument {flags.split()[0]}: the reference has this flag but never reads it" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- shipped files, the home folder


def test_shipped_files_are_found_beside_the_scripts_from_any_folder(monkeypatch, tmp_path, capsys):
    defaults = {
        "nasbench_data": (gan, "data/nasdata.jsonl"),
        "archs": (eval_archs, "data/nasdata.jsonl"),
        "checkpoint": (generate_archs, "data/generator.pt"),
    }
    monkeypatch.chdir(ROOT)
    for name, (script, value) in defaults.items():
        assert getattr(script.parse_args([]), name) == value
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "nasdata.jsonl").write_text("another one")
    monkeypatch.chdir(tmp_path)
    for name, (script, value) in defaults.items():
        assert getattr(script.parse_args([]), name) == str(ROOT / value)
        with pytest.raises(SystemExit):
            script.parse_args(["--help"])
        out = capsys.readouterr().out
        assert f"(default: {value})" in " ".join(out.split()) and str(ROOT) not in out
    assert generate_archs_multiobj.parse_args([]).checkpoint == str(ROOT / "data" / "generator_multiobj.pt")
    assert train_cifar.parse_args([]).data == "data"  # what is downloaded lies where one works


def test_cells_are_drawn_from_another_folder_and_the_next_command_works_there(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    generate_archs.main(generate_archs.parse_args("--num_archs 2 --device cpu --output_dir here --evaluate".split()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith(f"next: python {ROOT / 'visualize.py'} --arch here/best.json")
    assert lines[-1].split()[:2] == ["python", str(ROOT / "train_cifar.py")]
    assert (tmp_path / "here" / "evaluation.json").exists()


@pytest.mark.parametrize("module", ["build_nas_dataset", "build_nas_dataset.eval_archs", "generation.from_reference"])
def test_a_module_shows_how_it_is_started(module, capsys):
    script = importlib.import_module("build_nas_dataset.build_nas_dataset" if module == "build_nas_dataset" else module)
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m {module} ") and f"\n    python -m {module} " in out


def parse_paths(*words: str) -> argparse.Namespace:
    parser = ArgumentParser("")
    parser.add_argument("weights", nargs="?", help="a path without a flag")
    parser.add_argument("--output_dir", help="a path")
    parser.add_argument("--evaluate", nargs="+", help="several paths")
    parser.add_argument("--folder", type=Path, help="a path as such")
    return parser.parse_args(words)


def test_the_home_folder_is_meant_by_a_tilde_at_the_start_of_any_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args = parse_paths("~/w.pkl", "--output_dir=~/x", "--evaluate", "~/a.pt", "b~.pt", "./~/c.pt", "--folder=~")
    assert (args.weights, args.output_dir, args.folder) == ("/home/me/w.pkl", "/home/me/x", Path("/home/me"))
    assert args.evaluate == ["/home/me/a.pt", "b~.pt", "./~/c.pt"]
    assert train_cifar.parse_args(["--arch=~/g.json:3", "--data", "~/d"]).arch == "/home/me/g.json:3"


@pytest.mark.parametrize(
    ("home", "word"), [("", "~/x"), ("not/absolute", "~/x"), ("/home/me", "~nobody-of-this-name/x")]
)
def test_a_tilde_that_stands_for_no_home_folder_is_refused_by_the_name_of_its_flag(monkeypatch, capsys, home, word):
    monkeypatch.setenv("HOME", home)
    for words, flag in (([f"--output_dir={word}"], "--output_dir"), (["--evaluate", "a", word], "--evaluate")):
        with pytest.raises(SystemExit) as end:
            parse_paths(*words)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1
        assert f"argument {flag}: there is no home folder for the ~ of {word}; " in line and f"./{word}" in line
