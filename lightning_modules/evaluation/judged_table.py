"""Models beside each other, as a table, as JSON and as a picture."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_modules.architectures import bytes_of
from lightning_modules.evaluation.judging import Judged
from lightning_modules.pages.text_table import aligned, turned, width_of

FURTHER = {
    "token right": "token_accuracy",
    "calibration error": "calibration_error",
    "same token": "same_top",
    "same prediction": "same_prediction",
    "KL": "kl",
    "prefers stereotype": "prefers_stereotype",
}
"""Titles of what is shown where it was asked for."""
LESS_IS_BETTER = (
    *("bits_per_byte", "nats_per_token", "loss", "perplexity", "mse", "kl", "calibration_error"),
    *("parameters", "nonzero", "bytes", "bytes_in_memory", "prompt_ms", "token_ms", "joules", "text_joules"),
)
FIGURES = (*LESS_IS_BETTER, "token_accuracy", "same_top", "same_prediction", "prefers_stereotype")
"""All that a model may have besides the metrics of its task."""
SCREEN = 120
"""Characters."""


def worse(one: Judged, name: str) -> float:
    """A figure as less is better: 0.5 is the best share of stereotypes, of other figures the least or the most."""
    figure = one.figures[name]
    if name == "prefers_stereotype":
        return abs(figure - 0.5)
    less_is_better = not one.more_is_better if name == one.metric else name in LESS_IS_BETTER
    return figure if less_is_better else -figure


def unbeaten(found: Sequence[Judged], cost: str, quality: str) -> list[Judged]:
    """In the order of cost, those that no other is as good as in both and better in one; of equal ones the first."""
    by_pair: dict[tuple[float, float], Judged] = {}
    for one in found:
        by_pair.setdefault((worse(one, cost), worse(one, quality)), one)
    return sorted((by_pair[pair] for pair in pareto(list(by_pair))), key=lambda one: one.figures[cost])


def table(found: list[Judged]) -> str:
    """A row for each model; a column, where that is narrower and the rows are wider than a screen."""
    rows = cells(found)
    upright, lying = aligned(turned(rows)), aligned(rows)
    return min(upright, lying, key=width_of) if width_of(lying) > SCREEN else lying


def cells(found: list[Judged]) -> list[list[str]]:
    """A header, and a row for each model, beside what it has of the first one's."""
    first = found[0]
    columns: dict[str, Callable[[Judged], str]] = {"parameters": parameters_in_words}
    columns |= {"bytes": lambda one: bytes_of(int(one.figures["bytes"])), "of it": share_of(first, "bytes")}
    columns["in memory"] = lambda one: bytes_of(int(one.figures["bytes_in_memory"]))
    if "nats_per_token" in first.figures:
        columns |= {"nats/token": figure("nats_per_token"), "bits/byte": figure("bits_per_byte")}
        columns["more nats"] = excess_in_words(first)
    if first.metric is not None:
        columns |= {
            first.metric.replace("_", " "): figure(first.metric),
            "each example's score, more": interval_in_words("score_change"),
        }
    for title, name in FURTHER.items():
        if any(name in one.figures for one in found):
            columns[title] = figure(name)
    if any("bias_change" in one.changes for one in found):
        columns["stereotype, more"] = interval_in_words("bias_change")
    written = "token_ms" in first.figures
    columns |= {"ms/prompt": figure("prompt_ms", 1), "ms/token": figure("token_ms", 2)} if written else {}
    columns |= {} if written else {"ms/text": figure("prompt_ms", 1)}
    columns["of it "] = share_of(first, "token_ms" if written else "prompt_ms", 2)
    for what, name in (("token", "joules"), ("text", "text_joules")):
        drawn = [one.joules_by for one in found if name in one.figures]
        if drawn:
            how = "" if all(by.startswith("measured") for by in drawn) else ", estimated"
            columns[f"J/{what}{how}"] = figure(name)
    rows = [["", *(title.strip() for title in columns)]]
    return rows + [[one.name, *(cell(one) for cell in columns.values())] for one in found]


def figure(name: str, digits: int = 4) -> Callable[[Judged], str]:
    return lambda one: f"{one.figures[name]:.{digits}f}" if name in one.figures else ""


def share_of(first: Judged, name: str, digits: int = 3) -> Callable[[Judged], str]:
    return lambda one: f"{one.figures[name] / first.figures[name]:.{digits}f}" if name in one.figures else ""


def parameters_in_words(one: Judged) -> str:
    count, nonzero = int(one.figures["parameters"]), int(one.figures["nonzero"])
    if not count:  # of a file of ONNX
        return ""
    return f"{nonzero:,} of {count:,}" if nonzero < 0.95 * count else f"{count:,}"


def excess_in_words(first: Judged) -> Callable[[Judged], str]:
    def words(one: Judged) -> str:
        if one is first or "bits_per_byte" not in one.figures:
            return ""
        if one.kind != first.kind:
            return "of another kind"
        more = 100 * (one.figures["bits_per_byte"] / first.figures["bits_per_byte"] - 1)
        ends = one.changes.get("excess")
        return f"{more:+.2f} %" + (f" ({ends.low:+.2f} to {ends.high:+.2f})" if ends else ", of few documents")

    return words


def interval_in_words(name: str) -> Callable[[Judged], str]:
    return lambda one: "{:+.4f} to {:+.4f}".format(*one.changes[name]) if name in one.changes else ""


def save(found: list[Judged], folder: Path) -> None:
    """The table, the same as JSON, and a picture."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.txt").write_text(table(found) + "\n")
    summaries = {one.name: one.summary() for one in found}
    (folder / "report.json").write_text(json.dumps(summaries, indent=2) + "\n")
    quality = "bits_per_byte" if "bits_per_byte" in found[0].figures else found[0].metric
    if quality is not None and all(quality in one.figures for one in found):
        draw(found, quality, folder / "report.png")


def draw(found: list[Judged], quality: str, file: Path) -> None:
    """A figure against bytes on disk, and against the time of a token; nothing is better than the line in both."""
    from matplotlib.figure import Figure

    time = "token_ms" if "token_ms" in found[0].figures else "prompt_ms"
    labels = {"bytes": "MB on disk", "token_ms": "milliseconds of a new token", "prompt_ms": "milliseconds of a text"}
    picture = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, cost in zip(picture.subplots(1, 2, sharey=True), ("bytes", time), strict=True):
        unit = 1e6 if cost == "bytes" else 1
        best = [(one.figures[cost] / unit, one.figures[quality]) for one in unbeaten(found, cost, quality)]
        axis.step(*zip(*best, strict=True), where="post", color="0.8", zorder=0)
        for one in found:
            axis.plot(one.figures[cost] / unit, one.figures[quality], "o", label=short_name(one.name))
        axis.set(xlabel=labels[cost], xlim=(0, 1.15 * max(one.figures[cost] / unit for one in found)))
        axis.grid(alpha=0.3)
    picture.axes[0].set_ylabel(quality.replace("_", " "))
    picture.legend(*picture.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    picture.savefig(file, dpi=120)


def pareto(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is as good as in both and better in one, where less is better."""
    return sorted({one for one in pairs if not any(o[0] <= one[0] and o[1] <= one[1] and o != one for o in pairs)})


def short_name(folder: str) -> str:
    """Of a run's folder `model` and the like, with the run's name."""
    path = Path(folder)
    return f"{path.parent.name}/{path.name}" if path.name.startswith("model") else path.name
