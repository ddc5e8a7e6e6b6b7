"""Command lines: the parser of every script, the flags that all have, and flags of a run that is resumed."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from plumbing.checkpoint_files import load_checkpoint
from plumbing.console import keep_printing
from utils import HOME, fail, user_input


class Refused(str):
    """Why a flag of the reference is refused here, in the place of the words that say the same."""


UNREAD = Refused("the reference has this flag but never reads it")


class ArgumentParser(argparse.ArgumentParser):
    """argparse's parser with one-line errors, hyphens for underscores, and the names of the public reference's flags.

    description: the docstring of the script, which --help shows as it stands.
    recipes: name of a recipe -> its values by flag; the first is the one used by default. --help shows a default that
        differs between them as "robust 0.002, paper 0.0002".
    reference_flags: a flag of the reference (github.com/kunjing96/NAG), without its dashes -> the words that say the
        same here, with {} in the place of its value; or why it is Refused. They are not shown in --help.
        Example: {"gpu": "--device cuda:{}", "use_aux_head": "--auxiliary_weight 0", "n_cpu": UNREAD}.
    """

    def __init__(
        self,
        description: str,
        recipes: dict[str, dict] | None = None,
        reference_flags: dict[str, str] | None = None,
    ):
        super().__init__(
            description=description, formatter_class=lambda prog: HelpFormatter(prog, recipes=recipes or {})
        )
        self.reference_flags = reference_flags or {}

    def error(self, message: str):
        fail(message)

    def print_help(self, file=None):
        keep_printing()
        super().print_help(file)

    def parse_known_args(self, args=None, namespace=None):
        """Parse the command line. A ~ at the start of a text or path stands for the home folder, as in a shell.

        An empty value is refused: a shell variable that is not set does not leave a flag out.
        """
        words = self._our_words(sys.argv[1:] if args is None else list(args))
        namespace, rest = super().parse_known_args(words, namespace)
        for action in self._actions:
            value = getattr(namespace, action.dest, None)
            if value == "":
                self.error(f"argument {'/'.join(action.option_strings)}: expected a value, got an empty one")
            try:
                expanded = [expand_home(v) for v in value] if isinstance(value, list) else expand_home(value)
            except ValueError as error:
                self.error(f"argument {'/'.join(action.option_strings) or action.dest}: {error}")
            if expanded != value:
                setattr(namespace, action.dest, expanded)
        return namespace, rest

    def _our_words(self, words: list[str]) -> list[str]:
        """The command line with underscores for the hyphens in names of flags, and our flags for the reference's."""
        spelled = {name.replace("-", "_"): name for name in self._option_string_actions}
        found, remaining = [], list(words)
        while remaining:
            word = remaining.pop(0)
            flag, equals, value = word.partition("=")
            known = spelled.get(flag.replace("-", "_")) if flag.startswith("--") else None
            ours = self.reference_flags.get(flag[2:].replace("-", "_")) if flag.startswith("--") else None
            if known or ours is None:
                found.append((known or flag) + equals + value)
            elif isinstance(ours, Refused):
                self.error(f"argument {flag}: {ours}; leave it out")
            elif "{}" not in ours:
                found += ours.split()
            else:
                if not equals and not remaining:
                    self.error(f"argument {flag}: expected one argument")
                value = value if equals else remaining.pop(0)
                found += [part.replace("{}", value) for part in ours.split()]
        return found


def expand_home(value):
    """A text or path that begins with ~ or ~name, with that home folder in its place; anything else as it is.

    A shell does so only where ~ begins a word, which it does not in --output_dir=~/runs. Raises ValueError where there
    is no such home folder.
    """
    if not isinstance(value, (str, Path)) or not str(value).startswith("~"):
        return value
    text = str(value)
    expanded, own = os.path.expanduser(text), text.replace(os.sep, "/").split("/")[0] == "~"
    if expanded.startswith("~") or not os.path.isabs(expanded) or (own and os.environ.get("HOME") == ""):
        raise ValueError(f"there is no home folder for the ~ of {text}; a name that begins with ~ is written ./{text}")
    return type(value)(expanded)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it stands and, after each flag's help, the default that will be used."""

    def __init__(self, prog: str, recipes: dict[str, dict]):
        super().__init__(prog)
        self.recipes = recipes

    def _get_help_string(self, action: argparse.Action) -> str:
        text = (action.help or "").removesuffix(" (default: %(default)s)")  # which some releases add to switches
        values = {name: recipe[action.dest] for name, recipe in self.recipes.items() if action.dest in recipe}
        if len(set(values.values())) > 1:
            shown_values = ", ".join(f"{name} {_as_typed(value)}" for name, value in values.items())
            return f"{text} (default: {shown_values})"
        default = next(iter(values.values()), action.default)
        if default in (None, argparse.SUPPRESS) or (action.nargs == 0 and default is False) or "(default" in text:
            return text
        return f"{text} (default: {_as_typed(default)})"


