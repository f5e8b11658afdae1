"""What a teacher makes of the rows of a text, kept on disk: some words of each token's distribution.

A row is found by a hash of what the teacher read, not by its place: another order finds it, another text or tokenizer
does not. A cache is a header and shards of rows that are there whole or not at all, so writing it goes on where it was
interrupted, and ranks write different shards.

Shape suffixes: B rows in a batch, T labels of a row, R rows of a shard, K words that are kept of a token, H of them
with their exact share.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from datamodules.base import Batch
from datamodules.packed_ids import bytes_of, pack, unpack
from datamodules.rows import Rows
from datamodules.sources import ContentHashes

FORMAT_VERSION = 2
ROWS_OF_A_SHARD = 512
CHOSEN = ("scheme", "exact", "drawn", "temperature", "rows")
"""Of the header, what the user says; all else follows from text and teacher."""
Scheme = Literal["top_k", "sampled", "hybrid"]


@dataclass(frozen=True)
class About:
    """The header: what a cache holds, and what it is of."""

    scheme: Scheme
    """top_k: the likeliest words with their shares, all others together as a tail. sampled: words drawn by their
    shares, https://arxiv.org/abs/2503.16870. hybrid: the likeliest with their shares, and words drawn from the rest."""
    exact: int
    """Words of a token with their exact share."""
    drawn: int
    """Words of a token that are drawn, each for an equal part of what the exact ones leave."""
    temperature: float
    words: int
    """Of the vocabulary that counts."""
    labels_of_a_row: int
    rows: int
    teacher: str
    """Digest of its weights."""
    tokenizer: str
    noise: str
    """Seed and shares of what is hidden; empty where nothing is."""
    format: int = FORMAT_VERSION

    @property
    def of_words(self) -> str:
        return f"{self.scheme} of {self.exact} exact and {self.drawn} drawn words"

    @property
    def record(self) -> np.dtype:
        """Of a token."""
        fields = [("ids", np.uint8, (bytes_of(self.exact + self.drawn, self.words),))]
        if self.exact:
            fields += [("shares", np.float16, (self.exact,)), ("tail", np.float16)]
        if self.drawn:
            fields += [("entropy", np.float16)]
        return np.dtype(fields)

    @property
    def bytes_of_a_token(self) -> float:
        return self.record.itemsize + 8 / self.labels_of_a_row

    @property
    def shards(self) -> int:
        return -(-self.rows // ROWS_OF_A_SHARD)


Kept = Callable[[Batch, About, int], dict[str, np.ndarray]]
"""Of a batch, with a seed for what is drawn: ids, shares, tail and entropy of each label, (B, T, …)."""


class TeacherCache:
    """A complete cache, memory-mapped."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.about = read_header(self.folder)
        if self.about is None:
            raise ValueError(f"{self.folder} is no teacher's cache; write one with python recipes/distill.py cache")
        if missing := self.about.shards - sum(is_written(self.folder, i) for i in range(self.about.shards)):
            raise ValueError(
                f"{self.folder} lacks {missing} of {self.about.shards} shards; run its command again, which goes on"
            )

    @cached_property
    def shards(self) -> list[np.ndarray]:
        return [np.load(shard_file(self.folder, i), mmap_mode="r") for i in range(self.about.shards)]

    @cached_property
    def places(self) -> dict[int, int]:
        """The number of each row by its hash."""
        hashes = np.concatenate([np.load(hashes_file(self.folder, i)) for i in range(self.about.shards)])
        return {row_hash: number for number, row_hash in enumerate(hashes.tolist())}

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "about": self.about}

    def targets(self, batch: Batch) -> dict[str, torch.Tensor]:
        """The fields that a batch gets, zeros for rows without a label. Raises ValueError for a row that is missing."""
        about = self.about
        records_BT = np.zeros((len(batch["rows"]), about.labels_of_a_row), about.record)
        for i, row_hash in enumerate(row_hashes(batch)):
            if batch["rows"][i] < 0:
                continue
            if row_hash not in self.places:
                raise ValueError(
                    f"{self.folder} does not have row {int(batch['rows'][i])}: it was written for another text, "
                    "tokenizer or --data.seq_len; write one with these flags"
                )
            shard, place = divmod(self.places[row_hash], ROWS_OF_A_SHARD)
            records_BT[i] = self.shards[shard][place]
        return decoded(records_BT, about)


def encoded(kept: dict[str, np.ndarray], about: About) -> np.ndarray:
    """Records of what is kept of some tokens, (…)."""
    records = np.zeros(kept["ids"].shape[:-1], about.record)
    for name, value in kept.items():
        records[name] = pack(value, about.words) if name == "ids" else value
    return records


def decoded(records_BT: np.ndarray, about: About) -> dict[str, torch.Tensor]:
    """teacher_ids and teacher_shares (B, T, K), and teacher_tail or teacher_entropy (B, T): see base.py."""
    tail_BT = records_BT["tail"].astype(np.float32) if about.exact else np.ones(records_BT.shape, np.float32)
    shares = []
    if about.exact:
        exact_BTH = records_BT["shares"].astype(np.float32)
        exact_BTH *= ((1 - tail_BT) / np.maximum(exact_BTH.sum(-1), 1e-6))[..., None]  # sums that float16 has rounded
        shares.append(exact_BTH)
    if about.drawn:
        shares.append(np.repeat((tail_BT / about.drawn)[..., None], about.drawn, -1))
    ids_BTK = unpack(records_BT["ids"], about.words, about.exact + about.drawn)
    found = {"teacher_ids": ids_BTK, "teacher_shares": np.concatenate(shares, -1)}
    if about.drawn:
        found["teacher_entropy"] = records_BT["entropy"].astype(np.float32)
    else:
        found["teacher_tail"] = tail_BT
    return {name: torch.from_numpy(value) for name, value in found.items()}


class CachedRows:
    """Rows with their teacher's words."""

    def __init__(self, rows: Rows, cache: TeacherCache):
        self.rows, self.cache = rows, cache

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, numbers_and_rows: np.ndarray) -> Batch:
        batch = self.rows.__getitems__(numbers_and_rows)
        return batch | self.cache.targets(batch)


