"""What every datamodule shares: the place in the order of training, which a checkpoint holds as a number of rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
from lightning.pytorch import LightningDataModule

from datamodules.base import Batch
from datamodules.row_order import TrainingOrder, consumed_after


class Ordered(LightningDataModule, ABC):
    """A subclass has rows, numbered through all of training, and says what their order depends on."""

    batch_size: int
    rows_per_epoch: int
    allow_changed_data: bool

    def __init__(self) -> None:
        super().__init__()
        self.consumed = 0
        """Rows trained on so far, by all ranks together."""
        self.batch_row = 0
        """Number, in the whole training, of the first row of the batch in hand; -1 where this rank has none."""
        self._consumed_before_batch = 0

    @abstractmethod
    def identity(self) -> dict[str, int | str]:
        """What the order of training depends on, by the names that an error tells."""

    def consumed_here(self, state: dict[str, int | str]) -> int:
        """Rows of this datamodule that count as consumed by a checkpoint of other rows, where that is allowed."""
        return int(state["consumed"])

    @property
    def rank_and_ranks(self) -> tuple[int, int]:
        """This process among those that see different rows: tensor-parallel ranks share theirs."""
        sampler = self.trainer.distributed_sampler_kwargs if self.trainer else None
        return (sampler["rank"], sampler["num_replicas"]) if sampler else (0, 1)

    @property
    def start(self) -> str | None:
        """The folder or Hub name of the model whose tokenizer reads the data; None where it is new, or there is no
        run."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return module.start if module is not None else None

    @property
    def rows_per_micro_step(self) -> int:
        return self.batch_size * self.rank_and_ranks[1]

    def training_order(self, stored: Callable[[np.ndarray], np.ndarray]) -> TrainingOrder:
        """The batches of this rank, from the first row that is not consumed on; `stored` as TrainingOrder has it."""
        overfitting = self.trainer is not None and self.trainer.overfit_batches > 0
        first: Callable[[], int] = (lambda: 0) if overfitting else (lambda: self.consumed)
        return TrainingOrder(self.rows_per_epoch, self.batch_size, stored, first, *self.rank_and_ranks)

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        if self.trainer is not None and self.trainer.training:
            self._consumed_before_batch = self.consumed
            numbers_B = batch["rows"].numpy()
            self.batch_row = int(numbers_B[0])
            rank, ranks = self.rank_and_ranks
            self.consumed = consumed_after(numbers_B, self.consumed, self.batch_size, rank, ranks, self.rows_per_epoch)
        return batch

    def state_dict(self) -> dict[str, int | str]:
        consumed = self.consumed
        if self.trainer is not None:
            progress = self.trainer.fit_loop.epoch_loop.batch_progress.current
            if progress.ready > progress.processed:  # saved by an interruption in the middle of a batch
                consumed = self._consumed_before_batch
        return {"consumed": consumed} | self.identity()

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return
        here = self.identity()
        changed = [name for name in here if state.get(name) != here[name]]
        if changed and not self.allow_changed_data:
            name = changed[0]
            raise ValueError(
                f"the checkpoint was trained with another {name} ({_short(state.get(name))}; --data gives "
                f"{_short(here[name])}): resume with the same --data flags, or go on with this one by "
                "--data.allow_changed_data true"
            )
        self.consumed = self._consumed_before_batch = self.consumed_here(state)


def _short(value: object) -> str:
    """A hash by its beginning."""
    return str(value) if len(str(value)) < 20 else f"{str(value)[:12]}…"