def _as_typed(value) -> str:
    """A flag's value as one types it; the path of a shipped file as in the folder of the scripts."""
    if isinstance(value, str) and Path(value).is_relative_to(HOME):
        value = Path(value).relative_to(HOME).as_posix()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value).replace("%", "%%")


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float within [low, high], or (low, high] with `above`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value if above else low <= value) or value > high or value in (math.inf, -math.inf):
            what = "a whole number" if kind is int else "a number"
            bound = f"{'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < math.inf else "")
            raise argparse.ArgumentTypeError(f"expected {what} {bound}, got {text!r}")
        return value

    return parse


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that every script has."""
    group = parser.add_argument_group("run")
    group.add_argument(
        "--seed", type=number(int, 0, 2**63 - 1), default=1997, help="all random numbers of the run come from it"
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    group.add_argument("--tf32", action="store_true", help="TF32 in matrix products on CUDA, as in convolutions there")
    group.add_argument("--output_dir", help="folder for all that the run writes (default: runs/<script>-<time>-<pid>)")


def add_cuda_graphs_flag(group: argparse._ActionsContainer) -> None:
    """The flag of scripts that can record their steps as CUDA graphs."""
    text = "replay recorded steps on CUDA; off: slower, in less memory, with the same numbers up to rounding"
    group.add_argument("--cuda_graphs", action=argparse.BooleanOptionalAction, default=True, help=text)


def add_checkpoint_minutes_flag(group: argparse._ActionsContainer) -> None:
    """The flag of scripts that save within an epoch."""
    text = "minutes between checkpoints within an epoch, beside those at its end; 0: after every step"
    group.add_argument("--checkpoint_minutes", type=number(float, 0), default=10.0, help=text)


def parse_resumable(
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    kind: str,
    may_change: tuple[str, ...] = (),
    keys: tuple[str, ...] = (),
    before: dict | None = None,
) -> argparse.Namespace:
    """Parse the flags of a training script; with --resume RUN, those of that run's checkpoint.

    Flags given beside --resume must agree with the run, but for --device, --checkpoint_minutes and those in
    `may_change`; --output_dir must be its folder.
    keys: what the checkpoint has to hold.
    before: of flags that runs of older versions lack, the values that these went by, where the defaults are others.
    """
    args = parser.parse_args(argv)
    if not args.resume:
        return args
    folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    with user_input("--resume"):
        saved = load_checkpoint(args.resume, kind, ("args", *keys))["args"]
        latest = folder / "checkpoint.pt"
        if latest.exists() and Path(args.resume).is_file() and not latest.samefile(args.resume):  # it would be lost
            raise ValueError(f"{args.resume} is not the latest of its run; give {folder}")
    saved = {**(before or {}), **saved, "output_dir": str(folder)}
    if args.output_dir and Path(args.output_dir).resolve() == folder.resolve():
        args.output_dir = str(folder)
    explicit, may_change = explicit_flags(parser, argv) - {"resume"}, {"device", "checkpoint_minutes", *may_change}
    for name in sorted(explicit - may_change):
        if saved.get(name) != getattr(args, name):
            parser.error(f"argument --{name}: the run to resume has {saved.get(name)}, and a resumed run keeps it")
    kept = {name: getattr(args, name) for name in explicit & may_change}
    return argparse.Namespace(**{**vars(args), **saved, **kept, "resume": args.resume})


def explicit_flags(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> set[str]:
    """Names of the flags that the command line sets, whatever their values. Exits as parse_args does."""
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()  # those of set_defaults
    return set(vars(parser.parse_args(argv)))
