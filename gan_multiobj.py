"""Train the generator conditioned on classes of accuracy and of #params at once. All of it is gan.py's.

    python gan_multiobj.py                                 # 3 x 3 classes, data/nasdata.jsonl
    python gan_multiobj.py --recipe paper
    python gan_multiobj.py --objectives accuracy,params,macs
    python gan_multiobj.py --resume runs/gan_multiobj-...

The flags are those of gan.py. With --recipe paper, gradients are not clipped here. NAG paper, section 3.4.
"""

import argparse

import gan


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return gan.parse_args(argv, __doc__, objectives=("accuracy", "params"), paper={"clip_value": 0.0})


def main(args: argparse.Namespace) -> None:
    gan.main(args)


if __name__ == "__main__":
    main(parse_args())