def row_hashes(batch: Batch) -> list[int]:
    """64 bits of each row's ids, labels, and positions where they restart."""
    parts = [batch[name].numpy() for name in ("input_ids", "labels", "position_ids") if name in batch]
    found = []
    for i in range(len(parts[0])):
        digest = hashlib.blake2b(digest_size=8)
        for part in parts:
            digest.update(np.ascontiguousarray(part[i], np.int64))
        found.append(int.from_bytes(digest.digest(), "little"))
    return found


# Writing


def write_shards(
    folder: Path,
    about: About,
    batches: Callable[[int, int], Iterator[Batch]],
    kept: Kept,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[int]:
    """Writes the shards of this rank that are not there; yields the number of rows after each.

    `batches(first, last)` gives the rows from a place of the order of training to another.
    """
    for i in range(rank, about.shards, ranks):
        first, last = i * ROWS_OF_A_SHARD, min(about.rows, (i + 1) * ROWS_OF_A_SHARD)
        if not is_written(folder, i):
            records_RT = np.zeros((last - first, about.labels_of_a_row), about.record)
            hashes, done = [], 0
            for batch in batches(first, last):
                rows = slice(done, done + len(batch["rows"]))
                records_RT[rows] = encoded(kept(batch, about, first + done), about)
                hashes += row_hashes(batch)
                done = rows.stop
            _save(hashes_file(folder, i), np.array(hashes, np.uint64))
            _save(shard_file(folder, i), records_RT)
        yield last - first


def write_header(folder: Path, about: About) -> None:
    """Raises ValueError where there is a cache of something else."""
    if (there := read_header(folder)) is not None:
        require_equal(folder, there, about)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".header.{os.getpid()}.partial"  # ranks may write it at the same time
    temporary.write_text(json.dumps(asdict(about), indent=2))
    temporary.rename(folder / "header.json")


def require_equal(folder: Path, there: About, here: About) -> None:
    """Raises ValueError with what differs."""
    if names := [name for name, value in asdict(here).items() if asdict(there)[name] != value]:
        what = " and ".join(names)
        raise ValueError(f"the teacher's cache {folder} is of another {what}; write one into a new folder")


def weights_digest(model: str, hashes: ContentHashes) -> str:
    """Of a model's config and weights; of a Hub name that is no folder, the name."""
    files = [file for end in ("*.safetensors", "*.bin", "config.json") for file in sorted(Path(model).glob(end))]
    if not files:
        return model
    return hashlib.sha256("".join(hashes(file) for file in files).encode()).hexdigest()


def read_header(folder: Path) -> About | None:
    try:
        return About(**json.loads((folder / "header.json").read_text()))
    except (OSError, ValueError, TypeError):
        return None


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.npy"


def hashes_file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.rows.npy"


def is_written(folder: Path, number: int) -> bool:
    return shard_file(folder, number).is_file()


def _save(file: Path, array: np.ndarray) -> None:
    """Whole or not at all."""
    temporary = file.with_name(f".{file.name}.partial")
    with temporary.open("wb") as stream:
        np.save(stream, array)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)
