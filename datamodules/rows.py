"""Datasets of rows, one an objective, and their loader.

Each dataset hands out a whole batch at a time, as `base.py` describes it. A batch is asked for by a (2, B) array: the
rows' numbers for `rows`, and which stored rows they are; -1 in both for a row without labels.

Shape suffixes: B rows in a batch, T tokens in a row, U labels of a target row, V vocabulary.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import from_numpy
from torch.utils.data import DataLoader, Sampler

from datamodules.base import IGNORED, Batch
from datamodules.corruption import corrupt_spans, mask_tokens, noise_spans, raw_length
from datamodules.counter_random import uniforms
from datamodules.packing import cut_rows, piece_borders, piece_counts, restarting_positions, row_count
from datamodules.token_store import TokenStream


class Rows(Protocol):
    def __len__(self) -> int: ...

    def __getitems__(self, numbers_and_rows: np.ndarray) -> Batch: ...


@dataclass(frozen=True)
class CausalRows:
    """Each token predicts the next one. Every token of the stream but the first is a label exactly once."""

    stream: TokenStream
    seq_len: int
    fill_id: int
    restart_positions: bool

    def __len__(self) -> int:
        return row_count(len(self.stream) - 1, self.seq_len)

    def __getitems__(self, numbers_and_rows: np.ndarray) -> Batch:
        numbers_B, rows_B = numbers_and_rows
        rows_B = np.where(rows_B < 0, len(self) + 1, rows_B)
        tokens_N = self.stream.tokens_N
        batch = Batch(
            input_ids=from_numpy(cut_rows(tokens_N, rows_B, self.seq_len, self.fill_id)),
            labels=from_numpy(cut_rows(tokens_N[1:], rows_B, self.seq_len, IGNORED)),
            rows=from_numpy(numbers_B),
        )
        if self.restart_positions:
            positions_BT = restarting_positions(rows_B, self.seq_len, self.stream.document_bounds)
            batch["position_ids"] = from_numpy(positions_BT)
        return batch


@dataclass(frozen=True)
class MaskedRows:
    """Some tokens are hidden and predicted in their place; which ones depends on (seed, number of the row) alone."""

    stream: TokenStream
    seq_len: int
    fill_id: int
    restart_positions: bool
    seed: int
    mask_fraction: float
    mask_id: int
    is_special_V: np.ndarray

    @cached_property
    def ordinary_ids(self) -> np.ndarray:
        return np.flatnonzero(~self.is_special_V)

    def __len__(self) -> int:
        return row_count(len(self.stream), self.seq_len)

    def __getitems__(self, numbers_and_rows: np.ndarray) -> Batch:
        numbers_B, rows_B = numbers_and_rows
        rows_B = np.where(rows_B < 0, len(self) + 1, rows_B)
        ids_BT = cut_rows(self.stream.tokens_N, rows_B, self.seq_len, self.fill_id)
        is_text_BT = rows_B[:, None] * self.seq_len + np.arange(self.seq_len) < len(self.stream)
        inputs_BT, labels_BT = mask_tokens(
            ids_BT, numbers_B, self.seed, self.mask_fraction, self.mask_id, self.ordinary_ids, self.is_special_V
        )
        batch = Batch(
            input_ids=from_numpy(np.where(is_text_BT, inputs_BT, self.fill_id)),
            labels=from_numpy(np.where(is_text_BT, labels_BT, IGNORED)),
            rows=from_numpy(numbers_B),
        )
        if self.restart_positions:  # filling counts as a document, so it needs no mask of its own
            positions_BT = restarting_positions(rows_B, self.seq_len, self.stream.document_bounds)
            batch["position_ids"] = from_numpy(positions_BT)
        elif not is_text_BT.all():
            is_text_BT[:, 0] = True  # a row that attends to nothing at all would be NaN
            batch["attention_mask"] = from_numpy(is_text_BT.astype(np.int64))
        return batch


@dataclass(frozen=True)
class DenoisingRows:
    """Spans are replaced by sentinels and predicted by a decoder; which ones depends on (seed, number of the row)."""

    stream: TokenStream
    seq_len: int
    pad_id: int
    end_id: int
    one_document_a_row: bool
    seed: int
    noise_fraction: float
    mean_span: float
    sentinels: np.ndarray

    @cached_property
    def lengths(self) -> tuple[int, int]:
        """Tokens of text in a full row, and labels in every row."""
        return raw_length(self.seq_len, self.noise_fraction, self.mean_span)

    @cached_property
    def bounds(self) -> np.ndarray:
        """Borders that no row may cross."""
        return self.stream.document_bounds if self.one_document_a_row else np.array([0, len(self.stream)])

    @cached_property
    def pieces(self) -> np.ndarray:
        return piece_counts(self.bounds, self.lengths[0])

    def __len__(self) -> int:
        return int(self.pieces[-1])

    def __getitems__(self, numbers_and_rows: np.ndarray) -> Batch:
        numbers_B, rows_B = numbers_and_rows
        inputs_BT = np.full((len(rows_B), self.seq_len), self.pad_id, np.int64)
        labels_BU = np.full((len(rows_B), self.lengths[1]), IGNORED, np.int64)
        is_text_BT = np.zeros(inputs_BT.shape, bool)
        is_text_BT[:, 0] = True  # a row that attends to nothing at all would be NaN
        uniform_BN = uniforms(self.seed, numbers_B, self.lengths[0])
        starts_B, ends_B = piece_borders(np.maximum(rows_B, 0), self.bounds, self.pieces, self.lengths[0])
        for i in np.flatnonzero(rows_B >= 0):
            ids_N = self.stream.tokens_N[starts_B[i] : ends_B[i]].astype(np.int64)
            noise_N = noise_spans(len(ids_N), self.noise_fraction, self.mean_span, uniform_BN[i])
            inputs, labels = corrupt_spans(ids_N, noise_N, self.sentinels, self.end_id)
            inputs_BT[i, : len(inputs)] = inputs
            labels_BU[i, : len(labels)] = labels
            is_text_BT[i, : len(inputs)] = True
        batch = Batch(input_ids=from_numpy(inputs_BT), labels=from_numpy(labels_BU), rows=from_numpy(numbers_B))
        if not is_text_BT.all():
            batch["attention_mask"] = from_numpy(is_text_BT.astype(np.int64))
        return batch


class Loader(DataLoader):
    """Starts at the first batch, not at `iter()`, which Lightning may call before it has restored a checkpoint."""

    def __iter__(self) -> Iterator[Batch]:
        yield from super().__iter__()

    # Lightning warns of every loader that has no state of its own. The place of this one is in its datamodule's state.

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def row_loader(rows: Rows, order: Sampler[np.ndarray], num_workers: int) -> Loader:
    """The batches of `rows` that `order` asks for."""
    # Loading takes some 40 microseconds a batch, and Lightning advises workers to everyone; nor does it know our order.
    warnings.filterwarnings("ignore", message=".*(does not have many workers|You are using a custom batch sampler)")
    return Loader(
        rows,
        batch_sampler=order,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # the loader draws from it; the global one is for the model
    )


def _as_it_is(batch: Batch) -> Batch:
    return batch
