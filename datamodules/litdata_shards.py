"""Token shards that the litdata package has written for its TokensLoader, read without it.

A chunk is the number of its items, uint32; where each begins in the file and the last one ends, uint32; their bytes.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from datamodules.prepared import Place, Prepared, Shard, ShardedStream, place_of
from datamodules.token_store import Counts
from datamodules.tokenization import load_tokenizer

INDEX = "index.json"
OF_TORCH = {11: "uint8", 13: "int16", 14: "int16", 15: "int32", 16: "int32", 17: "int64", 18: "int64", 20: "uint16"}
OF_NUMPY = dict(enumerate(("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")))
"""What the numbers in its `data_format` stand for."""
MOST_DECODED = 2_000_000
"""Tokens whose text is made to find the bytes of a token."""


def is_litdata(path: object, cache: Path) -> bool:
    if not isinstance(path, str) or not path or not (place := place_of(path, cache)).exists(INDEX):
        return False
    try:
        index = json.loads(place.head(INDEX)[0])
    except ValueError:  # of a folder of texts, one of which has this name
        return False
    return isinstance(index, dict) and {"chunks", "config"} <= index.keys()


def open_litdata(path: str, val_path: str, tokenizer_name: str, cache: Path) -> Prepared:
    """Both splits, each in a folder of its own; an item is a document."""
    tokenizer = load_tokenizer(tokenizer_name)
    (train, dtype, kept), (val, dtype_of_val, kept_of_val) = (_shards(place_of(p, cache)) for p in (path, val_path))
    if dtype != dtype_of_val:
        raise ValueError(f"{path} has {dtype} and {val_path} {dtype_of_val}; write them alike")
    share = _bytes_per_token(_stream(val, dtype, kept_of_val, bytes_per_token=0.0), tokenizer)
    streams = [_stream(train, dtype, kept, share), _stream(val, dtype, kept_of_val, share)]
    about = {"files": len(train) + len(val), "duplicates": 0, "skipped_rows": {}, "empty_rows": 0, "encoder": "litdata"}
    digest = hashlib.sha256(repr([(s.name, s.tokens, s.documents) for s in (*train, *val)]).encode()).hexdigest()
    return Prepared((path, val_path), *streams, tokenizer, digest, about)


def _shards(place: Place) -> tuple[list[Shard], str, Path]:
    """With their dtype, and where what is read of them is kept."""
    url = place.url
    try:
        content, place = place.head(INDEX)
        index = json.loads(content)
        config = index["config"]
        kind, _, number = config["data_format"][0].partition(":")
        tables = {"no_header_tensor": OF_TORCH, "no_header_numpy": OF_NUMPY}
        dtype = tables.get(kind, {}).get(int(number or -1))
        if dtype is None or len(config["data_format"]) != 1:
            raise ValueError(f"{url} holds {config['data_format']}, no one-dimensional tensors of whole numbers")
        if config.get("item_loader", "TokensLoader") != "TokensLoader":
            raise ValueError(f"{url} was written for {config['item_loader']}; write it with item_loader=TokensLoader()")
        if config.get("compression") or config.get("encryption"):
            raise ValueError(f"{url} is compressed or encrypted, which is not read by ranges; write it without")
        return [_shard(place, chunk["filename"], dtype) for chunk in index["chunks"]], dtype, place.cache
    except (KeyError, IndexError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{url}/{INDEX} is no index of litdata ({error!r})") from None


def _shard(place: Place, name: str, dtype: str) -> Shard:
    starts, begin = item_starts(place, name, dtype)
    return Shard(place.url, name, int(starts[-1]), len(starts) - 1, file=name, begin=begin)


def item_starts(place: Place, name: str, dtype: str) -> tuple[np.ndarray, int]:
    """(items + 1,) int64 where each begins, in tokens, and the last one ends; and the byte where the first begins."""
    with place.open(name) as file:
        items = int(np.frombuffer(file.read(4), np.uint32)[0])
        offsets = np.frombuffer(file.read(4 * (items + 1)), np.uint32).astype(np.int64)
    return (offsets - offsets[0]) // np.dtype(dtype).itemsize, int(offsets[0])


def _stream(shards: list[Shard], dtype: str, cache: Path, bytes_per_token: float) -> ShardedStream:
    tokens, documents = sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards)
    counts = Counts(documents, round(tokens * bytes_per_token), tokens - documents, 0)
    return ShardedStream(tuple(shards), dtype, counts, cache)


def _bytes_per_token(stream: ShardedStream, tokenizer: PreTrainedTokenizerBase) -> float:
    """Of the first held-out documents."""
    bounds, size = stream.document_bounds, 0
    last = max(1, int(np.searchsorted(bounds, MOST_DECODED)))
    for begin, end in zip(bounds[:last], bounds[1 : last + 1], strict=False):
        size += len(tokenizer.decode(stream.tokens_N[int(begin) : int(end)], skip_special_tokens=True).encode())
    return size / max(1, int(bounds[min(last, len(bounds) - 1)]))
