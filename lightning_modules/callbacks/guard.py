"""Steps that go wrong: loss or gradient not finite, or a loss far above those before it."""

import json
import math
import statistics
import sys
from collections import deque
from pathlib import Path
from typing import Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from lightning_modules import checkpoint_io, tracking
from lightning_modules.callbacks.changed_weights import ChangedWeights
from lightning_modules.callbacks.recovery import Recovery
from lightning_modules.callbacks.samples import whole_lines
from lightning_modules.command_line import fail

REMEMBERED, FEWEST = 64, 16
"""Steps whose losses a spike is compared with, and how many there must be."""


class Guard(Callback):
    """A step whose loss or gradient is not finite is never applied: `ExactStep` drops it, here it is told and counted.
    The numbers of its rows, and those of a spike, go to unusual_steps.jsonl in the run's folder.

    Args:
        on_nonfinite: skip the step; stop the run; or rollback weights and optimizer to the last checkpoint and go on
            with the rows that are next.
        most_in_a_row: Of such steps, before the run is stopped whatever is asked for.
        spike_factor: A loss so many times the median of the last 64 is reported.
    """

    def __init__(
        self,
        on_nonfinite: Literal["skip", "stop", "rollback"] = "skip",
        most_in_a_row: int = 5,
        spike_factor: float = 4.0,
    ):
        self.on_nonfinite = on_nonfinite
        self.most_in_a_row = most_in_a_row
        self.spike_factor = spike_factor
        self.in_a_row = 0
        self._losses: deque[float] = deque(maxlen=REMEMBERED)
        self._batches: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Steps that are done again tell of themselves again."""
        path = Path(trainer.default_root_dir) / "unusual_steps.jsonl"
        if trainer.is_global_zero and path.is_file():
            kept = [line for line in whole_lines(path) if line["step"] <= trainer.global_step]
            with tracking.written(path):
                checkpoint_io.replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        self._batches.append(batch["rows"])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        searching = isinstance(trainer.precision_plugin, MixedPrecision) and trainer.precision_plugin.scaler is not None
        if searching and not module.step_is_finite:
            self._batches.clear()
            return  # float16's scaler finds the range of the gradients by such steps, and drops them itself
        loss, norm = float(module.step_loss), float(module.step_grad_norm)
        usual = statistics.median(self._losses) if len(self._losses) >= FEWEST else math.inf
        if not module.step_is_finite:
            self.in_a_row += 1
            self._tell(trainer, f"the loss is {loss:.4g}, the gradient norm {norm:.4g}: not applied", loss, norm)
            tracking.log_event(trainer.loggers, "not_finite", 1.0, int(module.tokens))
            self._act(trainer, module)
        elif loss > self.spike_factor * usual:
            self.in_a_row = 0
            self._tell(trainer, f"the loss is {loss:.4g}, {loss / usual:.1f} times the usual {usual:.4g}", loss, norm)
            tracking.log_event(trainer.loggers, "loss_spikes", loss, int(module.tokens))
        else:
            self.in_a_row = 0
            self._losses.append(loss)
        self._batches.clear()

    def _tell(self, trainer: Trainer, what: str, loss: float, norm: float) -> None:
        rows = [row for rows_B in self._batches for row in rows_B.tolist() if row >= 0]
        line = {"step": trainer.global_step, "rank": trainer.global_rank, "loss": str(loss), "grad_norm": str(norm)}
        path = Path(trainer.default_root_dir) / "unusual_steps.jsonl"
        with tracking.written(path), path.open("a") as file:
            file.write(json.dumps(line | {"rows": rows}) + "\n")
        if trainer.is_global_zero:
            print(f"warning: step {trainer.global_step}: {what}; its rows: unusual_steps.jsonl", file=sys.stderr)

    def _act(self, trainer: Trainer, module: LightningModule) -> None:
        if self.on_nonfinite == "stop" or self.in_a_row >= self.most_in_a_row:
            if not trainer.is_global_zero:
                raise SystemExit(1)
            fail(
                f"{self.in_a_row} steps in a row up to {trainer.global_step} were not finite; the checkpoints are from "
                "before: go on from there with a lower learning rate, or without the rows of unusual_steps.jsonl",
                code=1,
            )
        if self.on_nonfinite == "rollback":
            rollback(trainer, module)


def rollback(trainer: Trainer, module: LightningModule) -> None:
    """Weights and optimizer of the newest checkpoint; the place in the data, the step and the schedule stay."""
    path = checkpoint_io.newest(Recovery.folder(trainer))
    if path is None:
        print("warning: no checkpoint to roll back to yet; the step is skipped", file=sys.stderr)
        return
    checkpoint = trainer.strategy.load_checkpoint(path)
    if "state_dict" in checkpoint:  # else the strategy has put it where it belongs
        module.load_state_dict(checkpoint["state_dict"])
    trainer.strategy.load_optimizer_state_dict(checkpoint)
    for callback in trainer.callbacks:
        if isinstance(callback, ChangedWeights):  # which has the exact weights, or how they are changed
            callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
            callback.take_back(trainer, module)
    if trainer.is_global_zero:
        print(f"rolled back to the weights of step {checkpoint['global_step']} ({path})", file=sys.stderr)
