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
    *("text", "choices", "cloze", "pairs"),
    *("crows_pairs", "stereoset", "winobias", "bbq"),
    *("tuned", "generations", "lm_eval"),
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
class Harness:
    """Tasks of lm-evaluation-harness.

    Args:
        tasks: By name, one or several.
        include_path: A folder with tasks as YAML, of files on this machine for example; only these are known then.
        few_shot: Examples before each question. Left out: as the task says.
    """

    tasks: list[str] | str | None = None
    include_path: Path | None = None
    few_shot: int | None = None


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
    from datamodules.held_out import split_at
    from datamodules.sources import TextFile, find_files, hub_splits, is_hub_name

    paths = [texts.path] if isinstance(texts.path, str) else texts.path
    if len(paths) == 1 and is_hub_name(paths[0]):
        train, validation = hub_splits(paths[0], "--data.path")
        sources = [validation or train]
        print(f"note: of {paths[0]} the {'validation' if validation else 'training'} split is read", file=sys.stderr)
    else:
        sources = [TextFile(path, digest="") for path in find_files(paths, "--data.path")]
    bad_rows = BadRows(skip=texts.on_bad_row == "skip")
    for source in sources:
        held: list[str] = []
        for piece in source.pieces(texts.text_column, bad_rows):
            if piece.begins_document and held:
                yield from split_at("".join(held), texts.separator)
                held = []
            held.append(piece.text)
        yield from split_at("".join(held), texts.separator)
    for file, count in bad_rows.skipped.items():
        print(f"note: {count} rows of {file} could not be read and are left out", file=sys.stderr)


