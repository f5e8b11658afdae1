"""Which rows a rank sees, and when: a pure function of (seed, rows consumed), on one rank or on eight.

All training is one line of positions p = 0, 1, 2, …; position p is row `permuted(p mod n)` of epoch p // n. A
micro-step takes the next ranks × batch positions of the epoch, rank r the r-th batch of them, so one process that
accumulates two micro-batches sees what two ranks see at once. The last step of an epoch may be short.

Shape suffixes: B rows in a batch, N any count.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler

from datamodules.counter_random import keys, permuted

NO_ROW = -1
"""Number of a row without labels, for a rank that has none left in this step."""

_STEPS_AT_ONCE = 64  # permuting 64 small batches in one call costs about as much as one


def stored_rows(positions_N: np.ndarray, rows_per_epoch: int, seed: int) -> np.ndarray:
    """(N,) int64: the stored row that stands at each position of training."""
    epochs_N, places_N = np.divmod(positions_N, rows_per_epoch)
    return permuted(places_N, rows_per_epoch, keys(seed, epochs_N))


def step_end(consumed: int, rows_per_step: int, rows_per_epoch: int) -> int:
    """Rows consumed after the micro-step that begins at `consumed`: a step never crosses an epoch's border."""
    epoch_end = (consumed // rows_per_epoch + 1) * rows_per_epoch
    return min(consumed + rows_per_step, epoch_end)


def consumed_after(numbers_B: np.ndarray, consumed: int, batch_size: int, rank: int, ranks: int, epoch: int) -> int:
    """Rows consumed by all ranks once the micro-step of this batch is done; every rank computes the same.

    Args:
        numbers_B: the batch's `rows` on this rank.
        consumed: rows consumed before it; only read where the rank has no row.
        batch_size: rows for each rank and micro-step.
        rank: this rank.
        ranks: number of ranks.
        epoch: rows per epoch.
    """
    if numbers_B[0] != NO_ROW:
        consumed = int(numbers_B[0]) - rank * batch_size
    # A rank without a row is in the last step of an epoch, which ends where `consumed` says.
    return step_end(consumed, ranks * batch_size, epoch)


class TrainingOrder(Sampler[np.ndarray]):
    """Yields (2, B) int64 arrays for one rank: the rows' numbers in training, and the stored rows.

    An iteration begins at `consumed()`, read when the first batch is asked for, and has the length of an epoch: a
    Trainer that stops earlier (a resumed epoch, `limit_train_batches`) goes on where it stopped.
    """

    def __init__(
        self,
        rows_per_epoch: int,
        batch_size: int,
        seed: int,
        consumed: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
    ):
        self.rows_per_epoch = rows_per_epoch
        self.rows_per_rank = batch_size
        self.seed = seed
        self.consumed = consumed
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-self.rows_per_epoch // (self.rows_per_rank * self.ranks))

    def __iter__(self) -> Iterator[np.ndarray]:
        steps = itertools.islice(self._steps(), len(self))
        while chunk := list(itertools.islice(steps, _STEPS_AT_ONCE)):
            numbers_N = np.concatenate(chunk)
            stored_N = stored_rows(numbers_N, self.rows_per_epoch, self.seed)
            borders = np.cumsum([len(step) for step in chunk])[:-1]
            for numbers_B, stored_B in zip(np.split(numbers_N, borders), np.split(stored_N, borders), strict=True):
                yield np.stack([numbers_B, stored_B]) if len(numbers_B) else np.full((2, 1), NO_ROW)

    def _steps(self) -> Iterator[np.ndarray]:
        """The positions that this rank takes in each micro-step; none where a short step leaves it nothing."""
        start = self.consumed()
        while True:
            end = step_end(start, self.ranks * self.rows_per_rank, self.rows_per_epoch)
            first = start + self.rank * self.rows_per_rank
            yield np.arange(first, min(first + self.rows_per_rank, end))
            start = end


class HeldOutOrder(Sampler[np.ndarray]):
    """Yields (2, B) int64 arrays: the rows in order, every `ranks`-th for a rank, each row exactly once over all."""

    def __init__(self, rows_N: np.ndarray, batch_size: int, rank: int = 0, ranks: int = 1):
        self.rows_N = rows_N[rank::ranks]
        self.rows_per_rank = batch_size
        self.batches = -(-len(rows_N) // (batch_size * ranks))

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in range(0, self.batches * self.rows_per_rank, self.rows_per_rank):
            rows_B = self.rows_N[start : start + self.rows_per_rank]
            yield np.stack([rows_B, rows_B]) if len(rows_B) else np.full((2, 1), NO_ROW)
