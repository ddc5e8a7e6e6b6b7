"""Draw the pictures of README.md: docs/figures.

    python -m benchmarks.readme_figures                    # of docs/results/asked_obtained.json and NAG_HIGH_ACC

The counts of the first picture come from one run, which is put into the file by --gather:

    python generate_archs_multiobj.py --num_archs 400 --evaluate --seed 1998 --device cpu --output_dir runs/asked
    python -m benchmarks.readme_figures --gather runs/asked

The picture of the report's page needs Chromium; `make demo` writes the page:

    python -m benchmarks.readme_figures --page runs/demo/report.html
"""

import argparse
import base64
import io
import shutil
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.sampling_seeds import anywhere
from generation import figures
from genotypes import GENOTYPES
from plumbing.files import from_json, write_json
from tests.browser import NAMES, Browser
from utils import user_input
from visualize import render, write_source

ROOT = Path(__file__).resolve().parent.parent
FOLDER, COUNTS = ROOT / "docs" / "figures", ROOT / "docs" / "results" / "asked_obtained.json"
TITLES = {"accuracy": "accuracy", "params": "#params"}
CLASSES = ("low", "middle", "high")
WIDTH, HEIGHT, COLORS = 1280, 935, 128  # of the picture of the page


def gather(run: Path) -> dict:
    """What the file holds of a run of generate_archs_multiobj.py --evaluate: its counts, and how they came about."""
    config, evaluation = (from_json((run / name).read_text()) for name in ("config.json", "evaluation.json"))
    shown = ("drawn", *TITLES)
    return {
        "what": "Cells by the class asked for (rows) and the class obtained (columns): the first picture of README.md",
        "command": anywhere(config["command"]),
        **{name: config.get(name) for name in ("commit", "clean", "device")},
        "versions": {name: version for name, version in config["versions"].items() if version},
        "rebuilt": True,
        "seed": config["args"]["seed"],
        **{title: {name: evaluation[title][name] for name in shown} for title in ("generated cells", "random cells")},
    }


def asked_against_obtained(found: dict) -> Figure:
    """The first picture: of generated and of random cells, the share of each class asked for in each class obtained."""
    panels = {
        f"{word}: {title}": found[title][name]["asked_by_obtained"]
        for name, word in TITLES.items()
        for title in ("generated cells", "random cells")
    }
    return figures.heat_maps(panels, "class obtained", "class asked for", CLASSES)


def draw(folder: Path) -> None:
    """Write asked_obtained.svg, and normal_cell.svg and reduction_cell.svg, the published cells NAG_HIGH_ACC."""
    figure = asked_against_obtained(from_json(COUNTS.read_text()))
    with rc_context(figures.STYLE | {"svg.hashsalt": "readme"}):
        undated = {"Date": None, "Creator": None}
        figure.savefig(folder / "asked_obtained.svg", facecolor="white", metadata=undated)
    genotype = GENOTYPES["NAG_HIGH_ACC"]
    for name, cell in zip(genotype.space.cells, genotype.cells, strict=True):
        source = write_source(cell, folder / f"{name}_cell")
        render(source, "svg")
        source.unlink()


def photograph(page: Path, picture: Path) -> None:
    """Write what a page shows first of generated cells as a PNG. Raises ValueError where that cannot be."""
    if not any(map(shutil.which, NAMES)):
        raise ValueError(f"expected one of {', '.join(NAMES)} to be installed")
    with Browser() as browser:
        browser.open(page, WIDTH)
        top = browser.js(
            "(s => s && s.getBoundingClientRect().top + scrollY)(document.querySelector('[data-kind=generate_archs]'))"
        )
        if top is None:
            raise ValueError(f"expected a page about a run of generate_archs.py, got {page}")
        clip = {"x": 0, "y": top, "width": WIDTH, "height": HEIGHT, "scale": 1}
        taken = browser.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
    with Image.open(io.BytesIO(base64.b64decode(taken))) as image:
        image.convert("RGB").quantize(COLORS).save(picture, optimize=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gather", type=Path, metavar="RUN", help="write docs/results/asked_obtained.json first")
    parser.add_argument("--page", type=Path, metavar="FILE.html", help="take a picture of this page too")
    args = parser.parse_args(argv)
    with user_input("--gather"):
        if args.gather:
            write_json(COUNTS, gather(args.gather))
    FOLDER.mkdir(exist_ok=True)
    draw(FOLDER)
    with user_input("--page"):
        if args.page:
            photograph(args.page, FOLDER / "report.png")
    print(f"wrote {FOLDER}")


if __name__ == "__main__":
    main()
