"""Judge any causal or masked language model: by a text, by questions, by pairs of sentences, by its bias.

Run:
    python recipes/score.py --model runs/pretrain-DATE --data.path held_out.txt
    python recipes/score.py --model gpt2 --data.path news.jsonl --data.text_column body --stride 256 --json
    python recipes/score.py --model DIR --data.path stories.txt --data.separator "<|endoftext|>"
    python recipes/score.py --model DIR --task choices --data.path arc_easy.jsonl
    python recipes/score.py --model DIR --task pairs --data.path blimp.jsonl
    python recipes/score.py --model DIR --task crows_pairs --data.path crows_pairs_anonymized.csv
    python recipes/score.py --model runs/tuned/model-int4 --task tuned
    python recipes/score.py --model DIR --task generations --data.path held_out.txt --writing.train_path texts/

A causal model predicts each document from its beginning: the first token from the tokenizer's bos (else eos) token.
A masked model is scored by its pseudo-likelihood: each token masked once, predicted from all the others
(https://arxiv.org/abs/1910.14659); such numbers compare with those of masked models only.
Nothing but the text's own tokens is counted: special tokens are context. Questions become tokens as lm-eval makes them.
What each task wants of a file, and what its figures mean: docs/evaluation.md.
"""

import json as json_format
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveInt

from lightning_modules.command_line import OneLineParser, one_line_errors

if TYPE_CHECKING:
    from lightning_modules.evaluation.measures import Measures
    from lightning_modules.likelihood import Scorer
    from lightning_modules.model_folder import LoadedModel

Task = Literal[
    "text", "choices", "cloze", "pairs", "crows_pairs", "stereoset", "winobias", "bbq", "tuned", "generations"
]


@dataclass
class Texts:
    """Where the text is.

    Args:
        path: Files, folders or globs (txt, md, py, jsonl, json, csv, tsv, parquet; .gz .xz .zst of them), or of text a
            data set's name on the Hub.
        text_column: Column of the text in files that have columns.
        on_bad_row: What to do with a row that cannot be read.
        separator: A string that parts the documents of a file and belongs to none of them, with the white space
            around it.
    """

    path: list[str] | str | None = None
    text_column: str = "text"
    on_bad_row: Literal["error", "skip"] = "error"
    separator: str | None = None


