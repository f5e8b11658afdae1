"""What every objective shares: the network, a loss that is exact in tokens, optimizer, schedule, validation.

Shape suffixes: B rows, T tokens of a row.
"""

import os
from functools import partial
from typing import ClassVar, Literal

import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_modules.architectures import build, fit_config
from lightning_modules.losses import IGNORED
from lightning_modules.metrics import LanguageModelLoss
from lightning_modules.optim import adamw
from lightning_modules.scheduled_step import ScheduledStep, comparable, require_same
from lightning_modules.schedules import Cosine, Schedule
from lightning_modules.token_loss import TokenLoss


class LanguageModule(ScheduledStep):
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
        activation_checkpointing: Keeps of each layer its input alone and computes the rest once more backward: less
            memory, about a third more FLOPs.
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
        activation_checkpointing: bool = False,
    ):
        super().__init__(optimizer, schedule, max_tokens, l1, compile, activation_checkpointing)
        self.architecture = architecture
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.validation = LanguageModelLoss()

    # The network

    def configure_model(self) -> None:
        if self.network is not None:
            return
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        network = self.made_by_the_first(self.new_network).train()
        self.token_bytes = self.trainer.datamodule.token_bytes
        settings = (self.label_smoothing, self.z_loss, self.keep_only_labels)
        self.token_loss = TokenLoss(network, *settings, agreed=self.as_the_first)
        self.make_fast(network)
        self.network = network

    def new_network(self) -> PreTrainedModel:
        data = self.trainer.datamodule
        fit_config(self.architecture, data.tokenizer, data.vocab_size, data.seq_len)
        return build(self.architecture, self.auto_class, self.seed)

    # The loss

    def loss(self, batch: dict[str, Tensor], divisor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        return self.token_loss(partial(self.network, **self.inputs(batch)), batch["labels"], divisor)

    def logits(self, batch: dict[str, Tensor], network: PreTrainedModel | None = None) -> Tensor:
        """(B, T, V) float32; of another network than the module's own, if one is given."""
        return (network or self.network)(**self.inputs(batch)).logits.float()

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor | dict]:
        """What the network reads of a batch."""
        return self.inputs_of(batch, self.architecture)

    def inputs_of(self, batch: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor | dict]:
        """What a network of this config reads."""
        of_batch = network_inputs(batch, self.objective, config)
        return of_batch | self.decoder_inputs(batch, config) | {"use_cache": False}

    def decoder_inputs(self, batch: dict[str, Tensor], config: PreTrainedConfig) -> dict[str, Tensor]:
        return {}

    # Validation

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, nats, count = self.loss(batch)
        labels = batch["labels"]
        utf8_bytes = self.token_bytes.to(labels.device)[labels.clamp(min=0)] * (labels != IGNORED)
        self.validation.update(nats, count, utf8_bytes.sum())

    def found(self) -> dict[str, Tensor]:
        values = self.validation.compute()
        self.validation.reset()
        return values

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, float]]:
        """One row at a time: its number in the held-out text, tokens with a label, nats per token."""
        rows = []
        for i in range(len(batch["rows"])):
            _, nats, count = self.loss({name: value[i : i + 1] for name, value in batch.items()})
            if count:
                rows.append({"row": int(batch["rows"][i]), "tokens": int(count), "loss": float(nats / count)})
        return rows

    # What came of a run, in words

    units: ClassVar[str] = (
        "`val_loss` is in nats per token over the held-out text; `val_bits_per_byte` divides the same sum by its UTF-8 "
        "bytes."
    )

    def made_from(self, data: LightningDataModule) -> str:
        about = data.describe()
        return (
            f"{type(self.architecture).__name__} trained with the {self.objective} objective on {about['text']} "
            f"({about['train_tokens']:,} tokens; held out: {about['val_tokens']:,})."
        )

    def results(self, summary: dict[str, object]) -> dict[str, str]:
        if summary["val_loss"] is None:
            return {}
        loss, bits = summary["val_loss"], summary["val_bits_per_byte"]
        return {"val loss": f"{loss:.4f} nats per token", "bits per byte": f"{bits:.4f}"}

    def next_command(self, model: str, data: LightningDataModule) -> str:
        """For the terminal; `model` is quoted."""
        if self.objective != "causal":
            return f"python recipes/score.py --model {model} --data.path README.md"
        prompt = '"def "' if data.path is None else '"Once"'
        return f"python recipes/generate.py --model {model} --prompt {prompt}"

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["architecture"] = comparable(self.architecture)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        if "architecture" not in checkpoint:
            raise ValueError("the checkpoint is of another recipe; resume it with the script that made it")
        require_same(checkpoint["architecture"], comparable(self.architecture))
        super().on_load_checkpoint(checkpoint)


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
