"""Texts with labels: sentiment and every other classification, pairs of texts, several labels, numbers."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from torch import from_numpy

from datamodules.base import IGNORED, Batch
from datamodules.columns import Column, find_columns
from datamodules.example_store import Fields, Ragged
from datamodules.examples import Examples, Numbered
from datamodules.files import BadRows
from datamodules.library_functions import by_package
from datamodules.records import Record, fault_of, records
from datamodules.tokenization import document_start

TEXT_NAMES = ("text", "sentence", "sentence1", "premise", "question1", "text_a", "review", "content", "document")
PAIR_NAMES = ("sentence2", "hypothesis", "question2", "text_b", "pair")
LABEL_NAMES = ("label", "labels", "class", "category", "sentiment", "target", "score", "similarity", "stars", "rating")
Kind = Literal["one", "several", "number"]


class Labelled(Examples):
    """Texts with labels, from csv, tsv, jsonl, json or parquet.

    Args:
        text_column: Column of the text, by name, or by number where there is no header. Left out: found by its name.
        pair_column: Column of a second text. Left out: found by its name, if there is one.
        label_column: Column of the label. Left out: found by its name.
        label_kind: one label, several (a list in json, separated by `label_separator` elsewhere), or a number to
            predict. Left out: several where labels are lists, a number where one of them has a decimal point.
        label_separator: Between several labels in csv and tsv.
    """

    objective = "labels"

    def __init__(
        self,
        *,
        text_column: str | None = None,
        pair_column: str | None = None,
        label_column: str | None = None,
        label_kind: Kind | None = None,
        label_separator: str = ",",
        **settings: object,
    ):
        super().__init__(**settings)
        self.text_column, self.pair_column, self.label_column = text_column, pair_column, label_column
        self.asked_kind, self.label_separator = label_kind, label_separator
        self.columns: dict[str, str] = {}
        """Of text, pair and label, as they were found in the first file."""

    @property
    def kind(self) -> Kind:
        return self.store.about["kind"]

    @property
    def label_names(self) -> list[str]:
        """By their numbers; of numbers to predict the one name "score"."""
        return self.store.about["labels"]

    # Rows

    def settings(self) -> dict[str, object]:
        columns = [self.text_column, self.pair_column, self.label_column]
        return {"columns": columns, "kind": self.asked_kind, "separator": self.label_separator}

    def builtin(self) -> Iterator[Record]:
        return ({"text": source, "label": package} for source, package in by_package())

    def read(self, files: list[Path], bad_rows: BadRows, answered: bool = True) -> list[Numbered]:
        """As in `self.columns`, by what it is."""
        return [example for file in files for example in self._read(file, bad_rows, answered)]

    def _read(self, file: Path, bad_rows: BadRows, answered: bool) -> Iterator[Numbered]:
        header, columns = self._columns(file, answered)
        self.columns = self.columns or columns
        for number, row in records(file, bad_rows, list(columns.values()), "label_column", header):
            place = f"{file}:{number}"
            record = {name: row[column] for name, column in columns.items()}
            faults = [f"{columns[name]!r} {fault}" for name in columns if (fault := self._fault(name, record[name]))]
            if faults:
                bad_rows.add(str(file), f"{place}: {faults[0]}")
            else:
                yield place, record

    def _fault(self, name: str, value: object) -> str | None:
        """What is wrong with a text or a label, if anything is."""
        if name != "label":
            return fault_of(value) or (None if value.strip() else "is empty")
        if value is None or (isinstance(value, str) and not value.strip() and self.asked_kind != "several"):
            return "is empty"
        if not isinstance(value, str | int | float | list):
            return f"is no label but {type(value).__name__}"
        if isinstance(value, float) and not _is_number(value):
            return f"is {value}"
        return None

    def _columns(self, file: Path, answered: bool) -> tuple[bool, dict[str, str]]:
        """Whether a file has a header, and the columns of text, pair and, where it is answered, label."""
        wanted = {
            "text": Column(TEXT_NAMES, self.text_column),
            "pair": Column(PAIR_NAMES, self.pair_column, required=False),
        }
        if answered:
            wanted["label"] = Column(LABEL_NAMES, self.label_column)
        header, columns = find_columns(file, wanted)
        asked = [column for column in wanted.values() if column.asked is not None]
        if answered and not header and not asked and len(columns) == 2:
            return False, _two_columns(file)
        return header, columns

    def key(self, record: Record) -> str:
        return "\0".join(str(record[name]) for name in ("text", "pair") if name in record)

    def texts(self, record: Record) -> str:
        return " ".join(str(record[name]) for name in ("text", "pair") if name in record)

    # Numbers

    def encode(self, train: list[Numbered], val: list[Numbered], bad_rows: BadRows) -> tuple[Fields, Fields, dict]:
        kind = self.asked_kind or _kind([record["label"] for _, record in train])
        labels = [] if kind == "number" else _names_of(self._split(r["label"], kind) for _, r in train)
        if not labels and kind != "number":
            raise ValueError(f"{self.source} has no label at all; pass --data.label_column")
        if kind == "one" and len(labels) < 2:
            raise ValueError(f"{self.source} has one label only, {labels[0]!r}; there is nothing to learn")
        number = {label: i for i, label in enumerate(labels)}
        fields, cut = {}, 0
        for split, examples in (("train", train), ("val", val)):
            values, known = [], []
            for place, record in examples:
                found = self._split(record["label"], kind)
                if kind == "number":
                    fault = None if _is_number(found[0]) else f"label {found[0]!r} is no number"
                else:
                    unknown = [label for label in found if label not in number]
                    fault = f"label {unknown[0]!r} is in no training example" if unknown else None
                if fault:
                    bad_rows.add(place.rpartition(":")[0], f"{place}: {fault}")
                    continue
                known.append((place, record))
                values.append([float(found[0])] if kind == "number" else [number[label] for label in found])
            examples[:] = known
            fields[split], cut_here = self._token_fields([record for _, record in examples])
            fields[split]["labels"] = _label_array(values, kind, len(labels))
            cut += cut_here
        counts = Counter(label for _, record in train for label in self._split(record["label"], kind))
        about = {
            "kind": kind,
            "labels": labels or ["score"],
            "columns": self.columns,
            "counts": {label: counts[label] for label in labels},
            "cut_off": cut,
        }
        return fields["train"], fields["val"], about

    def encode_asked(self, examples: list[Numbered], bad_rows: BadRows) -> Fields:
        rows = [record for _, record in examples]
        fields, cut = self._token_fields(rows)
        bad_rows.notes["examples cut off"] += cut
        none = {"one": [0], "several": [], "number": [0.0]}[self.kind]
        return fields | {"labels": _label_array([none] * len(rows), self.kind, len(self.label_names))}

    def _token_fields(self, rows: list[Record]) -> tuple[Fields, int]:
        """Ids and token types, and how many examples were cut off."""
        ids, types, cut = self._tokens(rows)
        fields: Fields = {"input_ids": Ragged.of(ids)}
        return (fields | {"token_type_ids": Ragged.of(types)} if types else fields), cut

    def _split(self, label: object, kind: Kind) -> list[str]:
        if kind != "several":
            return [_name(label)]
        parts = label if isinstance(label, list) else str(label).split(self.label_separator)
        return [name for part in parts if (name := _name(part))]

    def _tokens(self, rows: list[Record]) -> tuple[list[list[int]], list[list[int]], int]:
        """Ids, token types where the tokenizer has them, and how many examples were cut off."""
        if not rows:
            return [], [], 0
        texts = [str(row["text"]) for row in rows]
        pairs = [str(row["pair"]) for row in rows] if "pair" in rows[0] else None
        tokenizer = self.tokenizer
        if tokenizer.num_special_tokens_to_add(pair=pairs is not None) == 0:
            # One that was made for pretraining: each text begins as a document does.
            start = [document_start(tokenizer)]
            ids = [start + text for text in tokenizer(texts, add_special_tokens=False)["input_ids"]]
            if pairs:
                second = tokenizer(pairs, add_special_tokens=False)["input_ids"]
                ids = [a + start + b for a, b in zip(ids, second, strict=True)]
            return [row[: self.max_length] for row in ids], [], sum(len(row) > self.max_length for row in ids)
        encoded = tokenizer(texts, pairs, verbose=False)
        cut = sum(len(row) > self.max_length for row in encoded["input_ids"])
        if cut:
            encoded = tokenizer(texts, pairs, truncation="longest_first", max_length=self.max_length)
        return encoded["input_ids"], encoded.get("token_type_ids") or [], cut

    # Batches

    def collate(self, fields: Fields, numbers_B: np.ndarray, examples_B: np.ndarray) -> Batch:
        ids: Ragged = fields["input_ids"]
        ids_BT = ids.padded(examples_B, self.pad_id)
        lengths_B = np.where(examples_B < 0, 1, ids.lengths[examples_B])
        mask_BT = (np.arange(ids_BT.shape[1]) < lengths_B[:, None]).astype(np.int64)
        labels = fields["labels"][np.maximum(examples_B, 0)]
        labels[examples_B < 0] = IGNORED
        batch = Batch(
            input_ids=from_numpy(ids_BT),
            attention_mask=from_numpy(mask_BT),
            labels=from_numpy(labels),
            rows=from_numpy(numbers_B),
        )
        if "token_type_ids" in fields:
            batch["token_type_ids"] = from_numpy(fields["token_type_ids"].padded(examples_B, 0))
        return batch

    # What it is

    def shown(self, example: int) -> list[tuple[str, bool]]:
        text = self.tokenizer.decode(self.store.train["input_ids"][example])
        return [(text, False), (str(self.store.records("train")[example]["label"]), True)]

    def plan(self) -> dict[str, str]:
        about = self.store.about
        examples = [len(self.store.train["input_ids"]), len(self.store.val["input_ids"])]
        tokens = int(self.lengths.sum())
        kinds = {"one": "one of", "several": "any of", "number": "a number, "}
        counts = about["counts"]
        shown = ", ".join(f"{name} {counts[name]:,}" for name in self.label_names[:8] if name in counts)
        return {
            "text": f"{self.source}: {examples[0]:,} examples, {tokens:,} tokens",
            "columns": ", ".join(f"{name} from {column!r}" for name, column in about["columns"].items()),
            "held out": f"{examples[1]:,} examples",
            "labels": f"{kinds[self.kind]} {len(self.label_names)}: {shown}{', …' * (len(self.label_names) > 8)}",
            "cut off": f"{about['cut_off']:,} examples at {self.max_length} tokens" if about["cut_off"] else "",
            "skipped": ", ".join(f"{count:,} bad rows of {file}" for file, count in about["skipped_rows"].items()),
        }


def _two_columns(file: Path) -> dict[str, str]:
    """Of a table without a header: the column with fewer different values holds the labels."""
    values = [set(), set()]
    for _, row in records(file, BadRows(skip=True), header=False):
        for i in (0, 1):
            values[i].add(row[str(i)])
    label = int(len(values[1]) < len(values[0]))
    return {"text": str(1 - label), "label": str(label)}


def _is_number(label: object) -> bool:
    try:
        return np.isfinite(float(label))
    except (TypeError, ValueError):
        return False


def _kind(labels: list[object]) -> Kind:
    if any(isinstance(label, list) for label in labels):
        return "several"
    numbers = all(_is_number(label) for label in labels)
    return "number" if numbers and any(float(label) != int(float(label)) for label in labels) else "one"


def _name(label: object) -> str:
    return str(label).strip()


def _names_of(labels: Iterator[list[str]]) -> list[str]:
    """Every label once: numbers in their order, others by the alphabet."""
    names = {name for found in labels for name in found}
    return sorted(names, key=(lambda name: (float(name), name)) if all(map(_is_number, names)) else None)


def _label_array(values: list[list[float]], kind: Kind, labels: int) -> np.ndarray:
    """(N,) int64 of one label, (N, labels) float32 of several, (N,) float32 of numbers."""
    if kind == "one":
        return np.array([value for (value,) in values], np.int64)
    if kind == "number":
        return np.array([value for (value,) in values], np.float32)
    several = np.zeros((len(values), labels), np.float32)
    for row, found in zip(several, values, strict=True):
        row[found] = 1
    return several
