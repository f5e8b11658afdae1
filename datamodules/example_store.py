"""Examples of any shape, once: arrays in a folder that is named by what went into it.

Shape suffixes: B examples in a batch, T tokens of the longest of them, N any count.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from datamodules.cache_folders import written_whole
from datamodules.token_store import checksum

FORMAT_VERSION = 3
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Ragged:
    """A list of numbers for each example, one after the other."""

    values_N: np.ndarray
    starts: np.ndarray
    """(examples + 1,) int64: where each list begins in `values_N`, and where the last one ends."""

    def __len__(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def __getitem__(self, example: int) -> np.ndarray:
        return self.values_N[self.starts[example] : self.starts[example + 1]]

    def padded(self, examples_B: np.ndarray, fill: int, multiple: int = 8) -> np.ndarray:
        """(B, T) int64; T is a multiple of `multiple`. Of example -1 all is filling."""
        lengths_B = np.where(examples_B < 0, 0, self.lengths[examples_B])
        width = max(1, -(-int(lengths_B.max()) // multiple)) * multiple
        padded_BT = np.full((len(examples_B), width), fill, np.int64)
        for i in np.flatnonzero(examples_B >= 0):
            padded_BT[i, : lengths_B[i]] = self[examples_B[i]]
        return padded_BT

    @staticmethod
    def of(lists: list[list[int]]) -> "Ragged":
        starts = np.cumsum([0, *map(len, lists)]).astype(np.int64)
        values_N = np.fromiter((value for values in lists for value in values), np.int64, int(starts[-1]))
        small = np.int32 if values_N.size == 0 or np.abs(values_N).max() < 2**31 else np.int64
        return Ragged(values_N.astype(small), starts)


Fields = dict[str, np.ndarray | Ragged]
"""The arrays of a split by name, one entry an example."""


@dataclass(frozen=True)
class ExampleStore:
    folder: Path
    train: Fields
    val: Fields
    about: dict[str, object]
    """What the writer said of it: labels, columns, what was cut off or left out."""

    def records(self, split: str) -> list[dict[str, object]]:
        """What the examples of a split were before they became numbers."""
        return [json.loads(line) for line in (self.folder / f"{split}.jsonl").open(encoding="utf-8")]


def open_examples(folder: Path) -> ExampleStore | None:
    """The store in a folder, or None where there is none or it is damaged."""
    try:
        header = json.loads((folder / "header.json").read_text())
        if any(checksum(folder / name) != known for name, known in header["checksums"].items()):
            return None
        splits = {split: {n: _load(folder, split, n, r) for n, r in header["fields"].items()} for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ExampleStore(folder, **splits, about=header["about"])


def _load(folder: Path, split: str, name: str, ragged: bool) -> np.ndarray | Ragged:
    values = np.load(folder / f"{split}.{name}.npy", mmap_mode="r")
    return Ragged(values, np.load(folder / f"{split}.{name}.starts.npy")) if ragged else values


def write_examples(
    folder: Path, splits: dict[str, Fields], records: dict[str, list[dict[str, object]]], about: dict[str, object]
) -> ExampleStore:
    """Writes the fields of both splits, what they were made of, and a header."""
    with written_whole(folder, is_sound=lambda other: open_examples(other) is not None) as temporary:
        for split in SPLITS:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records[split]]
            (temporary / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
            for name, field in splits[split].items():
                ragged = isinstance(field, Ragged)
                np.save(temporary / f"{split}.{name}.npy", field.values_N if ragged else field)
                if ragged:
                    np.save(temporary / f"{split}.{name}.starts.npy", field.starts)
        header = {
            "format": FORMAT_VERSION,
            "fields": {name: isinstance(field, Ragged) for name, field in splits["train"].items()},
            "checksums": {file.name: checksum(file) for file in sorted(temporary.iterdir())},
            "about": about,
        }
        (temporary / "header.json").write_text(json.dumps(header, indent=1))
    store = open_examples(folder)
    assert store is not None, f"{folder} was written and cannot be opened"
    return store
