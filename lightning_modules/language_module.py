"""What every objective shares: the network, a loss that is exact in tokens, optimizer, schedule, validation.

Shape suffixes: B rows, T tokens of a row, N tokens with a label, C width, V vocabulary.
"""

import os
from typing import ClassVar, Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules import cpu_kernels, hardware
from lightning_modules.architectures import HeadInput, build, find_head_loss, fit_config, flops_per_token
from lightning_modules.losses import IGNORED, HeadLoss, cross_entropy, linear_cross_entropy
from lightning_modules.metrics import LanguageModelLoss
from lightning_modules.optim import Float32Master, adamw, parameter_groups
from lightning_modules.precision import BF16Weights
from lightning_modules.schedules import Cosine, Schedule


class LanguageModule(LightningModule):
    """A language model in training; a subclass says with which objective.

    Args:
        architecture: A transformers config by name, such as transformers.LlamaConfig, with its fields. Vocabulary and
            special tokens follow from the data.
        optimizer: Any torch optimizer by name. Weight decay touches matrices and embeddings only.
        schedule: Constant, Linear, Cosine, Step, Exponential, InverseSquareRoot or WarmupStableDecay.
        max_tokens: Stop after this many training tokens, and end the schedule there.
        label_smoothing: Weight of the uniform distribution in the target.
        z_loss: Weight of logsumexp² of the logits, which keeps them from drifting.
        l1: Weight of the sum of absolute weights, in nats per token.
        compile: torch.compile of the network; auto: on a GPU, where it pays.
    """

    objective: ClassVar[str]
    auto_class: ClassVar[type]
    keep_only_labels: ClassVar[bool] = False
    """Whether positions without a label are left out before the head: pays where most carry none."""

    def __init__(
        self,
        architecture: PreTrainedConfig,
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = lazy_instance(Cosine),  # noqa: B008 - so that a saved config holds it by name
        max_tokens: int | None = None,
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
        l1: float = 0.0,
        compile: bool | Literal["auto"] = "auto",
    ):
        super().__init__()
        self.architecture = architecture
        self.optimizer = optimizer
        self.schedule = schedule
        self.max_tokens = max_tokens
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.l1 = l1
        self.compile_network = compile
        self.network: PreTrainedModel | None = None
        self.head_loss: HeadLoss | None = None
        self.lr: float | None = None
        self.validation = LanguageModelLoss()
        self.tokens = 0
        self.kernels: list[str] = []
        self._sums: Tensor | None = None
        self._nominal = 1
        self._seed = 0

    # The network

    def configure_model(self) -> None:
        if self.network is not None:
            return
        data = self.trainer.datamodule
        fit_config(self.architecture, data.tokenizer, data.vocab_size, data.seq_len)
        self._seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        network = build(self.architecture, self.auto_class, self._seed).train()
        self.token_bytes = data.token_bytes
        self.tap = HeadInput(network)
        rule = find_head_loss(network, self.tap)
        if rule is not None:
            self.head_loss = rule._replace(label_smoothing=self.label_smoothing, z_loss=self.z_loss)
        on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if on_cpu:
            hardware.keep_freed_memory()
        if on_cpu and self.low_precision and self.compile_network is not True:
            self.kernels = cpu_kernels.install(network)
        if self.compile_network is True or (self.compile_network == "auto" and not on_cpu):
            # In place, and the network alone: torch.compile(network) would rename all weights, and a compiled
            # LightningModule cannot log.
            network.compile()
        self.network = network

    @property
    def low_precision(self) -> bool:
        """Whether the weights themselves are bf16, and the optimizer keeps float32 masters."""
        return isinstance(self.trainer.precision_plugin, BF16Weights)

    def on_fit_start(self) -> None:
        self.flops_per_token = flops_per_token(self.network, self.trainer.datamodule.seq_len)

    # The loss

    def loss(self, batch: dict[str, Tensor], divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        """(objective / divisor, sum of nats, number of labels) of a batch; only the first has a gradient."""
        inputs = network_inputs(batch, self.objective, self.architecture) | self.decoder_inputs(batch)
        labels_N = batch["labels"].flatten()
        count = (labels_N != IGNORED).sum()
        if self.head_loss is None:
            head = HeadLoss(label_smoothing=self.label_smoothing, z_loss=self.z_loss)
            logits_NV = self.network(**inputs, use_cache=False).logits.flatten(0, 1)
            return *cross_entropy(logits_NV, labels_N, head=head, divisor=divisor), count
        with self.tap.tapped() as tap:
            self.network(**inputs, use_cache=False)
        hidden_NC = tap.hidden.flatten(0, 1)
        if self.keep_only_labels:
            keep_N = labels_N != IGNORED
            hidden_NC, labels_N = hidden_NC[keep_N], labels_N[keep_N]
        weight, bias = tap.head.weight, tap.head.bias
        return *linear_cross_entropy(hidden_NC, weight, labels_N, bias, head=self.head_loss, divisor=divisor), count

    def decoder_inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The *sum* of the loss over a constant: `on_before_optimizer_step` divides by the tokens of the whole step."""
        data = self.trainer.datamodule
        # Any constant would do that all micro-batches and ranks of a step share; this one keeps float16 in range.
        self._nominal = data.batch_size * data.seq_len
        objective, nats, count = self.loss(batch, divisor=self._nominal)
        tokens = (batch["rows"] >= 0).sum() * batch["input_ids"].shape[1]
        sums = torch.stack([nats.double(), count.double(), tokens.double()])
        self._sums = sums if self._sums is None else self._sums + sums
        if self.l1:
            # Counted once a token, so that it, too, does not depend on how the step is split.
            absolute = sum(p.abs().sum() for p in self.network.parameters() if p.ndim >= 2)
            objective = objective + self.l1 * absolute * (count / self._nominal)
        return objective

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        nats, count, tokens = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self._sums = None
        # Lightning has divided by accumulate_grad_batches, DDP by the ranks, training_step by its constant.
        scale = self._nominal * self.trainer.accumulate_grad_batches * self.trainer.world_size / count.clamp(min=1)
        if scale.device.type != "cpu" or scale != 1:
            torch._foreach_mul_([p.grad for p in self.network.parameters() if p.grad is not None], scale)
        self.tokens = self.tokens + tokens.long()
        self.step_loss = nats / count

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips by the norm over all gradients in float32, under every precision, fused optimizers included."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(self.network.parameters(), gradient_clip_val)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, torch.float32)))
        if gradient_clip_val and gradient_clip_algorithm != "value":
            factor = gradient_clip_val / (norm + 1e-6)
            if factor.device.type != "cpu" or factor < 1:
                torch._foreach_mul_(gradients, factor.clamp(max=1))
        self.step_grad_norm = norm

    # Optimizer and schedule

    def configure_optimizers(self) -> dict:
        groups = parameter_groups(self.network)
        optimizer = Float32Master(groups, self.optimizer) if self.low_precision else self.optimizer(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.schedule.factor(step, self.progress())
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Takes the rate that LearningRateFinder has set; a second group keeps its ratio to the first."""
        if self.lr is None:
            return
        for scheduler in (config.scheduler for config in self.trainer.lr_scheduler_configs):
            scale = self.lr / scheduler.base_lrs[0]
            scheduler.base_lrs = [lr * scale for lr in scheduler.base_lrs]
            factor = self.schedule.factor(0, self.progress())
            for group, lr in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
                group["initial_lr"], group["lr"] = lr, lr * factor

    def progress(self) -> float:
        """Part of the run that is done in the middle of the next step, 0 to 1: the largest of those of steps, epochs,
        tokens and time."""
        trainer = self.trainer
        done = [0.0]
        step = trainer.global_step + 0.5
        if trainer.max_steps > 0:
            done.append(step / trainer.max_steps)
        if trainer.max_epochs is not None and trainer.max_epochs > 0 and trainer.num_training_batches != float("inf"):
            steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches) * trainer.max_epochs
            done.append(step / max(1, steps))
        if self.max_tokens:
            done.append(float(self.tokens) / self.max_tokens)
        timer = next((c for c in trainer.callbacks if isinstance(c, Timer)), None)
        if timer is not None and timer.time_remaining() is not None:
            elapsed = timer.time_elapsed()
            done.append(elapsed / (elapsed + timer.time_remaining()))
        return min(1.0, max(done))

    # Validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, nats, count = self.loss(batch)
        labels = batch["labels"]
        utf8_bytes = self.token_bytes.to(labels.device)[labels.clamp(min=0)] * (labels != IGNORED)
        self.validation.update(nats, count, utf8_bytes.sum())

    def on_validation_epoch_end(self) -> None:
        self._log_validation("val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_validation("test")

    def _log_validation(self, stage: str) -> None:
        for name, value in self.validation.compute().items():
            self.log(f"{stage}/{name}", value, rank_zero_only=False)
        self.validation.reset()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, float]]:
        """One row at a time: its number in the held-out text, tokens with a label, nats per token."""
        rows = []
        for i in range(len(batch["rows"])):
            _, nats, count = self.loss({name: value[i : i + 1] for name, value in batch.items()})
            if count:
                rows.append({"row": int(batch["rows"][i]), "tokens": int(count), "loss": float(nats / count)})
        return rows

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["tokens"] = int(self.tokens)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.tokens = checkpoint["tokens"]


def network_inputs(batch: dict[str, Tensor], objective: str, config: PreTrainedConfig) -> dict[str, Tensor | dict]:
    """What a network reads of a batch.

    Causal networks of transformers see from positions that restart where attention must end; bidirectional ones need
    to be told, by a mask (B, 1, T, T) of the pairs that may see each other.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    if objective != "masked" or "position_ids" not in batch:
        return inputs
    documents_BT = (batch["position_ids"] == 0).cumsum(-1)
    same_B1TT = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    if "sliding_attention" not in (getattr(config, "layer_types", None) or ()):
        return inputs | {"attention_mask": same_B1TT}
    place_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    near_TT = (place_T[:, None] - place_T[None]).abs() <= config.sliding_window
    return inputs | {"attention_mask": {"full_attention": same_B1TT, "sliding_attention": same_B1TT & near_TT}}
