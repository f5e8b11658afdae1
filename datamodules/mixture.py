"""Rows of several sources by weights, in an order that is a pure function of the place in the training.

Shape suffixes: B rows in a batch, N any count, S sources.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from datamodules.base import Batch
from datamodules.row_order import Shuffled
from datamodules.rows import Rows

BLOCK = 1024
"""Rows, in which each source has its share to the row; within it they are shuffled."""


@dataclass(frozen=True)
class MixedRows:
    """The rows of all sources, one source after the other."""

    sources: Sequence[Rows]

    @property
    def firsts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.sources)])

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitems__(self, numbers_and_rows: np.ndarray) -> Batch:
        rows_B = numbers_and_rows[1]
        of_B = np.clip(np.searchsorted(self.firsts, rows_B, side="right") - 1, 0, len(self.sources) - 1)
        batch: dict[str, torch.Tensor] = {}
        for number in np.unique(of_B).tolist():
            places = np.flatnonzero(of_B == number)
            own = numbers_and_rows[:, places].copy()
            own[1] = np.where(own[1] < 0, own[1], own[1] - self.firsts[number])
            for name, value in self.sources[number].__getitems__(own).items():
                whole = batch.setdefault(name, value.new_zeros((len(rows_B), *value.shape[1:])))
                whole[torch.from_numpy(places)] = value
        return batch


class Mixed:
    """What stands at each position of training: a block has as many rows of a source as its weight says, and over all
    blocks so far none is more than one row away from it. A source that has been read to its end begins again, in
    another order."""

    def __init__(self, rows_S: Sequence[int], weights_S: Sequence[float], seed: int):
        self.rows_S, self.seed = list(rows_S), seed
        self.shares_S = np.array(weights_S) / sum(weights_S)
        self.firsts_S = np.cumsum([0, *self.rows_S])
        self.orders = [Shuffled(rows, seed + number) for number, rows in enumerate(self.rows_S)]

    def __call__(self, positions_N: np.ndarray) -> np.ndarray:
        """(N,) int64: rows of MixedRows."""
        stored_N = np.empty(len(positions_N), np.int64)
        blocks_N, places_N = np.divmod(positions_N, BLOCK)
        shuffled_N = Shuffled(BLOCK, self.seed)(blocks_N * BLOCK + places_N)
        for block in np.unique(blocks_N).tolist():
            here = np.flatnonzero(blocks_N == block)
            before_S, after_S = self.taken(block), self.taken(block + 1)
            ends_S = np.cumsum(after_S - before_S)
            of_N = np.searchsorted(ends_S, shuffled_N[here], side="right")
            for source in np.unique(of_N).tolist():
                own = here[of_N == source]
                place_in_block = shuffled_N[own] - (ends_S[source] - (after_S - before_S)[source])
                stored_N[own] = self.firsts_S[source] + self.orders[source](before_S[source] + place_in_block)
        return stored_N

    def taken(self, blocks: int) -> np.ndarray:
        """(S,) int64: rows of each source in the first blocks, which are `blocks` · BLOCK together."""
        cumulated = np.floor(np.cumsum(self.shares_S) * (blocks * BLOCK) + 0.5).astype(np.int64)
        cumulated[-1] = blocks * BLOCK
        return np.diff(cumulated, prepend=0)
