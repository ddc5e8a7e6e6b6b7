"""Counts of the house: how long its files and functions are, how many flags its scripts have, who imports whom.

    python benchmarks/house.py                  # of this checkout
    python benchmarks/house.py OLD NEW          # a column for each checkout

Prints a Markdown table. Lines are those of Python files, all of them. Parameters of a function are counted without self
and cls, and *args and **kwargs as one each. Flags are those that `python SCRIPT --help` lists, --x and --no-x as one.
The import rules, enforced by tests/test_house.py: root scripts -> generation -> build_nas_dataset -> training ->
models -> plumbing -> genotypes, utils; each may skip floors, none may climb. genotypes and utils import nothing of the
project, genotypes the standard library only; plumbing knows nothing of genotypes. models.fast is opened by models and
by the modules of OPENS_FAST only. A script imports another one as in SCRIPT_TO_SCRIPT only; no package imports a root
script. sys.path is changed in the files of EDITS_PATH only. tests and benchmarks import what they like.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# Folder, or module of the root -> its floor. Who imports may skip floors, but not climb; scripts are on the highest.
FLOORS = {
    "generation": 5,
    "build_nas_dataset": 4,
    "training": 3,
    "models": 2,
    "plumbing": 1,
    "genotypes": 0,
    "utils": 0,
}
SCRIPT_FLOOR = 6
# The only scripts that may import another script.
SCRIPT_TO_SCRIPT = {
    ("gan_multiobj", "gan"),
    ("generate_archs_multiobj", "generate_archs"),
    ("report", "visualize"),
    ("build_nas_dataset.__main__", "build_nas_dataset.build_nas_dataset"),
}
# Scripts that lie in a package: no other module may import them either.
PACKAGE_SCRIPTS = {
    "build_nas_dataset.__main__",
    "build_nas_dataset.build_nas_dataset",
    "build_nas_dataset.eval_archs",
    "build_nas_dataset.brief_scores",
    "generation.from_reference",
    "generation.search_benchmark",
}
# Outside of models, the only modules that may import from models.fast.
OPENS_FAST = {"training.steps", "generation.training", "build_nas_dataset.scoring"}
# The only files that may change sys.path: `python build_nas_dataset/FILE.py` must find the other packages, and a child
# of tests/starting.py has the path that python would give its script.
EDITS_PATH = {"build_nas_dataset/build_nas_dataset.py", "build_nas_dataset/eval_archs.py", "tests/starting.py"}
FREE = ("tests", "benchmarks")
SKIPPED = {".git", ".venv", "venv", "runs", "shared", "data", "docs", "__pycache__"}
SCRIPTS = (
    "gan.py",
    "gan_multiobj.py",
    "generate_archs.py",
    "generate_archs_multiobj.py",
    "train_cifar.py",
    "train_imagenet.py",
    "visualize.py",
    "report.py",
    "-m build_nas_dataset",
    "-m build_nas_dataset.eval_archs",
    "-m build_nas_dataset.tabular",
    "-m generation.from_reference",
    "-m generation.search_benchmark",
)


class Import(NamedTuple):
    """One name that a file imports. module: where it comes from, e.g. "models.fast.cpu"; name: "" for the module."""

    module: str
    name: str
    line: int


class Function(NamedTuple):
    """A function or method. where: file:line name; lines: with decorators and docstring."""

    where: str
    lines: int
    parameters: int


# ------------------------------------------------------------------------------------------------- reading


def python_files(checkout: Path) -> list[str]:
    """The project's Python files, as paths within the checkout."""
    found = []
    for folder, folders, files in os.walk(checkout):
        folders[:] = [name for name in folders if name not in SKIPPED and not name.startswith(".")]
        found += [Path(folder, name).relative_to(checkout).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def tree_of(checkout: Path, file: str) -> ast.Module:
    return ast.parse((checkout / file).read_text(), file)


def module_name(file: str) -> str:
    """models/fast/cpu.py -> models.fast.cpu; a package's __init__.py -> the package."""
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def imports_of(tree: ast.Module) -> list[Import]:
    """Every name that a file imports, also within functions. The project has no relative imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, "", node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [Import(module, alias.name, node.lineno) for alias in node.names]
    return found


def functions_of(tree: ast.Module, file: str) -> Iterator[Function]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            a = node.args
            names = [argument.arg for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
            number = len([name for name in names if name not in ("self", "cls")]) + bool(a.vararg) + bool(a.kwarg)
            yield Function(f"{file}:{node.lineno} {node.name}", node.end_lineno - first + 1, number)


# ------------------------------------------------------------------------------------------------- import rules


def project_module(found: Import, modules: set[str]) -> str | None:
    """The module of the project that an import reads: `from models import cost` reads models.cost. None: not ours."""
    whole = f"{found.module}.{found.name}"
    if found.name and whole in modules:
        return whole
    return found.module if found.module in modules or found.module.split(".")[0] in FLOORS else None


def floor(module: str) -> int:
    return FLOORS.get(module.split(".")[0], SCRIPT_FLOOR)


def broken(importer: str, imported: str) -> str:
    """Which rule an import of one module of the project by another breaks; "" when none."""
    own_folder, folder = importer.split(".")[0], imported.split(".")[0]
    is_script = imported in PACKAGE_SCRIPTS or floor(imported) == SCRIPT_FLOOR
    if is_script and (importer, imported) not in SCRIPT_TO_SCRIPT:
        return "imports a script"
    if floor(imported) > floor(importer):
        return "climbs"
    if floor(importer) == 0 and own_folder != folder:
        return "imports from the project"
    if own_folder == "plumbing" and folder == "genotypes":
        return "knows of cells"
    if imported.startswith("models.fast") and own_folder != "models" and importer not in OPENS_FAST:
        return "opens models.fast"
    return ""


def broken_arrows(checkout: Path) -> list[str]:
    """The imports that break a rule, one line for each pair of modules: "gan -> models.fast.cpu: opens models.fast"."""
    files = [file for file in python_files(checkout) if file.split("/")[0] not in FREE]
    modules = {module_name(file) for file in files}
    found = []
    for file in files:
        importer = module_name(file)
        for one in imports_of(tree_of(checkout, file)):
            imported = project_module(one, modules)
            if one.module.startswith("."):
                found.append(f"{importer}: relative import")
            elif one.module.split(".")[0] in FREE:
                found.append(f"{importer} -> {one.module}: imports tests or benchmarks")
            elif imported is not None and (rule := broken(importer, imported)):
                found.append(f"{importer} -> {imported}: {rule}")
            elif importer == "genotypes" and one.module.split(".")[0] not in sys.stdlib_module_names:
                found.append(f"{importer} -> {one.module}: more than the standard library")
    return list(dict.fromkeys(found))


def path_edits(checkout: Path) -> list[str]:
    """file:line of what changes sys.path, in files that may not."""
    found = []
    for file in python_files(checkout):
        if file in EDITS_PATH:
            continue
        for node in ast.walk(tree_of(checkout, file)):
            targets = []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                targets = [node.func.value]  # sys.path.insert(...)
            elif isinstance(node, (ast.Assign, ast.Delete)):
                targets = node.targets
            elif isinstance(node, ast.AugAssign):
                targets = [node.target]
            targets = [target.value if isinstance(target, ast.Subscript) else target for target in targets]
            if any(ast.unparse(target) == "sys.path" for target in targets):
                found.append(f"{file}:{node.lineno}")
    return found


# ------------------------------------------------------------------------------------------------- counts


def count_flags(checkout: Path, script: str) -> int | None:
    """Flags that --help lists; None where there is no such script."""
    words = script.split()
    path = Path(words[-1].replace(".", "/") + ".py") if words[0] == "-m" else Path(words[0])
    if not ((checkout / path).is_file() or (checkout / path.with_suffix("") / "__main__.py").is_file()):
        return None
    done = subprocess.run([sys.executable, *words, "--help"], cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        return None
    listed = re.findall(r"^  (?:-\w, )?(--[\w-]+)", done.stdout, flags=re.MULTILINE)
    return len({name for name in listed if name != "--help"})


def longer(functions: list[Function], lines: int) -> list[str]:
    return [function.where for function in functions if function.lines > lines]


def counts(checkout: Path) -> dict[str, int | None]:
    """What is counted -> how many, in the order of the table."""
    files = python_files(checkout)
    trees = {file: tree_of(checkout, file) for file in files}
    lines = {file: len((checkout / file).read_text().splitlines()) for file in files}
    functions = [function for file, tree in trees.items() for function in functions_of(tree, file)]
    folders: dict[str, int] = {}
    for file, number in lines.items():
        folder = str(Path(file).parent)
        folders[folder] = folders.get(folder, 0) + number
    found: dict[str, int | None] = {"Python lines": sum(lines.values())}
    found |= {f"Python lines in {'the root' if name == '.' else name}": n for name, n in sorted(folders.items())}
    found["Python files in the root"] = sum("/" not in file for file in files)
    for name, chosen in (("", lambda file: True), (" outside tests", lambda file: not file.startswith("tests/"))):
        own = [function for function in functions if chosen(function.where)]
        found[f"files over 400 lines{name}"] = sum(n > 400 for file, n in lines.items() if chosen(file))
        found[f"functions over 60 lines{name}"] = len(longer(own, 60))
        found[f"functions over 40 lines{name}"] = len(longer(own, 40))
        found[f"functions of more than 8 parameters{name}"] = sum(function.parameters > 8 for function in own)
    found |= {f"flags of python {script}": count_flags(checkout, script) for script in SCRIPTS}
    for file in files:
        if "/" not in file:
            found[f"names in imports of {file}"] = len(imports_of(trees[file]))
    found["imports that break the rules"] = len(broken_arrows(checkout))
    found["changes of sys.path"] = len(path_edits(checkout))
    return found


def table(columns: dict[str, dict[str, int | None]]) -> str:
    """A Markdown table with a row for each count that one of the checkouts has, those of one kind together."""
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    kinds = list(dict.fromkeys(name.split(" in ")[0] for name in names))
    names.sort(key=lambda name: kinds.index(name.split(" in ")[0]))
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name in names:
        values = [column.get(name) for column in columns.values()]
        if any(value is not None for value in values):
            shown = ["" if value is None else f"{value:,}" for value in values]
            lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT], help="folders (default: this checkout)")
    args = parser.parse_args(argv)
    for checkout in args.checkouts:
        if not (checkout / "gan.py").is_file():
            parser.error(f"argument checkouts: {checkout} is not a checkout of the project")
    print(table({str(checkout): counts(checkout) for checkout in args.checkouts}))
    for checkout in args.checkouts:
        for arrow in (*broken_arrows(checkout), *path_edits(checkout)):
            print(f"\n{checkout}: {arrow}", end="")
    print()


if __name__ == "__main__":
    main()
