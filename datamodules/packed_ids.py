"""Ids in as many bits as their vocabulary needs: 12 for 4,096 words, where whole bytes would take 16."""

import numpy as np


def bits_of(words: int) -> int:
    """Of an id below `words`."""
    return max(1, (words - 1).bit_length())


def bytes_of(count: int, words: int) -> int:
    """Of `count` ids, packed."""
    return -(-count * bits_of(words) // 8)


def pack(ids: np.ndarray, words: int) -> np.ndarray:
    """(…, K) integers below `words` to (…, bytes) uint8, the lowest bit first."""
    bits = (ids[..., None].astype(np.uint32) >> np.arange(bits_of(words), dtype=np.uint32)) & 1
    return np.packbits(bits.reshape(*ids.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


def unpack(packed: np.ndarray, words: int, count: int) -> np.ndarray:
    """(…, bytes) to (…, count) int64."""
    width, first_bit = bits_of(words), np.arange(count) * bits_of(words)
    places, last = first_bit // 8, packed.shape[-1] - 1
    value = np.zeros((*packed.shape[:-1], count), np.int64)
    for byte in range((7 + width + 7) // 8):
        value |= packed[..., np.minimum(places + byte, last)].astype(np.int64) << 8 * byte
    return value >> first_bit % 8 & (1 << width) - 1
