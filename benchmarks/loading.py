"""How fast rows are loaded: million tokens per CPU-second, in the training process, without workers.

Run:
    python benchmarks/loading.py --seq_len 1024 --batch_size 8

Rows, interleaved: `Text`'s loader (order, gather, batch), a DataLoader over a plain Dataset on the same memory map, and
random slices of it stacked by hand as nanoGPT does. Every row yields inputs and shifted labels as int64.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.text import Text


class PlainRows(Dataset):
    def __init__(self, tokens: np.ndarray, seq_len: int):
        self.tokens = tokens
        self.seq_len = seq_len

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.tokens[row * self.seq_len : (row + 1) * self.seq_len + 1].astype(np.int64)
        return torch.from_numpy(window[:-1]), torch.from_numpy(window[1:])


def random_slices(tokens: np.ndarray, seq_len: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        starts = torch.randint(len(tokens) - seq_len, (batch_size,))
        inputs = torch.stack([torch.from_numpy(tokens[i : i + seq_len].astype(np.int64)) for i in starts])
        labels = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        yield inputs, labels


def rate(batches: Callable[[], Iterator[object]], steps: int, tokens_per_batch: int) -> float:
    """Million tokens per CPU-second over `steps` batches."""
    before = time.process_time()
    count = sum(1 for _ in itertools.islice(batches(), steps))
    return count * tokens_per_batch / (time.process_time() - before) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=None)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--cross_document_attention", type=lambda word: word == "true", default=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    data = Text(
        path=options.path,
        seq_len=options.seq_len,
        batch_size=options.batch_size,
        cross_document_attention=options.cross_document_attention,
    )
    data.prepare_data()
    data.setup("fit")
    tokens = data.store.train.tokens_N
    plain = DataLoader(PlainRows(tokens, options.seq_len), batch_size=options.batch_size, shuffle=True)
    loader = data.train_dataloader()
    rows = {
        "Text": lambda: iter(loader),
        "DataLoader over a Dataset": lambda: iter(plain),
        "random slices (nanoGPT)": lambda: random_slices(tokens, options.seq_len, options.batch_size),
    }
    steps, size = len(loader) - 1, options.batch_size * options.seq_len
    rates = {name: [rate(batches, steps, size) for _ in range(options.rounds)] for name, batches in rows.items()}
    print(f"{steps} batches of {options.batch_size} x {options.seq_len}")
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:26} {median:6.1f} Mtok per CPU-second, {size / median:6.1f} us a batch")


if __name__ == "__main__":
    main()
