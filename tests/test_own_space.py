"""docs/own_space.md: what the page shows is done in a copy of the project, and its commands are run there."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.small_training import ROOT

pytestmark = pytest.mark.slow  # seven starts of scripts; tests/test_spaces.py has the same in small

PAGE = (ROOT / "docs" / "own_space.md").read_text()
OP_ENTRY, NAG_WITH_OP, MADE_UP, OWN_SPACE = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
OF_THE_OP, OF_THE_SPACE = re.findall(r"^```\n(python made_up.py.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Runs command lines one after the other in one process, which saves the start of Python and torch.
DRIVER = """
import json, runpy, sys
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")
"""


def replaced(text, old, new):
    assert text.count(old) == 1
    return text.replace(old, new)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the new op, the new space and made_up.py, in which the page's commands were run."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("**/*.py"):
        name = path.relative_to(ROOT)
        if name.parts[0] not in ("runs", ".venv", "tests", "benchmarks"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / name)
    text = (folder / "models" / "ops.py").read_text()
    (folder / "models" / "ops.py").write_text(replaced(text, "\ndef make_op(", f"\n{OP_ENTRY}\n\ndef make_op("))
    text = (folder / "genotypes.py").read_text()
    (published,) = re.findall(r"^NAG_SPACE = .*?^\)\n", text, re.MULTILINE | re.DOTALL)
    text = replaced(text, "\ndef find_space(", f"\n{OWN_SPACE}\n\ndef find_space(")
    (folder / "genotypes.py").write_text(replaced(text, published, NAG_WITH_OP))
    (folder / "made_up.py").write_text(MADE_UP)
    (folder / "runs").mkdir()
    commands = [shlex.split(line)[1:] for line in (OF_THE_OP + OF_THE_SPACE).splitlines()]
    command = [sys.executable, "-c", DRIVER, json.dumps(commands)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    return folder


def cells_of(folder, names):
    entries = json.loads((folder / "archs" / "genotypes.json").read_text())
    return entries, [entry[name] for entry in entries for name in names]


def test_the_new_op_is_drawn_and_counted(project):
    entries, cells = cells_of(project / "runs" / "seven", ("normal", "reduction"))
    assert sum("seqconv7x7" in cell["ops"] for cell in cells) > len(cells) / 4
    assert all(entry["params"] > 0 for entry in entries)  # by the op's entry
    assert (project / "runs" / "seven" / "pictures" / "reduction.svg").exists()


def test_cells_of_the_new_space_are_drawn(project):
    entries, cells = cells_of(project / "runs" / "chains", ("encoder", "decoder"))
    assert {label for entry in entries for label in entry["labels"]} == {0, 1, 2}
    assert {op for cell in cells for op in cell["ops"]} == {
        *("tokens", "memory", "mask", "attention", "gate", "skip", "output")
    }
    assert all(len(cell["ops"]) <= 7 and sum(map(sum, cell["matrix"])) <= 10 for cell in cells)
    assert (project / "runs" / "chains" / "pictures" / "decoder.svg").exists()
