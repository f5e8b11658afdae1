"""A corpus gets its tokenizer and becomes a token store: read, encode on every core, prove the ids, write."""

import collections
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from datamodules.corpus import Corpus, Split
from datamodules.documents import Piece
from datamodules.encoding import TRICKY_TEXTS, Encoder, encoders, same_ids
from datamodules.files import BadRows
from datamodules.token_store import FORMAT_VERSION, Encoded, TokenStore, write_store
from datamodules.tokenization import (
    Objective,
    bpe_tokenizer,
    byte_tokenizer,
    character_tokenizer,
    document_start,
    fingerprint,
    load_tokenizer,
    remembered,
)

_GROUP_CHARACTERS = 1 << 18
_SAMPLES, _SAMPLE_CHARACTERS = 16, 12_000
_QUIET_SECONDS = 2.0


def corpus_tokenizer(
    name: str, corpus: Corpus, objective: Objective, bpe_vocab_size: int, cache: Path
) -> PreTrainedTokenizerBase:
    """The tokenizer that a name stands for; what is made from the training text is kept in the cache."""
    if name == "bytes":
        return byte_tokenizer(objective)
    if name not in ("bpe", "chars"):
        return load_tokenizer(name)
    vocab_size = bpe_vocab_size if name == "bpe" else 0
    content = f"{FORMAT_VERSION} {corpus.digest} {name} {vocab_size} {objective}"

    def make() -> PreTrainedTokenizerBase:
        size = corpus.size("train")
        texts = (piece.text for piece in _with_bar(corpus.pieces("train"), size, f"reading text for {name}"))
        if name == "chars":
            return character_tokenizer(texts, objective)
        return bpe_tokenizer(texts, size, vocab_size, objective)

    return remembered(cache / "tokenizers" / hashlib.sha256(content.encode()).hexdigest(), make)


class DifferentIds(Exception):
    """A fast encoder gave other ids than the tokenizer itself."""


@dataclass(frozen=True)
class _Job:
    corpus: Corpus | None
    encoder: Encoder
    reference: Encoder | None
    start_id: int
    unknown_id: int | None


