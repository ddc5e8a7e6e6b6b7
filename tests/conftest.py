"""Tests run with one thread, here and in the processes that they start: several of them work side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it