@dataclass
class Writing:
    """How texts are written to be judged.

    Args:
        rows: Texts, each going on from the beginning of another held-out document.
        prompt_tokens: Of each of these beginnings.
        max_new_tokens: Of each text; less where the model ends it.
        temperature: Below 1 prefers the probable tokens, 0 takes the most probable one.
        seed: Of sampling.
        train_path: What the model was trained on, files or folders: how much of it is copied.
    """

    rows: PositiveInt = 64
    prompt_tokens: PositiveInt = 32
    max_new_tokens: PositiveInt = 128
    temperature: NonNegativeFloat = 1.0
    seed: int = 0
    train_path: list[str] | str | None = None


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
    writing: Writing,
    task: Task = "text",
    document_start: bool | None = None,
    config: Path | None = None,
    seq_len: PositiveInt | None = None,
    stride: PositiveInt | None = None,
    batch_size: PositiveInt | None = None,
    json: bool = False,
    tokenizer: str | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32",
    trust_remote_code: bool = False,
) -> None:
    """Judge a model and print the figures.

    Args:
        model: A run's folder, a transformers folder, or a name on the Hub.
        data: Where the text is.
        writing: Of generations.
        task: text: bits per byte. choices: questions with a right answer. cloze: a blank at the end. pairs: the good of
            two sentences. crows_pairs, stereoset, winobias, bbq: bias, from the files these are published as. tuned:
            the task that the model was fine-tuned for, by its own held-out examples. generations: what it writes,
            beside what really follows.
        document_start: Of all but text and tuned: whether a question begins with the token that opens a document. Left
            out: as the tokenizer does it.
        config: Of tuned: the config.yaml of the fine-tuning. Left out: that of the model's run.
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
    if task == "tuned":
        print_measures({str(model): of_tuning(model, config)}, model, task, as_json=json)
        return
    if data.path is None:
        raise ValueError("nothing to score; pass files by --data.path")
    if task != "text" and (seq_len or stride):
        raise ValueError(f"--{'seq_len' if seq_len else 'stride'} is for texts; leave it out with --task {task}")
    documents, questions = iter(()), {}
    if task in ("text", "generations"):
        documents = read_documents(data)
        first = next(documents, None)
        if first is None:
            raise ValueError(f"no text in {data.path}; pass other files by --data.path")
    else:
        questions = read_rows(data, task)
    from datamodules import hub
    from lightning_modules.model_folder import load

    loaded = load(model, tokenizer, device, dtype, trust_remote_code, hub.is_within_reach)
    if task == "generations":
        print_measures(of_writing(loaded, [first, *documents], writing), loaded.folder, task, as_json=json)
        return
    if task != "text":
        judged = judge(loaded, task, questions, document_start, batch_size)
        print_measures(judged, loaded.folder, task, as_json=json)
        return
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


def read_rows(data: Texts, task: Task) -> dict[str, list]:
    """By file, whole."""
    from datamodules import bias_rows
    from datamodules.files import ROW_FORMATS, BadRows, text_format
    from datamodules.questions import read_questions
    from datamodules.sources import find_files

    paths = [data.path] if isinstance(data.path, str) else data.path
    bad_rows = BadRows(skip=data.on_bad_row == "skip")
    if task == "winobias":
        files = [file for path in paths for file in (sorted(Path(path).glob("*_stereotyped_*")) or [Path(path)])]
        return {"WinoBias": list(bias_rows.read_winobias(files))}
    found = {}
    for file in find_files(paths, "--data.path"):
        if text_format(file) not in ROW_FORMATS and str(file) not in paths:  # what else lies in a folder
            continue
        if task == "crows_pairs":
            rows = bias_rows.read_crows_pairs(file, bad_rows)
        elif task == "stereoset":
            rows = bias_rows.read_stereoset(file)
        elif task == "bbq":
            rows = bias_rows.read_bbq(file, bad_rows)
        else:
            rows = read_questions(file, task, bad_rows)
        found[str(file)] = list(rows)
        if not found[str(file)]:
            raise ValueError(f"{file} has no row for --task {task}; pass other files by --data.path")
    if not found:
        raise ValueError(f"no file of rows in {data.path}; pass {', '.join(ROW_FORMATS)}")
    for name, count in bad_rows.skipped.items():
        print(f"note: {count} rows of {name} could not be read and are left out", file=sys.stderr)
    return found


def judge(
    loaded: "LoadedModel", task: Task, rows: dict[str, list], document_start: bool | None, batch_size: int | None
) -> "dict[str, Measures]":
    from lightning_modules.evaluation import bias, choices
    from lightning_modules.evaluation.continuations import Continuations

    if loaded.kind == "encoder-decoder":
        raise ValueError(f"{loaded.folder} is an encoder-decoder: it gives no probability to a text without a source")
    masked = loaded.kind == "masked"
    score = Continuations(loaded.model, loaded.tokenizer, masked, loaded.max_positions, document_start)
    of_bias = {"stereoset": bias.associations, "bbq": bias.bias_questions}
    of_bias |= {"crows_pairs": bias.contrasts, "winobias": bias.contrasts}
    if task in of_bias:
        return {file: of_bias[task](some, score, batch_size) for file, some in rows.items()}
    return {file: choices.JUDGES[task](some, choices.answered(some, score, batch_size)) for file, some in rows.items()}


def of_writing(loaded: "LoadedModel", documents: list[str], writing: Writing) -> "dict[str, Measures]":
    """Of what the model writes and, as its measure, of what stands there."""
    from lightning_modules.evaluation import generations
    from lightning_modules.evaluation.generations import Memory, Text

    if loaded.kind != "causal":
        raise ValueError(f"{loaded.folder} is no causal model: it writes nothing")
    room = writing.prompt_tokens + writing.max_new_tokens
    if loaded.max_positions is not None and room > loaded.max_positions:
        raise ValueError(f"--writing: {room} tokens, and the model has {loaded.max_positions} positions; pass fewer")
    tokenizer, prompts, real = loaded.tokenizer, [], []
    step = max(1, len(documents) // writing.rows)
    for document in documents[::step]:
        ids = tokenizer(document, split_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) > writing.prompt_tokens and len(prompts) < writing.rows:
            prompts.append(ids[: writing.prompt_tokens])
            rest = ids[writing.prompt_tokens : room]
            real.append(Text(rest, tokenizer.decode(rest, skip_special_tokens=True), len(ids) < room))
    if not prompts:
        raise ValueError(
            f"no document is longer than {writing.prompt_tokens} tokens; pass fewer --writing.prompt_tokens"
        )
    memory = None
    if writing.train_path is not None:
        memory = Memory("\n".join(read_documents(Texts(path=writing.train_path, on_bad_row="skip"))).encode())
    limits = (writing.max_new_tokens, writing.temperature, writing.seed)
    own = generations.written(loaded.model, tokenizer, prompts, *limits)
    return {
        "what the model writes": generations.judged(own, memory),
        "what follows in the text": generations.judged(real, memory),
    }


def of_tuning(model: str, config: Path | None) -> "Measures":
    """What the model's own task says, with the interval of the mean of the examples' scores."""
    from lightning_modules.compression.opened import done_so_far
    from lightning_modules.evaluation.measures import Measures
    from lightning_modules.model_folder import find_folder
    from lightning_modules.task_scores import task_config, task_scores

    folder = find_folder(model)
    config = config or task_config(folder) or task_config(str(done_so_far(folder)["source"]))
    if config is None:
        raise ValueError(f"no config.yaml of a fine-tuning beside {folder}; pass one by --config")
    found = task_scores(config, folder)
    of_all = {name: lambda means, value=value: value + 0 * means["score"] for name, value in found.metrics.items()}
    figures = {f"{found.by}": of_all.pop(found.by)} | of_all | {"score of an example": lambda means: means["score"]}
    return Measures({"score": found.scores_D}, [""] * len(found.scores_D), figures)


def print_measures(judged: "dict[str, Measures]", model: str, task: Task, as_json: bool) -> None:
    if as_json:
        found = {name: measures.summary() for name, measures in judged.items()}
        print(json_format.dumps({"task": task, "model": model, "files": found}))
        return
    for name, measures in judged.items():
        print(f"{name}: {len(measures):,}")
        print("\n".join(measures.lines()))


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
