"""The house rules: who may import whom, how long files and functions are, and that every flag says what it is."""

import argparse
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.house import (
    OPENS_FAST,
    PACKAGE_SCRIPTS,
    ROOT,
    broken,
    broken_arrows,
    functions_of,
    path_edits,
    python_files,
    tree_of,
)

FILES = python_files(ROOT)
PACKAGES = ("models", "generation", "training", "build_nas_dataset")
SCRIPTS = (
    "gan",
    "gan_multiobj",
    "generate_archs",
    "generate_archs_multiobj",
    "train_cifar",
    "train_imagenet",
    "visualize",
    "build_nas_dataset.build_nas_dataset",
    "build_nas_dataset.eval_archs",
)


def test_imports_keep_the_rules():
    assert broken_arrows(ROOT) == []


def test_the_rules_tell_good_imports_from_bad_ones():
    good = """
        gan models.graph|gan generation.recipes|gan utils|gan_multiobj gan|generate_archs_multiobj generate_archs
        report visualize|generation.metrics build_nas_dataset.records|generation.training models.fast.cuda_graphs
        build_nas_dataset.scoring models.fast.replay|training.steps models.fast.cuda_graphs|models.ops models.fast.cpu
        models.fast.replay models.fast.cuda_graphs|models.graph genotypes|training.images utils
        build_nas_dataset.__main__ build_nas_dataset.build_nas_dataset|build_nas_dataset.eval_archs training.cifar
    """
    bad = {
        "models.graph training.steps": "climbs",
        "training.steps build_nas_dataset.records": "climbs",
        "build_nas_dataset.scoring generation.metrics": "climbs",
        "genotypes models.graph": "climbs",
        "genotypes utils": "imports from the project",
        "utils genotypes": "imports from the project",
        "gan models.fast.cpu": "opens models.fast",
        "gan models.fast": "opens models.fast",
        "training.images models.fast.cpu": "opens models.fast",
        "build_nas_dataset.eval_archs train_cifar": "imports a script",
        "gan generate_archs": "imports a script",
        "gan gan_multiobj": "imports a script",
        "train_cifar build_nas_dataset.eval_archs": "imports a script",
        "generation.metrics build_nas_dataset.build_nas_dataset": "imports a script",
    }
    for pair in good.replace("\n", "|").split("|"):
        assert not pair.strip() or broken(*pair.split()) == "", pair
    for pair, rule in bad.items():
        assert broken(*pair.split()) == rule, pair
    modules = {file.removesuffix(".py").replace("/", ".") for file in FILES}
    assert {*SCRIPTS, "training.steps", "build_nas_dataset.scoring"} <= modules | {"build_nas_dataset.__main__"}
    assert PACKAGE_SCRIPTS & modules and OPENS_FAST & modules


def test_nothing_changes_the_module_path():
    assert path_edits(ROOT) == []


class Captured(Exception):
    """Holds the parser that was about to print its help."""


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script, monkeypatch):
    def capture(parser, file=None):
        raise Captured(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "print_help", capture)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(Captured) as caught:
        runpy.run_path(str(Path(ROOT, *script.split(".")).with_suffix(".py")), run_name="__main__")
    (parser,) = caught.value.args
    without = ["/".join(action.option_strings) for action in parser._actions if not (action.help or "").strip()]
    assert len(parser._actions) > 4
    assert without == []


def test_no_function_has_more_than_eight_parameters():
    functions = [function for file in FILES for function in functions_of(tree_of(ROOT, file), file)]
    assert [function.where for function in functions if function.parameters > 8] == []


def test_no_function_is_longer_than_sixty_lines():
    functions = [function for file in FILES for function in functions_of(tree_of(ROOT, file), file)]
    assert [f"{function.where}: {function.lines}" for function in functions if function.lines > 60] == []


def test_no_module_of_the_packages_is_longer_than_450_lines():
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in FILES if file.split("/")[0] in PACKAGES}
    assert len(lines) > 15
    assert {file: number for file, number in lines.items() if number > 450} == {}
