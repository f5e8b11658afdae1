"""compare.html: models beside each other in one table, where each stands for its cost, and the curves of their runs."""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.evaluation.judged_table import cells, short_name, unbeaten
from lightning_modules.evaluation.judging import Judged
from lightning_modules.pages import charts
from lightning_modules.pages.page import page, section, table
from lightning_modules.pages.run_page import CURVES, Run, flat, read_run

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

PATHS = ("trainer.default_root_dir", "ckpt_path")
"""Settings that are other in every run."""


def comparison_page(found: Sequence[Judged], axes: Sequence[tuple[str, str]], about: str) -> str:
    """Axes are pairs of figures, a cost and a quality."""
    header, *rows = cells(list(found))
    runs = list({run.folder.resolve(): run for one in found if (run := run_of(one.name)) is not None}.values())
    pictures = "".join(scatter(found, cost, quality) for cost, quality in axes)
    return page(
        " · ".join(short_name(one.name) for one in found[:3]) + (" …" if len(found) > 3 else ""),
        about,
        [
            section("Beside each other", table(header, [[short_name(row[0]), *row[1:]] for row in rows])),
            section("What each costs", f'<div class="charts">{pictures}</div>' if pictures else ""),
            section("Curves of their runs", curves(runs)),
            section("Settings that are not the same", settings(runs)),
        ],
    )


def scatter(found: Sequence[Judged], cost: str, quality: str) -> str:
    some = [one for one in found if cost in one.figures and quality in one.figures]
    best = [(one.figures[cost], one.figures[quality]) for one in unbeaten(some, cost, quality)]
    shown = [(short_name(one.name), (one.figures[cost], one.figures[quality])) for one in some]
    names = [TITLES.get(name, name.replace("_", " ")) for name in (cost, quality)]
    return charts.points(f"{names[1].capitalize()} by {names[0]}", *names, shown, best)


def run_of(model: str) -> Run | None:
    for folder in (Path(model), Path(model).parent):
        if (folder / "metrics.csv").is_file():
            try:
                return read_run(folder)
            except ValueError as error:  # a damaged file beside a model costs its curves alone
                print(f"note: {error}", file=sys.stderr)
    return None


def curves(runs: Sequence[Run]) -> str:
    if not runs:
        return ""
    drawn = (
        charts.lines(title, "tokens", [charts.Line(run.name, run.metrics.get(name, [])) for run in runs])
        for title, name, _ in CURVES
    )
    inside = "".join(drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def settings(runs: Sequence[Run]) -> str:
    """A row for each setting in which they differ."""
    if len(runs) < 2:
        return ""
    all_of = [flat(run.config) for run in runs]
    names = sorted({name for one in all_of for name in one if not name.startswith(PATHS)})
    rows = [
        [name, *(str(one.get(name, "")) for one in all_of)]
        for name in names
        if len({str(one.get(name)) for one in all_of}) > 1
        and not name.startswith(("trainer.default_root_dir", "ckpt_"))
    ]
    return table(["", *(run.name for run in runs)], rows)
