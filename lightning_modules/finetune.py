"""What every task of fine-tuning shares: a pretrained network with the head of the task, whole or by an adapter."""

import copy
import os
import shlex
import shutil
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist
from jsonargparse import lazy_instance
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import BaseFinetuning
from lightning.pytorch.cli import OptimizerCallable
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lightning_modules import hardware
from lightning_modules.adapter import Adapter
from lightning_modules.architectures import fit_config
from lightning_modules.checkpoint_io import replace_folder
from lightning_modules.compression.packed_folder import is_packed, read_packed
from lightning_modules.model_folder import find_folder, max_positions, newest_pretraining, read_config
from lightning_modules.optim import adamw
from lightning_modules.scheduled_step import ScheduledStep, comparable, require_same
from lightning_modules.schedules import Linear, Schedule

NEW = "new"
"""Of --model.from: weights that are initialised here."""
OF_100 = ("exact_match", "f1", "bleu", "chrf", "rouge1", "rouge2", "rougeL")
"""Metrics that are no parts of one."""


class FineTune(ScheduledStep):
    """A subclass is a task.

    Args:
        from_: Flag --model.from: a run's folder, a model's folder or a Hub name; or new, for freshly initialised
            weights of `architecture`. Left out: the newest pretraining in runs/ whose architecture can have the
            task's head, else new.
        architecture: A transformers config by name, with its fields, for new weights.
        adapter: Trains matrices of low rank beside the model's instead of the model.
        freeze_backbone: Trains the head alone, and what the model to begin with lacks, such as a pooler.
        dropout: Of all layers that have it. Left out: as the model has it.
        optimizer: Any torch optimizer by name. Weight decay touches matrices and embeddings only.
        schedule: Constant, Linear, Cosine, Step, Exponential, InverseSquareRoot or WarmupStableDecay.
        max_tokens: Stop after this many training tokens, and end the schedule there.
        l1: Weight of the sum of absolute weights, in nats per label.
        compile: torch.compile of the network; auto: on a GPU, where it pays.
        activation_checkpointing: Keeps of each layer its input alone and computes the rest once more backward: less
            memory, about a third more FLOPs.
    """

    objective: ClassVar[str]
    has_new_head: ClassVar[bool] = True
    """Whether the task's head is made here, where the model to begin with has none."""

    def __init__(
        self,
        from_: str | None = None,
        architecture: PreTrainedConfig | None = None,
        adapter: Adapter | None = None,
        freeze_backbone: bool = False,
        dropout: float | None = None,
        optimizer: OptimizerCallable = adamw,
        schedule: Schedule = lazy_instance(Linear),  # noqa: B008 - so that a saved config holds it by name
        max_tokens: int | None = None,
        l1: float = 0.0,
        compile: bool | Literal["auto"] = "auto",
        activation_checkpointing: bool = False,
    ):
        super().__init__(optimizer, schedule, max_tokens, l1, compile, activation_checkpointing)
        self.origin = self.start = starting_folder(from_, self.auto_class_of)
        """A folder or Hub name; None for new weights."""
        self.architecture = architecture
        if self.origin is None and architecture is None:
            raise ValueError(
                "no run in runs/ has a model for this task, and there is no --model.architecture to begin with; pass "
                "--model.from, or an architecture"
            )
        self.adapter = adapter
        self.freeze_backbone = freeze_backbone
        self.dropout = dropout
        self.new_parts: list[str] = []
        """Modules besides the head that the model to begin with lacks."""
        self.predictions: dict[int, dict[str, object]] = {}
        """Of the validation so far, by the number of the example."""

    # The network

    @staticmethod
    @abstractmethod
    def auto_class_of(config: PreTrainedConfig) -> type | None:
        """AutoModelFor… by which a model of this config gets the task's head; None if it cannot have it."""

    @cached_property
    def base_config(self) -> PreTrainedConfig:
        """Of the model to begin with."""
        return self.architecture if self.origin is None else read_config(self.origin, "--model.from")

    @cached_property
    def auto_class(self) -> type:
        found = self.auto_class_of(self.base_config)
        if found is None:
            flag = "--model.architecture" if self.origin is None else f"--model.from {self.origin}:"
            raise ValueError(f"{flag} {type(self.base_config).__name__} {self.needs}")
        return found

    needs: ClassVar[str]
    """Why a config has no `auto_class_of`, and which ones have."""

    @abstractmethod
    def head_fields(self) -> dict[str, object]:
        """Fields of the config that say what the task's head is."""

    @abstractmethod
    def measured(self) -> list[str]:
        """Names under val/ that a validation finds."""

    def configure_model(self) -> None:
        if self.network is not None:
            return
        data = self.trainer.datamodule
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if self.low_precision and any(isinstance(callback, BaseFinetuning) for callback in self.trainer.callbacks):
            raise ValueError(
                "a callback adds weights to the optimizer in the middle of the run, which the float32 masters of "
                "bf16-true do not follow; pass --trainer.precision bf16-mixed or 32-true"
            )
        if self.is_sharded and self.adapter is not None and self.adapter.bits is not None:
            raise ValueError("--model.adapter.bits is for weights that a rank has whole; take --trainer.strategy ddp")
        fields = self.head_fields()
        if data.has_answers:
            self._require_monitors()
        if self.dropout is not None:
            ends = ("dropout", "_pdrop", "dropout_prob", "dropout_rate")
            fields |= {name: self.dropout for name in vars(self.base_config) if name.endswith(ends)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # of new weights, and of the new head
            auto_class = self.auto_class
            network = self.made_by_the_first(partial(self.new_network, auto_class, fields))
            self._require_fit(network)
            network.config.pad_token_id = data.pad_id  # by which a decoder finds the last token of a text
            if self.freeze_backbone:
                network.base_model.requires_grad_(False)
                for part in self.new_parts:
                    network.base_model.get_submodule(part).requires_grad_(True)
            if self.adapter is not None:
                add = partial(self.adapter.added_to, network, auto_class, self.new_parts)
                network = self.made_by_the_first(add)
        plain = network if self.adapter is None else network.base_model.model
        self.prepare(plain)
        self.make_fast(plain)
        self.network = network.train()

    def _require_monitors(self) -> None:
        names = [f"val/{name}" for name in self.measured()]
        for callback in self.trainer.callbacks:
            watched = getattr(callback, "monitor", None)
            if watched is not None and watched.startswith("val/") and watched not in names:
                raise ValueError(
                    f"{type(callback).__name__} watches {watched}, which a validation here does not find; it finds "
                    f"{', '.join(names)}: name one by --trainer.callbacks.monitor, with --trainer.callbacks.mode"
                )

    def prepare(self, network: PreTrainedModel) -> None:
        """What a task makes for its network once."""

    def new_network(self, auto_class: type, fields: dict[str, object]) -> PreTrainedModel:
        return self._new(auto_class, fields) if self.origin is None else self._loaded(auto_class, fields)

    def _new(self, auto_class: type, fields: dict[str, object]) -> PreTrainedModel:
        data = self.trainer.datamodule
        self._require_positions(getattr(self.architecture, "max_position_embeddings", None))
        fit_config(self.architecture, data.tokenizer, data.vocab_size, data.seq_len)
        for name, value in fields.items():
            setattr(self.architecture, name, value)
        return auto_class.from_config(self.architecture, dtype=torch.float32)

    def _loaded(self, auto_class: type, fields: dict[str, object]) -> PreTrainedModel:
        if not hardware.reads_weights():
            return auto_class.from_config(changed(self.base_config, fields), dtype=torch.float32)
        self.new_parts: list[str] = []
        if is_packed(self.base_config):
            if self.trainer.state.fn == "fit":
                raise ValueError(f"--model.from {self.origin} has few bits; pass the model that it was made from")
            return read_packed(auto_class, self.origin, torch.float32)
        settings = {"dtype": torch.float32, "output_loading_info": True}
        settings |= {} if self.adapter is None else self.adapter.loading()
        try:
            # A head of another number of labels is made anew.
            network, info = auto_class.from_pretrained(self.origin, ignore_mismatched_sizes=True, **settings, **fields)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"--model.from {self.origin} gives no {auto_class.__name__} ({reason})") from None
        # The pooler, which pretraining does not have, belongs to the head.
        self.new_parts = ["pooler"] if any("pooler" in name for name in info["missing_keys"]) else []
        prefix = f"{network.base_model_prefix}." if self.has_new_head else ""
        missing = [name for name in sorted(info["missing_keys"]) if name.startswith(prefix) and "pooler" not in name]
        if missing:
            lacking = f"{len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"--model.from {self.origin} lacks {lacking}; pass a whole one")
        return network

    def _require_fit(self, network: PreTrainedModel) -> None:
        data = self.trainer.datamodule
        ids = network.get_input_embeddings().num_embeddings
        if data.vocab_size > ids:
            raise ValueError(
                f"the tokenizer has {data.vocab_size:,} ids and the model {ids:,}: they do not belong together; leave "
                "--data.tokenizer out for the model's own"
            )
        self._require_positions(max_positions(network))

    def _require_positions(self, positions: int | None, whose: str = "the model") -> None:
        data = self.trainer.datamodule
        width = -(-data.seq_len // 8) * 8  # to which examples are padded
        if positions is not None and width > positions:
            raise ValueError(
                f"an example has {data.seq_len:,} tokens, {width:,} when it is padded, and {whose} "
                f"{positions:,} positions; pass --data.max_length {positions // 8 * 8}"
            )

    @property
    def backbone(self) -> torch.nn.Module:
        """What Lightning's BackboneFinetuning freezes and thaws; it asks before it is time to make the network."""
        self.configure_model()
        return self.plain_network.base_model

    @property
    def plain_network(self) -> PreTrainedModel:
        """Without the adapter's wrapping, but with its weights: peft's own forward for questions leaves out
        token_type_ids."""
        return self.network if self.adapter is None else self.network.base_model.model

    def unsharded(self, weights: dict[str, Tensor]) -> torch.nn.Module:
        if self.adapter is None:
            return super().unsharded(weights)
        with torch.random.fork_rng(devices=[]):
            plain = self.auto_class.from_config(self.plain_network.config)
            network = self.adapter.added_to(plain, self.auto_class, self.new_parts)
        network.load_state_dict(weights)
        if plain.can_generate():
            plain.generation_config = self.plain_network.generation_config
        return network

    def exported(self) -> PreTrainedModel:
        """With an adapter, the network that it adds up to."""
        if self.adapter is None:
            return self.network
        if self.adapter.bits is None:
            return copy.deepcopy(self.network).float().merge_and_unload()
        base = self.auto_class.from_pretrained(self.origin, dtype=torch.float32, **self.head_fields())
        return self.adapter.merged(self.network, base, self.auto_class, self.new_parts)

    def save_beside(self, folder: Path) -> None:
        """The adapter alone, as peft loads it onto the model it began with."""
        if self.adapter is not None:
            temporary = folder / ".adapter.partial"
            shutil.rmtree(temporary, ignore_errors=True)
            self.network.save_pretrained(temporary)
            replace_folder(temporary, folder / "adapter")

    def counted_tokens(self, batch: dict[str, Tensor]) -> Tensor:
        return (batch["attention_mask"] * (batch["rows"] >= 0)[:, None]).sum()

    def gather_predictions(self) -> None:
        """Makes `predictions` those of all ranks."""
        if self.trainer.world_size > 1:
            of_ranks: list[dict] = [{}] * self.trainer.world_size
            dist.all_gather_object(of_ranks, self.predictions)
            self.predictions = {row: prediction for found in of_ranks for row, prediction in found.items()}

    def on_predict_epoch_end(self) -> None:
        self.gather_predictions()

    # What came of a run, in words

    units: ClassVar[str]

    def about(self) -> dict[str, object]:
        return super().about() | {"task": type(self).__name__}

    def made_from(self, data: LightningDataModule) -> str:
        origin = f"from {self.origin}" if self.origin else "from new weights"
        examples = f"{data.rows_per_epoch:,} examples of {data.source}"
        how = f", by {self.beside}" if self.beside else ""
        return f"{type(self.plain_network).__name__} fine-tuned {origin} on {examples}{how}."

    @property
    def beside(self) -> str | None:
        """What is trained beside the model."""
        return self.adapter and f"{self.adapter.kind} of rank {self.adapter.rank}"

    def next_command(self, model: str, data: LightningDataModule) -> str:
        """For the terminal; `model` is quoted."""
        run = shlex.quote(self.trainer.default_root_dir)
        return f"python recipes/finetune.py predict --config {run}/config.yaml --ckpt_path last --data.predict_path …"

    def results(self, summary: dict[str, object]) -> dict[str, str]:
        found = {name: value for name, value in summary.items() if name.startswith("val_") and value is not None}
        shown = {name.removeprefix("val_"): value for name, value in found.items() if not name.endswith("_final")}
        words = {name: f"{value:.2f} of 100" if name in OF_100 else f"{value:.4f}" for name, value in shown.items()}
        return {f"val {name.replace('_', ' ')}": value for name, value in words.items()}

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["task"] = self._task()
        checkpoint["network"] = comparable(self.plain_network.config)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        there, here = checkpoint.get("task", {}), self._task()
        require_same(there, here)
        if "network" in checkpoint:
            require_same(checkpoint["network"], comparable(self.plain_network.config))
        super().on_load_checkpoint(checkpoint)

    def _task(self) -> dict[str, object]:
        labels = getattr(self.trainer.datamodule, "label_names", [])
        return {"task": type(self).__name__, "network": type(self.plain_network).__name__} | {
            "labels": ", ".join(labels),
            "tokenizer": self.trainer.datamodule.tokenizer_digest[:12],
            "adapter": self.beside or "none",
        }


def changed(config: PreTrainedConfig, fields: dict[str, object]) -> PreTrainedConfig:
    config = copy.deepcopy(config)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def starting_folder(asked: str | None, auto_class_of: Callable[[PreTrainedConfig], type | None]) -> str | None:
    """The folder with the weights to begin with; None where they are new."""
    if asked == NEW:
        return None
    if asked is not None:
        return find_folder(asked)
    return newest_pretraining(lambda config: auto_class_of(config) is not None)
