"""Text that was made tokens once, for many runs: shards in a folder on a disk or in an object store.

A folder holds prepared.json, tokenizer/, and for each shard its tokens (.bin) and where documents begin in them (.npy).
What is not on this machine is read by ranges, and kept in blocks on its disk.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
from transformers import PreTrainedTokenizerBase

from datamodules.cache_folders import written_whole
from datamodules.token_store import Counts
from datamodules.tokenization import fingerprint, load_tokenizer

HEADER, FORMAT = "prepared.json", 1
BLOCK_BYTES = 2**20
"""Read at once of what is not on this machine."""


@dataclass(frozen=True)
class Shard:
    """A part of a stream."""

    folder: str
    name: str
    tokens: int
    """Ids, those that begin documents included."""
    documents: int
    file: str = ""
    """Of its tokens, where that is not its name with .bin."""
    begin: int = 0
    """The byte of the first token."""

    @property
    def tokens_file(self) -> str:
        return self.file or f"{self.name}.bin"


@dataclass(frozen=True)
class Place:
    """A folder here or elsewhere."""

    url: str
    cache: Path

    @property
    def is_here(self) -> bool:
        return "://" not in self.url

    def open(self, name: str) -> BinaryIO:
        if self.is_here:
            return Path(self.url, name).open("rb")
        # Small blocks, so that a row does not fetch a shard; they stay on this machine's disk.
        files, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
        blocks = fsspec.filesystem("blockcache", fs=files, cache_storage=str(self.cache / "blocks"), expiry_time=False)
        return blocks.open(path, block_size=BLOCK_BYTES)

    def exists(self, name: str) -> bool:
        if self.is_here:
            return Path(self.url, name).is_file()
        try:
            files, path = fsspec.core.url_to_fs(f"{self.url}/{name}")
        except (ImportError, ValueError) as error:  # no package for this kind of store, or no such kind
            raise ValueError(f"--data.path {self.url}: {error}") from None
        return files.exists(path)

    def head(self, name: str) -> tuple[bytes, "Place"]:
        """A small file as it is now, and the folder with a place for blocks that belong to it alone: what is written
        there anew is not mixed with what was kept."""
        if self.is_here:
            return Path(self.url, name).read_bytes(), self
        with fsspec.open(f"{self.url}/{name}") as file:
            content = file.read()
        return content, Place(self.url, self.cache / "remote" / hashlib.sha256(content).hexdigest()[:16])

    def files_of(self, folder: str, names: Sequence[str]) -> Path:
        """A small folder of it, on this machine."""
        if self.is_here:
            return Path(self.url, folder)
        own = self.cache / "fetched" / hashlib.sha256(f"{self.url}/{folder}".encode()).hexdigest()
        if not own.is_dir():
            with written_whole(own, is_sound=Path.is_dir) as temporary:
                for name in names:
                    with fsspec.open(f"{self.url}/{folder}/{name}") as file:
                        (temporary / name).write_bytes(file.read())
        return own


class Tokens:
    """The ids of all shards, one after the other; a range of them is read where it is asked for."""

    def __init__(self, shards: Sequence[Shard], dtype: str, cache: Path, first: int = 0):
        self.shards, self.dtype, self.cache, self.first = shards, np.dtype(dtype), cache, first
        self.ends = np.cumsum([shard.tokens for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) - self.first if len(self.ends) else 0

    def __getitem__(self, asked: slice | np.ndarray) -> "np.ndarray | Tokens":
        """A range as an array; one without an end as what begins there; some places as an array."""
        if isinstance(asked, slice):
            start = asked.start or 0
            if asked.stop is None:
                return Tokens(self.shards, self.dtype.name, self.cache, self.first + start)
            return self._range(start + self.first, min(asked.stop, len(self)) + self.first)
        return np.array([self._range(i + self.first, i + self.first + 1)[0] for i in np.asarray(asked).tolist()])

    def _range(self, start: int, stop: int) -> np.ndarray:
        parts, number = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            shard, begin = self.shards[number], int(self.ends[number]) - self.shards[number].tokens
            end = min(stop, int(self.ends[number]))
            parts.append(self._of_shard(shard, start - begin, end - begin))
            start, number = end, number + 1
        return np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _of_shard(self, shard: Shard, start: int, stop: int) -> np.ndarray:
        if "://" not in shard.folder:
            return mapped(f"{shard.folder}/{shard.tokens_file}", self.dtype.name, shard.begin)[start:stop]
        file = opened_by(os.getpid(), shard.folder, shard.tokens_file, self.cache)
        file.seek(shard.begin + start * self.dtype.itemsize)
        return np.frombuffer(file.read((stop - start) * self.dtype.itemsize), self.dtype)


@lru_cache(maxsize=256)
def mapped(file: str, dtype: str, begin: int) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, "r", offset=begin))


@lru_cache(maxsize=64)
def opened_by(process: int, folder: str, name: str, cache: Path) -> BinaryIO:
    """Of this process: one that it was forked from has a position of its own."""
    return Place(folder, cache).open(name)


@dataclass(frozen=True)
class ShardedStream:
    """As a TokenStream, of shards."""

    shards: tuple[Shard, ...]
    dtype: str
    counts: Counts
    cache: Path

    @cached_property
    def tokens_N(self) -> Tokens:
        return Tokens(self.shards, self.dtype, self.cache)

    @cached_property
    def document_bounds(self) -> np.ndarray:
        bounds, offset = [], 0
        for shard in self.shards:
            bounds.append(self._starts(shard) + offset)
            offset += shard.tokens
        return np.concatenate([*bounds, [offset]])

    def _starts(self, shard: Shard) -> np.ndarray:
        """Where documents begin in it."""
        place = Place(shard.folder, self.cache)
        if shard.file:  # of litdata
            from datamodules.litdata_shards import item_starts

            return item_starts(place, shard.file, self.dtype)[0][:-1]
        with place.open(f"{shard.name}.npy") as file:
            return np.load(io.BytesIO(file.read()))

    def __len__(self) -> int:
        return self.counts.tokens + self.counts.documents

    def __getstate__(self) -> dict[str, object]:
        return {name: self.__dict__[name] for name in ("shards", "dtype", "counts", "cache")}


@dataclass(frozen=True)
class Prepared:
    """What a folder holds, or several of them one after the other."""

    urls: tuple[str, ...]
    train: ShardedStream
    val: ShardedStream
    tokenizer: PreTrainedTokenizerBase
    digest: str
    about: dict[str, object]

    @property
    def folder(self) -> str:
        return ", ".join(self.urls)

    def documents(self, split: str) -> Iterator[str]:
        """The text of each, out of its tokens."""
        stream = getattr(self, split)
        bounds = stream.document_bounds.tolist()
        for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
            yield self.tokenizer.decode(stream.tokens_N[begin:end], skip_special_tokens=True)


def is_prepared(path: object, cache: Path) -> bool:
    """Whether --data.path names what `prepare` has written."""
    return isinstance(path, str) and bool(path) and place_of(path, cache).exists(HEADER)


def place_of(path: str, cache: Path) -> Place:
    path = path.rstrip("/") or path
    return Place(path if "://" in path else str(Path(path).expanduser()), cache)


def open_prepared(url: str, cache: Path) -> Prepared:
    try:
        content, place = place_of(url, cache).head(HEADER)
        url, header = place.url, json.loads(content)
        if header["format"] != FORMAT:
            raise ValueError(f"{url} was prepared in format {header['format']}, not {FORMAT}; prepare it once more")
        streams = {}
        for split in ("train", "val"):
            shards = tuple(Shard(url, each["name"], each["tokens"], each["documents"]) for each in header[split])
            counts = Counts(**header["counts"][split])
            streams[split] = ShardedStream(shards, header["dtype"], counts, place.cache)
            if place.is_here:
                require_whole(shards, header["dtype"])
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url}/{HEADER} is damaged ({error!r}); prepare it once more") from None
    tokenizer = load_tokenizer(str(place.files_of("tokenizer", header["tokenizer_files"])))
    if fingerprint(tokenizer) != header["tokenizer"]:
        raise ValueError(f"{url}/tokenizer is not the one that its tokens were made by; prepare it once more")
    return Prepared((url,), streams["train"], streams["val"], tokenizer, header["digest"], header["about"])


def require_whole(shards: Sequence[Shard], dtype: str) -> None:
    """Raises ValueError for a shard on this machine that is not as long as it is said to be."""
    for shard in shards:
        file = Path(shard.folder, f"{shard.name}.bin")
        there, said = file.stat().st_size if file.exists() else 0, shard.tokens * np.dtype(dtype).itemsize
        if there != said:
            raise ValueError(f"{file} has {there:,} bytes, not {said:,}; prepare it once more")


def joined(parts: Sequence[Prepared]) -> Prepared:
    """Several, one after the other. Raises ValueError where their tokens are not the same ones."""
    first = parts[0]
    for other in parts[1:]:
        if fingerprint(other.tokenizer) != fingerprint(first.tokenizer):
            raise ValueError(
                f"{other.folder} was prepared with another tokenizer than {first.folder}; prepare it with "
                f"--data.tokenizer {first.folder}/tokenizer"
            )
    streams = {}
    for split in ("train", "val"):
        each = [getattr(part, split) for part in parts]
        shards = tuple(shard for stream in each for shard in stream.shards)
        fields = ("documents", "bytes", "tokens", "unknown")
        counts = Counts(*(sum(getattr(stream.counts, field) for stream in each) for field in fields))
        streams[split] = ShardedStream(shards, max(stream.dtype for stream in each), counts, first.train.cache)
    about = dict(first.about) | {"duplicates": sum(part.about["duplicates"] for part in parts)}
    about["skipped_rows"] = {k: v for part in parts for k, v in part.about["skipped_rows"].items()}
    about["files"] = sum(part.about["files"] for part in parts)
    urls, digest = tuple(url for part in parts for url in part.urls), " ".join(part.digest for part in parts)
    return Prepared(urls, streams["train"], streams["val"], first.tokenizer, digest, about)
