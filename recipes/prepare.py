"""Make shards of tokens out of text, once, for any number of runs and machines.

Run:
    python recipes/prepare.py --data.path texts/ --data.tokenizer gpt2 --output prepared/texts
    python recipes/prepare.py --data.path 'web/*.jsonl.zst' --data.tokenizer gpt2 --output prepared/web --workers 16
    python recipes/pretrain.py fit --data.path prepared/texts
    python recipes/pretrain.py fit --data.path '{prepared/texts: 0.3, prepared/web: 0.7}'

The same command goes on where it was interrupted. Of equal documents one stays, a held-out one before all others.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from lightning_modules.command_line import OneLineParser, fail, one_line_errors


@dataclass
class Texts:
    """What is read.

    Args:
        path: Files, folders or globs, or the name of a Hub data set. Left out: the Python standard library.
        val_path: Held-out text, like `path`. Left out: a part of `path`.
        val_fraction: Share of the files to hold out, by a hash of their content; of a single file its last part.
        text_column: The column that holds the text, where a document is a row.
        tokenizer: bpe (trained on the text), bytes, chars, a folder, or a Hub name.
        vocab_size: Ids of the bpe tokenizer, special tokens included.
        objective: causal, masked or denoising: which special tokens a new tokenizer has.
        on_bad_row: What to do with a row that cannot be read: stop with an error, or skip and count it.
    """

    path: str | list[str] | None = None
    val_path: str | list[str] | None = None
    val_fraction: float = 0.05
    text_column: str = "text"
    tokenizer: str = "bpe"
    vocab_size: PositiveInt = 4096
    objective: Literal["causal", "masked", "denoising"] = "causal"
    on_bad_row: Literal["error", "skip"] = "error"


def make(
    output: Path,
    data: Texts,
    shard_tokens: PositiveInt = 50_000_000,
    workers: PositiveInt | None = None,
    remove_copies: bool = True,
) -> None:
    """Reads, encodes and writes.

    Args:
        output: The folder to write; one that was begun is finished.
        data: The text and its tokenizer.
        shard_tokens: Tokens of a shard, about.
        workers: Processes. Left out: one for each core.
        remove_copies: Whether of equal documents only one stays.
    """
    import os

    from datamodules.cache_folders import cache_root
    from datamodules.corpus import open_corpus
    from datamodules.encode_corpus import corpus_tokenizer
    from datamodules.prepare import prepare
    from datamodules.prepared import HEADER
    from datamodules.sources import ContentHashes

    if (output / HEADER).exists():
        raise FileExistsError(f"{output} is prepared already; write into a new folder")
    if not 0 < data.val_fraction < 1:
        raise ValueError(f"--data.val_fraction is {data.val_fraction}; it must lie between 0 and 1, both excluded")
    cache = cache_root(None)
    hashes = ContentHashes(cache / "file_hashes.json")
    skips = data.on_bad_row == "skip"
    corpus = open_corpus(data.path, data.val_path, data.val_fraction, data.text_column, skips, hashes)
    tokenizer = corpus_tokenizer(data.tokenizer, corpus, data.objective, data.vocab_size, cache)
    found = prepare(corpus, tokenizer, output, shard_tokens, workers or os.cpu_count() or 1, remove_copies)
    for split, name in (("train", "train"), ("val", "held out")):
        counts = found["counts"][split]
        size, shards = f"{counts['bytes'] / 1e6:,.2f} MB", len(found[split])
        print(f"{name:<9} {counts['documents']:,} documents, {size}, {counts['tokens']:,} tokens in {shards} shards")
    about = found["about"]
    bad_rows, empty_rows = sum(about["skipped_rows"].values()), about["empty_rows"]
    print(f"left out  {about['duplicates']:,} copies of documents, {bad_rows:,} bad rows, {empty_rows:,} empty ones")
    print(f"next      python recipes/pretrain.py fit --data.path {shlex.quote(str(output))}")


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_function_arguments(make, as_group=False)
    options = parser.instantiate(parser.parse_args(arguments))
    try:
        with one_line_errors():
            make(**options)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", code=130)


if __name__ == "__main__":
    sys.exit(main())
