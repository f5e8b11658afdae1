"""The recipe without what makes a run survive: no checkpoints by the clock, no look at signals, at numbers that are not
finite, at ranks that stand still, no seed of its own for each micro-batch, no second try where memory runs out.

The tokens of a step are counted as before: that is what the step's gradient is.
"""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from recipe_row import TakesTurns, config, run_recipe
from sizes import Job
from torch import Tensor
from turns import run_row

from lightning_modules.callbacks.guard import Guard
from lightning_modules.callbacks.recovery import Recovery
from lightning_modules.callbacks.watchdog import Watchdog
from lightning_modules.pretrain import CausalLM


class Bare(CausalLM):
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        data = self.trainer.datamodule
        self._nominal = data.batch_size * data.seq_len
        if self._sums is None:
            self.trainer.optimizers[0].zero_grad()
        return self._objective(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._parameters_in_order is None:
            self._parameters_in_order = list(self.network.parameters())
        self._stepped = [p for p in self._parameters_in_order if p.grad is not None]
        gradients = [p.grad for p in self._stepped]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
        nats, count, tokens = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self._sums = None
        self.tokens = self.tokens + tokens.long()
        self.step_loss = nats / count.clamp(min=1)
        self._scale = self.trainer.accumulate_grad_batches * self.trainer.world_size * self._nominal / count
        self.step_grad_norm = norm * self._scale


class TakesTurnsAlone(TakesTurns):
    """Takes the layer's callbacks away before they begin."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        layer = (Recovery, Guard, Watchdog)
        left: list[Callback] = [callback for callback in trainer.callbacks if not isinstance(callback, layer)]
        assert len(left) == len(trainer.callbacks) - len(layer), trainer.callbacks
        trainer.callbacks = left


def train(job: Job) -> None:
    settings = config(job)
    settings["trainer"]["callbacks"][0]["class_path"] = "bare_row.TakesTurnsAlone"
    settings["model"]["class_path"] = "bare_row.Bare"
    run_recipe(job, settings, "recipe_row", "bare_row")


if __name__ == "__main__":
    run_row(train)
