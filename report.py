"""Write one page about runs: what they did, how well it went, what to do next; with figures and cells to look at.

    python report.py runs/demo runs/demo/archs --out report.html
    python report.py runs/gan-... runs/generate_archs-... runs/train_cifar-...
    python report.py data/nasdata.jsonl                                # a NAS dataset alone

RUN is a run folder of any of the scripts, finished or not, or a NAS dataset FILE.jsonl. The page is one file that needs
no network and opens from disk; pointing at a point names a cell, clicking shows it. What a run does not hold, for
example because it stopped or another version wrote it, is said on the page. The page's figures are functions of their
data in generation/figures.py; what is said of each kind of run is in generation/report/.
"""

import argparse
import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from generation.report.cells import add_samples, generate_sections
from generation.report.nas_dataset import build_section, gan_sections
from generation.report.parts import Page, Section
from generation.report.runs import KINDS, Run, name_apart, read_run
from generation.report.trained import eval_sections, search_sections, train_sections
from plumbing.files import atomic_file
from plumbing.flags import ArgumentParser
from plumbing.run_folder import check_writable
from utils import user_input, writes

TEMPLATE = Path(__file__).resolve().parent / "generation" / "report" / "page.html.j2"
LARGEST_PAGE = 5 * 10**6  # bytes; a larger page is written, too, but said to be


def gan_with_samples(page: Page, run: Run) -> list[Section]:
    """The sections of a run of gan.py, with the same noise through training."""
    sections = gan_sections(page, run)
    add_samples(sections[-1], run, page)
    return sections


SECTIONS = {
    "build_nas_dataset": build_section,
    "gan": gan_with_samples,
    "generate_archs": generate_sections,
    "eval_archs": eval_sections,
    "train_cifar": train_sections,
    "train_imagenet": train_sections,
    "search": search_sections,
}


def facts_of(run: Run) -> list[tuple[str, str]]:
    """What the head of the page says of a run: command, training, commit, versions, device, duration."""
    versions = run.config.get("versions") if isinstance(run.config.get("versions"), dict) else {}
    words = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    known = {
        "folder": str(run.folder),
        "command": run.command,
        "training": run.settings,
        "commit": run.commit or "not recorded",
        "versions": words,
        "device": str(run.config.get("device") or ""),
        "computed for": duration(run.seconds),
    }
    return [(name, value) for name, value in known.items() if value]


def duration(seconds: float | None) -> str:
    """272.4 -> "4 min 32 s"."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def sections_of(page: Page, run: Run) -> list[Section]:
    """The sections about a run; the last of them is about the run itself. A section that fails says so."""
    try:
        return SECTIONS[run.kind](page, run)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        # Files of another version, or edited by hand: what the other runs hold is shown all the same.
        section = Section(run.kind, run.title, run.name, verdict="The run could not be read whole.")
        section.missing.append(f"Its files are not as this version writes them ({type(error).__name__}: {error}).")
        return [section]


def render(runs: list[Run]) -> str:
    """The page about the runs, in the order of the method's stages."""
    page, heads, sections = Page(), [], []
    for run in sorted(runs, key=lambda run: list(KINDS).index(run.kind)):
        own = sections_of(page, run)
        sections += own
        head = {"title": run.title, "name": run.name, "facts": facts_of(run), "missing": run.missing}
        heads.append(head | {"verdict": own[-1].verdict, "next": own[-1].next})
    for i, section in enumerate(sections):
        section.id = f"s{i}"
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, trim_blocks=True)
    written = f" on {time.strftime('%Y-%m-%d %H:%M')}"
    title = "Report: " + ", ".join(run.name for run in runs)
    content = {"title": title, "runs": heads, "sections": sections, "data": page.data(), "footer": written}
    return environment.get_template(TEMPLATE.name).render(content)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a NAS dataset FILE.jsonl")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="the page; one that is there is replaced")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    out = Path(args.out)
    with user_input("--out"):
        if out.is_dir():
            raise ValueError(f"expected a file, got the folder {out}")
        check_writable(out.absolute().parent)
    with user_input("RUN"):
        runs = [read_run(path) for path in args.runs]
        name_apart(runs)
    text = render(runs)
    with writes(out), atomic_file(out) as file:
        file.write(text)
    size = len(text.encode())
    print(f"wrote {out} ({size / 1e6:.1f} MB): open it in a browser")
    if size > LARGEST_PAGE:
        print(f"note: the page has more than {LARGEST_PAGE / 1e6:.0f} MB; a report on fewer runs is smaller")


if __name__ == "__main__":
    main(parse_args())
