"""What a run will do and cost, printed before its first step."""

import math
import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from lightning_modules.architectures import bytes_of, parameter_count
from lightning_modules.callbacks.speed import Speed

PLANNED_MFU = 0.45
"""Share of the matrix rate that the time in the plan supposes."""


class Plan(Callback):
    """Prints the plan; `rows` gives it as pairs."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            print_pairs("Plan", self.rows(trainer, module))

    def rows(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        data, about = trainer.datamodule, trainer.datamodule.describe()
        parts = (data.batch_size, data.seq_len, trainer.accumulate_grad_batches, trainer.world_size)
        held_out = about["held_out"]
        skipped = about["skipped_rows"]
        rows = {
            "model": f"{type(module).__name__} {type(module.architecture).__name__}, "
            f"{parameter_count(module.network):,} parameters, {precision(trainer, module)}",
            "text": f"{about['text']}: {about['files']:,} files, {about['train_documents']:,} documents, "
            f"{bytes_of(about['train_bytes'])}, {about['train_tokens']:,} tokens",
            "held out": f"{held_out if isinstance(held_out, str) else f'{len(held_out)} files'}, "
            f"{bytes_of(about['val_bytes'])}, {about['val_tokens']:,} tokens",
            "tokenizer": f"{about['tokenizer']}, {about['vocab_size']:,} ids, "
            f"{about['bytes_per_token']:.2f} bytes a token",
            "skipped": ", ".join(f"{count:,} bad rows of {file}" for file, count in skipped.items()),
            "step": "{} rows × {} tokens × {} micro-batches × {} ranks = {:,} tokens".format(*parts, math.prod(parts)),
            "run": self._length(trainer, module, math.prod(parts), about["train_tokens"]),
            "memory": f"about {bytes_of(self._state_bytes(module))} for weights, gradients and optimizer, "
            "and the activations",
            "files": trainer.default_root_dir,
        }
        return {name: text for name, text in rows.items() if text}

    def _length(self, trainer: Trainer, module: LightningModule, step_tokens: int, epoch_tokens: int) -> str:
        steps = [trainer.max_steps] if trainer.max_steps > 0 else []
        if module.max_tokens:
            steps.append(-(-module.max_tokens // step_tokens))
        if trainer.max_epochs and trainer.max_epochs > 0:
            steps.append(-(-trainer.num_training_batches // trainer.accumulate_grad_batches) * trainer.max_epochs)
        seconds_left = time_limit(trainer)
        limit = [] if seconds_left is None else [f"at most {seconds_left:,.0f} s"]
        if not steps:
            return ", ".join(limit)
        speed = next(c for c in trainer.callbacks if isinstance(c, Speed))
        tokens = min(steps) * step_tokens
        flops = tokens * module.flops_per_token
        seconds = flops / (PLANNED_MFU * speed.matrix_flops)
        length = f"{min(steps):,} steps = {tokens:,} tokens = {tokens / epoch_tokens:.2f} epochs, {flops:.1e} FLOP"
        rate = f"about {seconds:,.0f} s at {PLANNED_MFU:.0%} of the {speed.matrix_flops:.1e} FLOP/s measured here"
        return ", ".join([length, rate, *limit])

    @staticmethod
    def _state_bytes(module: LightningModule) -> int:
        # Weights, gradients, two moments in float32; masters make weights and gradients 2 bytes and add 8.
        return parameter_count(module.network) * (20 if module.low_precision else 16)


def precision(trainer: Trainer, module: LightningModule) -> str:
    return f"{trainer.precision} with float32 master weights" if module.low_precision else str(trainer.precision)


def time_limit(trainer: Trainer) -> float | None:
    """Seconds left of max_time."""
    timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)
    return timer.time_remaining() if timer else None


def print_pairs(title: str, rows: dict[str, str]) -> None:
    """Two columns on standard output, unwrapped, so that a command or a path can be copied whole."""
    width = max(map(len, rows))
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}")
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print(flush=True)
