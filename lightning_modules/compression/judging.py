"""Models beside each other: what each makes of the same text, how large it is, and how long it takes.

Shape suffixes: D documents, S resamplings.
"""

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightning_modules.architectures import bytes_of, parameter_count
from lightning_modules.compression.opened import Opened, bytes_of_weights
from lightning_modules.likelihood import BATCH_TOKENS, Row, Scorer, batches_by_length, token_nats
from lightning_modules.model_folder import max_positions

RESAMPLINGS = 2000
FEWEST = 6
"""Documents that an interval can be drawn from."""
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


def interval_of_excess(scored: Scored, reference: Scored, seed: int = 0) -> tuple[float, float]:
    """95 % of the percent by which a model needs more nats per byte than the reference, over documents drawn anew with
    replacement: the paired bootstrap, section 4 of https://aclanthology.org/W04-3250."""
    D = len(scored.nats_D)
    drawn_SD = np.random.default_rng(seed).integers(0, D, (RESAMPLINGS, D))
    excess_S = 100 * (scored.nats_D[drawn_SD].sum(1) / reference.nats_D[drawn_SD].sum(1) - 1)
    return float(np.percentile(excess_S, 2.5)), float(np.percentile(excess_S, 97.5))


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
    excess: tuple[float, float] | None
    """95 % interval, in percent, of nats more than the reference's."""
    prompt_ms: float
    token_ms: float | None

    def figures(self) -> dict[str, float | int | None]:
        found = {"parameters": self.parameters, "nonzero": self.nonzero, "bytes": self.bytes}
        found["bytes_in_memory"] = self.memory
        if self.scored is not None:
            found |= {"nats_per_token": self.scored.nats_per_token, "bits_per_byte": self.scored.bits_per_byte}
        if self.excess is not None:
            found |= {"excess_low": self.excess[0], "excess_high": self.excess[1]}
        return found | {"prompt_ms": self.prompt_ms, "token_ms": self.token_ms}


def judge(models: dict[str, Opened], documents: list[str]) -> list[Judged]:
    """The first is what the others are measured against; documents are held-out text."""
    scored = {name: score(o, documents) if o.scores_text and documents else None for name, o in models.items()}
    zeros = {
        # What is rounded to zero is not set to it.
        name: 0 if o.is_packed else sum(int((p == 0).sum()) for p in o.network.parameters())
        for name, o in models.items()
    }
    for opened in models.values():
        opened.to_stored()
    times, found, reference = latencies(models), [], next(iter(scored.values()))
    for name, opened in models.items():
        is_other = scored[name] is not None and scored[name] is not reference
        excess = interval_of_excess(scored[name], reference) if is_other and len(documents) >= FEWEST else None
        size, memory = bytes_of_weights(opened.folder), opened.bytes_in_memory()
        count = parameter_count(opened.network)
        found.append(Judged(name, count, count - zeros[name], size, memory, scored[name], excess, *times[name]))
    return found


def table(found: list[Judged]) -> str:
    """A row for each model, beside what it has of the first one's."""
    first, rows = found[0], [["", "parameters", "bytes", "of it", "in memory", "nats/token", "bits/byte", "more nats"]]
    rows[0] += ["ms/prompt", "ms/token", "of it"]
    for judged in found:
        scored = judged.scored
        few = judged.nonzero < 0.95 * judged.parameters
        count = f"{judged.parameters:,}" if judged.parameters else ""  # of a file of ONNX
        row = [judged.name, f"{judged.nonzero:,} of {count}" if few else count]
        row += [bytes_of(judged.bytes), f"{judged.bytes / first.bytes:.3f}", bytes_of(judged.memory)]
        row += ["", ""] if scored is None else [f"{scored.nats_per_token:.4f}", f"{scored.bits_per_byte:.4f}"]
        row += ["" if scored is None or judged is first else excess_in_words(judged, first)]
        row += [f"{judged.prompt_ms:.1f}", "" if judged.token_ms is None else f"{judged.token_ms:.2f}"]
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
        draw(found, folder / "report.png")


def draw(found: list[Judged], file: Path) -> None:
    """Bits per byte against bytes on disk, and against the time of a token; no model lies below the line in both."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, label, costs in zip(
        figure.subplots(1, 2, sharey=True),
        ("MB on disk", "milliseconds of a new token"),
        ([judged.bytes / 1e6 for judged in found], [judged.token_ms or judged.prompt_ms for judged in found]),
        strict=True,
    ):
        bits = [judged.scored.bits_per_byte for judged in found]
        best = sorted(
            (cost, bit)
            for cost, bit in zip(costs, bits, strict=True)
            if not any(c <= cost and b <= bit and (c, b) != (cost, bit) for c, b in zip(costs, bits, strict=True))
        )
        axis.step(*zip(*best, strict=True), where="post", color="0.8", zorder=0)
        for judged, cost, bit in zip(found, costs, bits, strict=True):
            axis.plot(cost, bit, "o", label=short_name(judged.name))
        axis.set(xlabel=label, xlim=(0, 1.15 * max(costs)))
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("bits per byte")
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
    return f"{more:+.2f} % ({judged.excess[0]:+.2f} to {judged.excess[1]:+.2f})"
