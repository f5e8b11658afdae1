"""The text of a run: which sources are trained on, which are held out, and the documents of both."""

import collections
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from datamodules.documents import Piece
from datamodules.files import BadRows, compression, text_format
from datamodules.sources import ContentHashes, HubRows, Source, TextFile, find_files, hub_splits, is_hub_name
from datamodules.sources import standard_library as standard_library_files

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Corpus:
    """Sources in order. Where `val` is empty, the last `val_fraction` of the only source is held out."""

    train: tuple[Source, ...]
    val: tuple[Source, ...]
    val_fraction: float
    text_column: str
    skip_bad_rows: bool

    @property
    def digest(self) -> str:
        """Changes with the content, the order, the split and the way of reading; not with paths or dates."""
        kinds = [[(_kind(source), source.digest) for source in sources] for sources in (self.train, self.val)]
        fraction = None if self.val else self.val_fraction
        content = json.dumps([kinds, fraction, self.text_column, self.skip_bad_rows])
        return hashlib.sha256(content.encode()).hexdigest()

    def size(self, split: Split) -> int:
        """Bytes on disk, about."""
        if self.val:
            return sum(source.size for source in (self.train if split == "train" else self.val))
        fraction = self.val_fraction if split == "val" else 1 - self.val_fraction
        return int(self.train[0].size * fraction)

    def splits(self, bad_rows: BadRows) -> tuple[Iterator[Piece], Iterator[Piece]]:
        """The pieces of both splits; the first is to be drawn to its end before the second."""
        if self.val:
            train, val = (
                itertools.chain.from_iterable(source.pieces(self.text_column, bad_rows) for source in sources)
                for sources in (self.train, self.val)
            )
            return train, val
        (source,) = self.train
        return _cut_in_two(source.pieces(self.text_column, bad_rows), self._cut, source.is_one_document)

    def pieces(self, split: Split, bad_rows: BadRows | None = None) -> Iterator[Piece]:
        """The documents of a split, each in one or more pieces."""
        train, val = self.splits(bad_rows or BadRows(self.skip_bad_rows))
        if split == "train":
            return train
        if not self.val:
            collections.deque(train, maxlen=0)
        return val

    def documents(self, split: Split) -> Iterator[str]:
        """The text of each document, whole."""
        held: list[str] = []
        for piece in self.pieces(split):
            if piece.begins_document and held:
                yield "".join(held)
                held = []
            held.append(piece.text)
        if held:
            yield "".join(held)

    @cached_property
    def _cut(self) -> int:
        """The character of the only document, or the row of the only table, where held-out text begins."""
        (source,) = self.train
        bad_rows = BadRows(self.skip_bad_rows)
        lengths = (len(p.text) if source.is_one_document else 1 for p in source.pieces(self.text_column, bad_rows))
        count = sum(lengths)
        if count < 2:
            unit = "characters" if source.is_one_document else "rows"
            raise ValueError(f"{source.name} has {count} {unit}, too few to hold some out; pass --data.val_path")
        return min(max(int(count * (1 - self.val_fraction)), 1), count - 1)


def open_corpus(
    path: str | list[str] | None,
    val_path: str | list[str] | None,
    val_fraction: float,
    text_column: str,
    skip_bad_rows: bool,
    hashes: ContentHashes,
) -> Corpus:
    """Finds the sources and splits them; reads no more than their bytes' hashes."""
    train, hub_val = _sources(path, "--data.path", hashes)
    if val_path is not None:
        rows, hub_val = _sources(val_path, "--data.val_path", hashes)
        val = [hub_val] if hub_val else rows
    elif hub_val:
        val = [hub_val]
    elif len(train) > 1:
        train, val = hold_out(train, val_fraction)
    else:
        val = []
    hashes.save()
    return Corpus(tuple(train), tuple(val), val_fraction, text_column, skip_bad_rows)


def _sources(path: str | list[str] | None, flag: str, hashes: ContentHashes) -> tuple[list[Source], HubRows | None]:
    if path is None:
        return [TextFile(file, hashes(file)) for file in standard_library_files()], None
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise ValueError(f"{flag} is an empty list; name files, folders or globs")
    if len(paths) == 1 and is_hub_name(paths[0]):
        train, val = hub_splits(paths[0], flag)
        return [train], val
    return [TextFile(file, hashes(file)) for file in find_files(paths, flag)], None


def hold_out(sources: list[Source], fraction: float) -> tuple[list[Source], list[Source]]:
    """Splits by a hash of each file's content alone: what is held out stays so when files are added.

    Where no file falls below `fraction`, the one with the smallest hash is held out; where all do, the one with the
    largest is trained on. Files of equal content land on the same side.
    """
    shares = {source.digest: int(source.digest[:16], 16) / 2**64 for source in sources}
    if len(shares) == 1:
        raise ValueError(f"all {len(sources)} files hold the same text; pass --data.val_path for held-out text")
    held_out = {digest for digest, share in shares.items() if share < fraction} or {min(shares, key=shares.get)}
    if len(held_out) == len(shares):
        held_out.remove(max(shares, key=shares.get))
    return [s for s in sources if s.digest not in held_out], [s for s in sources if s.digest in held_out]


def _kind(source: Source) -> str:
    return "hub" if isinstance(source, HubRows) else text_format(source.path) + compression(source.path)


def _cut_in_two(whole: Iterator[Piece], cut: int, is_one_document: bool) -> tuple[Iterator[Piece], Iterator[Piece]]:
    """The first `cut` characters of a document, or rows of a table, and the rest."""
    rest: list[Piece] = []

    def first() -> Iterator[Piece]:
        left = cut
        for piece in whole:
            size = len(piece.text) if is_one_document else 1
            if size > left:
                if left:
                    yield Piece(piece.begins_document, piece.text[:left])
                rest.append(Piece(True, piece.text[left:]))
                return
            yield piece
            left -= size

    def second() -> Iterator[Piece]:
        yield from rest
        yield from whole

    return first(), second()
