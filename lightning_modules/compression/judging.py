"""Models beside each other: what each makes of the same text, how large it is, and how long it takes.

Shape suffix: D documents.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightning_modules import bootstrap
from lightning_modules.architectures import bytes_of, parameter_count
from lightning_modules.bootstrap import Interval
from lightning_modules.compression.opened import Opened, bytes_of_weights, done_so_far
from lightning_modules.likelihood import BATCH_TOKENS, Row, Scorer, batches_by_length, token_nats
from lightning_modules.model_folder import max_positions
from lightning_modules.task_scores import TaskScores, task_config, task_scores

TIMES = 15
WARM = 3
PROMPT_TOKENS = 128


@dataclass
class Scored:
    """A text by its documents."""

    nats_D: np.ndarray
    tokens_D: np.ndarray
    bytes_D: np.ndarray

    @property
    def nats_per_token(self) -> float:
        return float(self.nats_D.sum() / self.tokens_D.sum())

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats_D.sum() / math.log(2) / self.bytes_D.sum())


def score(opened: Opened, documents: list[str]) -> Scored:
    """Every document from its beginning, as recipes/score.py does."""
    scorer = Scorer(
        *(opened.network, opened.tokenizer, not opened.network.can_generate(), max_positions(opened.network)),
        *(None, None, documents[0]),
    )
    rows: list[Row] = []
    owners: dict[int, int] = {}
    utf8_bytes = []
    for number, document in enumerate(documents):
        before = scorer.total.bytes
        for row in scorer.rows([document]):
            owners[id(row)] = number
            rows.append(row)
        utf8_bytes.append(scorer.total.bytes - before)
    nats_D, tokens_D = np.zeros(len(documents)), np.zeros(len(documents))
    for batch in batches_by_length(rows, None, BATCH_TOKENS[opened.network.device.type]):
        nats_N = token_nats(opened.network, batch, mask_padding=scorer.masked).numpy()
        ends = np.cumsum([len(row.targets) for row in batch])
        for row, part_n in zip(batch, np.split(nats_N, ends[:-1]), strict=True):
            nats_D[owners[id(row)]] += part_n.sum()
            tokens_D[owners[id(row)]] += len(part_n)
    return Scored(nats_D, tokens_D, np.array(utf8_bytes, float))


def interval_of_excess(scored: Scored, reference: Scored) -> Interval | None:
    """Of the percent by which a model needs more nats per byte than the reference."""
    found = bootstrap.of_ratio(scored.nats_D, reference.nats_D)
    return found and Interval(100 * (found.low - 1), 100 * (found.high - 1))


def validated(models: dict[str, Opened]) -> dict[str, TaskScores]:
    """Of models of a task, by the validation of the run that they all began with; {} where that is not at hand."""
    first = next(iter(models.values())).folder
    config = task_config(first) or task_config(str(done_so_far(first)["source"]))
    found: dict[str, TaskScores] = {}
    for name in models if config else ():
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
    calls = {name: timed_calls(opened) for name, opened in models.items()}
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
    length = min(PROMPT_TOKENS, (max_positions(network) or PROMPT_TOKENS) - 1)
    ids = torch.arange(length, device=network.device)[None] % network.config.get_text_config().vocab_size
    if not network.can_generate() or network.config.is_encoder_decoder:
        inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if network.config.is_encoder_decoder else {})
        return [lambda: network(**inputs)]
    held: list[object] = []

    def prompt() -> None:
        held[:] = [network(input_ids=ids, use_cache=True).past_key_values]

    return [prompt, lambda: network(input_ids=ids[:, :1], past_key_values=held[0], use_cache=True)]


# The table


@dataclass
class Judged:
    name: str
    parameters: int
    nonzero: int
    bytes: int
    memory: int
    """Bytes of the weights where they are computed with."""
    scored: Scored | None
    excess: Interval | None
    """In percent, of nats more than the reference's."""
    prompt_ms: float
    token_ms: float | None
    task: TaskScores | None
    task_change: Interval | None
    """Of the mean of the examples' scores, less the reference's."""

    def figures(self) -> dict[str, float | int | None]:
        found = {"parameters": self.parameters, "nonzero": self.nonzero, "bytes": self.bytes}
        found["bytes_in_memory"] = self.memory
        if self.scored is not None:
            found |= {"nats_per_token": self.scored.nats_per_token, "bits_per_byte": self.scored.bits_per_byte}
        if self.excess is not None:
            found |= {"excess_low": self.excess.low, "excess_high": self.excess.high}
        if self.task is not None:
            found |= self.task.metrics
        if self.task_change is not None:
            found |= {"score_change_low": self.task_change.low, "score_change_high": self.task_change.high}
        return found | {"prompt_ms": self.prompt_ms, "token_ms": self.token_ms}


