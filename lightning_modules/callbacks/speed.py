"""Loss, gradient norm, learning rate, tokens per second and MFU, once every log_every_n_steps steps and at the last."""

import gc
import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import hardware, tracking


class Speed(Callback):
    """Times training alone: validation, samples and checkpoints stop the clock.

    MFU is the share of the machine's rate of matrix products (a GPU's data sheet, a CPU's own, measured at the start)
    that the model's FLOPs come to; see `architectures.flops_per_token`.
    """

    def __init__(self):
        self.training_seconds = 0.0
        self.tokens_per_second = 0.0
        self.mfu = 0.0
        self.matrix_flops = 0.0
        self._running_since: float | None = None
        self._window = (0.0, 0)
        self._lr = 0.0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        dtype = torch.bfloat16 if "bf16" in str(trainer.precision) else torch.float32
        device = module.device.type
        self.matrix_flops = hardware.matrix_flops(device, dtype, torch.get_num_threads()) * trainer.world_size

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        kind = type(getattr(module.network, "config", None)).__name__
        tracking.tag(trainer.loggers, type(module).__name__, kind, str(module.objective), str(trainer.precision))
        # What start-up made lives as long as the run: the collector need not look at a million objects again and again.
        gc.collect()
        gc.freeze()
        self._window = (self.training_seconds, int(module.tokens))
        self._resume()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        if self._running_since is None:
            self._resume()

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer) -> None:
        self._lr = optimizer.param_groups[0]["lr"]  # the schedule moves it on before the step is logged

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.fit_loop._should_accumulate() or trainer.global_step == 0:
            return
        # Where the run is told to end Lightning logs what it has, however old.
        if trainer.global_step % trainer.log_every_n_steps and not trainer.should_stop:
            return
        self._pause()
        seconds, tokens = self._window
        now = (self.training_seconds, int(module.tokens))
        self.tokens_per_second = (now[1] - tokens) / max(1e-9, now[0] - seconds)
        self.mfu = self.tokens_per_second * module.flops_per_token / self.matrix_flops
        self._window = now
        values = {
            "train/loss": module.step_loss,
            "train/grad_norm": module.step_grad_norm,
            "train/lr": self._lr,
            "perf/tokens_per_second": self.tokens_per_second,
            "perf/mfu": self.mfu,
        }
        values |= {f"train/{name}": value for name, value in module.step_more.items()}
        module.log_dict({name: float(value) for name, value in values.items()})
        module.log("tokens", module.tokens.double())
        self._resume()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause()

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._pause()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause()

    def mean_tokens_per_second(self, module: LightningModule) -> float:
        """Over all training so far, that before a restart included."""
        return int(module.tokens) / max(1e-9, self.training_seconds)

    def mean_mfu(self, module: LightningModule) -> float:
        return self.mean_tokens_per_second(module) * module.flops_per_token / self.matrix_flops

    def state_dict(self) -> dict:
        running = time.perf_counter() - self._running_since if self._running_since is not None else 0.0
        return {"training_seconds": self.training_seconds + running}

    def load_state_dict(self, state_dict: dict) -> None:
        self.training_seconds = state_dict["training_seconds"]

    def _pause(self) -> None:
        if self._running_since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.training_seconds += time.perf_counter() - self._running_since
            self._running_since = None

    def _resume(self) -> None:
        self._running_since = time.perf_counter()
