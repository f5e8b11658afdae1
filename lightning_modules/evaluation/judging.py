"""Models beside each other: what each makes of the same text, how large it is, and how long it takes.

Shape suffix: D documents.
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from transformers import Cache

from lightning_modules import bootstrap, energy
from lightning_modules.architectures import parameter_count
from lightning_modules.bootstrap import Interval
from lightning_modules.compression.opened import Opened, bytes_of_weights, done_so_far
from lightning_modules.evaluation.bias import Contrast, contrasts, fitting, sentences_of
from lightning_modules.evaluation.calibration import calibration_error
from lightning_modules.evaluation.continuations import Continuations
from lightning_modules.evaluation.token_predictions import predictions
from lightning_modules.likelihood import BATCH_TOKENS, LONGEST_WINDOW, Row, Scorer, batches_by_length, token_nats
from lightning_modules.model_folder import max_positions
from lightning_modules.task_scores import TaskScores, task_config, task_scores

T = TypeVar("T")
ENERGY_SECONDS = 2.0
"""Of calls by which the energy of one is found."""
TIMES = 15
WARM = 3
PROMPT_TOKENS = 128


@dataclass
class Scored:
    """A text by its documents; `kind` is causal or masked, whose pseudo-likelihood is another figure."""

    nats_D: np.ndarray
    tokens_D: np.ndarray
    bytes_D: np.ndarray
    kind: str = "causal"

    @property
    def nats_per_token(self) -> float:
        return float(self.nats_D.sum() / self.tokens_D.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats_D.sum() / math.log(2) / self.bytes_D.sum())


def numbered_rows(
    opened: Opened, documents: list[str], seq_len: int | None = None
) -> tuple[list[tuple[int, Row]], list[int]]:
    """Every document from its beginning, as recipes/score.py reads it: rows with the number of their document, and the
    documents' bytes."""
    scorer = Scorer(
        *(opened.network, opened.tokenizer, is_masked(opened), max_positions(opened.network)),
        *(seq_len, None, documents[0]),
    )
    rows: list[tuple[int, Row]] = []
    utf8_bytes = []
    for number, document in enumerate(documents):
        before = scorer.total.bytes
        rows += [(number, row) for row in scorer.rows([document])]
        utf8_bytes.append(scorer.total.bytes - before)
    return rows, utf8_bytes


def is_masked(opened: Opened) -> bool:
    return not opened.network.can_generate()


def batches_of(opened: Opened, rows: list[tuple[int, Row]]) -> Iterator[list[tuple[int, Row]]]:
    owners = {id(row): number for number, row in rows}
    max_tokens = BATCH_TOKENS[opened.network.device.type]
    for batch in batches_by_length((row for _, row in rows), None, max_tokens):
        yield [(owners[id(row)], row) for row in batch]


def score(opened: Opened, documents: list[str]) -> Scored:
    rows, utf8_bytes = numbered_rows(opened, documents)
    nats_D, tokens_D = np.zeros(len(documents)), np.zeros(len(documents))
    for batch in batches_of(opened, rows):
        nats_N = token_nats(opened.network, [row for _, row in batch], mask_padding=is_masked(opened)).numpy()
        owners_N = np.repeat([number for number, _ in batch], [len(row.targets) for _, row in batch])
        np.add.at(nats_D, owners_N, nats_N)
        np.add.at(tokens_D, owners_N, 1)
    return Scored(nats_D, tokens_D, np.array(utf8_bytes, float), "masked" if is_masked(opened) else "causal")


def interval_of_excess(scored: Scored, reference: Scored) -> Interval | None:
    """Of the percent by which a model needs more nats per byte than the reference; None of another kind."""
    if scored.kind != reference.kind or len(scored.nats_D) < bootstrap.FEWEST:
        return None
    parts = [one for each in (scored, reference) for one in (each.nats_D, each.bytes_D)]
    nats_S, bytes_S, its_nats_S, its_bytes_S = bootstrap.sums(*parts)
    return bootstrap.interval(100 * (nats_S / bytes_S * its_bytes_S / its_nats_S - 1))


def validated(models: dict[str, Opened]) -> dict[str, TaskScores]:
    """Of models of a task, by the validation of the run that they all began with; {} where that is not at hand."""
    first = next(iter(models.values())).folder
    config = task_config(first) or task_config(str(done_so_far(first)["source"]))
    found: dict[str, TaskScores] = {}
    for name in models if config else ():
        print(f"judging {name} by the examples of {config}", file=sys.stderr)
        try:
            found[name] = task_scores(config, models[name].folder)
        except ValueError as error:
            print(f"note: {error}", file=sys.stderr)
    return found


# Time


