"""Which rows a rank sees, and when: a pure function of (seed, rows consumed), on one rank or on eight.

All training is one line of positions p = 0, 1, 2, …; position p is the (p mod n)-th row of epoch p // n, in that
epoch's order. A micro-step takes the next ranks × batch positions of the epoch, rank r the r-th batch of them, so one
process that accumulates two micro-batches sees what two ranks see at once. The last step of an epoch may be short.

Shape suffixes: B rows in a batch, N any count.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

from datamodules.counter_random import keys, permuted

NO_ROW = -1
"""Number of a row without labels, for a rank that has none left in this step."""

_STEPS_AT_ONCE = 64  # permuting 64 small batches in one call costs about as much as one


@dataclass(frozen=True)
class Shuffled:
    """Each epoch is a permutation of its own; nothing of an epoch's length is made."""

    rows_per_epoch: int
    seed: int

    def __call__(self, positions_N: np.ndarray) -> np.ndarray:
        """(N,) int64: the stored row that stands at each position of training."""
        epochs_N, places_N = np.divmod(positions_N, self.rows_per_epoch)
        return permuted(places_N, self.rows_per_epoch, keys(self.seed, epochs_N))


class ByLength:
    """Shuffled, but rows of about the same length stand beside each other, so that little is padded.

    The shuffled rows of an epoch are taken POOL at a time and sorted by length; then groups of GROUP rows are shuffled.
    So the order knows nothing of batches or ranks: a batch whose size divides GROUP is a part of one group.
    """

    POOL, GROUP = 2048, 32

    def __init__(self, lengths_N: np.ndarray, seed: int):
        self.lengths_N, self.seed = lengths_N, seed
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, positions_N: np.ndarray) -> np.ndarray:
        """(N,) int64: the stored row that stands at each position of training."""
        epochs_N, places_N = np.divmod(positions_N, len(self.lengths_N))
        stored_N = np.empty(len(positions_N), np.int64)
        for epoch in np.unique(epochs_N).tolist():
            here_N = epochs_N == epoch
            stored_N[here_N] = self._epoch(epoch)[places_N[here_N]]
        return stored_N

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            count = len(self.lengths_N)
            rows_N = Shuffled(count, self.seed)(np.arange(count) + epoch * count)
            for start in range(0, count, self.POOL):
                pool = rows_N[start : start + self.POOL]
                pool[:] = pool[np.argsort(self.lengths_N[pool], kind="stable")]
            if groups := count // self.GROUP:
                rows_GN = rows_N[: groups * self.GROUP].reshape(groups, self.GROUP)
                rows_GN[:] = rows_GN[Shuffled(groups, self.seed)(np.arange(groups) + epoch * groups)]
            self._epochs = {epoch: rows_N}  # the one before is over
        return self._epochs[epoch]


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
        stored: Callable[[np.ndarray], np.ndarray],
        consumed: Callable[[], int],
        rank: int = 0,
        ranks: int = 1,
    ):
        self.rows_per_epoch = rows_per_epoch
        self.rows_per_rank = batch_size
        self.stored = stored
        """Of positions in training to the rows that stand there: `Shuffled` or `ByLength`."""
        self.consumed = consumed
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-self.rows_per_epoch // (self.rows_per_rank * self.ranks))

    def __iter__(self) -> Iterator[np.ndarray]:
        steps = itertools.islice(self._steps(), len(self))
        while chunk := list(itertools.islice(steps, _STEPS_AT_ONCE)):
            numbers_N = np.concatenate(chunk)
            stored_N = self.stored(numbers_N)
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


def batches_mixed(rows_N: np.ndarray, batch_size: int) -> np.ndarray:
    """(N,) the same rows with their batches in another fixed order, so that the first few are not all short ones."""
    whole = len(rows_N) // batch_size
    batches_GN = rows_N[: whole * batch_size].reshape(whole, batch_size)
    mixed = Shuffled(max(1, whole), seed=0)(np.arange(whole))
    return np.concatenate([batches_GN[mixed].ravel(), rows_N[whole * batch_size :]])


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
