"""bf16 weights without bf16 bookkeeping."""

from typing import Literal

import torch
from lightning.pytorch.plugins import Precision
from torch import nn


class BF16Shards(Precision):
    """The same of weights that FSDP2 shards: they stay float32 in their shards, which are the masters, and are gathered
    as bf16; gradients are added up in float32."""

    precision: Literal["bf16-true"] = "bf16-true"


class BF16Weights(Precision):
    """`--trainer.precision bf16-true` as a recipe means it: the weights are bf16, nothing else becomes so.

    Lightning's own also rounds rotary frequencies, and makes bf16 the default dtype, in which `self.log` then rounds
    a validation loss of 5.4391 to 5.4375. The optimizer keeps float32 masters: `optim.Float32Master`.
    """

    precision: Literal["bf16-true"] = "bf16-true"

    def convert_module(self, module: nn.Module) -> nn.Module:
        for parameter in module.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return module