def judge(models: dict[str, Opened], documents: list[str], tasks: dict[str, TaskScores]) -> list[Judged]:
    """The first is what the others are measured against; documents are held-out text, tasks what some found at one."""
    scored = {name: score(o, documents) if o.scores_text and documents else None for name, o in models.items()}
    zeros = {
        # What is rounded to zero is not set to it.
        name: 0 if o.is_packed else sum(int((p == 0).sum()) for p in o.network.parameters())
        for name, o in models.items()
    }
    for opened in models.values():
        opened.to_stored()
    times, found, reference = latencies(models), [], next(iter(scored.values()))
    first = tasks.get(next(iter(models)))
    for name, opened in models.items():
        is_other = scored[name] is not None and scored[name] is not reference
        excess = interval_of_excess(scored[name], reference) if is_other and reference is not None else None
        task, change = tasks.get(name), None
        if task is not None and first is not None and task is not first:
            change = bootstrap.of_mean(task.scores_D - first.scores_D)
        size, memory = bytes_of_weights(opened.folder), opened.bytes_in_memory()
        count = parameter_count(opened.network)
        sizes = (count, count - zeros[name], size, memory)
        judged = Judged(name, *sizes, scored[name], excess, *times[name], task, change)
        found.append(judged)
    return found


def table(found: list[Judged]) -> str:
    """A row for each model, beside what it has of the first one's."""
    first, rows = found[0], [["", "parameters", "bytes", "of it", "in memory"]]
    metric = first.task and first.task.by.replace("_", " ")
    rows[0] += ["nats/token", "bits/byte", "more nats"] if first.scored is not None else []
    rows[0] += [metric, "each example's score, more"] if metric else []
    written = first.token_ms is not None
    rows[0] += ["ms/prompt", "ms/token", "of it"] if written else ["ms/text", "of it"]
    for judged in found:
        scored = judged.scored
        few = judged.nonzero < 0.95 * judged.parameters
        count = f"{judged.parameters:,}" if judged.parameters else ""  # of a file of ONNX
        row = [judged.name, f"{judged.nonzero:,} of {count}" if few else count]
        row += [bytes_of(judged.bytes), f"{judged.bytes / first.bytes:.3f}", bytes_of(judged.memory)]
        if first.scored is not None:
            row += ["", ""] if scored is None else [f"{scored.nats_per_token:.4f}", f"{scored.bits_per_byte:.4f}"]
            row += ["" if scored is None or judged is first else excess_in_words(judged, first)]
        if metric:
            row += ["", ""] if judged.task is None else [f"{judged.task.metric:.4f}", change_in_words(judged, first)]
        row += [f"{judged.prompt_ms:.1f}"]
        row += ["" if judged.token_ms is None else f"{judged.token_ms:.2f}"] if written else []
        row += [f"{(judged.token_ms or judged.prompt_ms) / (first.token_ms or first.prompt_ms):.2f}"]
        rows.append(row)
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def save(found: list[Judged], folder: Path) -> None:
    """The table, the same as JSON, and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(table(found) + "\n")
    figures = {judged.name: judged.figures() for judged in found}
    (folder / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    if all(judged.scored is not None for judged in found):
        draw(found, [judged.scored.bits_per_byte for judged in found], "bits per byte", False, folder / "report.png")
    elif all(judged.task is not None for judged in found):
        by, more = found[0].task.by, found[0].task.more_is_better
        draw(found, [judged.task.metric for judged in found], by.replace("_", " "), more, folder / "report.png")


def draw(found: list[Judged], figures: list[float], label: str, more_is_better: bool, file: Path) -> None:
    """A figure against bytes on disk, and against the time of a token; nothing is better than the line in both."""
    from matplotlib.figure import Figure

    sign, written = -1 if more_is_better else 1, found[0].token_ms is not None
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, cost_label, costs in zip(
        figure.subplots(1, 2, sharey=True),
        ("MB on disk", "milliseconds of a new token" if written else "milliseconds of a text"),
        ([judged.bytes / 1e6 for judged in found], [judged.token_ms or judged.prompt_ms for judged in found]),
        strict=True,
    ):
        pairs = [(cost, sign * figure) for cost, figure in zip(costs, figures, strict=True)]
        best = sorted(pair for pair in pairs if not any(c <= pair[0] and f <= pair[1] for c, f in {*pairs} - {pair}))
        front = [(cost, sign * figure) for cost, figure in best]
        axis.step(*zip(*front, strict=True), where="post", color="0.8", zorder=0)
        for judged, cost, figure_of_it in zip(found, costs, figures, strict=True):
            axis.plot(cost, figure_of_it, "o", label=short_name(judged.name))
        axis.set(xlabel=cost_label, xlim=(0, 1.15 * max(costs)))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel(label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(file, dpi=120)


def short_name(folder: str) -> str:
    """Of a run's folder `model` and the like, with the run's name."""
    path = Path(folder)
    return f"{path.parent.name}/{path.name}" if path.name.startswith("model") else path.name


def excess_in_words(judged: Judged, first: Judged) -> str:
    more = 100 * (judged.scored.nats_D.sum() / first.scored.nats_D.sum() - 1)
    if judged.excess is None:
        return f"{more:+.2f} %, of few documents"
    return f"{more:+.2f} % ({judged.excess.low:+.2f} to {judged.excess.high:+.2f})"


def change_in_words(judged: Judged, first: Judged) -> str:
    if judged is first:
        return ""
    more = judged.task.scores_D.mean() - first.task.scores_D.mean()
    if judged.task_change is None:
        return f"{more:+.4f}, of few examples"
    return f"{more:+.4f} ({judged.task_change.low:+.4f} to {judged.task_change.high:+.4f})"
