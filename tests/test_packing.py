import numpy as np
import pytest

from datamodules.packing import cut_rows, piece_borders, piece_counts, restarting_positions, row_count

FILL = -7


@pytest.mark.parametrize("length", [1, 4, 5, 7, 8, 9])
def test_rows_hold_every_token_of_the_stream_in_order(length):
    stream = np.arange(length, dtype=np.uint16)
    rows = cut_rows(stream, np.arange(row_count(length, 4)), 4, FILL)
    assert rows.dtype == np.int64 and rows.shape == (-(-length // 4), 4)
    assert rows.ravel()[:length].tolist() == list(range(length))
    assert (rows.ravel()[length:] == FILL).all()


def test_rows_come_in_the_order_asked_for_and_beyond_the_last_there_is_filling():
    rows = cut_rows(np.arange(10, dtype=np.uint16), np.array([2, 0, 4, 2]), 4, FILL)
    assert rows.tolist() == [[8, 9, FILL, FILL], [0, 1, 2, 3], [FILL] * 4, [8, 9, FILL, FILL]]


def test_positions_restart_at_each_document_and_at_each_row():
    bounds = np.array([0, 3, 9, 10])  # documents of 3, 6 and 1 tokens
    positions = restarting_positions(np.arange(3), 4, bounds)
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 2, 3], [0, 0, 0, 1]]


def test_a_row_without_text_counts_on():
    assert restarting_positions(np.array([5]), 4, np.array([0, 10])).tolist() == [[0, 1, 2, 3]]


def test_pieces_hold_every_token_once_and_never_two_documents():
    bounds = np.array([0, 3, 11, 12, 20])
    counts = piece_counts(bounds, 4)
    starts, ends = piece_borders(np.arange(counts[-1]), bounds, counts, 4)
    assert starts.tolist() == [0, 3, 7, 11, 12, 16] and ends.tolist() == [3, 7, 11, 12, 16, 20]
