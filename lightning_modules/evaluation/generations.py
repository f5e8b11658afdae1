"""What a model writes when nobody scores it: loops, endings, variety, and what it has by heart.

Shape suffixes: N bytes of a text, B texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_modules.evaluation.measures import Measures

REPEATS, LOOP_TOKENS = 3, 16
"""A text loops that ends in the same tokens so many times, together at least so many tokens."""
SPANS = (64, 32, 16)
"""Bytes of the spans that are looked for, powers of 2: the next where there is none of one."""
MOST_PLACES = 64
"""Where the same span stands in the text that was trained on, so many are looked at."""
BASE = np.uint64(0x9E3779B97F4A7C15)
ROWS = 32


@dataclass(frozen=True)
class Text:
    """What follows on a prompt."""

    ids: list[int]
    text: str
    ended: bool


@torch.inference_mode()
def written(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> list[Text]:
    """Of prompts of one length, so that there is no padding. Temperature 0 takes the likeliest token.

    Of the model's own settings only where it ends counts: cut or penalised samples would say less of it.
    """
    own = network.generation_config
    ends = tokenizer.eos_token_id if own.eos_token_id is None else own.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [])
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends) or None,
        pad_token_id=min(ends, default=0),
        use_cache=True,
        **sampled,
    )
    network.generation_config = settings  # by which generate() would fill what is left open
    try:
        return _written(network, tokenizer, prompts, settings, ends, seed)
    finally:
        network.generation_config = own


def _written(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    settings: GenerationConfig,
    ends: set[int],
    seed: int,
) -> list[Text]:
    found = []
    with torch.random.fork_rng(devices=[network.device] if network.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for begin in range(0, len(prompts), ROWS):
            ids_BT = torch.tensor(prompts[begin : begin + ROWS], device=network.device)
            mask_BT = torch.ones_like(ids_BT)
            rows = network.generate(ids_BT, attention_mask=mask_BT, generation_config=settings)[:, ids_BT.shape[1] :]
            for row in rows.tolist():
                end = next((place for place, token in enumerate(row) if token in ends), len(row))
                text = tokenizer.decode(row[:end], skip_special_tokens=True)
                found.append(Text(row[:end], text, end < len(row)))
    return found


def judged(texts: Sequence[Text], memory: "Memory | None") -> Measures:
    """Shares and means over the texts; with what was trained on also how much of it is copied from there."""
    each: dict[str, list[float]] = {}
    for text in texts:
        counted = {
            "loops": float(loops(text.ids)),
            "ended": float(text.ended),
            "empty": float(not text.text.strip()),
            "distinct_2": distinct(text.ids, 2),
            "distinct_4": distinct(text.ids, 4),
            "tokens": float(len(text.ids)),
        }
        if memory is not None:
            longest, covered = memory.copied(text.text.encode())
            counted |= {"longest_copied_bytes": float(longest), "copied": covered}
        for name, value in counted.items():
            each.setdefault(name, []).append(value)
    return Measures({name: np.array(values) for name, values in each.items()}, [""] * len(texts))


def loops(ids: Sequence[int]) -> bool:
    for unit in range(1, len(ids) // REPEATS + 1):
        times = max(REPEATS, -(-LOOP_TOKENS // unit))
        if unit * times > len(ids):
            continue
        tail = ids[-unit * times :]
        if all(tail[i] == tail[i - unit] for i in range(unit, len(tail))):
            return True
    return False


def distinct(ids: Sequence[int], n: int) -> float:
    """The share of n-grams that are no repetition, https://arxiv.org/abs/1510.03055; 1 of texts without any."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


class Memory:
    """Finds in a text what stands in another, longer one, in bytes.

    Spans whose length is a power of 2 are looked up by their hash, and compared; the longest are then drawn out to
    both sides. 12 MB take a second and 300 MB of memory.
    """

    def __init__(self, trained_on: bytes):
        self.text_N = np.frombuffer(trained_on, np.uint8)
        self.sorted: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """By length the hashes in order, and where each stands."""

    def copied(self, text: bytes) -> tuple[int, float]:
        """Bytes of the longest span that was copied, 0 if it is shorter than 16; the share of the text in copied spans
        of at least 64."""
        own_N = np.frombuffer(text, np.uint8)
        covered_N = np.zeros(len(own_N), bool)
        for length in SPANS:
            matches = self._matches(own_N, length)
            for place, _ in matches if length == SPANS[0] else ():
                covered_N[place : place + length] = True
            if matches:
                longest = max(self._drawn_out(own_N, *match) for match in matches)
                return longest, float(covered_N.mean())
        return 0, 0.0

    def _matches(self, own_N: np.ndarray, length: int) -> list[tuple[int, int]]:
        """Places in a text, each with one where the same bytes were trained on."""
        if len(own_N) < length or len(self.text_N) < length:
            return []
        if length not in self.sorted:
            hashes_N = hashes(self.text_N, length)
            order_N = np.argsort(hashes_N, kind="stable")
            self.sorted[length] = hashes_N[order_N], order_N
        sorted_N, order_N = self.sorted[length]
        found = []
        for place, value in enumerate(hashes(own_N, length)):
            begin, end = np.searchsorted(sorted_N, value, "left"), np.searchsorted(sorted_N, value, "right")
            found += [
                (place, int(where))
                for where in order_N[begin : min(end, begin + MOST_PLACES)]
                if np.array_equal(own_N[place : place + length], self.text_N[where : where + length])
            ]
        return found

    def _drawn_out(self, own_N: np.ndarray, place: int, where: int) -> int:
        """Bytes of the span around a match."""
        after = _alike(own_N[place:], self.text_N[where : where + len(own_N)])
        before = _alike(own_N[:place][::-1], self.text_N[max(0, where - place) : where][::-1])
        return after + before


def hashes(text_N: np.ndarray, length: int) -> np.ndarray:
    """Of each span of so many bytes, a power of 2; sums wrap around."""
    found_N, size, power = text_N.astype(np.uint64) + np.uint64(1), 1, BASE
    with np.errstate(over="ignore"):
        while size < length:
            found_N = found_N[:-size] * power + found_N[size:]
            power, size = power * power, 2 * size
    return found_N


def _alike(one_N: np.ndarray, other_N: np.ndarray) -> int:
    """Bytes that both begin with."""
    count = min(len(one_N), len(other_N))
    differ = np.nonzero(one_N[:count] != other_N[:count])[0]
    return int(differ[0]) if len(differ) else count
