"""Noise for encoders: BERT's masks and T5's spans, each a pure function of the row's number.

Shape suffixes: B rows in a batch, T tokens in a row, S spans of a row, V vocabulary, N any count.
"""

import numpy as np

from datamodules.base import IGNORED
from datamodules.counter_random import uniforms


def mask_tokens(
    ids_BT: np.ndarray,
    numbers_B: np.ndarray,
    seed: int,
    mask_fraction: float,
    mask_id: int,
    ordinary_ids: np.ndarray,
    is_special_V: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(B, T), (B, T) int64: inputs and labels of masked language modelling, section 3.1 of Devlin et al.,
    https://arxiv.org/abs/1810.04805.

    Each token that is not special is chosen with probability `mask_fraction`; of the chosen ones 80 % become the
    mask, 10 % one of `ordinary_ids` and 10 % stay. Labels are IGNORED where nothing was chosen.
    """
    seq_len = ids_BT.shape[1]
    choose_BT, change_BT = np.split(uniforms(seed, numbers_B, 2 * seq_len), 2, axis=1)
    chosen_BT = (choose_BT < mask_fraction) & ~is_special_V[ids_BT]
    random_BT = ordinary_ids[(change_BT * 10 % 1 * len(ordinary_ids)).astype(np.int64)]
    changed_BT = np.where(change_BT < 0.8, mask_id, np.where(change_BT < 0.9, random_BT, ids_BT))
    return np.where(chosen_BT, changed_BT, ids_BT), np.where(chosen_BT, ids_BT, IGNORED)


def noise_counts(length: int, noise_fraction: float, mean_span: float) -> tuple[int, int]:
    """Tokens of noise in a row of `length` tokens, and the number of spans that they form."""
    noise = min(max(round(length * noise_fraction), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    return noise, spans


def raw_length(input_length: int, noise_fraction: float, mean_span: float) -> tuple[int, int]:
    """Tokens to take from the text so that the input has exactly `input_length`, and the length of its labels.

    Input and labels hold one sentinel for each span and an end of text, as in section 3.1.4 of Raffel et al.,
    https://arxiv.org/abs/1910.10683.
    """

    def lengths(length: int) -> tuple[int, int]:
        noise, spans = noise_counts(length, noise_fraction, mean_span)
        return length - noise + spans + 1, noise + spans + 1

    length = 2
    while lengths(length + 1)[0] <= input_length:
        length += 1
    return length, lengths(length)[1]


def noise_spans(length: int, noise_fraction: float, mean_span: float, uniform_T: np.ndarray) -> np.ndarray:
    """(T,) bool: where the noise is. The row begins with kept text, ends with noise, and the lengths of the spans
    and of the gaps are uniform over all ways to make up their sums."""
    noise, spans = noise_counts(length, noise_fraction, mean_span)
    if not spans:
        return np.zeros(length, bool)
    kept_S = _parts(length - noise, spans, uniform_T[: length - noise - 1])
    noise_S = _parts(noise, spans, uniform_T[length - noise - 1 : length - 2])
    return np.repeat(np.tile([False, True], spans), np.stack([kept_S, noise_S], axis=1).ravel())


def _parts(total: int, parts: int, uniform_N: np.ndarray) -> np.ndarray:
    """(parts,) int64 ≥ 1 with the sum `total`, all such equally likely; takes total - 1 uniform numbers."""
    cuts = np.sort(np.argsort(uniform_N, kind="stable")[: parts - 1]) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


def corrupt_spans(
    ids_T: np.ndarray, noise_T: np.ndarray, sentinels: np.ndarray, end_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels of span denoising: in the input a sentinel stands for each span, in the labels it comes
    before the span's tokens; both end with `end_id`."""
    begins_T = noise_T & ~np.concatenate([[False], noise_T[:-1]])
    spans = int(begins_T.sum())
    inputs = ids_T.copy()
    inputs[begins_T] = sentinels[:spans]
    begins_in_noise = np.flatnonzero(begins_T[noise_T])
    labels = np.insert(ids_T[noise_T], begins_in_noise, sentinels[:spans])
    return np.append(inputs[~noise_T | begins_T], end_id), np.append(labels, end_id)
