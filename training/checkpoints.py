"""Checkpoints within an epoch: every --checkpoint_minutes, at SIGUSR1, and before a run ends by SIGINT or SIGTERM.

    checkpoints = Checkpoints(args.checkpoint_minutes, network, save, state)
    with signals.held():
        for epoch in range(epochs_done, args.epochs):
            set_seed(derive_seed(args.seed, epoch))
            totals = checkpoints.begin(epoch)
            for i, batch in enumerate(islice(batches(epoch), checkpoints.done, None), start=checkpoints.done):
                totals += step(batch)
                checkpoints.after_step(i + 1)

A run that goes on from such a checkpoint computes what it would have without a stop. What an epoch draws from a seed of
its own, the order of the images and their augmentation, is drawn again, so that of random numbers only the place in
torch's global streams is kept, which dropout and drop path draw from.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from plumbing.signals import signals
from training import distributed
from utils import all_finite, fail, random_state, set_random_state

SAVE = 1  # asks for a checkpoint; larger numbers are those of the signals that also end the run


class Checkpoints:
    """When a run saves within an epoch, and what it keeps of the epoch under way.

    minutes: between two checkpoints. network: the one in training.
    save(part): writes the checkpoint of the run, which `part` is a part of: {"epoch": how many are done, "within": of
    the one under way}. Every process calls it, with the same `part`. None: nothing is saved and no signal asked for.
    state: the checkpoint that the run goes on from, if any. Ends the script if other processes are needed for it.
    done, seconds: of the epoch under way, how many steps were done, and what time they took, before `begin`.
    """

    def __init__(
        self,
        minutes: float = 0.0,
        network: nn.Module | None = None,
        save: Callable[[dict], None] | None = None,
        state: dict | None = None,
    ):
        self.minutes, self.network, self.save = minutes, network, save
        self.saved = time.monotonic()
        self._before: dict | None = (state or {}).get("within")
        self.done, self.seconds = (self._before["steps"], self._before["seconds"]) if self._before else (0, 0.0)
        if self._before and (processes := len(self._before["processes"])) != distributed.world():
            fail(
                f"--resume: the run was stopped within an epoch of {processes} processes, which as many have to go on "
                f"with; there are {distributed.world()}"
            )

    def begin(self, epoch: int) -> Tensor:
        """Begin an epoch, or go on within it. Returns what its steps so far have summed up, (2,): zeros at its start.

        Called when the random streams of the epoch are seeded.
        """
        device = next(self.network.parameters()).device if self.network else None
        self.epoch, self.steps, self.started = epoch, self.done, time.monotonic() - self.seconds
        self.totals = torch.zeros(2, device=device)
        if self._before:
            own = self._before["processes"][distributed.rank()]
            self.totals.copy_(own["totals"])
            set_random_state(own["random"], device)
            for name, buffer in self.network.named_buffers():
                if name in own["buffers"]:
                    buffer.copy_(own["buffers"][name])
        self._before, self.done, self.seconds = None, 0, 0.0
        return self.totals

    def after_step(self, steps: int) -> None:
        """Save, or save and end the run, if it is time or was asked for. steps: of this epoch, that are done."""
        self.steps = steps
        if self.save is None:
            return
        due = signals.save or time.monotonic() - self.saved >= 60 * self.minutes
        asked = distributed.largest(signals.stop or (SAVE if due else 0))
        if asked:
            self._save()
        if asked > SAVE:
            self._end(asked)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it, where the network is evaluated after an epoch, a signal to end does not wait for the end.

        The epoch is saved with all its steps done, for the evaluation to be repeated. Several processes do not agree
        on when to leave an evaluation: there, the signal waits.
        """
        if self.save is None or distributed.world() > 1:
            yield
            return
        try:
            with signals.raised():
                yield
        except KeyboardInterrupt:
            self._save()
            self._end(signals.stop)

    def _save(self) -> None:
        """Save, unless training has diverged, which the end of the epoch will tell: what was saved before is kept."""
        if distributed.largest(0 if all_finite(self.network) else 1):
            return
        device = self.totals.device
        # each process has running statistics of its own, until they are averaged at the end of the epoch
        buffers = dict(self.network.named_buffers()) if distributed.world() > 1 else {}
        own = {
            "totals": self.totals.cpu(),
            "random": random_state(device),
            "buffers": {name: buffer.cpu() for name, buffer in buffers.items()},
        }
        processes = distributed.gathered(own)
        within = {"steps": self.steps, "seconds": time.monotonic() - self.started, "processes": processes}
        self.save({"epoch": self.epoch, "within": within})
        self.saved, signals.save = time.monotonic(), False

    @staticmethod
    def _end(number: int) -> None:
        """End the script by a signal, which only one of several processes may have received, when all have saved."""
        signals.stop = number
        signals.tell()
        distributed.barrier()
        sys.exit(128 + number)
