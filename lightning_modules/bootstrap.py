"""How far a figure would move if the documents were others: they are drawn anew, with replacement, many times.

Two models are compared on the same draws, the paired bootstrap of section 4 of https://aclanthology.org/W04-3250.
Shape suffixes: D documents or examples, S draws.
"""

from typing import NamedTuple

import numpy as np

DRAWS = 2000
FEWEST = 6
"""Documents that an interval can be drawn from."""
AT_ONCE = 2**22
"""Numbers of documents drawn at once, 32 MiB of them."""


class Interval(NamedTuple):
    """Where 95 % of the draws lie."""

    low: float
    high: float


def sums(values_D: np.ndarray, *others_D: np.ndarray, seed: int = 0) -> list[np.ndarray]:
    """(S,) each: the sum over each draw, of all arguments over the same draws."""
    D = len(values_D)
    numbers, found = np.random.default_rng(seed), []
    rows = max(1, AT_ONCE // D)
    for begin in range(0, DRAWS, rows):
        drawn_SD = numbers.integers(0, D, (min(rows, DRAWS - begin), D))
        found.append([values[drawn_SD].sum(1) for values in (values_D, *others_D)])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def interval(figures_S: np.ndarray) -> Interval:
    return Interval(*(float(end) for end in np.percentile(figures_S, [2.5, 97.5])))


def of_ratio(above_D: np.ndarray, below_D: np.ndarray, seed: int = 0) -> Interval | None:
    """Of one sum by another; None of too few documents."""
    if len(above_D) < FEWEST:
        return None
    above_S, below_S = sums(above_D, below_D, seed=seed)
    return interval(above_S / below_S)


def of_mean(values_D: np.ndarray, seed: int = 0) -> Interval | None:
    """Of a mean, or of the mean of differences; None of too few documents."""
    if len(values_D) < FEWEST:
        return None
    return interval(sums(values_D, seed=seed)[0] / len(values_D))
