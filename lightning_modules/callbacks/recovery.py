"""A run may end at any moment and goes on from there: checkpoints by the clock, and one at a signal."""

import mmap
import os
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from lightning_modules import checkpoint_io, tracking

STEPS_DONE = ".steps_done"
"""Eight bytes beside the checkpoints: the last step that was done, which a killed run cannot tell any more."""
LEFT = ".left_at_a_signal"
"""A file beside the checkpoints, as long as a run that was terminated has not gone on: who started it looks for it."""


class Recovery(Callback):
    """Saves a checkpoint by the clock, and at SIGTERM or SIGINT at the end of the step; a second signal ends the run at
    once. All ranks decide together, by numbers that ride on the sum of the step's tokens.

    Args:
        every_minutes: Time between two checkpoints to go on from, beside those of ModelCheckpoint.
        every_n_steps: The same in optimizer steps, whichever comes first.
        keep: How many of them stay.
    """

    def __init__(self, every_minutes: float = 10.0, every_n_steps: int | None = None, keep: int = 2):
        if every_minutes <= 0 or keep < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"--recovery.every_minutes is {every_minutes}, .every_n_steps {every_n_steps}, .keep {keep}; "
                "pass more than 0"
            )
        self.every_minutes = every_minutes
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.validation_is_due = False
        """Whether the checkpoint in hand was made before the validation of its step."""
        self._signal = 0
        self._leaving = 0
        self._saved_at = time.monotonic()
        self._saved_step = 0
        self._owed = False

    # Start

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning's own handler would call a collective from within the signal, and hang.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._handle)
        self._trainer = trainer
        self._saved_at = time.monotonic()
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            for unfinished in self.folder(trainer).glob(".*.partial"):  # of a run that was killed while it saved
                checkpoint_io.remove(unfinished)
            require_space(self.folder(trainer), module)
            (self.folder(trainer) / LEFT).unlink(missing_ok=True)
            if trainer.global_step:
                self._tell(trainer)
            self._steps_done = open_counter(self.folder(trainer) / STEPS_DONE)
        epoch_loop = trainer.fit_loop.epoch_loop
        if self.validation_is_due or epoch_loop.restarted_on_train_batch_end:
            # Lightning would go on without the validation that was due when the checkpoint was made.
            epoch_loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            self.validation_is_due = False

    def _tell(self, trainer: Trainer) -> None:
        step, again = trainer.global_step, max(0, steps_done(self.folder(trainer)) - trainer.global_step)
        tracking.forget_after(trainer.loggers, step)
        print(
            f"going on from step {step} ({trainer.ckpt_path}): {trainer.datamodule.consumed:,} rows consumed, "
            f"{again:,} steps are done again",
            file=sys.stderr,
        )

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "checkpoints"

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            launcher = self._trainer.strategy.launcher
            if launcher is not None:
                launcher.kill(signal.SIGKILL)
            os._exit(128 + number)
        self._signal = number
        os.write(2, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    # At the end of a step

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer) -> None:
        due = trainer.is_global_zero and self._is_due(trainer.global_step + 1)
        module.wishes = [float(self._signal == signal.SIGTERM), float(self._signal == signal.SIGINT), float(due)]

    def _is_due(self, step: int) -> bool:
        by_steps = self.every_n_steps is not None and step % self.every_n_steps == 0
        return self._owed or by_steps or time.monotonic() - self._saved_at > 60 * self.every_minutes

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate():
            return
        if trainer.is_global_zero:
            self._steps_done[:] = struct.pack("<q", trainer.global_step)
        terminate, interrupt, due = module.wishes_of_all
        self._leaving = signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0
        if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):
            self._owed = bool(due)  # saved a step later; `on_validation_start` leaves
            return
        if self._leaving:
            # What Lightning would do after this hook: write the metrics of the step.
            trainer._logger_connector.on_batch_end()
            trainer._logger_connector.update_train_step_metrics()
            self._leave(trainer)
        if due:
            self._save(trainer)

    # Around validation

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._leaving:
            self.validation_is_due = True
            self._leave(trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        told = [float(self._signal == signal.SIGTERM), float(self._signal == signal.SIGINT)]
        if trainer.world_size > 1:
            told = trainer.strategy.reduce(torch.tensor(told, device=module.device), reduce_op="sum").tolist()
        if any(told):
            self._leaving = signal.SIGTERM if told[0] else signal.SIGINT
            self.validation_is_due = True
            self._leave(trainer)

    # Saving

    def _save(self, trainer: Trainer) -> Path:
        path = self.folder(trainer) / f"recovery-{trainer.global_step:09d}.ckpt"
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            for old in sorted(self.folder(trainer).glob("recovery-*.ckpt"))[: -self.keep]:
                trainer.strategy.remove_checkpoint(old)
        self._saved_at, self._owed = time.monotonic(), False
        return path

    def _leave(self, trainer: Trainer) -> None:
        path = self._save(trainer)
        if trainer.is_global_zero:
            if self._leaving == signal.SIGTERM:
                (self.folder(trainer) / LEFT).touch()
            name = signal.Signals(self._leaving).name
            print(
                f"{name} at step {trainer.global_step}: {path} is written; the same command goes on with "
                f"--trainer.default_root_dir {shlex.quote(str(trainer.default_root_dir))} --ckpt_path last",
                file=sys.stderr,
            )
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher):
            for thread in threading.enumerate():
                if thread.name == "child-process-observer":  # would kill this rank when it sees that another has ended
                    thread._child_processes = []
            for rank in launcher.procs:  # they leave, too; none is to outlive the first
                with suppress(subprocess.TimeoutExpired):
                    rank.wait(timeout=10)
        raise SystemExit(128 + self._leaving)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._saved_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        # Lightning's last.ckpt is the last of those that were among the best; the end of the run may be none.
        if self._saved_step < trainer.global_step:
            self._save(trainer)

    def state_dict(self) -> dict:
        return {"validation_is_due": self.validation_is_due}

    def load_state_dict(self, state_dict: dict) -> None:
        self.validation_is_due = state_dict["validation_is_due"]


def require_space(folder: Path, module: LightningModule) -> None:
    """Raises OSError where fewer than two checkpoints fit: the next one is written before the last one goes."""
    # Weights, and of each number two moments in float32, of weights in bf16 a float32 copy, too.
    one = sum(p.numel() * (p.element_size() + 8 + (p.element_size() < 4) * 4) for p in module.parameters())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 2 * one:
        raise OSError(
            f"{folder} has {free:,} bytes free, and two checkpoints of about {one:,} must fit; make room or pass "
            "another --trainer.default_root_dir"
        )


def open_counter(path: Path) -> mmap.mmap:
    """Eight bytes of a file, in memory: what is written there outlives the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.stat().st_size != 8:
        path.write_bytes(struct.pack("<q", 0))
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 8)


def steps_done(folder: Path) -> int:
    """The last step that a run did, whether or not it was saved."""
    path = folder / STEPS_DONE
    content = path.read_bytes() if path.exists() else b""
    return struct.unpack("<q", content)[0] if len(content) == 8 else 0  # fewer: killed while it was made
