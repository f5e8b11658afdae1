"""Weights of few bits: which numbers there are, and which of them stands for a weight.

Shape suffixes: R rows (outputs), C columns (inputs), G groups of a row, S columns of a group.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SHARES = torch.linspace(0.3, 1.1, 33)
"""Of the largest weight of a group: where the last number of a grid is tried."""
FLOAT8 = torch.float8_e4m3fn
DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, added to it: section 3.3 of https://arxiv.org/abs/2210.17323."""
BLOCK = 128
"""Columns whose errors are passed on to all later ones together."""


@dataclass(frozen=True)
class Grid:
    """Whole numbers from -2^(bits-1) to 2^(bits-1) - 1 times the scale of a group; or float8 times the scale."""

    bits: int
    group_size: int | None = None
    """Columns that share a scale; None: all of a row."""
    kind: Literal["int", "float"] = "int"

    def __str__(self) -> str:
        return f"{self.kind}{self.bits}, a scale for " + (
            f"{self.group_size} weights" if self.group_size else "each row"
        )

    def bits_of(self, columns: int) -> float:
        """Of a weight, with its part of a scale of 16 bits."""
        return self.bits + 16 / (self.group_size or columns)

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1))


class Codes(NamedTuple):
    """A weight on a grid: its value is codes · scale."""

    codes_RC: Tensor
    """int8, or float8."""
    scales_RG: Tensor

    def values(self) -> Tensor:
        """(R, C) float32"""
        codes_RGS = self.codes_RC.float().unflatten(1, (self.scales_RG.shape[1], -1))
        return (codes_RGS * self.scales_RG.float()[..., None]).flatten(1)


def grouped(weight_RC: Tensor, grid: Grid) -> Tensor:
    """(R, G, S)"""
    return weight_RC.unflatten(1, (-1, grid.group_size or weight_RC.shape[1]))


def codes_of(weight_RC: Tensor, scales_RG: Tensor, grid: Grid) -> Codes:
    """The nearest number of the grid for each weight."""
    ratio_RGS = weight_RC.float().unflatten(1, (scales_RG.shape[1], -1)) / scales_RG.float()[..., None]
    if grid.kind == "float":
        largest = torch.finfo(FLOAT8).max
        return Codes(ratio_RGS.clamp(-largest, largest).to(FLOAT8).flatten(1), scales_RG)
    return Codes(ratio_RGS.round().clamp(grid.lowest, -grid.lowest - 1).to(torch.int8).flatten(1), scales_RG)


def scales_of(weight_RC: Tensor, grid: Grid, importance_C: Tensor | None = None, dtype=torch.bfloat16) -> Tensor:
    """(R, G) of the least squared error, columns weighed by their importance; of 8 bits those that reach the largest
    weight. A scale may be negative: there is one number more on that side."""
    weight_RGS = grouped(weight_RC.float(), grid)
    largest_RG = weight_RGS.abs().amax(-1).clamp_min(1e-10)
    if grid.kind == "float":
        return (largest_RG / torch.finfo(FLOAT8).max).to(dtype)
    if grid.bits == 8:
        return (largest_RG / 127).to(dtype)
    weighing_GS = torch.ones_like(weight_RC[0]) if importance_C is None else importance_C.float()
    weighing_GS = grouped(weighing_GS[None], grid)[0]
    best_RG, least_RG = None, None
    for share in (*SHARES, *-SHARES):
        scales_RG = (largest_RG * share / -grid.lowest).to(dtype)
        values_RGS = codes_of(weight_RC, scales_RG, grid).values().view_as(weight_RGS)
        error_RG = ((values_RGS - weight_RGS).square() * weighing_GS).sum(-1)
        is_better_RG = None if least_RG is None else error_RG < least_RG
        best_RG = scales_RG if best_RG is None else torch.where(is_better_RG, scales_RG, best_RG)
        least_RG = error_RG if least_RG is None else torch.minimum(error_RG, least_RG)
    return best_RG


def nearest(weight_RC: Tensor, grid: Grid, importance_C: Tensor | None = None, dtype=torch.bfloat16) -> Codes:
    return codes_of(weight_RC, scales_of(weight_RC, grid, importance_C, dtype), grid)


def passed_on(weight_RC: Tensor, moments_CC: Tensor, grid: Grid, dtype=torch.bfloat16) -> Codes:
    """Column after column to the nearest number, the error of each made up for by the columns behind it: GPTQ,
    algorithm 1 of https://arxiv.org/abs/2210.17323.

    Args:
        weight_RC: What is rounded.
        moments_CC: Sum of xxᵀ over the inputs x that the layer reads.
        grid: Where to.
        dtype: Of the scales.
    """
    left_RC, moments_CC = weight_RC.double().clone(), moments_CC.double().clone()
    diagonal_C = moments_CC.diagonal()
    unread_C = diagonal_C == 0
    diagonal_C[unread_C] = 1.0
    importance_C = diagonal_C.clone()
    diagonal_C += DAMPING * diagonal_C.mean()
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(moments_CC))
    upper_CC = torch.linalg.cholesky(inverse_CC, upper=True)
    R, C = left_RC.shape
    size = grid.group_size or C
    block = size if size > BLOCK else BLOCK // size * size  # what a scale is chosen of has met all errors before it
    codes_RC = torch.empty(R, C, dtype=FLOAT8 if grid.kind == "float" else torch.int8)
    scales = []
    for start in range(0, C, block):
        end = min(start + block, C)
        errors_RB = torch.empty(R, end - start, dtype=torch.float64)
        for column in range(start, end):
            if column % size == 0:
                group = slice(column, column + size)
                whole = Grid(grid.bits, None, grid.kind)
                scales.append(scales_of(left_RC[:, group], whole, importance_C[group], dtype))
            one = codes_of(left_RC[:, column : column + 1], scales[-1], grid)
            codes_RC[:, column] = one.codes_RC[:, 0]
            error_R = (left_RC[:, column] - one.values()[:, 0].double()) / upper_CC[column, column]
            left_RC[:, column + 1 : end] -= error_R[:, None] * upper_CC[column, column + 1 : end]
            errors_RB[:, column - start] = error_R
        left_RC[:, end:] -= errors_RB @ upper_CC[start:end, end:]
    return Codes(codes_RC, torch.cat(scales, 1))


def minmax(weight_RC: Tensor, bits: int, per: Literal["tensor", "channel"]) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook's linear quantization, round((W - min) / (max - min) · (2^bits - 1)): uint8 codes (R, C), and min
    and max, (R, 1) each or (1, 1)."""
    weight_RC = weight_RC.float()
    axes = (0, 1) if per == "tensor" else (1,)
    low, high = weight_RC.amin(axes, keepdim=True), weight_RC.amax(axes, keepdim=True)
    width = torch.where(high > low, high - low, torch.ones_like(low))
    codes_RC = ((weight_RC - low) / width * (2**bits - 1)).round()
    return codes_RC.to(torch.uint8), low, high


def from_minmax(codes_RC: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """(R, C) float32: what the codes of `minmax` stand for."""
    return codes_RC.float() / (2**bits - 1) * (high - low) + low
