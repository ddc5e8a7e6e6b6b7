"""Write cells with a generator trained by gan_multiobj.py: for every combination of classes, or for those wanted.

    python generate_archs_multiobj.py                                      # with the generator that is shipped
    python generate_archs_multiobj.py --checkpoint runs/gan_multiobj-.../generator.pt
    python generate_archs_multiobj.py --perf_label 2 --params_label 0
    python generate_archs_multiobj.py --target_quantile 0.9 --max_params 2.0M

The flags and what is written are those of generate_archs.py.
"""

import argparse

import generate_archs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return generate_archs.parse_args(argv, __doc__, checkpoint="data/generator_multiobj.pt")


def main(args: argparse.Namespace) -> None:
    generate_archs.main(args, single=False)


if __name__ == "__main__":
    main(parse_args())
