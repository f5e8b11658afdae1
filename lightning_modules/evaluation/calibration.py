"""Whether a model is as often right as it says to be.

Shape suffixes: N predictions, K bins.
"""

import numpy as np

BINS = 15


def bins_of(confidence_N: np.ndarray) -> np.ndarray:
    """(N,): the bin of equal width in which each lies."""
    return np.minimum((confidence_N * BINS).astype(int), BINS - 1)


def calibration_error(confidence_N: np.ndarray, right_N: np.ndarray) -> float:
    """The mean distance, over bins, of how often the likeliest prediction is right from how probable it was: the
    expected calibration error, section 2 of https://arxiv.org/abs/1706.04599."""
    gap_K = np.bincount(bins_of(confidence_N), right_N - confidence_N, BINS)
    return float(np.abs(gap_K).sum() / len(confidence_N))