@torch.inference_mode()
def latencies(models: dict[str, Opened]) -> dict[str, tuple[float, float | None]]:
    """Median milliseconds of a prompt of PROMPT_TOKENS tokens and of one new token behind it, the models in turns; no
    new token of models that do not write."""
    calls = {name: timed_calls(opened) for name, opened in models.items()}  # of a prompt, and of a token behind it
    seconds: dict[tuple[str, int], list[float]] = {}
    for _ in range(TIMES + WARM):
        for name, functions in calls.items():
            for place, function in enumerate(functions):
                start = time.perf_counter()
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds.setdefault((name, place), []).append(time.perf_counter() - start)
    found = {}
    for name, functions in calls.items():
        medians = [1000 * statistics.median(seconds[name, place][WARM:]) for place in range(len(functions))]
        found[name] = (medians[0], medians[1] if len(medians) > 1 else None)
    return found


def timed_calls(opened: Opened) -> list[Callable[[], object]]:
    network = opened.network
    ids = torch.arange(prompt_length(opened), device=network.device)[None]
    ids = ids % network.config.get_text_config().vocab_size
    if not network.can_generate() or network.config.is_encoder_decoder:
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if network.config.is_encoder_decoder else {})
        return [lambda: network(**inputs)]
    held: list[object] = []

    def prompt() -> None:
        held[:] = [network(input_ids=ids, use_cache=True).past_key_values]

    def token() -> None:
        network(input_ids=ids[:, :1], past_key_values=held[0], use_cache=True)

    return [prompt, token]


def repeated(opened: Opened) -> Callable[[], object]:
    """A text, or a new token behind the same prompt, however often: no cache grows by it."""
    first, *others = timed_calls(opened)
    if not others:
        return first
    ids = torch.zeros((1, prompt_length(opened)), dtype=torch.long, device=opened.network.device)
    cache = opened.network(input_ids=ids, use_cache=True).past_key_values

    def token() -> None:
        behind = cache if not isinstance(cache, Cache) or cache.is_croppable else copy.deepcopy(cache)
        opened.network(input_ids=ids[:, :1], past_key_values=behind, use_cache=True)
        if isinstance(behind, Cache) and behind.is_croppable:
            behind.crop(-1)

    return token


def prompt_length(opened: Opened) -> int:
    return min(PROMPT_TOKENS, (max_positions(opened.network) or PROMPT_TOKENS) - 1)


# All of it


@dataclass
class Judged:
    """A model beside the first of them.

    Args:
        name: As it was asked for.
        figures: By stable names, which report.json and compare.json have.
        changes: Intervals of what is other than the first's: excess, nats in percent; score_change, of the task's
            examples; bias_change, of pairs.
        metric: Of the task that it was fine-tuned for, the name of the figure that counts.
        more_is_better: Whether of that figure.
        kind: Of its likelihood, causal or masked; "" where it scores no text.
        joules_by: How the joules were found: measured, or estimated.
    """

    name: str
    figures: dict[str, float]
    changes: dict[str, Interval] = field(default_factory=dict)
    metric: str | None = None
    more_is_better: bool = True
    kind: str = ""
    joules_by: str = ""

    def summary(self) -> dict[str, float | str]:
        ends = {f"{name}_low": low for name, (low, _) in self.changes.items()}
        ends |= {f"{name}_high": high for name, (_, high) in self.changes.items()}
        return self.figures | ends | ({"joules_by": self.joules_by} if self.joules_by else {})


@dataclass
class Wanted:
    """What models are judged by besides sizes, time and their text or task.

    Args:
        predictions: How sure of each token they are, how often right, and how much like the first.
        contrasts: Pairs of sentences that bias is measured by.
        energy: Joules a token.
    """

    predictions: bool = False
    contrasts: Sequence[Contrast] = ()
    energy: bool = False


def judge(
    models: dict[str, Opened], documents: list[str], tasks: dict[str, TaskScores], wanted: Wanted | None = None
) -> list[Judged]:
    """The first is what the others are measured against; documents are held-out text, tasks what some found at one."""
    wanted = wanted or Wanted()
    found = {name: Judged(name, sizes(opened)) for name, opened in models.items()}
    texts = {name: score(o, documents) for name, o in models.items() if o.scores_text and documents}
    for name, scored in texts.items():
        found[name].figures |= {"nats_per_token": scored.nats_per_token, "bits_per_byte": scored.bits_per_byte}
        found[name].kind = scored.kind
    compare(found, texts, "excess", interval_of_excess)
    for name, task in tasks.items():
        found[name].figures |= task.metrics
        found[name].metric, found[name].more_is_better = task.by, task.more_is_better
    add_labels(found, tasks)
    scores = {name: task.scores_D for name, task in tasks.items()}
    compare(found, scores, "score_change", lambda mine_D, its_D: bootstrap.of_mean(mine_D - its_D))
    if wanted.predictions:
        add_predictions(found, {name: models[name] for name in texts}, documents)
    if wanted.contrasts:
        add_bias(found, models, wanted.contrasts)
    for name, opened in models.items():
        opened.to_stored()
        found[name].figures["bytes_in_memory"] = opened.bytes_in_memory()
    for name, (prompt_ms, token_ms) in latencies(models).items():
        found[name].figures["prompt_ms"] = prompt_ms
        if token_ms is not None:
            found[name].figures["token_ms"] = token_ms
    if wanted.energy:
        add_energy(found, models)
    return list(found.values())