def score(
    model: str,
    data: Texts,
    writing: Writing,
    lm_eval: Harness,
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
        lm_eval: Of lm_eval.
        task: text: bits per byte. choices: questions with a right answer. cloze: a blank at the end. pairs: the good of
            two sentences. crows_pairs, stereoset, winobias, bbq: bias, from the files these are published as. tuned:
            the task that the model was fine-tuned for, by its own held-out examples. generations: what it writes,
            beside what really follows. lm_eval: tasks of lm-evaluation-harness.
        document_start: Of choices, cloze, stereoset and bbq: whether a question begins with the token that opens a
            document. Left out: as the tokenizer does it.
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
    given = {"seq_len": seq_len, "stride": stride, "document_start": document_start, "config": config}
    given |= {"data.path": data.path, "tokenizer": tokenizer, "batch_size": batch_size}
    given |= {"device": None if device == "auto" else device, "dtype": None if dtype == "float32" else dtype}
    require_used(task, {name for name, value in given.items() if value is not None}, lm_eval)
    if task == "tuned":
        from lightning_modules.evaluation.tasks import of_tuning

        print_measures({str(model): of_tuning(model, config)}, model, task, as_json=json)
        return
    documents, rows = iter(()), {}
    if task in ("text", "generations"):
        documents = read_documents(data)
        first = next(documents, None)
        if first is None:
            raise ValueError(f"no text in {data.path}; pass other files by --data.path")
    elif task != "lm_eval":
        from datamodules.judged_rows import read_rows

        paths = [data.path] if isinstance(data.path, str) else data.path
        rows = read_rows(paths, task, data.on_bad_row == "skip")
    from datamodules import hub
    from lightning_modules.model_folder import load

    loaded = load(model, tokenizer, device, dtype, trust_remote_code, hub.is_within_reach)
    if document_start is not None and loaded.kind == "masked":
        raise ValueError(f"--document_start changes nothing of {loaded.folder}, a masked model; leave it out")
    if task == "lm_eval":
        print_results(loaded, lm_eval, as_json=json)
        return
    if task == "generations":
        from lightning_modules.evaluation.tasks import of_writing

        settings = vars(writing).copy()
        trained_on = settings.pop("train_path")
        if trained_on is not None:
            trained_on = "\n".join(read_documents(Texts(path=trained_on, on_bad_row="skip")))
        judged = of_writing(loaded, [first, *documents], **settings, trained_on=trained_on)
        print_measures(judged, loaded.folder, task, as_json=json)
        return
    if task != "text":
        from lightning_modules.evaluation.tasks import judged as by_rows

        judged = by_rows(loaded, task, rows, document_start, batch_size)
        print_measures(judged, loaded.folder, task, as_json=json)
        return
    if loaded.kind == "encoder-decoder":
        from lightning_modules.span_likelihood import SpanScorer

        if stride is not None:
            raise ValueError("--stride is for causal and masked models; leave it out for an encoder-decoder")
        scorer = SpanScorer(loaded.model, loaded.tokenizer, seq_len)
    else:
        from lightning_modules.likelihood import Scorer

        masked = loaded.kind == "masked"
        scorer = Scorer(loaded.model, loaded.tokenizer, masked, loaded.max_positions, seq_len, stride, sample=first)
    scorer.score(chain([first], documents), batch_size)
    if not scorer.total.tokens:
        raise ValueError(f"{data.path} holds no token that can be scored; pass a longer text")
    report(scorer, loaded, as_json=json)


USED = {
    "text": {"data.path", "seq_len", "stride", "tokenizer", "batch_size", "device", "dtype"},
    "generations": {"data.path", "tokenizer", "device", "dtype"},
    "tuned": {"config"},
    "lm_eval": {"tokenizer", "device", "dtype"},
}
OF_ROWS = {"data.path", "tokenizer", "batch_size", "device", "dtype"}
"""Flags by which a task is judged."""
CONTEXTS = ("choices", "cloze", "stereoset", "bbq")
"""Tasks of texts that go on from another one, in front of which a document may begin or not."""


def require_used(task: Task, given: set[str], lm_eval: Harness) -> None:
    """Raises ValueError for what is missing, and for flags that the task would pass over."""
    used = USED.get(task, OF_ROWS) | ({"document_start"} if task in CONTEXTS else set())
    if passed_over := sorted(given - used):
        raise ValueError(f"--{passed_over[0]} changes nothing with --task {task}; leave it out")
    if task == "lm_eval" and not lm_eval.tasks:
        raise ValueError("no task; pass --lm_eval.tasks arc_easy, or '[arc_easy, piqa]'")
    if "data.path" in used - given:
        raise ValueError("nothing to score; pass files by --data.path")


def print_results(loaded: "LoadedModel", lm_eval: Harness, as_json: bool) -> None:
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ValueError("--task lm_eval needs lm-eval, which is not installed: pip install -e '.[score]'")
    from lightning_modules.evaluation.harness import lines, run_tasks

    tasks = [lm_eval.tasks] if isinstance(lm_eval.tasks, str) else lm_eval.tasks
    found = run_tasks(loaded, tasks, lm_eval.include_path, lm_eval.few_shot)
    if as_json:
        print(json_format.dumps({"task": "lm_eval", "model": loaded.folder, "results": found}))
        return
    print("\n".join(lines(found)))


def print_measures(judged: "dict[str, Measures]", model: str, task: Task, as_json: bool) -> None:
    if as_json:
        found = {name: measures.summary() for name, measures in judged.items()}
        print(json_format.dumps({"task": task, "model": model, "files": found}))
        return
    for name, measures in judged.items():
        print(f"{name}: {len(measures):,}")
        print("\n".join(measures.lines()))


KINDS = {
    "causal": "causal",
    "masked": "pseudo-likelihood, each token masked once",
    "encoder-decoder": "pseudo-likelihood, each span of three tokens left out once",
}


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
        "unknown_tokens": scorer.unknown,
        "model": loaded.folder,
    }
    if as_json:
        print(json_format.dumps(figures | settings))
        return
    for name, figure in figures.items():
        value = f"{figure:.4f}" if isinstance(figure, float) else f"{figure:,}"
        print(f"{name.replace('_', ' '):<16}{value:>14}")
    print(f"{KINDS[loaded.kind]}; windows of {scorer.seq_len} tokens, one every {scorer.stride}")
    if scorer.unknown:
        print(f"{scorer.unknown:,} tokens stand for what the tokenizer has no words for, whose bytes are counted, too")
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
