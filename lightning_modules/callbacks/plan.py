"""What a run will do and cost, printed before its first step."""

import math
import sys

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer

from lightning_modules.architectures import bytes_of, parameter_count
from lightning_modules.callbacks.speed import Speed
from lightning_modules.finetune import FineTune

PLANNED_MFU = 0.45
"""Share of the matrix rate that the time in the plan supposes."""


class Plan(Callback):
    """Prints the plan; `rows` gives it as pairs."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            print_pairs("Plan", self.rows(trainer, module))
            if isinstance(module, FineTune):
                print(f"example   {marked(trainer.datamodule.shown(0))}\n", flush=True)

    def rows(self, trainer: Trainer, module: LightningModule) -> dict[str, str]:
        data = trainer.datamodule
        groups = data.rank_and_ranks[1]
        parts = (data.batch_size, round(data.tokens_per_row), trainer.accumulate_grad_batches, groups)
        ranks = "ranks" if groups == trainer.world_size else f"groups of {trainer.world_size // groups} ranks"
        step_tokens = data.tokens_per_row * math.prod(parts) / parts[1]
        trained = sum(p.numel() for p in module.network.parameters() if p.requires_grad)
        total = parameter_count(module.network)
        rows = {
            "model": f"{type(module).__name__} {type(module.network.config).__name__}, {total:,} parameters, "
            f"{f'{trained:,} of them trained, ' if trained < total else ''}{precision(trainer, module)}",
            **module.plan(),
            **data.plan(),
            "step": "{} rows × {} tokens × {} micro-batches × {} ".format(*parts)
            + f"{ranks} = "
            + f"{step_tokens:,.0f} tokens",
            "run": self._length(trainer, module, step_tokens, data.tokens_per_row * data.rows_per_epoch),
            "memory": f"about {bytes_of(self._state_bytes(module))} for weights, gradients and optimizer, "
            "and the activations",
            "files": trainer.default_root_dir,
        }
        return {name: text for name, text in rows.items() if text}

    def _length(self, trainer: Trainer, module: LightningModule, step_tokens: float, epoch_tokens: float) -> str:
        steps = [trainer.max_steps] if trainer.max_steps > 0 else []
        if module.max_tokens:
            steps.append(math.ceil(module.max_tokens / step_tokens))
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
        length = f"{min(steps):,} steps = {tokens:,.0f} tokens = {tokens / epoch_tokens:.2f} epochs, {flops:.1e} FLOP"
        rate = f"about {seconds:,.0f} s at {PLANNED_MFU:.0%} of the {speed.matrix_flops:.1e} FLOP/s measured here"
        return ", ".join([length, rate, *limit])

    @staticmethod
    def _state_bytes(module: LightningModule) -> int:
        # Weights, gradients, two moments in float32; masters make weights and gradients 2 bytes and add 8.
        return parameter_count(module.network) * (20 if module.low_precision else 16)


def marked(pieces: list[tuple[str, bool]], most: int = 400) -> str:
    """An example in one line, in pieces: what is learnt is green, or in ⟦brackets⟧ where there is no terminal."""
    left, right = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    shown = []
    for text, is_learnt in pieces:
        text = text.replace("\n", "⏎")
        text = text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
        shown.append(f"{left}{text}{right}" if is_learnt else text)
    return "".join(shown)


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
