"""What the datamodules of fine-tuning share: examples of several lengths, encoded once, in batches that pad little."""

import hashlib
import json
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from datamodules import hub
from datamodules.base import Batch
from datamodules.cache_folders import cache_root
from datamodules.example_store import FORMAT_VERSION, ExampleStore, Fields, open_examples, write_examples
from datamodules.files import BadRows, text_format
from datamodules.ordered import Ordered
from datamodules.records import Record
from datamodules.row_order import ByLength, HeldOutOrder, batches_mixed
from datamodules.rows import Loader, row_loader
from datamodules.sources import ContentHashes, find_files, hub_files, is_hub_name, standard_library
from datamodules.tokenization import bpe_tokenizer, document_start, fingerprint, load_tokenizer, remembered

Numbered = tuple[str, Record]
"""An example, and where it stands: "file:row"."""


class Examples(Ordered):
    """A subclass says what its rows are, what they become, and what a batch of them is.

    Args:
        path: Files, folders, globs or a Hub data set. Left out: examples from the Python standard library.
        val_path: Held-out examples, like `path`. Left out: a part of `path`.
        predict_path: Examples for `predict`, like `path` but without what is to be predicted.
        val_fraction: Share of the examples to hold out, by a hash of their text (of questions: of their article).
        max_val_examples: Held-out examples that a validation goes through, spread evenly over all. Left out: all.
        tokenizer: A folder, "vocab.json,merges.txt" or a Hub name. Left out: the model's own.
        vocab_size: Ids of a tokenizer that is trained on these texts, where there is no model to begin with.
        max_length: Tokens of an example; longer ones are cut off and counted.
        batch_size: Examples in a micro-batch of one rank.
        val_batch_size: Examples in a batch of validation. Left out: as `batch_size`.
        num_workers: Processes that load examples beside the training process.
        on_bad_row: What to do with a row that cannot be read: stop with an error, or skip and count it.
        cache_dir: Where tokens are kept. Left out: $XDG_CACHE_HOME or ~/.cache, and there lightning-lm-recipes.
        seed: Decides the order of the examples, together with their number consumed.
        allow_changed_data: Whether a checkpoint of other examples, tokenizer or seed may be gone on from.
    """

    objective: str
    """Of the modules that train on it."""

    def __init__(
        self,
        *,
        path: str | list[str] | None = None,
        val_path: str | list[str] | None = None,
        predict_path: str | list[str] | None = None,
        val_fraction: float = 0.1,
        max_val_examples: int | None = None,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        max_length: int = 256,
        batch_size: int = 16,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        on_bad_row: Literal["error", "skip"] = "error",
        cache_dir: str | None = None,
        seed: int = 0,
        allow_changed_data: bool = False,
    ):
        super().__init__()
        positive = {"max_length": max_length, "batch_size": batch_size, "val_batch_size": val_batch_size}
        positive |= {"max_val_examples": max_val_examples}
        for name, value in positive.items():
            if value is not None and value < 1:
                raise ValueError(f"--data.{name} is {value}; it must be 1 or more")
        if not 0 < val_fraction < 1:
            raise ValueError(f"--data.val_fraction is {val_fraction}; it must lie between 0 and 1, both excluded")
        self.path, self.val_path, self.predict_path, self.val_fraction = path, val_path, predict_path, val_fraction
        self.tokenizer_name, self.new_vocab_size = tokenizer, vocab_size
        self.max_length = max_length
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.num_workers = num_workers
        self.on_bad_row = on_bad_row
        self.cache_dir = cache_root(cache_dir)
        self.seed = seed
        self.max_val_examples = max_val_examples
        self.allow_changed_data = allow_changed_data
        self.store: ExampleStore | None = None
        self.asked: list[Record] = []
        """What validation or prediction goes through, as it was before it became numbers."""
        self.asked_fields: Fields = {}
        self.has_answers = True
        """Whether it is known what is right; not of the files of --data.predict_path."""

    # What a subclass says

    @abstractmethod
    def settings(self) -> dict[str, object]:
        """All flags that decide what the stored arrays hold."""

    @abstractmethod
    def builtin(self) -> Iterator[Record]:
        """Examples from this machine's standard library."""

    def files(self, path: str | list[str], flag: str) -> list[Path]:
        """Those that a flag names; of a Hub data set its training rows and, if it has such, its validation rows."""
        if isinstance(path, str) and is_hub_name(path):
            return hub_files(path, flag, self.cache_dir)
        return find_files(_listed(path), flag)

    @abstractmethod
    def read(self, files: list[Path], bad_rows: BadRows, answered: bool = True) -> list[Numbered]:
        """The examples of files, by the names that `builtin` gives their values; checked one by one. Where they are
        not answered, what is right is missing."""

    @abstractmethod
    def key(self, record: Record) -> str:
        """What must not stand on both sides of a split: equal keys stay together."""

    @abstractmethod
    def encode(self, train: list[Numbered], val: list[Numbered], bad_rows: BadRows) -> tuple[Fields, Fields, dict]:
        """The arrays of both splits, and what is to be told of them; takes examples that cannot be encoded out of the
        lists. One of the arrays is Ragged: `input_ids`."""

    @abstractmethod
    def encode_asked(self, examples: list[Numbered], bad_rows: BadRows) -> Fields:
        """The arrays of examples that are not answered; takes those that cannot be encoded out of the list."""

    @abstractmethod
    def texts(self, record: Record) -> str:
        """The text of an example, to train a tokenizer on."""

    @abstractmethod
    def collate(self, fields: Fields, numbers_B: np.ndarray, examples_B: np.ndarray) -> Batch:
        """A batch; example -1 is one without labels."""

    def prepare_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """What a subclass asks of a tokenizer, or adds to it."""

    def costs(self, fields: Fields) -> np.ndarray:
        """(N,) by which examples of about the same are put beside each other."""
        return fields["input_ids"].lengths

    @abstractmethod
    def shown(self, example: int) -> list[tuple[str, bool]]:
        """An example of training as the model reads it, in pieces, and whether a piece is what it has to learn."""

    @abstractmethod
    def plan(self) -> dict[str, str]:
        """The rows of the plan that are about the examples."""

    # Preparation

    def prepare_data(self) -> None:
        self._open(build=True)

    def setup(self, stage: str) -> None:
        if self.store is None:
            self._open(build=False)
        assert self.store is not None
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        self.lengths = self.store.train["input_ids"].lengths
        self.rows_per_epoch = len(self.lengths)
        self.tokens_per_row = float(self.lengths.mean())
        if stage == "predict" and self.predict_path:
            self._ask(self.predict_path)
        else:
            self.asked, self.asked_fields = self.store.records("val"), self.store.val
        self.seq_len = int(max(self.lengths.max(), self.asked_fields["input_ids"].lengths.max()))

    def _ask(self, path: str | list[str]) -> None:
        """Of files without answers; each example says where it stands."""
        bad_rows = BadRows(self.on_bad_row == "skip")
        found = self.read(self.files(path, "--data.predict_path"), bad_rows, answered=False)
        self.asked_fields = self.encode_asked(found, bad_rows)
        if not found:
            raise ValueError(f"{path} has no example; pass others by --data.predict_path")
        self.asked, self.has_answers = [{"place": place} | record for place, record in found], False
        told = {f"bad rows of {file}": count for file, count in bad_rows.skipped.items()} | dict(bad_rows.notes)
        for what, count in told.items():
            if count:
                print(f"note: {count:,} {what}", file=sys.stderr)

    def _open(self, build: bool) -> None:
        if self.start is not None and not Path(self.start).exists():
            hub.look_only_here_where_it_is_out_of_reach()
        hashes = ContentHashes(self.cache_dir / "file_hashes.json")
        train_files = None if self.path is None else self.files(self.path, "--data.path")
        val_files = self.files(self.val_path, "--data.val_path") if self.val_path else []
        if isinstance(self.path, str) and is_hub_name(self.path):
            train_files, of_the_set = train_files[:1], train_files[1:]
            val_files = val_files or of_the_set
        read = standard_library() if train_files is None else train_files
        digests = [[(text_format(file), hashes(file)) for file in files] for files in (read, val_files)]
        hashes.save()
        content = [FORMAT_VERSION, type(self).__name__, digests, self.val_fraction, self.on_bad_row, self.settings()]
        examples = partial(self._splits, train_files, val_files, BadRows(self.on_bad_row == "skip"))
        self.tokenizer = self._tokenizer(content, examples)
        self.prepare_tokenizer(self.tokenizer)
        content += [fingerprint(self.tokenizer), self.tokenizer.chat_template, self.max_length]
        self.tokenizer_digest = fingerprint(self.tokenizer)
        self.digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        folder = self.cache_dir / "examples" / self.digest
        self.store = open_examples(folder)
        if self.store is None and build:
            bad_rows = BadRows(self.on_bad_row == "skip")
            train, val = self._splits(train_files, val_files, bad_rows)
            fields_train, fields_val, about = self.encode(train, val, bad_rows)
            self._require_both(train, val)
            about |= {"skipped_rows": dict(bad_rows.skipped), "files": len(train_files or []) + len(val_files)}
            records = {"train": [record for _, record in train], "val": [record for _, record in val]}
            self.store = write_examples(folder, {"train": fields_train, "val": fields_val}, records, about)
        if self.store is None:
            raise ValueError(f"{self.source} changed since its examples were encoded; start again")

    def _tokenizer(
        self, content: list, examples: Callable[[], tuple[list[Numbered], list[Numbered]]]
    ) -> PreTrainedTokenizerBase:
        """The one that is asked for, else the model's, else one trained on these texts."""
        name = self.tokenizer_name or self.start
        if name is not None:
            try:
                return load_tokenizer(name)
            except (OSError, ValueError) as error:
                if self.tokenizer_name:
                    raise
                raise ValueError(str(error).replace("--data.tokenizer", "the tokenizer of --model.from")) from None
        key = hashlib.sha256(json.dumps(["bpe", self.new_vocab_size, *content]).encode()).hexdigest()

        def trained() -> PreTrainedTokenizerBase:
            texts = [self.texts(record) for _, record in examples()[0]]
            return bpe_tokenizer(texts, sum(map(len, texts)), self.new_vocab_size, "masked")

        return remembered(self.cache_dir / "tokenizers" / key, trained)

    def _splits(
        self, train_files: list[Path] | None, val_files: list[Path], bad_rows: BadRows
    ) -> tuple[list[Numbered], list[Numbered]]:
        if train_files is None:
            examples = [(f"example {i}", record) for i, record in enumerate(self.builtin(), 1)]
        else:
            examples = self.read(train_files, bad_rows)
        if val_files:
            val = self.read(val_files, bad_rows)
            self._require_both(examples, val)
            return examples, val
        keys = sorted({self.key(record) for _, record in examples}, key=_hash)
        # Of a few examples one is held out all the same, and one is trained on.
        count = sum(_hash(key) < self.val_fraction * 2**64 for key in keys)
        held_out = set(keys[: min(max(1, count), len(keys) - 1)])
        train = [(place, record) for place, record in examples if self.key(record) not in held_out]
        val = [(place, record) for place, record in examples if self.key(record) in held_out]
        self._require_both(train, val)
        return train, val

    def _require_both(self, train: list[Numbered], val: list[Numbered]) -> None:
        if not train:
            raise ValueError(f"{self.source} has no example to train on; pass more by --data.path")
        if not val:
            source = ", ".join(_listed(self.val_path)) if self.val_path else self.source
            share = "" if self.val_path else f" by --data.val_fraction {self.val_fraction}"
            raise ValueError(f"{source} has no example to hold out{share}; pass more by --data.val_path")

    @property
    def source(self) -> str:
        return "the Python standard library" if self.path is None else ", ".join(_listed(self.path))

    # Batches

    def train_dataloader(self) -> Loader:
        order = self.training_order(ByLength(self.costs(self.store.train), self.seed))
        return row_loader(_Split(self, self.store.train), order, self.num_workers)

    def val_dataloader(self) -> Loader:
        return self._asked_loader(self.max_val_examples)

    def test_dataloader(self) -> Loader:
        return self._asked_loader(None)

    def predict_dataloader(self) -> Loader:
        return self._asked_loader(None)

    def _asked_loader(self, most: int | None) -> Loader:
        rows_N = np.arange(len(self.asked_fields["input_ids"]))
        if most is not None and most < len(self.asked):  # spread evenly over them
            chosen = np.linspace(0, len(self.asked) - 1, most).round().astype(np.int64)
            rows_N = np.flatnonzero(np.isin(self.examples_of_rows(self.asked_fields), chosen))
        by_length_N = rows_N[np.argsort(self.costs(self.asked_fields)[rows_N], kind="stable")]
        batch_size = self.val_batch_size or self.batch_size
        rank, ranks = self.rank_and_ranks
        mixed_N = batches_mixed(by_length_N, batch_size * ranks)
        return row_loader(
            _Split(self, self.asked_fields), HeldOutOrder(mixed_N, batch_size, rank, ranks), self.num_workers
        )

    def examples_of_rows(self, fields: Fields) -> np.ndarray:
        """(N,) number of the example that each row is of."""
        return np.arange(len(fields["input_ids"]))

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return document_start(self.tokenizer) if pad is None else pad

    @property
    def skipped_rows(self) -> dict[str, int]:
        return self.store.about["skipped_rows"]

    def identity(self) -> dict[str, int | str]:
        return {"seed": self.seed, "examples": self.digest, "rows_per_epoch": self.rows_per_epoch}


class _Split:
    """What a loader asks for batches."""

    def __init__(self, data: Examples, fields: Fields):
        self.collate, self.fields = data.collate, fields

    def __len__(self) -> int:
        return len(self.fields["input_ids"])

    def __getitems__(self, numbers_and_examples: np.ndarray) -> Batch:
        return self.collate(self.fields, *numbers_and_examples)


def _hash(key: str) -> int:
    """64 bits."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:16], 16)


def _listed(path: str | list[str]) -> list[str]:
    return [path] if isinstance(path, str) else path
