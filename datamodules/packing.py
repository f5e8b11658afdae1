"""Rows of a fixed length, cut from a stream of documents without losing a token.

Shape suffixes: B rows in a batch, T tokens in a row, N any count. `bounds` are the documents' starts in the stream and
its end. A row number past the last row stands for a row of nothing but filling.
"""

import numpy as np


def row_count(stream_length: int, seq_len: int) -> int:
    """Rows of T tokens that hold the whole stream, the last one perhaps in part."""
    return -(-stream_length // seq_len)


def cut_rows(stream_N: np.ndarray, rows_B: np.ndarray, seq_len: int, fill: int) -> np.ndarray:
    """(B, T) int64: row r is tokens r·T to (r + 1)·T of the stream, `fill` beyond its end."""
    full = len(stream_N) // seq_len
    if not isinstance(stream_N, np.ndarray):  # of shards, of which a range is read at a time
        tokens_BT = np.full((len(rows_B), seq_len), fill, np.int64)
        for tokens_T, row in zip(tokens_BT, rows_B.tolist(), strict=True):
            if row <= full:
                part = stream_N[row * seq_len : (row + 1) * seq_len]
                tokens_T[: len(part)] = part
        return tokens_BT
    grid = stream_N[: full * seq_len].reshape(full, seq_len)
    if (rows_B < full).all():
        return grid[rows_B].astype(np.int64)
    tokens_BT = np.full((len(rows_B), seq_len), fill, np.int64)
    whole_B = rows_B < full
    tokens_BT[whole_B] = grid[rows_B[whole_B]]
    tail = stream_N[full * seq_len :]
    tokens_BT[rows_B == full, : len(tail)] = tail
    return tokens_BT


def restarting_positions(rows_B: np.ndarray, seq_len: int, bounds: np.ndarray) -> np.ndarray:
    """(B, T) int64: each token's place in its document, or in its part of one where the row's border cuts it.

    Filling after the stream's end counts as one more document.
    """
    starts_B = rows_B * seq_len
    first_B = np.searchsorted(bounds, starts_B, side="left")
    last_B = np.searchsorted(bounds, starts_B + seq_len, side="left")
    places_T = np.arange(seq_len)
    begins_BT = np.zeros((len(rows_B), seq_len), np.int64)
    for begins_T, start, first, last in zip(begins_BT, starts_B, first_B, last_B, strict=True):
        inside = bounds[first:last] - start
        begins_T[inside] = inside
    return places_T - np.maximum.accumulate(begins_BT, axis=1)


def piece_counts(bounds: np.ndarray, piece_length: int) -> np.ndarray:
    """(documents + 1,) int64: how many pieces of at most `piece_length` tokens the documents before each one have."""
    counts = -(-np.diff(bounds) // piece_length)
    return np.concatenate([[0], np.cumsum(counts)])


def piece_borders(
    pieces_B: np.ndarray, bounds: np.ndarray, counts: np.ndarray, piece_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """(B,), (B,) int64: where in the stream each piece begins and ends; no piece holds tokens of two documents."""
    documents_B = np.searchsorted(counts, pieces_B, side="right") - 1
    starts_B = bounds[documents_B] + (pieces_B - counts[documents_B]) * piece_length
    return starts_B, np.minimum(starts_B + piece_length, bounds[documents_B + 1])
