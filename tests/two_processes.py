"""Run a script as it is, started by torchrun; fail if it leaves threads of the process group: see distributed.finish.

python -m torch.distributed.run ... -m tests.two_processes train_cifar.py ...
"""

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]  # none but on Linux
    assert not any("gloo" in name for name in threads), threads
