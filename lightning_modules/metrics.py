"""Metrics that add up before they divide, so that batches and ranks change nothing."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class LanguageModelLoss(Metric):
    """Nats per token, perplexity and bits per byte of all that was seen, from sums over batches and ranks."""

    full_state_update = False

    def __init__(self):
        super().__init__()
        for name in ("nats", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, nats: Tensor, tokens: Tensor, utf8_bytes: Tensor) -> None:
        """Sums over a batch: nats of its labels, number of them, UTF-8 bytes of the text they stand for."""
        self.nats += nats
        self.tokens += tokens
        self.bytes += utf8_bytes

    def compute(self) -> dict[str, Tensor]:
        loss = self.nats / self.tokens
        bits_per_byte = self.nats / math.log(2) / self.bytes
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_byte": bits_per_byte}
