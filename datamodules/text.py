"""Text to pretrain on: files, folders, a Hub data set or the standard library, as rows of tokens."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.base import Batch
from datamodules.cache_folders import cache_root
from datamodules.corpus import Split, open_corpus
from datamodules.corruption import noise_counts, raw_length
from datamodules.encode_corpus import corpus_tokenizer, encode_corpus
from datamodules.encoding import token_bytes
from datamodules.litdata_shards import is_litdata, open_litdata
from datamodules.mixture import BLOCK, Mixed, MixedRows
from datamodules.ordered import Ordered
from datamodules.prepared import Prepared, is_prepared, joined, open_prepared
from datamodules.row_order import HeldOutOrder, Shuffled
from datamodules.rows import CausalRows, DenoisingRows, Loader, MaskedRows, Rows, row_loader
from datamodules.sources import ContentHashes
from datamodules.teacher_cache import (
    CHOSEN,
    About,
    CachedRows,
    Kept,
    TeacherCache,
    require_equal,
    row_hashes,
    weights_digest,
    write_header,
    write_shards,
)
from datamodules.token_store import FORMAT_VERSION, TokenStore, TokenStream, open_store
from datamodules.tokenization import document_start, fingerprint, require_special_tokens, sentinel_ids


class Text(Ordered):
    """Rows of text. The text is tokenized once, into a folder of the cache that is named by its content.

    Args:
        path: Files, folders or globs (txt, md, py: a document each; jsonl, json, csv, tsv, parquet: a document a row;
            .gz, .xz or .zst of them), or the name of a Hub data set ("owner/name", "owner/name:config"); or what
            recipes/prepare.py has written, here or elsewhere (s3://…), several of them with their weights:
            {prepared/web: 0.7, prepared/code: 0.3}; or token shards of litdata. Left out: the Python standard library
            on this machine.
        val_path: Held-out text, like `path`. Left out: a part of `path`.
        val_fraction: Share of the files to hold out, by a hash of their content; of a single file its last part.
        text_column: The column that holds the text, where a document is a row.
        tokenizer: bpe (trained on the text), bytes, chars, a folder, "vocab.json,merges.txt", or a Hub name. Left out:
            that of the teacher, in distillation; else bpe.
        vocab_size: Ids of the bpe tokenizer, special tokens included.
        seq_len: Tokens in a row.
        batch_size: Rows in a micro-batch of one rank.
        val_batch_size: Rows in a batch of validation. Left out: as `batch_size`.
        num_workers: Processes that load rows beside the training process.
        cross_document_attention: Whether tokens may attend to other documents in their row.
        objective: causal (the next token), masked (BERT) or denoising (T5).
        mask_fraction: Share of the tokens that are masked or replaced by sentinels.
        mean_span: Mean tokens in a span of denoising.
        max_val_rows: Validate on this many rows, spread evenly over the held-out text. Left out: on all.
        teacher_cache: A folder that python recipes/distill.py cache has written: what the teacher makes of each row.
        on_bad_row: What to do with a row that cannot be read: stop with an error, or skip and count it.
        cache_dir: Where tokens are kept. Left out: $XDG_CACHE_HOME or ~/.cache, and there lightning-lm-recipes.
        seed: Decides the order of the rows and the noise, together with the number of rows consumed.
        allow_changed_data: Whether a checkpoint of other text, tokenizer, row length or seed may be gone on from.
    """

    def __init__(
        self,
        path: str | list[str] | dict[str, float] | None = None,
        val_path: str | list[str] | None = None,
        val_fraction: float = 0.05,
        text_column: str = "text",
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        seq_len: int = 256,
        batch_size: int = 8,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        cross_document_attention: bool = True,
        objective: Literal["causal", "masked", "denoising"] = "causal",
        mask_fraction: float = 0.15,
        mean_span: float = 3.0,
        max_val_rows: int | None = None,
        teacher_cache: str | None = None,
        on_bad_row: Literal["error", "skip"] = "error",
        cache_dir: str | None = None,
        seed: int = 0,
        allow_changed_data: bool = False,
    ):
        super().__init__()
        at_least_one = {"seq_len": seq_len, "batch_size": batch_size, "mean_span": mean_span}
        at_least_one |= {"val_batch_size": val_batch_size, "max_val_rows": max_val_rows}
        for name, value in at_least_one.items():
            if value is not None and value < 1:
                raise ValueError(f"--data.{name} is {value}; it must be 1 or more")
        for name, share in (("val_fraction", val_fraction), ("mask_fraction", mask_fraction)):
            if not 0 < share < 1:
                raise ValueError(f"--data.{name} is {share}; it must lie between 0 and 1, both excluded")
        if objective == "denoising" and seq_len < 3:
            raise ValueError(f"--data.seq_len is {seq_len}; a row of denoising has 3 tokens or more")
        self.path = path
        self.val_path = val_path
        self.val_fraction = val_fraction
        self.text_column = text_column
        self.tokenizer_name = tokenizer
        self.bpe_vocab_size = vocab_size
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.num_workers = num_workers
        self.cross_document_attention = cross_document_attention
        self.objective = objective
        self.mask_fraction = mask_fraction
        self.mean_span = mean_span
        self.max_val_rows = max_val_rows
        self.teacher_cache = None if teacher_cache is None else TeacherCache(teacher_cache)
        self.on_bad_row = on_bad_row
        self.cache_dir = cache_root(cache_dir)
        self.seed = seed
        self.allow_changed_data = allow_changed_data
        self.store: TokenStore | Prepared | None = None
        self.sources: list[Prepared] = []
        """Where --data.path is shards: each folder with its weight in `weights`."""
        self.weights: list[float] = []

    # Preparation

    def prepare_data(self) -> None:
        self._open(build=True)

    def setup(self, stage: str) -> None:
        if self.store is None:
            self._open(build=False)
        assert self.store is not None
        self.vocab_size = _ids(self.tokenizer)
        counts = self.store.val.counts
        self.token_bytes: Tensor = token_bytes(
            self.tokenizer, self.vocab_size, mean=counts.bytes / max(1, counts.tokens)
        )
        self.train_rows, self.val_rows = self._all_rows("train"), self._all_rows("val")
        self.rows_per_epoch = len(self.train_rows)
        self.tokens_per_row: float = self.seq_len
        if self.teacher_cache is not None:
            here = self.about_cache(**{name: getattr(self.teacher_cache.about, name) for name in CHOSEN})
            require_equal(self.teacher_cache.folder, self.teacher_cache.about, here)
            self.train_rows = CachedRows(self.train_rows, self.teacher_cache)

    def about_cache(self, **chosen: object) -> About:
        """The header of a teacher's cache of this text; `chosen` is what does not follow from the text and teacher."""
        if self.start is None:
            raise ValueError("a teacher's cache is for distillation: leave --data.teacher_cache out")
        labels = self.train_rows.__getitems__(np.zeros((2, 1), np.int64))["labels"].shape[1]
        hashes = ContentHashes(self.cache_dir / "file_hashes.json")
        teacher = weights_digest(self.start, hashes)
        hashes.save()
        return About(
            words=self.vocab_size,
            labels_of_a_row=labels,
            teacher=teacher,
            tokenizer=fingerprint(self.tokenizer),
            noise="" if self.objective == "causal" else f"{self.seed} {self.mask_fraction} {self.mean_span}",
            **chosen,
        )

    def write_cache(self, folder: Path, about: About, kept: Kept, rank: int = 0, ranks: int = 1) -> Iterator[int]:
        """Writes what is kept of the rows of training, in their order; yields the number of rows after each shard."""
        write_header(folder, about)
        return write_shards(folder, about, self.batches_in_order, kept, rank, ranks)

    def batches_in_order(self, first: int, last: int) -> Iterator[Batch]:
        """The rows of training from a place of their order to another."""
        order = self._order()
        for start in range(first, last, self.batch_size):
            places_B = np.arange(start, min(last, start + self.batch_size))
            yield self.train_rows.__getitems__(np.stack([places_B, order(places_B)]))

    def lacks_rows(self, rows: int, looked_at: int = 4096) -> bool:
        """Whether the cache lacks some of the first rows of the order of training; of many, evenly spaced ones are
        looked for."""
        places_B = np.unique(np.linspace(0, rows - 1, min(rows, looked_at)).astype(np.int64))
        order = self._order()
        parts = np.array_split(places_B, -(-len(places_B) // 256))
        batches = (self.train_rows.rows.__getitems__(np.stack([part, order(part)])) for part in parts)
        return any(row not in self.teacher_cache.places for batch in batches for row in row_hashes(batch))

    def held_out_rows(self) -> Iterator[dict[str, str]]:
        """Documents, as lines of a file that this class reads."""
        return ({"text": text} for text in self.corpus.documents("val"))

    def _open(self, build: bool) -> None:
        """Finds the corpus, its tokenizer and its tokens; makes what is missing where `build` allows."""
        if self._opened_prepared():
            return
        hashes = ContentHashes(self.cache_dir / "file_hashes.json")
        skip_bad_rows = self.on_bad_row == "skip"
        self.corpus = open_corpus(self.path, self.val_path, self.val_fraction, self.text_column, skip_bad_rows, hashes)
        name = self.tokenizer_name or self.start or "bpe"
        self.tokenizer = corpus_tokenizer(name, self.corpus, self.objective, self.bpe_vocab_size, self.cache_dir)
        require_special_tokens(self.tokenizer, self.objective, self._spans)
        content = f"{FORMAT_VERSION} {self.corpus.digest} {fingerprint(self.tokenizer)}"
        folder = self.cache_dir / "tokens" / hashlib.sha256(content.encode()).hexdigest()
        self.store = open_store(folder)
        if self.store is None and build:
            self.store = encode_corpus(folder, self.corpus, self.tokenizer, _ids(self.tokenizer))
        if self.store is None:
            raise ValueError(f"{self._text_name} changed since its tokens were made; start again")
        self._require_rows(self.store)

    def _opened_prepared(self) -> bool:
        """Whether --data.path is shards that are there already."""
        if not isinstance(self.path, dict) and is_litdata(self.path, self.cache_dir):
            return self._opened_litdata()
        if not isinstance(self.path, dict) and not is_prepared(self.path, self.cache_dir):
            return False
        weights = self.path if isinstance(self.path, dict) else {self.path: 1.0}
        for name, weight in weights.items():
            if not is_prepared(name, self.cache_dir):
                raise ValueError(f"--data.path {name} was not prepared: python recipes/prepare.py writes such folders")
            if weight <= 0:
                raise ValueError(f"--data.path gives {name} the weight {weight}; pass one above 0, or leave it out")
            if weight * BLOCK < sum(weights.values()):
                raise ValueError(
                    f"--data.path gives {name} less than a row in {BLOCK:,}; pass a larger weight, or leave it out"
                )
        if self.val_path is not None or self.tokenizer_name is not None:
            flag = "--data.val_path" if self.val_path is not None else "--data.tokenizer"
            raise ValueError(f"{flag} was decided when the text was prepared; leave it out")
        self.sources = [open_prepared(name, self.cache_dir) for name in weights]
        self.weights = list(weights.values())
        self.store = self.corpus = joined(self.sources)
        self.tokenizer = self.store.tokenizer
        require_special_tokens(self.tokenizer, self.objective, self._spans)
        self._require_rows(self.store)
        return True

    def _opened_litdata(self) -> bool:
        if not is_litdata(self.val_path, self.cache_dir) or self.tokenizer_name is None:
            raise ValueError(
                f"{self.path} was written by litdata: pass such a folder with held-out text by --data.val_path, and "
                "the tokenizer of both by --data.tokenizer"
            )
        self.store = self.corpus = open_litdata(self.path, self.val_path, self.tokenizer_name, self.cache_dir)
        self.sources, self.tokenizer = [self.store], self.store.tokenizer
        require_special_tokens(self.tokenizer, self.objective, self._spans)
        self._require_rows(self.store)
        return True

    def _all_rows(self, split: Split) -> Rows:
        if len(self.sources) < 2:
            return self._rows(getattr(self.store, split))
        return MixedRows([self._rows(getattr(source, split)) for source in self.sources])

    def _order(self) -> Shuffled | Mixed:
        if len(self.sources) < 2:
            return Shuffled(self.rows_per_epoch, self.seed)
        rows = self.train_rows.rows if isinstance(self.train_rows, CachedRows) else self.train_rows
        return Mixed([len(source) for source in rows.sources], self.weights, self.seed)

    @property
    def _spans(self) -> int:
        """Spans of noise in a full row."""
        if self.objective != "denoising":
            return 0
        length, _ = raw_length(self.seq_len, self.mask_fraction, self.mean_span)
        return noise_counts(length, self.mask_fraction, self.mean_span)[1]

    def _require_rows(self, store: TokenStore) -> None:
        """Raises ValueError where there is less than a row to train on, or nothing to validate on."""
        if len(store.train) <= self.seq_len:
            raise ValueError(
                f"{self._text_name} has {len(store.train):,} tokens to train on, less than one row; "
                f"give more text or a --data.seq_len below {self.seq_len}"
            )
        if not store.val.counts.tokens:
            raise ValueError(f"{self._text_name} leaves no text to hold out; pass --data.val_path")

    @property
    def _text_name(self) -> str:
        if self.path is None:
            return f"the standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
        if isinstance(self.path, dict):
            return ", ".join(f"{weight:g} {name}" for name, weight in self.path.items())
        return self.path if isinstance(self.path, str) else ", ".join(self.path)

    @property
    def document_start(self) -> int:
        """The id that stands before each document."""
        return document_start(self.tokenizer)

    @property
    def fill_id(self) -> int:
        """The id behind the last document, in a row that it does not fill."""
        pad_id = self.tokenizer.pad_token_id
        return self.document_start if pad_id is None else pad_id

    # Rows

    def _rows(self, stream: TokenStream) -> Rows:
        start_id, pad_id = self.document_start, self.fill_id
        apart = not self.cross_document_attention
        if self.objective == "causal":
            return CausalRows(stream, self.seq_len, pad_id, apart)
        if self.objective == "masked":
            is_special_V = np.zeros(self.vocab_size, bool)
            is_special_V[self.tokenizer.all_special_ids] = True
            mask_id = self.tokenizer.mask_token_id
            return MaskedRows(stream, self.seq_len, pad_id, apart, self.seed, self.mask_fraction, mask_id, is_special_V)
        sentinels = sentinel_ids(self.tokenizer)
        return DenoisingRows(
            stream, self.seq_len, pad_id, start_id, apart, self.seed, self.mask_fraction, self.mean_span, sentinels
        )

    def train_dataloader(self) -> Loader:
        order = self.training_order(self._order())
        return row_loader(self.train_rows, order, self.num_workers)

    def val_dataloader(self) -> Loader:
        count = len(self.val_rows)
        kept = min(count, self.max_val_rows or count)
        rows_N = np.arange(kept) * count // kept
        order = HeldOutOrder(rows_N, self.val_batch_size or self.batch_size, *self.rank_and_ranks)
        return row_loader(self.val_rows, order, self.num_workers)

    def test_dataloader(self) -> Loader:
        return self.val_dataloader()

    def predict_dataloader(self) -> Loader:
        return self.val_dataloader()

    # The place in the order of training

    def identity(self) -> dict[str, int | str]:
        return {
            "seed": self.seed,
            "seq_len": self.seq_len,
            "objective": self.objective,
            "text": self.corpus.digest + (f" {self.weights}" if len(self.sources) > 1 else ""),
            "tokenizer": fingerprint(self.tokenizer),
            "rows_per_epoch": self.rows_per_epoch,
        }

    def consumed_here(self, state: dict[str, int | str]) -> int:
        """As many rows as hold the same number of tokens."""
        return int(state["consumed"]) * int(state["seq_len"]) // self.seq_len

    # What it is

    def documents(self, split: Split) -> Iterator[str]:
        """The text of each document of a split, in the order of its stream."""
        return self.corpus.documents(split)

    def val_documents(self, limit_bytes: int | None = None) -> list[bytes]:
        """Held-out documents in UTF-8, whole ones from the first on, as many as fit into `limit_bytes`."""
        documents, size = [], 0
        for text in self.corpus.documents("val"):
            document = text.encode()
            size += len(document)
            if limit_bytes is not None and documents and size > limit_bytes:
                break
            documents.append(document)
        return documents

    @property
    def skipped_rows(self) -> dict[str, int]:
        return self.describe()["skipped_rows"]

    def plan(self) -> dict[str, str]:
        """The rows of the plan that are about the text."""
        about = self.describe()
        held_out = about["held_out"]
        skipped = about["skipped_rows"]
        return {
            "text": f"{about['text']}: {about['files']:,} files, {about['train_documents']:,} documents, "
            f"{about['train_bytes'] / 1e6:,.2f} MB, {about['train_tokens']:,} tokens",
            "held out": f"{held_out if isinstance(held_out, str) else f'{len(held_out)} files'}, "
            f"{about['val_bytes'] / 1e6:,.2f} MB, {about['val_tokens']:,} tokens",
            "tokenizer": f"{about['tokenizer']}, {about['vocab_size']:,} ids, "
            f"{about['bytes_per_token']:.2f} bytes a token",
            "skipped": ", ".join(f"{count:,} bad rows of {file}" for file, count in skipped.items()),
        }

    def describe(self) -> dict[str, object]:
        """What the plan before training says of the text."""
        assert self.store is not None, "describe() is for after setup()"
        train, val, about = self.store.train.counts, self.store.val.counts, self.store.about
        if self.sources:
            files, held_out = about["files"], f"{val.documents:,} documents"
        else:
            files, held_out = len(self.corpus.train) + len(self.corpus.val), [s.name for s in self.corpus.val]
        return {
            "text": self._text_name,
            "files": files,
            "held_out": held_out or f"the last {self.val_fraction:.1%} of {self.corpus.train[0].name}",
            "tokenizer": self.tokenizer_name or self.start or "bpe",
            "vocab_size": self.vocab_size,
            "train_documents": train.documents,
            "train_bytes": train.bytes,
            "train_tokens": train.tokens,
            "val_documents": val.documents,
            "val_bytes": val.bytes,
            "val_tokens": val.tokens,
            "bytes_per_token": round((train.bytes + val.bytes) / (train.tokens + val.tokens), 3),
            "unknown_tokens": train.unknown + val.unknown,
            "rows_per_epoch": self.rows_per_epoch,
            "val_rows": len(self.val_rows),
            "skipped_rows": about["skipped_rows"],
            "empty_rows": about["empty_rows"],
            "encoder": about["encoder"],
            "cache": str(self.store.folder),
        }


def _ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1
