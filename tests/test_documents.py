"""README.md and docs: every command is one that the scripts take, and the pictures show what their files hold.

Commands of docs/own_images.md and docs/own_space.md are run by tests of their own; those of the other pages are run by
test_commands_run.py, one of the slow tests.
"""

import argparse
import html
import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks import readme_figures
from genotypes import GENOTYPES
from models.generator import Generator
from plumbing.files import write_json
from tests.small_training import ROOT
from tests.test_house import PAGES, prose
from tests.test_own_images import make_tree

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")

# What lines of a block of commands begin with; `made_up.py` is written by the reader of docs/own_space.md.
PROGRAMS = ("python", "torchrun", "make", "pip", "tensorboard", "wget", "sha256sum", ".")
OTHERS = ("{", "@article", "gan.py  gan_multiobj.py", "photos/cat/1.jpg", "--dataset folder: photos")  # other blocks
NOT_OURS = ("venv", "made_up.py")


def blocks_of(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language; "" for those without."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [text for own, text in found if own == language]


def commands_in(block: str) -> Iterator[list[str]]:
    """The commands of a block as lists of words, without comments; loops of the shell are written out."""
    for line in block.replace("\\\n", " ").splitlines():
        loop = re.fullmatch(r"for (\w+) in ([\w ]+); do (.*); done", line.strip())
        for value in loop[2].split() if loop else [""]:
            body = re.sub(rf"\${loop[1]}\b", value, loop[3]) if loop else line
            words = shlex.split(body, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


def commands_of(page: str) -> list[list[str]]:
    """All commands in the fenced blocks of a page."""
    return [words for block in blocks_of(page) if not block.startswith(OTHERS) for words in commands_in(block)]


def script_of(words: list[str]) -> tuple[str, list[str]]:
    """The module that a command starts, and its arguments: ("gan", ["--seed", "1"]). "" for other programs."""
    words = list(words)
    if words[0] == "torchrun":
        words = words[next(i for i, word in enumerate(words) if (i and not word.startswith("--")) or word == "-m") :]
    elif words[0] == "python":
        words = words[1:]
    else:
        return "", words
    name, *arguments = words[1:] if words[0] == "-m" else words
    name = "" if name in NOT_OURS or name.startswith("tests.") else name.removesuffix(".py").replace("/", ".")
    return "build_nas_dataset.build_nas_dataset" if name == "build_nas_dataset" else name, arguments


class Parsed(Exception):
    """A command line was parsed."""


def check(words: list[str], monkeypatch) -> None:
    """Fail if the script of a command does not take its flags, whole names only, and their values."""
    real = argparse.ArgumentParser.parse_args

    def parse(parser, args=None, namespace=None):
        given = sys.argv[1:] if args is None else args
        real(parser, args, namespace)
        flags = {word.partition("=")[0] for word in given if word.startswith("--")}
        assert flags <= parser._option_string_actions.keys()  # no beginnings of names
        raise Parsed

    script, arguments = script_of(words)
    if script == "build_nas_dataset.brief_scores":  # takes the flags of eval_archs.py, and two files
        script, arguments = "build_nas_dataset.eval_archs", [w for w in arguments if not w.endswith(".json")]
    if not script:
        return
    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "path", [*sys.path])
        if script.startswith("benchmarks."):  # which start themselves anew where they are no module
            runpy.run_module(script, run_name="__main__")
        runpy.run_path(str(ROOT / f"{script.replace('.', '/')}.py"), run_name="__main__")
    module = importlib.import_module(script)
    reads_checkpoints = {"--resume", "--evaluate" if script.startswith("train_") else ""} & {*arguments}
    if hasattr(module, "parse_args") and not reads_checkpoints:
        module.parse_args(arguments)
    for word in arguments:
        if word.startswith("python "):  # --evaluate_with
            check(shlex.split(word), monkeypatch)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to be in, with photos and new_photos."""
    make_tree(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page != "docs/own_space.md"]
)  # in a space that is not there
def test_every_command_in_a_fenced_block_is_taken(page, folder, monkeypatch):
    for block in blocks_of(page):
        if block.startswith(OTHERS):
            continue
        for words in commands_in(block):
            assert words[0] in PROGRAMS, words
            words = [word.replace("$SLURM_ARRAY_TASK_ID", "3") for word in words if word != "..."]
            check(words, monkeypatch)


@pytest.mark.parametrize("page", [page for page in PAGES if "reference" not in page and "speed" not in page])
def test_every_command_within_a_text_is_taken(page, folder, monkeypatch):
    text = re.sub(r"^From \[.*", "", prose((ROOT / page).read_text()), flags=re.MULTILINE)  # how files were made
    found = re.findall(r"`((?:python|torchrun) [^`]*)`", text.replace("\n", " "))
    for words in map(shlex.split, found):
        script, arguments = script_of(words)
        assert not script or script == "SCRIPT" or (ROOT / f"{script.replace('.', '/')}.py").is_file(), words
        if arguments and not {"SCRIPT", "...", "--help"} & {*words}:  # the others only name a script
            check(words, monkeypatch)
    assert found or page in ("data/README.md", "docs/own_images.md", "docs/formats.md", "docs/own_space.md")


def test_a_command_that_is_not_taken_is_found(folder, monkeypatch, capsys):
    for line in ("gan.py --n_epoch 3", "gan.py --gone 3", "gan.py --recipe none", "-m build_nas_dataset --scoring 2",
                 "generate_archs.py --evaluate --max_params 3M", "visualize.py"):  # fmt: skip
        with pytest.raises((SystemExit, AssertionError)):
            check(["python", *line.split()], monkeypatch)
    assert list(commands_in("for x in A B; do python a.py $x --out runs/$x; done  \n")) == [
        ["python", "a.py", "A", "--out", "runs/A"],
        ["python", "a.py", "B", "--out", "runs/B"],
    ]


def test_every_target_of_make_is_there():
    targets = {words[1] for page in PAGES for words in commands_of(page) if words[0] == "make"}
    assert {"demo", "test", "tables"} <= targets
    for target in targets:
        dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr


def test_the_python_lines_of_the_questions_run():
    (block,) = blocks_of("docs/faq.md", "python")
    found = {"Generator": Generator}
    exec(compile(block.replace('"data/', f'"{ROOT}/data/').replace("n=100", "n=4"), "docs/faq.md", "exec"), found)
    assert len(found["genotypes"]) == 4


# ------------------------------------------------------------------------------------------------------ pictures


def test_the_first_picture_has_the_shares_of_its_file():
    found = json.loads(readme_figures.COUNTS.read_text())
    text = (readme_figures.FOLDER / "asked_obtained.svg").read_text()
    counts = [found[title][name]["asked_by_obtained"] for name in ("accuracy", "params")
              for title in ("generated cells", "random cells")]  # fmt: skip
    shares = [f"{share:.2f}" for table in counts for share in np.ravel(np.array(table) / np.sum(table, 1)[:, None])]
    assert re.findall(r">(\d\.\d\d)</text>", text) == shares
    assert {found[title]["drawn"] for title in ("generated cells", "random cells")} == {3600}
    assert "3,600 each" in (ROOT / "README.md").read_text()


def test_the_cells_of_the_readme_are_the_published_ones():
    for name, cell in zip(("normal", "reduction"), GENOTYPES["NAG_HIGH_ACC"].cells, strict=True):
        text = html.unescape((readme_figures.FOLDER / f"{name}_cell.svg").read_text())
        edges = sorted(tuple(map(int, pair)) for pair in re.findall(r"<title>(\d+)->(\d+)</title>", text))
        expected = [(src, dst) for dst in range(cell.num_vertices) for src in cell.predecessors(dst)]
        assert [edge for edge in edges if edge != (0, 1)] == sorted(expected)  # the inputs are kept in order by 0 -> 1
        labels = dict(re.findall(r"<title>(\d+)</title>.*?>(\w+)</text>", text, re.DOTALL))
        assert [labels[str(v)] for v in range(cell.num_vertices)] == list(cell.ops)


def test_the_pictures_are_drawn_anew(tmp_path, monkeypatch):
    run = tmp_path / "run"
    counts = {"asked_by_obtained": [[3, 1, 0], [0, 4, 0], [2, 0, 2]]}
    cells = {"drawn": 12, "accuracy": counts, "params": counts}
    write_json(run / "evaluation.json", {"generated cells": cells, "random cells": cells})
    about = {"command": "python x.py", "commit": "c", "clean": True, "device": "d", "versions": {"a": "1", "b": None}}
    write_json(run / "config.json", {**about, "args": {"seed": 7}})
    monkeypatch.setattr(readme_figures, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(readme_figures, "FOLDER", tmp_path / "figures")
    readme_figures.main(["--gather", str(run)])
    found = json.loads((tmp_path / "counts.json").read_text())
    assert found["generated cells"] == cells and (found["seed"], found["versions"]) == (7, {"a": "1"})
    shares = re.findall(r">(\d\.\d\d)</text>", (tmp_path / "figures" / "asked_obtained.svg").read_text())
    assert shares == "0.75 0.25 0.00 0.00 1.00 0.00 0.50 0.00 0.50".split() * 4
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "asked_obtained.svg", "normal_cell.svg", "reduction_cell.svg"}  # fmt: skip
