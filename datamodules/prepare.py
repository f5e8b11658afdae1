"""Makes shards of tokens out of text: in parallel, going on where it was interrupted, without copies of a document."""

import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from datamodules.corpus import Corpus, Split
from datamodules.documents import Piece
from datamodules.encode_corpus import encoded_in_order
from datamodules.files import BadRows
from datamodules.prepared import FORMAT, HEADER
from datamodules.token_store import Counts
from datamodules.tokenization import fingerprint, load_tokenizer


@dataclass(frozen=True)
class Group:
    """Some sources of a split, which one process reads; of a corpus that is cut in two all of the split."""

    split: Split
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


@dataclass(frozen=True)
class Job:
    corpus: Corpus
    output: Path
    shard_tokens: int
    vocab_size: int

    def documents(self, group: Group, bad_rows: BadRows) -> Iterator[list[Piece]]:
        """Each as its pieces."""
        corpus, held = self.corpus, []
        sources = (corpus.train if group.split == "train" else corpus.val)[group.first : group.last]
        read = (source.pieces(corpus.text_column, bad_rows) for source in sources)
        # Of a corpus that is cut in two all is read on the way to the held-out part, which counts for both.
        of_both = bad_rows if group.split == "val" else None
        for piece in chain.from_iterable(read) if corpus.val else corpus.pieces(group.split, of_both):
            if is_interrupted():
                raise KeyboardInterrupt
            if piece.begins_document and held:
                yield held
                held = []
            held.append(piece)
        if held:
            yield held


def groups_of(corpus: Corpus, group_bytes: int) -> list[Group]:
    """Held-out ones first: of two equal documents the first stays."""
    if not corpus.val:
        return [Group("val", 0, 0, 1), Group("train", 0, 0, 1)]
    found: list[Group] = []
    for split in ("val", "train"):
        sources, first, size, number = getattr(corpus, split), 0, 0, 0
        for i, source in enumerate(sources, 1):
            size += source.size
            if size >= group_bytes or i == len(sources):
                found.append(Group(split, number, first, i))
                first, size, number = i, 0, number + 1
    return found


def hashes_of(job: Job, group: Group) -> np.ndarray:
    """(documents, 2) uint64: 128 bits of each; kept beside the shards until all are done."""
    file = job.output / "hashes" / f"{group.name}.npy"
    if not file.exists():
        found = []
        for pieces in job.documents(group, BadRows(job.corpus.skip_bad_rows)):
            text = hashlib.blake2b(digest_size=16)
            for piece in pieces:
                text.update(piece.text.encode())
            found.append(np.frombuffer(text.digest(), np.uint64))
        _save(file, np.array(found, np.uint64).reshape(-1, 2))
    return np.load(file)


def copies_in(hashes: list[np.ndarray]) -> list[np.ndarray]:
    """For each group whether a document stands in it, or in one before it, already."""
    every = np.concatenate(hashes)
    _, firsts = np.unique(every, axis=0, return_index=True)
    is_copy = np.ones(len(every), bool)
    is_copy[firsts] = False
    return np.split(is_copy, np.cumsum([len(part) for part in hashes])[:-1])


def write_group(job: Job, group: Group, is_copy: np.ndarray | None) -> dict[str, object]:
    """Writes the shards of a group, once; returns what they hold."""
    done = job.output / "done" / f"{group.name}.json"
    if done.exists():
        return json.loads(done.read_text())
    tokenizer, bad_rows = load_tokenizer(str(job.output / "tokenizer")), BadRows(job.corpus.skip_bad_rows)
    copies = 0

    def kept() -> Iterator[Piece]:
        nonlocal copies
        for number, pieces in enumerate(job.documents(group, bad_rows)):
            if is_copy is not None and is_copy[number]:
                copies += 1
            else:
                yield from pieces

    dtype = np.dtype(np.uint16 if job.vocab_size <= 1 << 16 else np.uint32)
    shards, totals, writer = [], dict.fromkeys(("documents", "bytes", "tokens", "unknown"), 0), None
    for part in encoded_in_order(tokenizer, kept()):
        begin = 0
        while begin < len(part.ids_N):
            if writer is None or writer.tokens >= job.shard_tokens:
                if writer is not None:
                    shards.append(writer.close())
                writer = ShardWriter(job.output, f"{group.name}-{len(shards):03d}", dtype)
            full = part.starts[part.starts >= begin + job.shard_tokens - writer.tokens]
            end = int(full[0]) if len(full) else len(part.ids_N)  # a document stays whole
            inside = part.starts[(part.starts >= begin) & (part.starts < end)]
            writer.add(part.ids_N[begin:end], inside - begin)
            begin = end
        totals["documents"] += len(part.starts)
        totals["bytes"] += part.bytes
        totals["unknown"] += part.unknown
        totals["tokens"] += len(part.ids_N) - len(part.starts)
    if writer is not None:
        shards.append(writer.close())
    found = {"shards": shards, "counts": totals, "copies": copies}
    found |= {"skipped": dict(bad_rows.skipped), "empty": bad_rows.empty, "dtype": dtype.name}
    _write(done, json.dumps(found))
    return found


