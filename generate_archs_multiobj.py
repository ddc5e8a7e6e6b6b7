"""Write cells with a generator trained by gan_multiobj.py: for every combination of classes, or for those wanted.

    python generate_archs_multiobj.py --checkpoint runs/gan_multiobj-.../checkpoint.pt
    python generate_archs_multiobj.py --checkpoint runs/gan_multiobj-... --perf_label 2 --params_label 0
    python generate_archs_multiobj.py --checkpoint runs/gan_multiobj-... --target_quantile 0.9 --max_params 2.0M

The flags and what is written are those of generate_archs.py.
"""

import generate_archs

if __name__ == "__main__":
    generate_archs.main(generate_archs.parse_args(description=__doc__), single=False)
