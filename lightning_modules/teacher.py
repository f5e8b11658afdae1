"""A trained model that a student learns from: read, and never part of the student's module tree.

So it is in no checkpoint, optimizer or bucket of gradients, and stays in eval mode without gradients.
"""

import copy
import hashlib
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging

from lightning_modules import cpu_kernels, hardware
from lightning_modules.compression.packed_folder import is_packed, read_packed
from lightning_modules.handing_out import as_the_first, made_by_the_first
from lightning_modules.losses import Head
from lightning_modules.model_folder import find_folder, load_tokenizer, max_positions, read_config
from lightning_modules.token_loss import TokenLoss

Answer = TypeVar("Answer")
KEPT = 1e-3
"""Nats per token that a teacher's distribution may move by for its weights to be bf16."""


class Teacher:
    """Of a run's folder, a model's folder or a Hub name, with the same head as the student."""

    def __init__(self, name: str, auto_class: type, flag: str = "--model.teacher"):
        self.folder, self.auto_class, self.flag = find_folder(name), auto_class, flag
        self.config = read_config(self.folder, flag)
        found = auto_class._model_mapping.get(type(self.config), None)
        there = (self.config.architectures or [found and found.__name__])[0]
        if found is None or there != found.__name__:
            raise ValueError(f"{flag} {name} is a {there}, no {auto_class.__name__}, as both have to be")
        self.network: PreTrainedModel | None = None

    def require_fit(self, data: LightningDataModule) -> None:
        """Raises ValueError where it cannot read what the student reads."""
        if load_tokenizer(self.folder).get_vocab() != data.tokenizer.get_vocab():
            raise ValueError(
                f"{self.flag} {self.folder} has another tokenizer than the text was read with; leave --data.tokenizer "
                "out, or take models that share one"
            )
        if data.vocab_size > self.config.get_text_config().vocab_size:
            ids = self.config.get_text_config().vocab_size
            raise ValueError(f"{self.flag} {self.folder} has {ids:,} ids, and its tokenizer {data.vocab_size:,}")
        if self.positions is not None and data.seq_len > self.positions:
            raise ValueError(
                f"{self.flag} {self.folder} reads {self.positions} tokens at once, and a row has {data.seq_len}; pass "
                f"--data.seq_len {self.positions}"
            )

    def read(self) -> PreTrainedModel:
        """Its network in float32."""
        if not hardware.reads_weights():
            return self.auto_class.from_config(copy.deepcopy(self.config), dtype=torch.float32)
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        if is_packed(self.config):
            if self.flag != "--model.teacher":
                raise ValueError(f"{self.flag} {self.folder} has few bits; pass the model that it was made from")
            return read_packed(self.auto_class, self.folder, torch.float32)
        try:
            settings = {"dtype": torch.float32, "output_loading_info": True}
            network, info = self.auto_class.from_pretrained(self.folder, **settings)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{self.flag} {self.folder} gives no {self.auto_class.__name__} ({reason})") from None
        if missing := sorted(info["missing_keys"]):
            lacking = f"{len(missing)} weights ({missing[0]}, …)"
            raise ValueError(f"{self.flag} {self.folder} lacks {lacking}; pass a trained one")
        return network

    def load(self, device: torch.device, share_out: Callable[[PreTrainedModel], None] | None = None) -> None:
        """Makes it ready to be asked, in the cheapest precision that keeps its distribution; by `share_out` each rank
        keeps a part of it."""
        handed_out = share_out is not None and not hardware.is_planning()
        self.network = (made_by_the_first(self.read) if handed_out else self.read()).eval().requires_grad_(False)
        if not handed_out or dist.get_rank() == 0:
            self.network.to(device)
        kind = hardware.kind_of(device)
        if not hardware.best_precision(kind).startswith("bf16"):
            self.bf16_nats = None
        elif hardware.is_planning():
            self.bf16_nats = 0.0
        else:
            self.bf16_nats = as_the_first(self._cost_of_bf16) if handed_out else self._cost_of_bf16()
        if self.bf16_nats is not None and self.bf16_nats <= KEPT:
            self.network.bfloat16()
            if kind == "cpu":
                self.kernels = cpu_kernels.install(self.network)
        if share_out is not None:
            share_out(self.network)

    @cached_property
    def digest(self) -> str:
        """Of its weights; of a Hub name, the name."""
        files = sorted(Path(self.folder).glob("*.safetensors"))
        if not files:
            return self.folder
        found = hashlib.sha256()
        for file in files:
            with file.open("rb") as stream:
                found.update(hashlib.file_digest(stream, "sha256").digest())
        return found.hexdigest()[:12]

    @cached_property
    def positions(self) -> int | None:
        with torch.device("meta"):
            return max_positions(self.auto_class.from_config(copy.deepcopy(self.config)))

    @torch.no_grad()
    def _cost_of_bf16(self) -> float:
        """KL of its distributions in float32 to those in bf16, a mean over some tokens; of a number the distance."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.config.vocab_size, (1, min(64, self.positions or 64)), generator=generator)
        ids = ids.to(self.network.device)
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if self.config.is_encoder_decoder else {})
        rounded_network = copy.deepcopy(self.network).bfloat16()
        exact, rounded = (log_shares(network(**inputs)) for network in (self.network, rounded_network))
        if exact.shape[-1] == 1:
            return float((exact - rounded).abs().mean())
        return float((exact.exp() * (exact - rounded)).sum(-1).mean())

    @cached_property
    def _token_loss(self) -> TokenLoss:
        return TokenLoss(self.network)

    @torch.no_grad()
    def asked(self, read: Callable[[PreTrainedModel], Answer]) -> Answer:
        """What its network makes of something, in its own precision whatever the student's is."""
        with torch.autocast(self.network.device.type, enabled=False):
            return read(self.network)

    def head(self, forward: Callable[[PreTrainedModel], ModelOutput]) -> Head:
        """What makes its logits of all positions, N = B · T."""
        return self.asked(lambda network: self._token_loss.head(partial(forward, network)))

    def describe(self) -> str:
        parameters = sum(p.numel() for p in self.network.parameters())
        dtype = str(self.network.dtype).removeprefix("torch.")
        cost = "" if self.bf16_nats is None else f" (bf16 moves it by {self.bf16_nats:.0e} nats per token)"
        return f"{self.folder}: {type(self.config).__name__}, {parameters:,} parameters, {dtype}{cost}"


def log_shares(output: ModelOutput) -> Tensor:
    """Log-probabilities, whatever the head is; a single number stays what it is."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits]).float().log_softmax(-1)
    logits = output.logits.float()
    return logits if logits.shape[-1] == 1 else logits.log_softmax(-1)
