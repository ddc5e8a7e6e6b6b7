"""Run a script as one of several processes; fail if it leaves threads of the process group: see distributed.finish.

python -m torch.distributed.run ... -m tests.two_processes train_cifar.py ...
"""

import contextlib
import runpy
import sys
import time
from pathlib import Path


def gloo_threads() -> list[str]:
    """Names of this process's threads that belong to the process group; none but on Linux."""
    names = []
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(path.read_text().strip())
    return [name for name in names if "gloo" in name]


if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    deadline = time.monotonic() + 10  # the last references may be those of a thread that is just ending
    while (left := gloo_threads()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, left
