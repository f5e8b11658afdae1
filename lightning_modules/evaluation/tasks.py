"""A loaded model judged by one kind of rows, by its own texts, or by the task that it was fine-tuned for."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.compression.opened import done_so_far
from lightning_modules.evaluation import bias, choices, generations
from lightning_modules.evaluation.continuations import Continuations
from lightning_modules.evaluation.generations import Memory, Text
from lightning_modules.evaluation.measures import Measures
from lightning_modules.model_folder import LoadedModel, find_folder
from lightning_modules.task_scores import task_config, task_scores

BIAS = {
    "stereoset": bias.associations,
    "bbq": bias.bias_questions,
    "crows_pairs": bias.contrasts,
    "winobias": bias.contrasts,
}


def judged(
    loaded: LoadedModel, task: str, rows: dict[str, list], document_start: bool | None, batch_size: int | None
) -> dict[str, Measures]:
    """By file."""
    if loaded.kind == "encoder-decoder":
        raise ValueError(f"{loaded.folder} is an encoder-decoder: it gives no probability to a text without a source")
    masked = loaded.kind == "masked"
    score = Continuations(loaded.model, loaded.tokenizer, masked, loaded.max_positions, document_start)
    if task in ("crows_pairs", "winobias", "stereoset"):
        rows = {file: bias.fitting(some, bias.sentences_of, [score]) for file, some in rows.items()}
    if task in BIAS:
        found = {file: BIAS[task](some, score, batch_size) for file, some in rows.items()}
    else:
        answers = {file: choices.answered(some, score, batch_size) for file, some in rows.items()}
        found = {file: choices.JUDGES[task](some, answers[file]) for file, some in rows.items()}
    if score.cut:
        print(f"note: of {score.cut} texts the last {score.room()} tokens alone were read", file=sys.stderr)
    return found


def of_writing(
    loaded: LoadedModel,
    documents: Sequence[str],
    rows: int,
    prompt_tokens: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    trained_on: str | None,
) -> dict[str, Measures]:
    """Of what a model writes behind the beginnings of documents and, as its measure, of what stands there."""
    if loaded.kind != "causal":
        raise ValueError(f"{loaded.folder} is no causal model: it writes nothing")
    room = prompt_tokens + max_new_tokens
    if loaded.max_positions is not None and room > loaded.max_positions:
        raise ValueError(f"--writing: {room} tokens, and the model has {loaded.max_positions} positions; pass fewer")
    tokenizer, beginnings = loaded.tokenizer, []
    for document in documents:
        ids = tokenizer(document, split_special_tokens=True, verbose=False)["input_ids"]
        if len(ids) > prompt_tokens:
            beginnings.append((ids[:room], len(ids) < room))
    count = min(rows, len(beginnings))
    some = [beginnings[place * len(beginnings) // count] for place in range(count)]
    prompts = [ids[:prompt_tokens] for ids, _ in some]
    rests = [(ids[prompt_tokens:], ended) for ids, ended in some]
    real = [Text(rest, tokenizer.decode(rest, skip_special_tokens=True), ended) for rest, ended in rests]
    if not prompts:
        raise ValueError(f"no document has more than {prompt_tokens} tokens; lower --writing.prompt_tokens")
    memory = None if trained_on is None else Memory(trained_on.encode())
    own = generations.written(loaded.model, tokenizer, prompts, max_new_tokens, temperature, seed)
    return {
        "what the model writes": generations.judged(own, memory),
        "what follows in the text": generations.judged(real, memory),
    }


def of_tuning(model: str, config: Path | None) -> Measures:
    """What the model's own task says; figures that are the mean of the examples' scores with its interval."""
    folder = find_folder(model)
    config = config or task_config(folder) or task_config(str(done_so_far(folder)["source"]))
    if config is None:
        raise ValueError(f"no config.yaml of a fine-tuning beside {folder}; pass one by --config")
    found = task_scores(config, folder)
    mean = float(found.scores_D.mean())
    means = [name for name, value in found.metrics.items() if math.isclose(value, mean, rel_tol=1e-6, abs_tol=1e-9)]
    fixed = {name: found.metrics[name] for name in sorted(found.metrics, key=found.by.__ne__) if name not in means}
    figures = {name: lambda means: means["score"] for name in means or ["score of an example"]}
    return Measures({"score": found.scores_D}, [""] * len(found.scores_D), figures, fixed=fixed)
