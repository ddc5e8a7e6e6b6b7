"""Scores for a search with --evaluate_with: held-out accuracy after the brief training of eval_archs.py.

    python -m build_nas_dataset.brief_scores --epochs 3 --schedule_epochs 3 genotypes.json scores.json

The flags are those of eval_archs.py; the last two words are the file of the genotypes and the file for the scores, a
JSON list with one number for each genotype, in their order. Isomorphic genotypes are trained once and get the same
score; one that is not valid, or whose training diverged, gets 0. The run of eval_archs.py is kept beside the scores, in
the folder brief_training, and the next start with the same files goes on from there. It is an example: any program that
reads and writes such files will do.
"""

import sys
from pathlib import Path

from build_nas_dataset.brief_labels import train_briefly
from build_nas_dataset.candidates import key_of
from genotypes import read_genotypes
from plumbing.files import write_json
from utils import fail, user_input


def main(argv: list[str]) -> None:
    if argv in (["--help"], ["-h"]):
        print(__doc__)
        return
    if len(argv) < 2 or any(word.startswith("-") for word in argv[-2:]):
        fail("expected flags of eval_archs.py, then the file of the genotypes and the file for the scores")
    *flags, archs, out = argv
    with user_input("genotypes"):
        genotypes = [genotype for genotype, _ in read_genotypes(archs)]
    valid = [genotype for genotype in genotypes if genotype.is_valid]
    folder, scores = Path(out).resolve().parent / "brief_training", {}
    if valid:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "valid.json", [genotype.to_dict() for genotype in valid])
        scores = train_briefly(flags, folder / "valid.json", folder)
    write_json(out, [scores[key_of(genotype)] if genotype.is_valid else 0.0 for genotype in genotypes])


if __name__ == "__main__":
    main(sys.argv[1:])
