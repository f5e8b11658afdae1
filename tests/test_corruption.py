import numpy as np
import pytest

from datamodules.base import IGNORED
from datamodules.corruption import corrupt_spans, mask_tokens, noise_counts, noise_spans, raw_length
from datamodules.counter_random import uniforms

MASK, SPECIAL, VOCAB = 98, 99, 100
SENTINELS = np.arange(1000, 1100)
END = 1


def masked(ids_BT: np.ndarray, numbers_B: np.ndarray, seed: int = 0, fraction: float = 0.15):
    is_special_V = np.arange(VOCAB) >= MASK
    return mask_tokens(ids_BT, numbers_B, seed, fraction, MASK, np.flatnonzero(~is_special_V), is_special_V)


def test_of_the_chosen_tokens_eight_tenths_are_masked_one_changed_at_random_and_one_kept():
    ids = np.random.default_rng(0).integers(0, MASK, (400, 500))
    inputs, labels = masked(ids, np.arange(400))
    chosen = labels != IGNORED
    assert abs(chosen.mean() - 0.15) < 0.003
    assert abs((inputs[chosen] == MASK).mean() - 0.8) < 0.01
    kept = (inputs[chosen] == ids[chosen]).mean()
    assert abs(kept - (0.1 + 0.1 / MASK)) < 0.01  # a random token may be the one that was there
    changed = inputs[chosen & (inputs != MASK) & (inputs != ids)]
    assert np.bincount(changed, minlength=VOCAB)[:MASK].min() > 0 and changed.max() < MASK


def test_labels_are_the_hidden_tokens_and_inputs_change_nowhere_else():
    ids = np.random.default_rng(0).integers(0, MASK, (8, 64))
    inputs, labels = masked(ids, np.arange(8))
    chosen = labels != IGNORED
    assert (labels[chosen] == ids[chosen]).all() and (inputs[~chosen] == ids[~chosen]).all()


def test_special_tokens_are_never_chosen():
    ids = np.full((4, 64), SPECIAL)
    inputs, labels = masked(ids, np.arange(4), fraction=0.99)
    assert (inputs == SPECIAL).all() and (labels == IGNORED).all()


def test_masks_depend_on_the_rows_number_and_the_seed_alone():
    ids = np.random.default_rng(0).integers(0, MASK, (4, 64))
    together = masked(ids, np.array([5, 9, 2, 7]))[0]
    alone = masked(ids[1:2], np.array([9]))[0][0]
    assert (together[1] == alone).all()
    assert (masked(ids[1:2], np.array([10]))[0][0] != alone).any()
    assert (masked(ids[1:2], np.array([9]), seed=1)[0][0] != alone).any()


def test_lengths_are_those_of_t5():
    assert raw_length(512, 0.15, 3.0) == (568, 114)  # seqio's and t5's published numbers
    assert raw_length(256, 0.15, 3.0)[0] > 256


@pytest.mark.parametrize("input_length", [3, 4, 17, 64, 255, 512])
@pytest.mark.parametrize(("fraction", "mean_span"), [(0.15, 3.0), (0.5, 3.0), (0.15, 1.0), (0.3, 8.0)])
def test_a_full_row_of_denoising_fills_its_input_exactly(input_length, fraction, mean_span):
    length, label_length = raw_length(input_length, fraction, mean_span)
    ids = np.arange(2, length + 2)
    noise = noise_spans(length, fraction, mean_span, uniforms(0, np.array([7]), length)[0])
    inputs, labels = corrupt_spans(ids, noise, np.arange(1000, 2000), END)
    assert len(inputs) == input_length and len(labels) == label_length


def restored(inputs: np.ndarray, labels: np.ndarray) -> list[int]:
    """The text that input and labels tell of, each sentinel replaced by its span."""
    spans: dict[int, list[int]] = {}
    for token in labels[:-1].tolist():
        if token >= 1000:
            spans[token] = span = []
        else:
            span.append(token)
    return sum((spans[token] if token >= 1000 else [token] for token in inputs[:-1].tolist()), [])


@pytest.mark.parametrize("length", [1, 2, 3, 10, 100, 568])
def test_input_and_labels_together_hold_the_text(length):
    ids = np.arange(2, length + 2)
    for number in range(20):
        noise = noise_spans(length, 0.15, 3.0, uniforms(0, np.array([number]), length)[0])
        inputs, labels = corrupt_spans(ids, noise, SENTINELS, END)
        assert inputs[-1] == END and labels[-1] == END
        assert restored(inputs, labels) == ids.tolist()
        assert noise.sum() == noise_counts(length, 0.15, 3.0)[0]


def test_spans_never_touch_and_their_number_is_fixed():
    for number in range(50):
        noise = noise_spans(100, 0.3, 3.0, uniforms(0, np.array([number]), 100)[0])
        begins = noise & ~np.concatenate([[False], noise[:-1]])
        assert begins.sum() == 10 and not noise[0] and noise[-1]


def test_each_way_to_part_the_noise_is_equally_likely():
    lengths = []
    for number in range(3000):
        noise = noise_spans(20, 0.2, 2.0, uniforms(0, np.array([number]), 20)[0])  # four tokens in two spans
        lengths.append(int(np.diff(np.flatnonzero(np.diff(noise.astype(int))))[0]))
    counts = np.bincount(lengths, minlength=4)[1:4]
    assert counts.sum() == 3000 and abs(counts - 1000).max() < 100
