"""What a run shows of itself while it goes: progress bars, the time that is left, and lines that nobody may read."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from tqdm import tqdm

from utils import this_process


class Tolerant(io.FileIO):
    """A file of text for people, such as stdout, whose reader may go away: what cannot be written then is dropped."""

    def write(self, text) -> int:
        try:
            return super().write(text)
        except OSError:  # a closed pipe (`| head`), a terminal that is gone, a full disk
            return len(text)


def keep_printing() -> None:
    """Print line by line, and let no run end because nobody can read any more what it prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and type(getattr(stream.buffer, "raw", stream.buffer)) is io.FileIO:
            stream.flush()
            buffer = io.BufferedWriter(Tolerant(stream.fileno(), "w", closefd=False))
            ours = io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)
            setattr(sys, name, ours)


LINE_SECONDS = 60  # between two lines on progress where there is no bar; a run that takes less says nothing of the time


def duration(seconds: float) -> str:
    """A duration in words, two units at most: "45 s", "12 min", "3 h 20 min", "2 days 3 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    days, hours = divmod(round(hours + minutes / 60), 24)
    return f"{days} days {hours} h" if days > 1 else f"{days} day {hours} h"


class ProgressBar:
    """Iterates over items with a bar on a terminal; elsewhere with a line a minute on stderr, so that none is silent.

    Of several processes under torchrun, the first one shows it. See progress_bar for the arguments.
    """

    def __init__(
        self,
        items: Iterable | None,
        total: int | None,
        desc: str,
        initial: int,
        later: int,
        left: Callable[[], float | None] | None,
    ):
        self.items, self.total, self.desc, self.initial, self.n, self.later = (
            items,
            total,
            desc,
            initial,
            initial,
            later,
        )
        self.seconds_left = left or self._at_this_rate
        self.started = self.said = time.monotonic()
        self.silent = this_process().rank > 0
        options = {"disable": self.silent or None, "leave": False, "dynamic_ncols": True}  # None: unless on a terminal
        self.bar = tqdm(initial=initial, total=total, desc=desc, **options)
        if left and not self.bar.disable:
            self._say()

    def __iter__(self) -> Iterator:
        try:
            for item in self.items:
                yield item
                self.update()
        finally:
            self.close()

    def update(self, n: int = 1) -> None:
        """Count n more items as done."""
        self.n += n
        self.bar.update(n)
        if not self.silent and (now := time.monotonic()) - self.said >= LINE_SECONDS:
            self.said = now
            self._say()

    def close(self) -> None:
        self.bar.close()

    def _at_this_rate(self) -> float | None:
        """The seconds that the rest takes at the pace up to now; None where that is not known."""
        done = self.n - self.initial
        if not done or self.total is None:
            return None
        return (self.total - self.n + self.later) * (time.monotonic() - self.started) / done

    def _say(self) -> None:
        """Say how far it is, and how long all that is left takes."""
        seconds = self.seconds_left()
        left = "" if seconds is None else f"about {duration(seconds)} left"
        if not self.bar.disable:
            self.bar.set_postfix_str(f"in all {left}" if left else "")
            return
        of = "" if self.total is None else f" of {self.total}"
        print(f"{self.desc}: {self.n}{of}{', ' if left else ''}{left}", file=sys.stderr, flush=True)


def progress_bar(
    items: Iterable | None = None,
    *,
    desc: str,
    total: int | None = None,
    initial: int = 0,
    later: int = 0,
    left: Callable[[], float | None] | None = None,
) -> ProgressBar:
    """Iterate over items and show how far it is, see ProgressBar; without items, call `update` and `close`.

    desc: what is done. total: how many items there are, those of `initial` included, which were done before a stop.
    later: how many further ones follow after these, which count in the time left. left: gives the seconds left in all,
    in the place of an estimate from these items.
    """
    total = len(items) if total is None and hasattr(items, "__len__") else total
    return ProgressBar(items, total, desc, initial, later, left)


class Pace:
    """How long the training in this process takes, from the steps that it has to do and the time that they have taken.

        pace.expect(epochs * steps)
        for epoch in range(epochs):
            for x in pace.steps(batches, total=steps, desc=f"epoch {epoch + 1}"):
                ...
            print(f"epoch {epoch + 1}: loss {loss:.3f}{pace.left()}")

    After its first 20 steps it says how long the training takes. The first 5 are not timed, since kernels are chosen,
    compiled and recorded in them. What is done between epochs, as evaluations, counts in, but what is `paused`.
    """

    UNTIMED, SAY = 5, 20

    def __init__(self):
        self.expected, self.done, self.started = 0, 0, 0.0

    def expect(self, steps: int) -> None:
        """From now on, a training of that many steps is timed."""
        self.__init__()
        self.expected = steps

    def steps(self, batches: Iterable, **shown) -> Iterator:
        """Iterate over the batches of training steps with a bar. shown: its total, desc and initial."""
        for batch in progress_bar(batches, left=self.seconds_left, **shown):
            yield batch
            self._count()

    def seconds_left(self) -> float | None:
        """The seconds that the rest of the training takes; None where that is not known."""
        if not self.expected or self.done <= self.UNTIMED:
            return None
        return self._seconds_a_step() * max(self.expected - self.done, 0)

    def left(self) -> str:
        """For the end of a line: ", about 43 min left"; "" at the end, or where the training takes under a minute."""
        seconds = self.seconds_left()
        known = seconds and self._seconds_a_step() * self.expected >= LINE_SECONDS
        return f", about {duration(seconds)} left" if known else ""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, time does not count as that of the training."""
        before = time.monotonic()
        yield
        self.started += time.monotonic() - before

    def _seconds_a_step(self) -> float:
        return (time.monotonic() - self.started) / (self.done - self.UNTIMED)

    def _count(self) -> None:
        self.done += 1
        if self.done in (self.UNTIMED, self.SAY) and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # else only the launches would be timed
        if self.done == self.UNTIMED:
            self.started = time.monotonic()
        if self.done == self.SAY and this_process().rank == 0 and self.left():
            step = self._seconds_a_step()
            known = f"at the pace of its first {self.SAY} steps, {step:.3g} s each"
            tqdm.write(f"the training takes about {duration(step * self.expected)} {known}", file=sys.stderr)


pace = Pace()  # of the training in this process
