"""Tests run with one thread, here and in the processes that they start: several of them work side by side."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, which reads it

# A script that starts the tests in the background (`make test &`) lets them and what they start ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
