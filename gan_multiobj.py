"""Train the generator conditioned on classes of accuracy and of #params at once. All of it is gan.py's.

    python gan_multiobj.py                                 # 3 x 3 classes, data/nasdata.jsonl
    python gan_multiobj.py --recipe paper
    python gan_multiobj.py --objectives accuracy,params,macs
    python gan_multiobj.py --resume runs/gan_multiobj-...

The flags are those of gan.py. With --recipe paper, gradients are not clipped here. NAG paper, section 3.4.
"""

import gan

if __name__ == "__main__":
    gan.main(gan.parse_args(description=__doc__, objectives=("accuracy", "params"), paper={"clip_value": 0.0}))