class ShardWriter:
    def __init__(self, folder: Path, name: str, dtype: np.dtype):
        self.folder, self.name, self.dtype, self.tokens = folder, name, dtype, 0
        self.starts: list[np.ndarray] = []
        self.partial = folder / f".{name}.bin.{os.getpid()}.partial"
        self.file = self.partial.open("wb")

    def add(self, ids_N: np.ndarray, starts: np.ndarray) -> None:
        self.file.write(ids_N.astype(self.dtype, copy=False))
        self.starts.append(starts + self.tokens)
        self.tokens += len(ids_N)

    def close(self) -> dict[str, object]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        starts = np.concatenate(self.starts).astype(np.int64)
        _save(self.folder / f"{self.name}.npy", starts)
        os.replace(self.partial, self.folder / f"{self.name}.bin")
        return {"name": self.name, "tokens": self.tokens, "documents": len(starts)}


def is_interrupted() -> bool:
    """In a worker, whether what it has in hand is to end."""
    return False


def begin_work(interrupted: Event) -> None:
    global is_interrupted
    is_interrupted = interrupted.is_set


@contextmanager
def set_at_ctrl_c(interrupted: Event) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        interrupted.set()
        raise


def started(pool: ProcessPoolExecutor, function: Callable, *of_groups: Sequence) -> Iterator:
    """As the pool's `map`, by workers that ignore Ctrl-C from their first moment: this process tells them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return pool.map(function, *of_groups)
    finally:
        signal.signal(signal.SIGINT, before)


def prepare(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    shard_tokens: int,
    workers: int,
    removes_copies: bool,
) -> dict[str, object]:
    """Returns what prepared.json holds."""
    about = {"digest": corpus.digest, "tokenizer": _fingerprint_once_loaded(tokenizer)}
    about |= {"shard_tokens": shard_tokens, "removes_copies": removes_copies}
    _require_same(output, about)
    tokenizer.save_pretrained(output / "tokenizer")
    job = Job(corpus, output, shard_tokens, max(tokenizer.get_vocab().values()) + 1)
    groups = groups_of(corpus, 4 * shard_tokens)
    context, count = get_context("spawn"), len(groups)
    interrupted = context.Event()
    with (
        ProcessPoolExecutor(max(1, min(workers, count)), context, begin_work, (interrupted,)) as pool,
        set_at_ctrl_c(interrupted),
    ):
        copies: list[np.ndarray | None] = [None] * count
        if removes_copies:
            hashes = list(_with_bar(started(pool, partial(hashes_of, job), groups), count, "looking for copies"))
            copies = copies_in(hashes)
        found = list(_with_bar(started(pool, partial(write_group, job), groups, copies), count, "making tokens"))
    header: dict[str, object] = {"format": FORMAT, "dtype": found[0]["dtype"]} | about | {"counts": {}}
    header["tokenizer_files"] = sorted(file.name for file in (output / "tokenizer").iterdir())
    for split in ("train", "val"):
        own = [part for part, group in zip(found, groups, strict=True) if group.split == split]
        header[split] = [shard for part in own for shard in part["shards"]]
        sums = {name: sum(part["counts"][name] for part in own) for name in ("documents", "bytes", "tokens", "unknown")}
        header["counts"][split] = asdict(Counts(**sums))
    if not header["counts"]["train"]["documents"]:
        raise ValueError(
            f"nothing is left to train on beside {header['counts']['val']['documents']:,} held-out documents, of which "
            "all others are copies; write into a new folder with more text or --remove_copies false"
        )
    header["about"] = {
        "files": len(corpus.train) + len(corpus.val),
        "duplicates": sum(part["copies"] for part in found),
        "skipped_rows": {file: count for part in found for file, count in part["skipped"].items()},
        "empty_rows": sum(part["empty"] for part in found),
        "encoder": "prepared",
    }
    for unfinished in output.glob(".*.partial"):  # of a run that was interrupted
        unfinished.unlink()
    _write(output / HEADER, json.dumps(header, indent=1))
    for folder in ("done", "hashes"):
        shutil.rmtree(output / folder, ignore_errors=True)
    return header


def _fingerprint_once_loaded(tokenizer: PreTrainedTokenizerBase) -> str:
    """As every later run sees it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return fingerprint(load_tokenizer(folder))


def _require_same(output: Path, about: dict[str, object]) -> None:
    """Raises ValueError where something else was being prepared in the folder."""
    file = output / "preparing.json"
    if file.exists() and json.loads(file.read_text()) != about:
        raise ValueError(f"{output} was begun with other text, tokenizer or settings; write into a new folder")
    _write(file, json.dumps(about))


def _save(file: Path, array: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with temporary.open("wb") as opened:
        np.save(opened, array)
    os.replace(temporary, file)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    temporary.write_text(text)
    os.replace(temporary, file)


def _with_bar(parts: Iterator, count: int, what: str) -> Iterator:
    from tqdm import tqdm

    yield from tqdm(parts, total=count, desc=what, unit="part", disable=None, leave=False, file=sys.stderr)
