"""`python -m build_nas_dataset` builds a NAS dataset: see build_nas_dataset.py in this folder."""

from build_nas_dataset.build_nas_dataset import main, parse_args

main(parse_args())
