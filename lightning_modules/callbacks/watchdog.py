"""A rank that stands still is found, named and ended; the others would wait for it for half an hour."""

import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

_SLOT = struct.Struct("<qqq")
"""A rank's process, the stations it has passed, and its step."""

STATIONS = ("loading a batch", "the forward pass", "the backward pass or waiting for the other ranks", "validation")


class Watchdog(Callback):
    """Each rank notes in a shared file which stations of a step it has passed. Where nothing moves for `minutes`, the
    rank that has passed fewest is the one that the others wait for: it is named and killed, and the run ends.

    Args:
        minutes: Without any progress. 0: never.
    """

    def __init__(self, minutes: float = 5.0):
        if minutes < 0:
            raise ValueError(f"--watchdog.minutes is {minutes}; pass 0 (never) or more")
        self.minutes = minutes
        self._over = threading.Event()
        self._slots: mmap.mmap | None = None
        self._passed = 0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not self.minutes:
            return
        ranks = trainer.world_size
        # Of this machine alone: a rank elsewhere is watched by its neighbours there.
        file = Path(trainer.default_root_dir) / "checkpoints" / f".ranks-{socket.gethostname()}"
        if trainer.local_rank == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(_SLOT.size * ranks))
        trainer.strategy.barrier("watchdog")
        with file.open("r+b") as opened:
            self._slots = mmap.mmap(opened.fileno(), _SLOT.size * ranks)
        self._rank = trainer.global_rank
        self._pass(trainer, 0)
        self._over.clear()
        threading.Thread(target=self._watch, args=(ranks,), daemon=True, name="watchdog").start()

    def _pass(self, trainer: Trainer, station: int) -> None:
        """Begins a station."""
        if self._slots is not None:
            self._passed += 1
            slot = _SLOT.pack(os.getpid(), self._passed * len(STATIONS) + station, trainer.global_step)
            self._slots[self._rank * _SLOT.size : (self._rank + 1) * _SLOT.size] = slot

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        self._pass(trainer, 1)

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss) -> None:
        self._pass(trainer, 2)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        self._pass(trainer, 0)

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._pass(trainer, 3)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._pass(trainer, 0)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._over.set()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._over.set()

    # The thread

    def _watch(self, ranks: int) -> None:
        seconds = 60 * self.minutes
        pause = min(1.0, seconds / 10)
        seen, since, looked = b"", time.monotonic(), time.monotonic()
        while not self._over.wait(pause):
            stopped = time.monotonic() - looked > pause + seconds / 2  # all of it, by Ctrl-Z: nobody stands still
            looked, now = time.monotonic(), bytes(self._slots)
            if now != seen or stopped:
                seen, since = now, looked
            elif looked - since > seconds:
                self._end([_SLOT.unpack_from(seen, i * _SLOT.size) for i in range(ranks)], seconds)

    def _end(self, slots: list[tuple[int, int, int]], seconds: float) -> None:
        here = {rank: slot for rank, slot in enumerate(slots) if slot[0]}
        stuck = min(here, key=lambda rank: here[rank][1])
        pid, passed, step = here[stuck]
        speaker = min((rank for rank in here if rank != stuck), default=stuck)
        if self._rank != speaker:
            time.sleep(2)  # the speaker speaks first
        else:
            print(
                f"\nerror: rank {stuck} (process {pid}) has stood still for {seconds:,.0f} s in step {step + 1}, in "
                f"{STATIONS[passed % len(STATIONS)]}; it is ended; --ckpt_path last goes on from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            for rank, (other, _, _) in here.items():
                if rank != self._rank:
                    with suppress(ProcessLookupError):
                        os.kill(other, signal.SIGKILL)
        os._exit(1)
