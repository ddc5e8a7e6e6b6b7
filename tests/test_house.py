"""The house rules: who may import whom, how long files and functions are, what flags and documents say."""

import argparse
import ast
import re
import runpy
import sys
from functools import cache
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
PAGES = ("README.md", "data/README.md", *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/*.md")))
OTHER_FLAGS = {
    "--help",
    "--standalone",
    "--nproc_per_node",
    "--logdir",
    "--index-url",
    "--shm-size",
    "--signal",
    "--array",
    "--gather",  # of benchmarks/readme_figures.py
}  # of other programs
SCRIPTS = (
    "gan",
    "gan_multiobj",
    "generate_archs",
    "generate_archs_multiobj",
    "train_cifar",
    "train_imagenet",
    "visualize",
    "report",
    "build_nas_dataset.build_nas_dataset",
    "build_nas_dataset.eval_archs",
    "build_nas_dataset.tabular",
    "generation.from_reference",
    "generation.search_benchmark",
)


def test_imports_keep_the_rules():
    assert broken_arrows(ROOT) == []


def test_the_rules_tell_good_imports_from_bad_ones():
    good = """
        gan models.graph|gan generation.recipes|gan utils|gan_multiobj gan|generate_archs_multiobj generate_archs
        report visualize|generation.metrics build_nas_dataset.records|generation.training models.fast.cuda_graphs
        build_nas_dataset.scoring models.fast.replay|training.steps models.fast.cuda_graphs|models.ops models.fast.cpu
        models.fast.replay models.fast.cuda_graphs|models.graph genotypes|training.images utils
        plumbing.files utils|plumbing.flags plumbing.files|models.predictor plumbing.files|gan plumbing.start
        build_nas_dataset.__main__ build_nas_dataset.build_nas_dataset|build_nas_dataset.eval_archs training.cifar
    """
    bad = {
        "models.graph training.steps": "climbs",
        "training.steps build_nas_dataset.records": "climbs",
        "build_nas_dataset.scoring generation.metrics": "climbs",
        "genotypes models.graph": "climbs",
        "genotypes utils": "imports from the project",
        "utils genotypes": "imports from the project",
        "utils plumbing.files": "climbs",
        "genotypes plumbing.files": "climbs",
        "plumbing.files genotypes": "knows of cells",
        "plumbing.files models.cost": "climbs",
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


@cache
def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser of a script, by running `python SCRIPT --help` in this process up to where the help is printed."""

    def capture(parser, file=None):
        raise Captured(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Captured) as caught:
        patch.setattr(argparse.ArgumentParser, "print_help", capture)
        patch.setattr(sys, "argv", [f"{script}.py", "--help"])
        patch.setattr(sys, "path", [*sys.path])
        runpy.run_path(str(Path(ROOT, *script.split(".")).with_suffix(".py")), run_name="__main__")
    return caught.value.args[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text(script):
    actions = parser_of(script)._actions
    assert len(actions) > 2
    assert ["/".join(action.option_strings) for action in actions if not (action.help or "").strip()] == []


def test_no_function_has_more_than_eight_parameters():
    functions = [function for file in FILES for function in functions_of(tree_of(ROOT, file), file)]
    assert [function.where for function in functions if function.parameters > 8] == []


def test_no_function_is_longer_than_sixty_lines():
    functions = [function for file in FILES for function in functions_of(tree_of(ROOT, file), file)]
    assert [f"{function.where}: {function.lines}" for function in functions if function.lines > 60] == []


def test_no_file_is_longer_than_400_lines():
    """But two, each of one subject: what a cell and a search space are, and how a cell is grown."""
    lines = {file: len((ROOT / file).read_text().splitlines()) for file in FILES if not file.startswith("tests/")}
    assert len(lines) > 80
    assert {file for file, number in lines.items() if number > 400} == {"genotypes.py", "models/generator.py"}


# ------------------------------------------------------------------------------------------------- documents


def prose(text: str) -> str:
    """A Markdown text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchor(heading: str) -> str:
    """The name by which a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_within_the_project_leads_somewhere(page):
    text = prose((ROOT / page).read_text())
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, name = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if name:
            assert name in map(anchor, re.findall(r"^#+ (.+)$", path.read_text(), flags=re.MULTILINE)), target


@pytest.mark.parametrize("page", [page for page in PAGES if "reference" not in page and "speed" not in page])
def test_every_flag_in_a_page_is_one_of_a_script(page):
    known = {name for script in SCRIPTS for action in parser_of(script)._actions for name in action.option_strings}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", (ROOT / page).read_text()))
    assert named - known - OTHER_FLAGS == set()


def names_of(node: ast.stmt) -> list[str]:
    """What a statement defines: a function, a class, or what it assigns."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [getattr(node, "name", ""), *(target.id for target in targets if isinstance(target, ast.Name))]


def test_the_functions_that_the_method_page_names_are_there():
    rows = re.findall(r"\]\(\.\./([\w/]+\.py)\) \| `([\w.]+)` \|", (ROOT / "docs" / "method.md").read_text())
    assert len(rows) > 20
    for file, name in rows:
        assert (ROOT / file).is_file(), file
        nodes = tree_of(ROOT, file).body
        for part in name.split("."):
            named = [node for node in nodes if part in names_of(node)]
            assert named, f"{file}: {name}"
            nodes = getattr(named[0], "body", [])


def test_the_readme_is_short_and_its_tree_names_every_module():
    text = (ROOT / "README.md").read_text()
    assert len(prose(text).split()) <= 900
    missing = [
        file
        for file in FILES
        if not file.startswith(("tests/", "benchmarks/"))
        and Path(file).name not in ("__init__.py", "__main__.py")
        and Path(file).name not in text
    ]
    assert missing == []
    named = set(re.findall(r"\b(\w+\.py)\b", text))
    assert named <= {Path(file).name for file in FILES}
