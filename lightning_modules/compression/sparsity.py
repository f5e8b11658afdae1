"""Weights that are set to zero one by one, or two of each four.

Shape suffixes: R rows (outputs), C columns (inputs).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Pattern = Literal["unstructured", "2:4"]


def kept(weight_RC: Tensor, sparsity: float, pattern: Pattern, moments_CC: Tensor | None = None) -> Tensor:
    """(R, C) bool: which weights stay, so that `sparsity` of them are gone.

    With what the layer reads, in `moments_CC` (the sum of xxᵀ), the least |w| · ‖x‖ of each row go: Wanda, section 3 of
    https://arxiv.org/abs/2306.11695. Without, the least |w| of the matrix. Of 2:4 the lesser two of four in a row.
    """
    worth_RC = weight_RC.abs().float()
    if moments_CC is not None:
        worth_RC = worth_RC * moments_CC.diagonal().sqrt()
    if pattern == "2:4":
        return largest(worth_RC.unflatten(1, (-1, 4)), 2).flatten(1)
    if moments_CC is not None:
        return largest(worth_RC, worth_RC.shape[1] - round(sparsity * worth_RC.shape[1]))
    count = worth_RC.numel() - round(sparsity * worth_RC.numel())
    return largest(worth_RC.flatten(), count).view(worth_RC.shape)


def largest(worth: Tensor, count: int) -> Tensor:
    """Whether a number is among the `count` largest along the last axis."""
    places = worth.topk(count, -1).indices
    return torch.zeros_like(worth, dtype=torch.bool).scatter_(-1, places, True)


def require_fours(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if (inputs := by_outputs(layer).shape[1]) % 4:
            raise ValueError(f"--pattern 2:4: the {inputs} inputs of {name} do not divide by 4")


def by_outputs(layer: nn.Module) -> Tensor:
    """(R, C), a view: GPT-2's layers have their weights the other way round."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@torch.no_grad()
def sparsify(
    layers: dict[str, nn.Module], sparsity: float, pattern: Pattern, moments: dict[str, Tensor]
) -> tuple[int, int]:
    """In place; returns how many weights are zero now, of how many."""
    zero = of = 0
    for name, layer in layers.items():
        weight_RC = by_outputs(layer)
        weight_RC.mul_(kept(weight_RC, sparsity, pattern, moments.get(name)))
        zero += int((layer.weight == 0).sum())
        of += layer.weight.numel()
    return zero, of
