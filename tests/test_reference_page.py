"""docs/from_the_reference.md names every flag of the public reference, and says what the scripts do with it.

tests/data/reference_flags.json holds the flags and defaults of its scripts at commit b3dd6cd.
"""

import json
import re
from pathlib import Path

import pytest

import gan
import gan_multiobj
from plumbing.flags import Refused
from tests.test_house import parser_of

ROOT = Path(__file__).parent.parent
REFERENCE = json.loads((ROOT / "tests" / "data" / "reference_flags.json").read_text())
PAGE = (ROOT / "docs" / "from_the_reference.md").read_text(encoding="utf-8")
# The reference's script -> ours, and the number of the table of its flags.
OURS = {
    "gan.py": ("gan", 2),
    "gan_multiobj.py": ("gan_multiobj", 2),
    "generate_archs.py": ("generate_archs", 3),
    "generate_archs_multiobj.py": ("generate_archs_multiobj", 3),
    "build_nas_dataset/build_nas_dataset.py": ("build_nas_dataset.build_nas_dataset", 4),
    "build_nas_dataset/eval_archs.py": ("build_nas_dataset.eval_archs", 5),
    "build_nas_dataset/train_cifar.py": ("train_cifar", 5),
    "build_nas_dataset/train_imagenet.py": ("train_imagenet", 6),
    "build_nas_dataset/test_ensemble.py": ("train_cifar", 7),
}
IN_ALL_SCRIPTS = {"--seed", "--data", "--output_dir"}  # a paragraph tells of them


def rows_of(number: int) -> list[tuple[set[str], str]]:
    """The rows of a table of the page: the flags in the first column, and what the last column says."""
    table = PAGE.split(f"**Table {number}.**")[1].split("**Table")[0]
    cells = [line.strip("| ").split(" | ") for line in re.findall(r"^\|.*\|$", table, re.MULTILINE)[2:]]
    return [(set(re.findall(r"--\w+", row[0])), row[-1]) for row in cells]


def default_of(script: str, flag: str):
    """The default of our script; where it depends on the recipe, that of the published one."""
    if script in ("gan", "gan_multiobj"):
        module = {"gan": gan, "gan_multiobj": gan_multiobj}[script]
        return getattr(module.parse_args(["--recipe", "paper"]), flag[2:])
    return parser_of(script).get_default(flag[2:])


def test_the_page_names_every_script():
    table = PAGE.split("**Table 1.**")[1].split("**Table 2.**")[0]
    assert [name for name in REFERENCE if f"`python {name}`" not in table] == []
    assert REFERENCE.keys() == OURS.keys()


@pytest.mark.parametrize("name", OURS)
def test_a_flag_that_the_page_does_not_name_is_the_same_here(name):
    script, number = OURS[name]
    named = set().union(*(flags for flags, _ in rows_of(number))) | IN_ALL_SCRIPTS
    options = parser_of(script)._option_string_actions
    others = [flag for flag in REFERENCE[name] if flag not in named]
    assert [flag for flag in others if flag not in options] == []
    defaults = {flag: (default_of(script, flag), REFERENCE[name][flag]) for flag in others}
    assert {flag: pair for flag, pair in defaults.items() if pair[0] != pair[1]} == {}
    assert named - IN_ALL_SCRIPTS - REFERENCE[name].keys() <= REFERENCE["gan.py"].keys()


@pytest.mark.parametrize("name", [name for name in OURS if "ensemble" not in name])
def test_the_scripts_take_or_refuse_each_flag_of_the_reference_as_the_page_says(name):
    script, number = OURS[name]
    parser = parser_of(script)
    options, known = parser._option_string_actions, parser.reference_flags
    for flag in REFERENCE[name]:
        says = [text for flags, text in rows_of(number) if flag in flags]
        ours = known.get(flag[2:])
        assert flag in options or ours is not None, flag  # never "unrecognized arguments"
        if flag not in options and isinstance(ours, Refused):
            assert any("refused" in text for text in says), flag
        elif flag not in options:
            words = ours.replace("{}", "N")
            assert any(f"`{words}`" in text or "accepted" in text for text in says), flag
        else:
            assert not any(text.startswith("refused") for text in says), flag
