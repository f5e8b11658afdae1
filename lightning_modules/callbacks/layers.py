"""How large weights and gradients are, layer by layer, and how they are distributed: for W&B, on request."""

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor
from torch.optim import Optimizer

from lightning_modules.shards import local

BINS = 64


class Layers(Callback):
    """Logs layers/grad_norm/NAME, before clipping, and layers/weight_norm/NAME of each weight.

    Args:
        every_n_steps: Optimizer steps from one to the next.
        histograms: Whether to log the distributions, too.
    """

    def __init__(self, every_n_steps: int = 100, histograms: bool = False):
        self.every_n_steps = every_n_steps
        self.histograms = histograms
        self._found: dict[str, object] = {}

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        """Here gradients are sums yet, and after the step they are gone."""
        self._found = {}
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        for name, weight in module.network.named_parameters():
            if weight.grad is not None:
                self._found[f"layers/grad_norm/{name}"] = float(whole_norm(weight.grad))
                if self.histograms:
                    self._found[f"layers/grads/{name}"] = counted(local(weight.grad))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if not self._found:
            return
        found, self._found = self._found, {}
        for name, value in found.items():
            scale = module.gradient_scale
            found[name] = drawn(value[0], value[1] * scale) if isinstance(value, tuple) else value * scale
        for name, weight in module.network.named_parameters():
            if weight.requires_grad:
                found[f"layers/weight_norm/{name}"] = float(whole_norm(weight.detach()))
                if self.histograms:
                    found[f"layers/weights/{name}"] = drawn(*counted(local(weight.detach())))
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.log_metrics(found | {"tokens": int(module.tokens)}, step=trainer.global_step)


def whole_norm(tensor: Tensor) -> Tensor:
    """Of a sharded tensor that over all ranks."""
    norm = torch.linalg.vector_norm(tensor, dtype=torch.float32)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def counted(tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Counts and edges; of a sharded tensor the first rank's part."""
    values = tensor.float().flatten()
    values = values[torch.isfinite(values)].cpu().numpy()
    return np.histogram(values if values.size else [0.0], bins=BINS)


def drawn(counts: np.ndarray, edges: np.ndarray) -> object:
    import wandb

    return wandb.Histogram(np_histogram=(counts, edges))
