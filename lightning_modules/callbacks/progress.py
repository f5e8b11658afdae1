"""The progress bar: loss, tokens per second, MFU and the time left."""

import sys
import time
from datetime import timedelta

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar

from lightning_modules.callbacks.speed import Speed

WIDTH = 24


class Progress(ProgressBar):
    """One line that is redrawn at most five times a second on a terminal, and written every 30 s elsewhere.

    Lightning's own bars cost half a millisecond a step, which small models notice.
    """

    def __init__(self):
        super().__init__()
        self._enabled = True
        self._drawn = 0.0
        self._started = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._started = self._drawn = time.monotonic()
        self._first = module.progress()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        now = time.monotonic()
        if now - self._drawn >= (0.2 if sys.stderr.isatty() else 30):
            self._drawn = now
            self._draw(trainer, module)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._draw(trainer, module)
            self.newline()

    def newline(self) -> None:
        """What others print belongs below the bar."""
        if self._enabled and sys.stderr.isatty():
            print(file=sys.stderr)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._enabled or not trainer.is_global_zero or not hasattr(module, "step_loss"):
            return
        speed = next(c for c in trainer.callbacks if isinstance(c, Speed))
        done = module.progress()
        elapsed = time.monotonic() - self._started
        left = elapsed * (1 - done) / max(1e-9, done - self._first)
        bar = "━" * round(WIDTH * done)
        line = (
            f"{bar:·<{WIDTH}} {done:4.0%}  step {trainer.global_step}  loss {float(module.step_loss):.3f}  "
            f"{speed.tokens_per_second:,.0f} tokens/s  MFU {speed.mfu:.0%}  {timedelta(seconds=round(left))} left"
        )
        print(
            f"\r{line}" if sys.stderr.isatty() else line,
            end="" if sys.stderr.isatty() else "\n",
            file=sys.stderr,
            flush=True,
        )
