"""Start `python benchmarks/gan.py` anew as `python -m benchmarks.gan`: there, `import gan` finds the root's gan.py."""

import os
import sys
from pathlib import Path


def restart() -> None:
    script = Path(sys.argv[0]).resolve()
    os.chdir(script.parent.parent)
    os.execv(sys.executable, [sys.executable, "-m", f"benchmarks.{script.stem}", *sys.argv[1:]])
