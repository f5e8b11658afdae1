"""Random numbers as pure functions of a seed and a counter, so that no generator has a state to save.

Shape suffixes: N any count, K numbers for each.
"""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(words: np.ndarray) -> np.ndarray:
    """A bijection of uint64 words whose output bits look random: the finaliser of SplitMix64.

    Steele, Lea and Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def keys(seed: int, counters_N: np.ndarray) -> np.ndarray:
    """(N,) uint64: one key for each pair of a seed and a counter."""
    seed_word = mix(np.array([seed % 2**64], np.uint64) + _GOLDEN)
    return mix((counters_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN ^ seed_word)


def uniforms(seed: int, counters_N: np.ndarray, count: int) -> np.ndarray:
    """(N, K) float64 in [0, 1): `count` numbers for each counter, whatever the other counters of the call."""
    steps_K = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits_NK = mix(keys(seed, counters_N)[:, None] + steps_K)
    return (bits_NK >> np.uint64(11)) * 2.0**-53


def permuted(positions_N: np.ndarray, size: int, keys_N: np.ndarray) -> np.ndarray:
    """(N,) int64: each position of [0, size) mapped by the permutation of [0, size) that its key stands for.

    A Feistel network over the next even number of bits, applied again to what falls outside ("cycle walking":
    Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Nothing of length `size` is made, so an epoch
    of 10⁹ rows costs no more to begin than one of ten.
    """
    half_bits = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = [mix(keys_N + step) for step in np.arange(1, 7, dtype=np.uint64) * _GOLDEN]
    values_N = positions_N.astype(np.uint64)
    outside = np.arange(len(values_N))
    while len(outside):
        left, right = values_N[outside] >> half_bits, values_N[outside] & half_mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key[outside]) & half_mask)
        values_N[outside] = left << half_bits | right
        outside = outside[values_N[outside] >= size]
    return values_N.astype(np.int64)
