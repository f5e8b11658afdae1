"""How fast text becomes tokens on disk: MB of text per CPU-second (user + system), everything on one core.

Run:
    python benchmarks/encoding.py                   the standard library, a BPE of 4,096
    python benchmarks/encoding.py --path DIR --tokenizer gpt2_folder --rounds 5

Rows, interleaved: `encode_corpus` (reading the files, encoding, proving the ids on samples, writing the store),
tiktoken's own `encode_ordinary` over the same documents in memory, and `datasets.map` with the fast tokenizer, batched.
"""

import argparse
import os
import resource
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from datamodules.encode_corpus import corpus_tokenizer, encode_corpus
from datamodules.text import Text
from datamodules.tokenization import byte_characters


def on_one_core() -> None:
    """Two threads of one core, or two busy cores of a small machine, would each count as a slower CPU-second."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def measured(work: Callable[[], object]) -> float:
    before = cpu_seconds()
    work()
    return cpu_seconds() - before


def raw_tiktoken(data: Text, documents: list[str]) -> Callable[[], object]:
    """The peer: tiktoken on the tokenizer's ranks, made here without our code."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    byte_of = {char: byte for byte, char in enumerate(byte_characters())}
    specials = set(data.tokenizer.all_special_tokens)
    vocab = {token: i for token, i in data.tokenizer.get_vocab().items() if token not in specials}
    ranks = {bytes(byte_of[char] for char in token): i for token, i in vocab.items()}
    encoding = tiktoken.Encoding("raw", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    return lambda: [encoding.encode_ordinary(document) for document in documents]


def datasets_map(data: Text, documents: list[str]) -> Callable[[], object]:
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    table = datasets.Dataset.from_dict({"text": documents})
    return lambda: table.map(lambda rows: data.tokenizer(rows["text"]), batched=True, remove_columns=["text"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default=None)
    parser.add_argument("--tokenizer", default="bpe")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    on_one_core()
    with tempfile.TemporaryDirectory() as cache:
        data = Text(path=options.path, tokenizer=options.tokenizer, cache_dir=cache)
        data.prepare_data()
        data.setup("fit")
        documents = [text for split in ("train", "val") for text in data.documents(split)]
        megabytes = sum(len(document.encode()) for document in documents) / 1e6
        tokenizer = corpus_tokenizer(options.tokenizer, data.corpus, data.objective, data.bpe_vocab_size, Path(cache))
        folders = iter(Path(cache, f"round{i}") for i in range(options.rounds))
        rows = {
            "encode_corpus": lambda: encode_corpus(next(folders), data.corpus, tokenizer, data.vocab_size),
            "tiktoken encode_ordinary": raw_tiktoken(data, documents),
            "datasets.map, batched": datasets_map(data, documents),
        }
        seconds: dict[str, list[float]] = {name: [] for name in rows}
        for _ in range(options.rounds):
            for name, work in rows.items():
                seconds[name].append(measured(work))
    print(f"{len(documents):,} documents, {megabytes:.1f} MB, vocabulary {data.vocab_size:,}")
    for name, times in seconds.items():
        rates = sorted(megabytes / time for time in times)
        print(f"{name:26} {statistics.median(rates):6.2f} MB per CPU-second ({rates[0]:.2f} to {rates[-1]:.2f})")


if __name__ == "__main__":
    main()
