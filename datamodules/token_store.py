"""Text as tokens, once: memory-mapped streams in a folder that is named by what went into it.

A stream is, for each document, the id that begins a document and the document's tokens.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from datamodules.cache_folders import written_whole

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Counts:
    """What a stream holds."""

    documents: int
    bytes: int
    """UTF-8 bytes of its text."""
    tokens: int
    """Tokens of text, without those that begin documents."""
    unknown: int
    """Tokens that stand for text the tokenizer cannot write."""


@dataclass(frozen=True)
class Encoded:
    """A stretch of a stream."""

    ids_N: np.ndarray
    """The ids, those that begin documents included."""
    starts: np.ndarray
    """Where in `ids_N` documents begin."""
    bytes: int
    unknown: int


@dataclass(frozen=True)
class TokenStream:
    """One split of a store; it opens its files where it is first used, so a worker is sent no more than their names."""

    tokens_file: Path
    documents_file: Path
    dtype: str
    counts: Counts

    @cached_property
    def tokens_N(self) -> np.ndarray:
        return np.asarray(np.memmap(self.tokens_file, self.dtype, "r"))

    @cached_property
    def document_bounds(self) -> np.ndarray:
        """(documents + 1,) int64: where each document begins in the stream, and where the last one ends."""
        return np.load(self.documents_file, mmap_mode="r")

    def __len__(self) -> int:
        return self.counts.tokens + self.counts.documents

    def __getstate__(self) -> dict[str, object]:
        fields = ("tokens_file", "documents_file", "dtype", "counts")
        return {name: self.__dict__[name] for name in fields}


@dataclass(frozen=True)
class TokenStore:
    folder: Path
    train: TokenStream
    val: TokenStream
    about: dict[str, object]
    """What the writer said of it: sources, tokenizer, rows left out."""


def open_store(folder: Path) -> TokenStore | None:
    """The store in a folder, or None where there is none or it is damaged."""
    try:
        header = json.loads((folder / "header.json").read_text())
        files = {name: folder / name for name in header["checksums"]}
        if any(checksum(file) != header["checksums"][name] for name, file in files.items()):
            return None
        train, val = (
            TokenStream(
                files[f"{split}.bin"], files[f"{split}.documents.npy"], header["dtype"], Counts(**header[split])
            )
            for split in ("train", "val")
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return TokenStore(folder, train, val, header["about"])


def write_store(
    folder: Path, train: Iterator[Encoded], val: Iterator[Encoded], vocab_size: int, about: dict[str, object]
) -> TokenStore:
    """Writes both streams and a header. `about` may be filled while the streams are drawn."""
    with written_whole(folder, is_sound=lambda other: open_store(other) is not None) as temporary:
        dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        header: dict[str, object] = {"format": FORMAT_VERSION, "dtype": dtype.name}
        for split, stretches in (("train", train), ("val", val)):
            header[split] = asdict(_write_stream(temporary, split, stretches, dtype))
        header["checksums"] = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
        header["about"] = about
        (temporary / "header.json").write_text(json.dumps(header, indent=1))
    store = open_store(folder)
    assert store is not None, f"{folder} was written and cannot be opened"
    return store


def _write_stream(folder: Path, split: str, stretches: Iterator[Encoded], dtype: np.dtype) -> Counts:
    offset, size, unknown = 0, 0, 0
    bounds: list[np.ndarray] = []
    with (folder / f"{split}.bin").open("wb") as file:
        for stretch in stretches:
            file.write(stretch.ids_N.astype(dtype, copy=False))
            bounds.append(stretch.starts + offset)
            offset += len(stretch.ids_N)
            size += stretch.bytes
            unknown += stretch.unknown
    documents = sum(map(len, bounds))
    np.save(folder / f"{split}.documents.npy", np.concatenate([*bounds, [offset]]).astype(np.int64))
    return Counts(documents, size, offset - documents, unknown)


def checksum(file: Path) -> list[int]:
    """The size, and a CRC of up to 64 blocks spread over the file: cheap whatever the size."""
    size, block = file.stat().st_size, 4096
    crc = 0
    with file.open("rb") as stream:
        for i in range(64):
            stream.seek(max(0, size - block) * i // 63)
            crc = zlib.crc32(stream.read(block), crc)
    return [size, crc]
