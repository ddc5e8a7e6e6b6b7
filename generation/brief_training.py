"""Score genotypes of the published space by brief training: an example for search_benchmark.py --evaluate_with.

    python -m generation.brief_training --dataset folder --data DIR --epochs 2 GENOTYPES.json SCORES.json

All flags are those of `python -m build_nas_dataset.eval_archs`, which trains the networks and is given --archs,
--num_archs and --output_dir here. A score is the accuracy on held-out images.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from genotypes import Genotype
from utils import fail, from_json, write_json


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flags", nargs="*", help="flags of build_nas_dataset.eval_archs")
    parser.add_argument("genotypes", help="the genotypes to score, a list")
    parser.add_argument("scores", help="the file to write")
    words = sys.argv[1:] if argv is None else argv
    if len(words) < 2 or {"-h", "--help"} & set(words):
        parser.parse_args(words)
    return argparse.Namespace(flags=words[:-2], genotypes=words[-2], scores=words[-1])


def main(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "build_nas_dataset.eval_archs", *args.flags]
        command += ["--archs", args.genotypes, "--num_archs", "0", "--output_dir", folder]
        if status := subprocess.run(command).returncode:
            fail(f"build_nas_dataset.eval_archs ended with exit status {status}")
        results = from_json((Path(folder) / "results.json").read_text())
    accuracies = {Genotype.from_dict(result).canonical(): result["held_out_accuracy"] for result in results}
    genotypes = [Genotype.from_dict(data) for data in from_json(Path(args.genotypes).read_text())]
    write_json(args.scores, [accuracies[genotype.canonical()] for genotype in genotypes])


if __name__ == "__main__":
    main(parse_args())
