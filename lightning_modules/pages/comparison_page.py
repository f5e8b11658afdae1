"""compare.html: models beside each other in one table, where each stands for its cost, and the curves of their runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.evaluation.judged_table import cells, short_name, unbeaten
from lightning_modules.evaluation.judging import Judged
from lightning_modules.pages import charts
from lightning_modules.pages.page import page, section, table, upright
from lightning_modules.pages.run_page import CURVES, Run, flat, read_run, unlike

TITLES = {
    "bytes": "bytes on disk",
    "bytes_in_memory": "bytes in memory",
    "parameters": "parameters",
    "token_ms": "milliseconds of a new token",
    "prompt_ms": "milliseconds of a prompt",
    "joules": "joules a new token",
    "text_joules": "joules a text",
    "bits_per_byte": "bits per byte",
    "prefers_stereotype": "prefers the stereotype",
}

BY_KIND = ("bits_per_byte", "nats_per_token", "perplexity")
"""Figures of a text that models of one kind can be compared by: no pseudo-likelihood with a likelihood."""


def comparison_page(found: Sequence[Judged], axes: Sequence[tuple[str, str]], about: str) -> str:
    """Axes are pairs of figures, a cost and a quality."""
    rows = [[short_name(name), *row] for name, *row in cells(list(found))]
    colors = {one.name: charts.COLORS[place % len(charts.COLORS)] for place, one in enumerate(found)}
    runs: dict[Path, tuple[Run, str]] = {}
    for one in found:
        if (run := run_of(one.name)) is not None:
            runs.setdefault(run.folder.resolve(), (run, colors[one.name]))
    pictures = "".join(scatter(found, cost, quality, colors) for cost, quality in axes)
    return page(
        " · ".join(short_name(one.name) for one in found[:3]) + (" …" if len(found) > 3 else ""),
        about,
        [
            section("Beside each other", table(*upright(rows))),
            section("What each costs", f'<div class="charts">{pictures}</div>' if pictures else ""),
            section("Curves of their runs", curves(list(runs.values()))),
            section("Settings that are not the same", settings([run for run, _ in runs.values()])),
        ],
    )


def scatter(found: Sequence[Judged], cost: str, quality: str, colors: dict[str, str]) -> str:
    some = [one for one in found if cost in one.figures and quality in one.figures]
    if quality in BY_KIND:
        some = [one for one in some if one.kind == found[0].kind]
    best = [(one.figures[cost], one.figures[quality]) for one in unbeaten(some, cost, quality)]
    shown = [(short_name(one.name), (one.figures[cost], one.figures[quality])) for one in some]
    names = [TITLES.get(name, name.replace("_", " ")) for name in (cost, quality)]
    title = f"{names[1].capitalize()} by {names[0]}"
    return charts.points(title, *names, shown, best, [colors[one.name] for one in some])


def run_of(model: str) -> Run | None:
    for folder in (Path(model), Path(model).parent):
        if (folder / "metrics.csv").is_file():
            try:
                return read_run(folder)
            except ValueError as error:  # a damaged file beside a model costs its curves alone
                print(f"note: {error}", file=sys.stderr)
    return None


def curves(runs: Sequence[tuple[Run, str]]) -> str:
    """Of each run in the color of the first model that is from it."""
    drawn = (
        charts.lines(
            title,
            "tokens",
            [charts.Line(run.name, run.metrics.get(name, []), color=color) for run, color in runs],
        )
        for title, name, _ in CURVES
    )
    inside = "".join(drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def settings(runs: Sequence[Run]) -> str:
    """A row for each setting in which they differ."""
    if len(runs) < 2:
        return ""
    all_of = [flat(run.config) for run in runs]
    return table(["", *(run.name for run in runs)], unlike(all_of))
