"""Score a text with any causal or masked language model: nats per token, perplexity and bits per byte.

Run:
    python recipes/score.py --model runs/pretrain-DATE --data.path held_out.txt
    python recipes/score.py --model gpt2 --data.path news.jsonl --data.text_column body --stride 256 --json
    python recipes/score.py --model DIR --data.path stories.txt --data.separator "<|endoftext|>"

A causal model predicts each document from its beginning: the first token from the tokenizer's bos (else eos) token.
A masked model is scored by its pseudo-likelihood: each token masked once, predicted from all the others
(https://arxiv.org/abs/1910.14659); such numbers compare with those of masked models only.
Nothing but the text's own tokens is counted: special tokens are context.
"""

import json as json_format
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import PositiveInt

from lightning_modules.command_line import OneLineParser, one_line_errors

if TYPE_CHECKING:
    from lightning_modules.likelihood import Scorer
    from lightning_modules.model_folder import LoadedModel


@dataclass
class Texts:
    """Where the text is.

    Args:
        path: Files, folders or globs (txt, md, py, jsonl, json, csv, tsv, parquet; .gz .xz .zst of them), or a data
            set's name on the Hub.
        text_column: Column of the text in files that have columns.
        on_bad_row: What to do with a row that cannot be read.
        separator: A string that parts the documents of a file and belongs to none of them, with the white space
            around it.
    """

    path: list[str] | str
    text_column: str = "text"
    on_bad_row: Literal["error", "skip"] = "error"
    separator: str | None = None


def read_documents(texts: Texts) -> Iterator[str]:
    """Each document's text, whole."""
    from datamodules.documents import BadRows
    from datamodules.sources import TextFile, find_files, hub_splits, is_hub_name

    paths = [texts.path] if isinstance(texts.path, str) else texts.path
    if len(paths) == 1 and is_hub_name(paths[0]):
        sources = [rows for rows in hub_splits(paths[0]) if rows]
    else:
        sources = [TextFile(path, digest="") for path in find_files(paths, "--data.path")]
    bad_rows = BadRows(skip=texts.on_bad_row == "skip")
    for source in sources:
        held: list[str] = []
        for piece in source.pieces(texts.text_column, bad_rows):
            if piece.begins_document and held:
                yield from split_documents("".join(held), texts.separator)
                held = []
            held.append(piece.text)
        yield from split_documents("".join(held), texts.separator)
    for file, count in bad_rows.skipped.items():
        print(f"note: {count} rows of {file} could not be read and are left out", file=sys.stderr)


def split_documents(text: str, separator: str | None) -> list[str]:
    parts = [text] if separator is None else [part.strip() for part in text.split(separator)]
    return [part for part in parts if part]


def score(
    model: str,
    data: Texts,
    seq_len: PositiveInt | None = None,
    stride: PositiveInt | None = None,
    batch_size: PositiveInt | None = None,
    json: bool = False,
    tokenizer: str | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Score a text and print the figures.

    Args:
        model: A run's folder, a transformers folder, or a name on the Hub.
        data: Where the text is.
        seq_len: Tokens read at once; left out: as many as the model can, and at most 4096.
        stride: Tokens from one window of a long document to the next, each scored once; left out: half a window.
        batch_size: Windows at a time, which changes nothing but speed; left out: as many as hold 2,048 tokens
            (16,384 on a GPU).
        json: Print one JSON object.
        tokenizer: Folder or Hub name of a tokenizer, where the model's folder holds none.
        device: Where to compute.
        dtype: Precision of the weights; auto: as they were saved.
        trust_remote_code: Run the code that the model's folder brings along.
    """
    documents = read_documents(data)
    first = next(documents, None)
    if first is None:
        raise ValueError(f"no text in {data.path}; pass other files by --data.path")
    from datamodules import hub
    from lightning_modules.model_folder import load

    loaded = load(model, tokenizer, device, dtype, trust_remote_code, hub.is_within_reach)
    if loaded.kind == "encoder-decoder":
        raise ValueError(f"{loaded.folder} is an encoder-decoder: it gives no probability to a text without a source")
    from lightning_modules.likelihood import Scorer

    scorer = Scorer(
        loaded.model, loaded.tokenizer, loaded.kind == "masked", loaded.max_positions, seq_len, stride, sample=first
    )
    scorer.score(chain([first], documents), batch_size)
    if not scorer.total.tokens:
        raise ValueError(f"{data.path} holds no token that can be scored; pass a longer text")
    report(scorer, loaded, as_json=json)


def report(scorer: "Scorer", loaded: "LoadedModel", as_json: bool) -> None:
    total = scorer.total
    figures = {
        "nats_per_token": total.nats_per_token,
        "perplexity": total.perplexity,
        "bits_per_byte": total.bits_per_byte,
        "tokens": total.tokens,
        "bytes": total.bytes,
        "documents": scorer.documents,
    }
    settings = {
        "kind": loaded.kind,
        "seq_len": scorer.seq_len,
        "stride": scorer.stride,
        "tokens_not_counted": scorer.not_counted,
        "model": loaded.folder,
    }
    if as_json:
        print(json_format.dumps(figures | settings))
        return
    for name, figure in figures.items():
        value = f"{figure:.4f}" if isinstance(figure, float) else f"{figure:,}"
        print(f"{name.replace('_', ' '):<16}{value:>14}")
    kind = "pseudo-likelihood, each token masked once" if loaded.kind == "masked" else "causal"
    print(f"{kind}; windows of {scorer.seq_len} tokens, one every {scorer.stride}")
    if scorer.not_counted:
        print(f"not counted: {scorer.not_counted:,} first tokens; the tokenizer has no bos or eos to predict them from")


def main(arguments: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_function_arguments(score, as_group=False, skip={"json"})
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    options = parser.instantiate(parser.parse_args(arguments))
    with one_line_errors():
        score(**options)


if __name__ == "__main__":
    main()
