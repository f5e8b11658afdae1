"""Texts by which models are calibrated and judged, split as pretraining with the same flags splits them."""

import sys
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from jsonargparse.typing import PositiveInt


@dataclass
class Texts:
    """What a model is calibrated on and, held out from it, judged by.

    Args:
        path: Files, folders or globs (txt, md, py, jsonl, json, csv, tsv, parquet; .gz .xz .zst of them), or a data
            set's name on the Hub. Left out: the Python standard library on this machine.
        val_path: Held-out text, like `path`. Left out: a part of `path`.
        val_fraction: Share of the files to hold out, by a hash of their content; of a single file its last part.
        text_column: Column of the text in files that have columns.
        separator: A string that parts the documents of a file.
        max_val_documents: Judge by so many documents, spread evenly.
    """

    path: list[str] | str | None = None
    val_path: list[str] | str | None = None
    val_fraction: float = 0.05
    text_column: str = "text"
    separator: str | None = None
    max_val_documents: PositiveInt = 64


def documents(data: Texts, split: Literal["train", "val"]) -> list[str]:
    """Of a split, whole; as pretraining with the same flags splits them. Of the training text the first 4,096. Says
    how much held-out text it is."""
    from datamodules.cache_folders import cache_root
    from datamodules.corpus import open_corpus
    from datamodules.sources import ContentHashes

    hashes = ContentHashes(cache_root(None) / "file_hashes.json")
    corpus = open_corpus(data.path, data.val_path, data.val_fraction, data.text_column, False, hashes)
    parts = (part for text in corpus.documents(split) for part in split_at(text, data.separator))
    if split == "train":
        return list(islice(parts, 4096))
    found = list(parts)
    step = max(1, -(-len(found) // data.max_val_documents))
    if not found:
        raise ValueError("the held-out text is empty; pass other files by --data.val_path")
    found = found[::step]
    whole = "" if data.val_path is not None else ", held out; --data.val_path judges by a text as a whole"
    size = sum(len(text.encode()) for text in found)
    print(f"judging by {len(found):,} documents, {size:,} bytes{whole}", file=sys.stderr)
    return found


def split_at(text: str, separator: str | None) -> list[str]:
    parts = [text] if separator is None else [part.strip() for part in text.split(separator)]
    return [part for part in parts if part]