def encode_corpus(folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenStore:
    """Encodes both splits into a store at `folder`, by the fastest encoder whose ids are those of the tokenizer."""
    *fast, slow = encoders(tokenizer)
    for encoder in [*fast, slow]:
        try:
            return _write(folder, corpus, tokenizer, vocab_size, encoder, None if encoder is slow else slow)
        except DifferentIds as difference:
            print(f"{encoder.name} {difference}; encoding by the tokenizer itself, more slowly", file=sys.stderr)
    raise AssertionError("the tokenizer differs from itself")


def encoded_in_order(tokenizer: PreTrainedTokenizerBase, pieces: Iterator[Piece]) -> Iterator[Encoded]:
    """Stretches of whole documents, by one thread and the fastest encoder whose ids are those of the tokenizer."""
    *fast, slow = encoders(tokenizer)
    encoder = next((other for other in fast if same_ids(other, slow, TRICKY_TEXTS)), slow)
    unknown_id = tokenizer.unk_token_id if tokenizer.unk_token_id != document_start(tokenizer) else None
    job = _Job(None, encoder, None, document_start(tokenizer), unknown_id)
    for number, group in enumerate(_groups(_whole_documents(pieces))):
        if number % _SAMPLES == 0 and encoder is not slow:
            samples = [piece.text[:_SAMPLE_CHARACTERS] for piece in group[:1]]
            if not same_ids(encoder, slow, samples):
                text = samples[0][:40]
                raise ValueError(f"{encoder.name} gives other ids than the tokenizer for {text!r}…; pass another one")
        yield _encode_group(job, group)


def _write(
    folder: Path,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    encoder: Encoder,
    reference: Encoder | None,
) -> TokenStore:
    if reference and not same_ids(encoder, reference, TRICKY_TEXTS):
        raise DifferentIds("gives other ids than the tokenizer for unusual text")
    # A byte-level tokenizer may name an unknown token (GPT-2 does) and never yields it.
    unknown_id = tokenizer.unk_token_id if tokenizer.unk_token_id != document_start(tokenizer) else None
    job = _Job(corpus, encoder, reference, document_start(tokenizer), unknown_id)
    sources = [*corpus.train, *corpus.val]
    about: dict[str, object] = {
        "encoder": encoder.name,
        "tokenizer": fingerprint(tokenizer),
        "files": len(sources),
        "first_files": [source.name for source in sources[:100]],
    }
    bad_rows = BadRows(corpus.skip_bad_rows)
    train, val = corpus.splits(bad_rows)
    began = time.monotonic()
    store = write_store(
        folder, _encoded(job, train, "train"), _noting(_encoded(job, val, "val"), bad_rows, about), vocab_size, about
    )
    seconds = time.monotonic() - began
    if seconds > _QUIET_SECONDS:
        size, tokens = store.train.counts.bytes + store.val.counts.bytes, len(store.train) + len(store.val)
        print(f"tokenized {size / 1e6:,.1f} MB into {tokens:,} tokens in {seconds:.1f} s: {folder}", file=sys.stderr)
    return store


def _noting(val: Iterator[Encoded], bad_rows: BadRows, about: dict[str, object]) -> Iterator[Encoded]:
    """Notes what was left out once the last split has been read to its end."""
    yield from val
    about["skipped_rows"] = dict(bad_rows.skipped)
    about["empty_rows"] = bad_rows.empty


def _encoded(job: _Job, pieces: Iterator[Piece], split: Split) -> Iterator[Encoded]:
    """The stream of a split, encoded by as many threads as there are cores, in order."""
    if not job.encoder.takes_pieces:
        pieces = _whole_documents(pieces)
    if job.reference:
        pieces = _proven(pieces, job.encoder, job.reference, job.corpus.size(split))
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = _groups(_with_bar(pieces, job.corpus.size(split), f"tokenizing {split}"))
    if threads == 1:
        yield from (_encode_group(job, group) for group in groups)
        return
    with ThreadPoolExecutor(threads) as pool:
        futures = (pool.submit(_encode_group, job, group) for group in groups)
        waiting = collections.deque(itertools.islice(futures, 2 * threads))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))


def _encode_group(job: _Job, group: list[Piece]) -> Encoded:
    start = np.array([job.start_id], np.uint32)
    parts: list[np.ndarray] = []
    starts, length, size = [], 0, 0
    for (begins_document, text), ids in zip(group, job.encoder.encode([p.text for p in group]), strict=True):
        if begins_document:
            starts.append(length)
            parts.append(start)
            length += 1
        parts.append(ids)
        length += len(ids)
        size += len(text) if text.isascii() else len(text.encode())
    ids_N = np.concatenate(parts)
    unknown = 0 if job.unknown_id is None else int((ids_N == job.unknown_id).sum())
    return Encoded(ids_N, np.array(starts, np.int64), size, unknown)


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    group, characters = [], 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _whole_documents(pieces: Iterator[Piece]) -> Iterator[Piece]:
    held: list[str] = []
    for piece in pieces:
        if piece.begins_document and held:
            yield Piece(True, "".join(held))
            held = []
        held.append(piece.text)
    if held:
        yield Piece(True, "".join(held))


def _proven(pieces: Iterator[Piece], encoder: Encoder, reference: Encoder, size: int) -> Iterator[Piece]:
    """Passes pieces on; compares the ids of the first and of some spread over the text with the tokenizer's own."""
    seen, next_sample = 0, 0
    for piece in pieces:
        if seen >= next_sample:
            if not same_ids(encoder, reference, [piece.text[:_SAMPLE_CHARACTERS]]):
                raise DifferentIds(f"gives other ids than the tokenizer for {piece.text[:40]!r}…")
            next_sample = seen + size // _SAMPLES
        seen += len(piece.text)
        yield piece


def _with_bar(pieces: Iterable[Piece], size: int, what: str) -> Iterator[Piece]:
    """Passes pieces on and shows a bar on a terminal when they take longer than two seconds."""
    from tqdm import tqdm

    with tqdm(total=size, desc=what, unit="B", unit_scale=True, delay=_QUIET_SECONDS, disable=None, leave=False) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece.text))
