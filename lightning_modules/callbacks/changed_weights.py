"""Weights that a network reads in another form than the one that the optimizer changes."""

from abc import abstractmethod
from typing import ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.optim import Float32Master
from lightning_modules.strategies import Sharded


class ChangedWeights(Callback):
    """The gradient is taken where the network reads, and applied to the exact weights behind: the straight-through
    estimator, https://arxiv.org/abs/1308.3432. With float32 masters those are the exact ones; else they are kept here.
    A network's own weights, and with them every validation, checkpoint and folder, are the changed ones.

    Of several such callbacks the first keeps the weights, and each changes them in turn, by its `turn`.
    """

    turn: ClassVar[int] = 0

    def __init__(self) -> None:
        self.exact: dict[str, Tensor] = {}
        """By name; of weights that the optimizer has masters of, the masters."""
        self._from_checkpoint: dict[str, Tensor] = {}
        self._has_masters = False
        self._is_put_back = False

    @abstractmethod
    def names(self, network: nn.Module) -> list[str]:
        """Of the weights that are changed."""

    @abstractmethod
    def put_in(self, module: LightningModule, exact: dict[str, Tensor]) -> None:
        """Gives the network what it reads. What is changed in `exact` is changed for those behind, too."""

    @abstractmethod
    def adapt(self, module: LightningModule, exact: dict[str, Tensor]) -> None:
        """After a step: how weights are changed from now on."""

    def move_to(self, device: torch.device) -> None:
        """What decides how weights are changed."""

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(trainer.strategy, Sharded):
            kind = type(self).__name__
            raise ValueError(f"{kind} changes whole weights, which no rank has; take --trainer.strategy ddp")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        together = [callback for callback in trainer.callbacks if isinstance(callback, ChangedWeights)]
        if together[0] is not self:
            return
        optimizer, weights = trainer.optimizers[0], dict(module.network.named_parameters())
        names = dict.fromkeys(name for callback in together for name in callback.names(module.network))
        self._has_masters = isinstance(optimizer, Float32Master)
        if self._has_masters:
            masters = {id(p): master for p, master in zip(optimizer.mastered, optimizer.masters, strict=True)}
            self.exact = {name: masters[id(weights[name])] for name in names}
        else:
            kept = self._from_checkpoint
            self.exact = {name: kept.get(name, weights[name].detach()).to(weights[name], copy=True) for name in names}
        together.sort(key=lambda callback: callback.turn)
        for callback in together:  # what a checkpoint had is on the CPU
            callback.move_to(next(iter(weights.values())).device)

        @torch.no_grad()
        def after_step(*_) -> None:
            if not self._has_masters:
                for name, tensor in self.exact.items():
                    tensor.copy_(weights[name])
            self._is_put_back = False
            for callback in together:
                callback.adapt(module, self.exact)
                callback.put_in(module, self.exact)

        self._after_step = after_step
        optimizer.register_step_post_hook(after_step)
        with torch.no_grad():
            for callback in together:
                callback.put_in(module, self.exact)

    @torch.no_grad()
    def take_back(self, trainer: Trainer, module: LightningModule) -> None:
        """Goes on from what a checkpoint had, in the middle of a run."""
        self.move_to(module.device)
        for name, tensor in self._from_checkpoint.items():
            self.exact[name].copy_(tensor)
        leader = next(callback for callback in trainer.callbacks if isinstance(callback, ChangedWeights))
        self.put_in(module, leader.exact)

    @torch.no_grad()
    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        if self.exact and not self._has_masters:
            self._is_put_back = True
            for name, tensor in self.exact.items():
                module.network.get_parameter(name).copy_(tensor)

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if self._is_put_back:  # float16's scaler has left the step out
            self._after_step()

    def state_dict(self) -> dict:
        return {"exact": {} if self._has_masters else self.exact}

    def load_state_dict(self, state_dict: dict) -> None:
        self._from_checkpoint = state_dict["exact"]
