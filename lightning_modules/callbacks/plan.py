"""What a run will do and cost, printed before its first step."""

import sys

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import hardware, planning
from lightning_modules.architectures import bytes_of, parameter_count
from lightning_modules.callbacks.speed import Speed
from lightning_modules.finetune import FineTune
from lightning_modules.hardware import Device
from lightning_modules.planning import Forecast
from lightning_modules.precision import BF16Shards
from lightning_modules.simulation import Footprint


class Plan(Callback):
    """Prints the plan, and keeps it for what is measured to stand beside it."""

    forecast: Forecast | None = None
    memory_besides: int | None = None
    """Bytes that the process holds besides the tensors of the run."""
    memory_held = 0
    """Bytes of the run's tensors when it begins; its steps take no less."""
    peak: int | None = None
    """The most that it held before it validated for the first time: of steps alone, as the plan is."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        kind = module.device.type
        if trainer.is_global_zero:
            speed = next(c for c in trainer.callbacks if isinstance(c, Speed))
            device = hardware.here(kind, speed.matrix_flops / trainer.world_size, trainer.world_size)
            footprint, tokens = None, 1
            if not module.is_sharded:  # of which only the verb `plan` can say it: it is rank by rank
                footprint, tokens = self.foreseen(trainer, module, device)
            self.forecast = planning.forecast(trainer, module, device, footprint, tokens)
            print_pairs("Plan", rows(self.forecast, trainer, module, is_measured=True))
            if isinstance(module, FineTune):
                print(f"example   {marked(trainer.datamodule.shown(0))}\n", flush=True)
        in_use = hardware.memory_in_use(kind)
        self.memory_held = planning.bytes_there(trainer, module)
        self.memory_besides = None if in_use is None else in_use - self.memory_held
        hardware.start_peak_memory(kind)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.peak is None and not trainer.sanity_checking:
            self.peak = hardware.peak_memory(module.device.type)

    @staticmethod
    def foreseen(trainer: Trainer, module: LightningModule, device: Device) -> tuple[Footprint | None, int]:
        """What a plan cannot say must not keep a run from beginning."""
        try:
            return planning.simulate(trainer, module, device)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"warning: the plan cannot foresee the memory of this run: {reason}", file=sys.stderr)
            return None, 1

    def measured_memory(self, kind: str) -> int | None:
        """The most that the steps took: of a GPU's tensors, or what a CPU's process grew by."""
        peak = self.peak or hardware.peak_memory(kind)
        if peak is None or self.memory_besides is None:
            return None
        return max(peak - self.memory_besides, self.memory_held)  # the system counts a process to about 100 kB


def rows(forecast: Forecast, trainer: Trainer, module: LightningModule, is_measured: bool) -> dict[str, str]:
    """The plan as pairs; `is_measured`: the rate of the device was."""
    data = trainer.datamodule
    groups = data.rank_and_ranks[1]
    parts = (data.batch_size, round(data.tokens_per_row), trainer.accumulate_grad_batches, groups)
    ranks = "ranks" if groups == trainer.world_size else f"groups of {trainer.world_size // groups} ranks"
    limit = planning.time_limit(trainer)
    at_most = "" if limit is None else f"at most {limit:,.0f} s" + (" more" if trainer.ckpt_path else "")
    found = {
        "model": f"{type(module).__name__} {type(module.network.config).__name__}, {parameters(forecast)}, "
        f"{precision(trainer, module)}",
        **module.plan(),
        **data.plan(),
        "step": "{} rows × {} tokens × {} micro-batches × {} ".format(*parts)
        + f"{ranks} = {planning.step_tokens(trainer):,.0f} tokens",
        "run": ", ".join(part for part in (forecast.run(is_measured), at_most) if part),
        "compute": forecast.compute(),
        "memory": forecast.memory()
        or f"{state_bytes(module)} for weights, gradients and optimizer, and the activations",
        "files": trainer.default_root_dir,
    }
    return {name: text for name, text in found.items() if text}


def parameters(forecast: Forecast) -> str:
    parts = [f"{count:,} {part}" for part, count in forecast.parameters.items()]
    by_part = f" ({', '.join(parts)})" if len(parts) > 1 else ""
    trained = f", {forecast.trained:,} of them trained" if forecast.trained < forecast.total else ""
    active = f", {forecast.active:,} of them active" if forecast.active < forecast.total else ""
    return f"{forecast.total:,} parameters{by_part}{active}{trained}"


def state_bytes(module: LightningModule) -> str:
    # Weights, gradients, two moments in float32; masters make weights and gradients 2 bytes and add 8.
    return f"about {bytes_of(parameter_count(module.network) * (20 if module.low_precision else 16))}"


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
    if isinstance(trainer.precision_plugin, BF16Shards):
        return f"{trainer.precision} of float32 shards"
    return f"{trainer.precision} with float32 master weights" if module.low_precision else str(trainer.precision)


def print_pairs(title: str, rows: dict[str, str]) -> None:
    """Two columns on standard output, unwrapped, so that a command or a path can be copied whole."""
    width = max(map(len, rows))
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n{title}")
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    print(flush=True)
