import numpy as np
import pytest

from datamodules.counter_random import keys, permuted, uniforms
from datamodules.row_order import NO_ROW, ByLength, HeldOutOrder, Shuffled, TrainingOrder, consumed_after


def batches(rows: int, batch_size: int, consumed: int = 0, rank: int = 0, ranks: int = 1) -> list[list[int]]:
    order = TrainingOrder(rows, batch_size, stored=Shuffled(rows, 3), consumed=lambda: consumed, rank=rank, ranks=ranks)
    return [numbers_B.tolist() for numbers_B, _ in order]


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 16, 17, 1000])
def test_every_epoch_holds_every_row_once(rows):
    epochs = Shuffled(rows, 3)(np.arange(3 * rows)).reshape(3, rows)
    assert (np.sort(epochs, axis=1) == np.arange(rows)).all()


def test_epochs_and_seeds_differ():
    first, second = Shuffled(100, 3)(np.arange(200)).reshape(2, 100)
    other_seed = Shuffled(100, 4)(np.arange(100))
    assert (first != second).any() and (first != other_seed).any()


def test_every_row_stands_at_every_place_equally_often():
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), permuted(np.arange(8), 8, keys(seed, np.zeros(8, np.int64)))] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 85.4  # 0.1 % of fair shuffles would exceed it, at 49 degrees of freedom


def test_the_order_does_not_depend_on_the_batch_size():
    orders = [
        sum((stored.tolist() for _, stored in TrainingOrder(50, b, Shuffled(50, 3), lambda: 0)), [])
        for b in (1, 3, 8, 64)
    ]
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("rows", [8, 9, 10, 11, 12])
def test_two_ranks_see_at_once_what_one_rank_sees_in_two_steps(rows):
    alone = batches(rows, 2)
    left, right = (batches(rows, 2, rank=rank, ranks=2) for rank in (0, 1))
    assert len(left) == len(right) == -(-rows // 4)
    for step, (ours, theirs) in enumerate(zip(left, right, strict=True)):
        at_once = [number for number in ours + theirs if number != NO_ROW]
        assert at_once == sum(alone[2 * step : 2 * step + 2], [])


def test_a_rank_that_has_no_row_left_gets_one_that_is_none():
    assert batches(9, 2, rank=1, ranks=2)[-1] == [NO_ROW]
    assert batches(9, 2, rank=0, ranks=2)[-1] == [8]


@pytest.mark.parametrize("consumed", [0, 4, 9, 10, 14, 29])
def test_an_iteration_continues_at_the_rows_that_were_next(consumed):
    numbers = sum(batches(10, 2, consumed), [])
    assert numbers[: 10 - consumed % 10] == list(range(consumed, consumed + 10 - consumed % 10))
    assert numbers == list(range(consumed, consumed + len(numbers)))


def test_a_step_never_crosses_the_border_of_an_epoch():
    assert batches(10, 4, consumed=4) == [[4, 5, 6, 7], [8, 9], [10, 11, 12, 13]]


def test_the_place_is_read_when_the_first_batch_is_asked_for():
    place = {"consumed": 0}
    iterator = iter(TrainingOrder(10, 2, Shuffled(10, 3), lambda: place["consumed"]))
    place["consumed"] = 6
    assert next(iterator)[0].tolist() == [6, 7]


@pytest.mark.parametrize(("rows", "batch_size", "ranks"), [(9, 2, 2), (24, 2, 3), (5, 4, 2), (7, 1, 4)])
def test_all_ranks_agree_on_what_is_consumed(rows, batch_size, ranks):
    orders = [TrainingOrder(rows, batch_size, Shuffled(rows, 3), lambda: 0, rank, ranks) for rank in range(ranks)]
    consumed = 0
    for step in zip(*orders, strict=True):
        counted = {consumed_after(b[0], consumed, batch_size, r, ranks, rows) for r, b in enumerate(step)}
        seen = sum(int((numbers_B != NO_ROW).sum()) for numbers_B, _ in step)
        assert counted == {consumed + seen}
        consumed += seen
    assert consumed == rows


@pytest.mark.parametrize(("rows", "ranks"), [(10, 1), (10, 2), (9, 2), (2, 4)])
def test_held_out_rows_are_seen_exactly_once_in_batches_of_equal_number(rows, ranks):
    orders = [HeldOutOrder(np.arange(rows), 2, rank, ranks) for rank in range(ranks)]
    seen = [number for order in orders for numbers_B, _ in order for number in numbers_B.tolist() if number != NO_ROW]
    assert sorted(seen) == list(range(rows))
    assert len({len(list(order)) for order in orders}) == 1 and len(orders[0]) == len(list(orders[0]))


def test_random_numbers_depend_on_their_own_counter_alone():
    together = uniforms(5, np.array([3, 1, 2]), 4)
    assert (together[1] == uniforms(5, np.array([1]), 4)[0]).all()
    assert (together != uniforms(6, np.array([3, 1, 2]), 4)).all()
    many = uniforms(5, np.arange(1000), 100)
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002 and many.min() >= 0 and many.max() < 1
    assert abs(np.corrcoef(many[:-1].ravel(), many[1:].ravel())[0, 1]) < 0.01


@pytest.mark.parametrize("rows", [1, 31, 32, 100, 5000])
def test_rows_by_length_are_each_once_an_epoch_and_another_way_in_the_next(rows):
    lengths_N = np.random.default_rng(0).lognormal(3, 1, rows).astype(int)
    first, second = ByLength(lengths_N, 3)(np.arange(2 * rows)).reshape(2, rows)
    assert sorted(first) == sorted(second) == list(range(rows))
    assert rows < 32 or not np.array_equal(first, second)
    late = ByLength(lengths_N, 3)(np.arange(rows, 2 * rows))  # as after a restart
    assert np.array_equal(late, second)


def test_rows_by_length_leave_little_to_pad():
    lengths_N = np.random.default_rng(0).lognormal(3, 1, 5000).astype(int) + 1
    padded = {}
    for order in (ByLength(lengths_N, 3), Shuffled(5000, 3)):
        batches_MB = lengths_N[order(np.arange(4992))].reshape(-1, 16)
        padded[type(order)] = (batches_MB.max(1) * 16).sum() / batches_MB.sum()
    assert padded[ByLength] < 1.08 and padded[Shuffled] > 2.5
    first_groups = lengths_N[ByLength(lengths_N, 3)(np.arange(320))].reshape(10, 32).mean(1)
    assert not np.all(np.diff(first_groups) > 0)  # groups are shuffled: no epoch begins with the short rows
