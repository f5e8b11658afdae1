"""Weights that stay zero while the others are trained, or become zero on the way."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn

from lightning_modules.callbacks.changed_weights import ChangedWeights
from lightning_modules.callbacks.report import Report
from lightning_modules.compression.quantization import ends_of
from lightning_modules.compression.reordering import linear_layers
from lightning_modules.compression.sparsity import kept
from lightning_modules.compression.training import MANY

LATEST = 0.9
"""Part of a run at which all zeros have to be there, so that a validation sees them."""


class SparseWeights(ChangedWeights):
    """Keeps the zeros of a pruned model through training. With `sparsity`, more and more of the least weights of each
    matrix become zero until so many are: cubically, section 3 of https://arxiv.org/abs/1710.01878. Embeddings, head,
    norms and biases are left alone.

    Args:
        sparsity: Share of the weights that is zero in the end. Left out: those that are zero already.
        begin: Part of the run, 0 to 1, at which it begins.
        end: Part of the run at which it is reached.
        every: Steps after which the zeros are chosen anew, until then.
    """

    def __init__(self, sparsity: float | None = None, begin: float = 0.0, end: float = 0.5, every: int = 10):
        super().__init__()
        if sparsity is not None and not 0 < sparsity < 1:
            raise ValueError(f"SparseWeights: sparsity is {sparsity}; pass a share between 0 and 1")
        if not 0 <= begin <= end <= LATEST:
            raise ValueError(f"SparseWeights: from {begin} to {end} of the run; pass 0 <= begin <= end <= {LATEST}")
        self.sparsity, self.begin, self.end, self.every = sparsity, begin, end, every
        self.is_kept: dict[str, Tensor] = {}
        self.was_kept: dict[str, Tensor] = {}
        """At the beginning of the run: what was zero then stays so."""
        self._steps = 0
        self._is_done = False

    def names(self, network: nn.Module) -> list[str]:
        ends = {id(end) for end in ends_of(network).values()}
        layers = {name: module for name, module in linear_layers(network).items() if id(module) not in ends}
        if self.sparsity is None:
            layers = {name: module for name, module in layers.items() if share_of_zeros(module.weight) > MANY}
        return [f"{name}.weight" for name in layers]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        super().on_fit_start(trainer, module)
        names = self.names(module.network)
        if not names:
            raise ValueError("the model has no zeros to keep; prune it with --method wanda, or pass a sparsity")
        if not self.is_kept:
            self.is_kept = {name: module.network.get_parameter(name).detach() != 0 for name in names}
            self.was_kept = dict(self.is_kept)
        least = min(float(mask.float().mean()) for mask in self.was_kept.values())
        if self.sparsity is not None and 1 - self.sparsity > least + 0.01:
            raise ValueError(f"SparseWeights: {1 - least:.0%} of a matrix is zero already; pass a sparsity above that")

    def adapt(self, module: LightningModule, exact: dict[str, Tensor]) -> None:
        self._steps += 1
        if self.sparsity is None or self._is_done:
            return
        if self._steps % self.every == 0 or module.progress() >= self.end:
            self._choose(module.progress(), exact)
            forget_the_best(module.trainer)

    def move_to(self, device: torch.device) -> None:
        self.is_kept = {name: mask.to(device) for name, mask in self.is_kept.items()}
        self.was_kept = {name: mask.to(device) for name, mask in self.was_kept.items()}

    def put_in(self, module: LightningModule, exact: dict[str, Tensor]) -> None:
        for name, is_kept in self.is_kept.items():
            exact[name].mul_(is_kept)
            module.network.get_parameter(name).copy_(exact[name])

    def _choose(self, progress: float, exact: dict[str, Tensor]) -> None:
        place = min(1.0, max(0.0, (progress - self.begin) / max(self.end - self.begin, 1e-9)))
        self._is_done = place == 1.0
        share = self.sparsity * (1 - (1 - place) ** 3)
        for name, was_kept in self.was_kept.items():
            before = 1 - float(was_kept.float().mean())
            self.is_kept[name] = kept(exact[name] * was_kept, max(share, before), "unstructured") & was_kept

    def state_dict(self) -> dict:
        return super().state_dict() | {
            "is_kept": self.is_kept,
            "was_kept": self.was_kept,
            "steps": self._steps,
            "is_done": self._is_done,
        }

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self.is_kept, self._steps = dict(state_dict["is_kept"]), state_dict["steps"]
        self.was_kept = dict(state_dict["was_kept"])
        self._is_done = state_dict["is_done"]

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            weights = [module.network.get_parameter(name) for name in self.is_kept]
            zero, of = sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)
            print(f"sparse     {zero:,} of {of:,} weights are zero ({100 * zero / of:.2f} %)", flush=True)


def share_of_zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def forget_the_best(trainer: Trainer) -> None:
    """Models that are not as sparse as asked for are no match for those that will be."""
    for callback in trainer.callbacks:
        if isinstance(callback, Report):
            callback.validations.clear()
        elif isinstance(callback, ModelCheckpoint):
            if callback.best_model_path:
                trainer.strategy.remove_checkpoint(callback.best_model_path)
            callback.best_k_models, callback.best_model_path, callback.kth_best_model_path = {}, "", ""
            callback.best_model_score = callback.kth_value = callback.current_score = None
        elif isinstance(callback, EarlyStopping):
            callback.wait_count, callback.best_score = 0, torch.full_like(callback.best_score, torch.inf)
            callback.best_score *= 1 if callback.mode == "min" else -1
