"""Tests run with one thread, here and in the processes that they start: several of them work side by side."""

import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it

# A script that starts the tests in the background (`make test &`) lets them and what they start ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest. They begin first, so that no process waits at the end for another one's last file.
LONGEST = """
    scripts train_cifar report gan benchmarks train_imagenet eval_archs faults search visualize checkpoints replay
    own_images generate_archs supernet shards
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