def sizes(opened: Opened) -> dict[str, float]:
    """What is rounded to zero is not set to it."""
    zeros = 0 if opened.is_packed else sum(int((p == 0).sum()) for p in opened.network.parameters())
    count = parameter_count(opened.network)
    return {"parameters": count, "nonzero": count - zeros, "bytes": bytes_of_weights(opened.folder)}


def compare(
    found: dict[str, Judged], parts: dict[str, T], name: str, interval: Callable[[T, T], Interval | None]
) -> None:
    """Adds to each the interval of its change from the first, where that one has the same."""
    first = next(iter(found))
    for other, mine in parts.items() if first in parts else ():
        ends = interval(mine, parts[first]) if other != first else None
        if ends is not None:
            found[other].changes[name] = ends


def add_predictions(found: dict[str, Judged], models: dict[str, Opened], documents: list[str]) -> None:
    """Beside the first one in windows that both can read."""
    first = models.get(next(iter(found)))
    for name, opened in models.items():
        beside = first if first is not None and first is not opened and are_alike(opened, first) else None
        longest = [max_positions(one.network) for one in (opened, beside) if one is not None]
        window = min((one for one in longest if one is not None), default=None)
        facts = facts_of(opened, documents, beside, window if beside is not None else None)
        if beside is not None and window != longest[0]:
            facts |= facts_of(opened, documents)
        found[name].figures["token_accuracy"] = facts.pop("accuracy")
        found[name].figures |= facts


def facts_of(
    opened: Opened, documents: list[str], reference: Opened | None = None, seq_len: int | None = None
) -> dict[str, float]:
    rows, _ = numbered_rows(opened, documents, seq_len and min(seq_len, LONGEST_WINDOW))
    network = None if reference is None else reference.network
    batches = batches_of(opened, rows)
    return predictions(
        opened.network, batches, len(documents), mask_padding=is_masked(opened), reference=network
    ).figures()


def add_labels(found: dict[str, Judged], tasks: dict[str, TaskScores]) -> None:
    """How sure of its labels a model is, and how often it says what the first says."""
    first = tasks.get(next(iter(found)))
    for name, task in tasks.items():
        if task.confidence_D is not None:
            found[name].figures["calibration_error"] = calibration_error(task.confidence_D, task.scores_D)
        if first is not None and task is not first:
            alike = [mine == its for mine, its in zip(task.predictions, first.predictions, strict=True)]
            found[name].figures["same_prediction"] = sum(alike) / len(alike)


def are_alike(one: Opened, other: Opened) -> bool:
    """Whether both say how probable the same words are, given the same."""
    return is_masked(one) == is_masked(other) and one.tokenizer.get_vocab() == other.tokenizer.get_vocab()


def add_bias(found: dict[str, Judged], models: dict[str, Opened], pairs: Sequence[Contrast]) -> None:
    """Of the same pairs, those that all models can read whole."""
    scores = {
        name: Continuations(opened.network, opened.tokenizer, is_masked(opened), max_positions(opened.network))
        for name, opened in models.items()
        if opened.scores_text
    }
    pairs = fitting(pairs, sentences_of, list(scores.values())) if scores else []
    preferred = {}
    for name, score in scores.items():
        measures = contrasts(pairs, score)
        found[name].figures["prefers_stereotype"] = measures.figures()["prefers_stereotype"]
        preferred[name] = measures.each["prefers_stereotype"]
    compare(found, preferred, "bias_change", lambda mine_D, its_D: bootstrap.of_mean(mine_D - its_D))


def add_energy(found: dict[str, Judged], models: dict[str, Opened]) -> None:
    """Of a new token: joules; of a text of models that do not write: text_joules."""
    with torch.inference_mode():
        for name, opened in models.items():
            figures, writes = found[name].figures, "token_ms" in found[name].figures
            ms = figures["token_ms" if writes else "prompt_ms"]
            meter = energy.Meter(works=opened.network.device.type)
            drawn = energy.joules_of(repeated(opened), max(1, round(1000 * ENERGY_SECONDS / ms)), meter)
            if drawn.joules:
                figures["joules" if writes else "text_joules"] = drawn.joules
                found[name].joules_by = drawn.by
