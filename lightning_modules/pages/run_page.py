"""report.html of a run's folder: its curves beside those of its neighbours, samples, settings, what it took."""

import csv
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from lightning_modules.architectures import bytes_of
from lightning_modules.callbacks.comparison import cells, gap_in_words
from lightning_modules.callbacks.energy import in_words
from lightning_modules.callbacks.samples import whole_lines
from lightning_modules.explaining import LINKED, VOCABULARY, canonical
from lightning_modules.pages import charts
from lightning_modules.pages.page import figures, folded, page, preformatted, section, table, upright

FILE = "report.html"
LOOKED_AT, NEIGHBOURS = 20, 5
"""The newest other runs beside it whose curves are drawn, too."""
EARLIER = 20
"""Validations before the last one whose samples are in the page, evenly spread."""
MOST = 50
"""Unusual steps in the page."""
CURVES = (
    ("Loss, nats", "val/loss", "train/loss"),
    ("Bits per byte, held out", "val/bits_per_byte", None),
    ("Accuracy, held out", "val/accuracy", None),
    ("F1, held out", "val/f1", None),
    ("BLEU, held out", "val/bleu", None),
    ("ROUGE-1, held out", "val/rouge1", None),
    ("Pearson, held out", "val/pearson", None),
    ("Squared error, held out", "val/mse", None),
    ("Gradient norm", "train/grad_norm", None),
    ("Learning rate", "train/lr", None),
    ("Tokens per second", "perf/tokens_per_second", None),
    ("MFU", "perf/mfu", None),
)
"""Titles, each with what is drawn of all runs, and what of this one alone."""
TITLES = {"peak_memory_bytes": "peak memory", "seconds": "time of steps", "mfu": "MFU"}
OF_ANY_RUN = {"trainer.default_root_dir", "ckpt_path", VOCABULARY, *LINKED}
"""Settings that are other in every run, or that follow from the data."""


@dataclass
class Run:
    """What a run left in its folder."""

    folder: Path
    summary: dict
    config: dict
    metrics: dict[str, list[charts.Point]]
    """By name, over tokens; over steps where a run counts none."""
    counts_tokens: bool = True

    @property
    def name(self) -> str:
        return self.folder.name


def read_run(folder: Path) -> Run:
    """Files that are not there are empty; raises ValueError for one that is damaged."""
    try:
        summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").is_file() else {}
        config = yaml.safe_load((folder / "config.yaml").read_text()) if (folder / "config.yaml").is_file() else {}
    except (ValueError, yaml.YAMLError, OSError) as error:
        raise ValueError(f"{folder} holds a damaged file: {str(error).splitlines()[0]}") from None
    metrics, counts_tokens = read_metrics(folder / "metrics.csv")
    return Run(folder, summary, config or {}, metrics, counts_tokens)


def read_metrics(file: Path) -> tuple[dict[str, list[charts.Point]], bool]:
    """By name, and whether over tokens."""
    if not file.is_file():
        return {}, True
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    rows = [row for row in rows if is_whole(row)]
    tokens_at, found = {}, {}
    for row in rows:
        if row.get("tokens"):
            tokens_at[int(float(row["step"]))] = float(row["tokens"])
    known = sorted(tokens_at)
    for row in rows:
        step = int(float(row["step"]))
        x = tokens_at.get(step, _between(step, known, tokens_at)) if known else float(step)
        for name, value in row.items():
            if value and name not in ("epoch", "step", "tokens"):
                found.setdefault(name, []).append((x, float(value)))
    return found, bool(known) or not rows


def is_whole(row: dict[str, str | None]) -> bool:
    """Not one that is being written, or was cut off."""
    if not row.get("step") or None in row or None in row.values():  # with cells too many, or too few
        return False
    return all(is_number(cell) for cell in row.values() if cell)


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _between(step: int, known: list[int], tokens_at: dict[int, float]) -> float:
    """As many tokens a step as the nearest logged one had."""
    nearest = min(known, key=lambda other: abs(other - step))
    return tokens_at[nearest] * (step + 1) / (nearest + 1)


def neighbours(folder: Path) -> list[Run]:
    """The newest other runs in the folder around it that train the same class of module; not those that are damaged."""
    files = [file for file in folder.resolve().parent.glob("*/metrics.csv") if file.parent != folder.resolve()]
    files.sort(key=lambda file: file.stat().st_mtime, reverse=True)
    mine, found = kind_of(read_run(folder)), []
    for file in files[:LOOKED_AT]:
        with suppress(ValueError):
            found.append(read_run(file.parent))
    return [run for run in found if kind_of(run) == mine][:NEIGHBOURS]


def kind_of(run: Run) -> str | None:
    model = run.config.get("model")
    return model.get("class_path") if isinstance(model, dict) else None


def run_page(run: Run, others: list[Run]) -> str:
    summary = run.summary
    about = f"{summary.get('objective', '')} · {summary.get('hardware', '')} · {summary.get('precision', '')}"
    curves = [one for title, name, own in CURVES if (one := curve(title, run, others, name, own))]
    return page(
        run.name,
        about.strip(" ·"),
        [
            figures(key_figures(summary)),
            section("Curves", f'<div class="charts">{"".join(curves)}</div>' if curves else ""),
            section("Teacher and student", compared(summary)),
            section("Samples", samples(run.folder)),
            section("Unusual steps", unusual(run.folder)),
            section("Planned and measured", planned(summary)),
            section("Energy", drawn(summary)),
            section(f"Other than in {others[0].name}" if others else "", differences(run, others)) if others else "",
            section("Settings", folded("config.yaml", preformatted("", yaml.safe_dump(run.config, sort_keys=False)))),
        ],
    )


def key_figures(summary: dict) -> list[tuple[str, str]]:
    metrics = [name for name in summary if name.startswith("val_") and not name.endswith("_final")]
    pairs = [
        (name.removeprefix("val_").replace("_", " "), f"{summary[name]:.4f}")
        for name in metrics
        if _is_number(summary[name])
    ]
    if "tokens" in summary:
        pairs += [
            ("tokens", f"{summary['tokens']:,}"),
            ("steps", f"{summary['steps']:,}"),
            ("time", duration(summary["seconds"])),
            ("tokens/s", f"{summary['tokens_per_second']:,.0f}"),
            ("MFU", f"{summary['mfu']:.0%}"),
            ("parameters", f"{summary['parameters']:,}"),
            ("peak memory", bytes_of(summary["peak_memory_bytes"])),
        ]
    if "energy" in summary:
        pairs.append(("energy" if summary["energy"]["by"].startswith("measured") else "energy, estimated",
                      in_words(summary["energy"]["joules"])))  # fmt: skip
    return pairs


def curve(title: str, run: Run, others: list[Run], name: str, own: str | None) -> str:
    some = [charts.Line("held out" if own else run.name, run.metrics.get(name, []))]
    if own:
        some.append(charts.Line("training", run.metrics.get(own, [])))
    others = [other for other in others if other.counts_tokens == run.counts_tokens]
    some += [charts.Line(other.name, other.metrics.get(name, []), True) for other in others]
    if not any(len(line.points) > 1 for line in some if not line.is_faint):
        return ""
    return charts.lines(title, "tokens" if run.counts_tokens else "steps", some)


def samples(folder: Path) -> str:
    """Of the last validation; those before it folded away."""
    file = folder / "samples.jsonl"
    if not file.is_file():
        return ""
    rows = whole_lines(file)
    if not rows:
        return ""
    by_step: dict[int, str] = {}
    for row in rows:
        text = row["text"].removeprefix(row["prompt"])
        by_step[row["step"]] = by_step.get(row["step"], "") + preformatted(text, row["prompt"])
    *before, last = by_step
    before = [before[place * len(before) // EARLIER] for place in range(EARLIER)] if len(before) > EARLIER else before
    earlier = "".join(folded(f"step {step:,}", by_step[step]) for step in before[::-1])
    return f'<p class="about">step {last:,}</p>{by_step[last]}{earlier}'


def unusual(folder: Path) -> str:
    file = folder / "unusual_steps.jsonl"
    if not file.is_file():
        return ""
    rows = whole_lines(file)
    shown = [
        [
            f"{row['step']:,}",
            str(row.get("rank", "")),
            row["loss"],
            row["grad_norm"],
            ", ".join(map(str, row["rows"][:8])),
        ]
        for row in rows[:MOST]
    ]
    more = f'<p class="about">{len(rows) - MOST:,} more in {file.name}</p>' if len(rows) > MOST else ""
    return table(["step", "rank", "loss", "gradient norm", "rows"], shown) + more


def compared(summary: dict) -> str:
    found = summary.get("comparison")
    if not found:
        return ""
    gap = gap_in_words(summary)
    return table(*upright(cells(found))) + (f'<p class="about">{escape(gap)}</p>' if gap else "")


def planned(summary: dict) -> str:
    foreseen, measured = summary.get("planned"), summary.get("measured")
    if not foreseen or not measured:
        return ""
    forms = {"peak_memory_bytes": bytes_of, "steps": "{:,}".format, "tokens": "{:,}".format, "seconds": duration,
             "mfu": "{:.0%}".format}  # fmt: skip
    known = [name for name in forms if foreseen.get(name) is not None and measured.get(name) is not None]
    shown, limit = {name: forms[name](foreseen[name]) for name in known}, foreseen.get("limit_seconds")
    if limit is not None and limit < foreseen.get("seconds", 0.0):
        ended = {"steps", "tokens", "seconds"} & shown.keys()
        shown |= {name: f"at most {shown[name]}" for name in ended} | {"seconds": f"at most {duration(limit)}"}
    rows = [[TITLES.get(name, name), shown[name], forms[name](measured[name])] for name in known]
    note = "" if measured.get("memory_of") != "process" else (
        '<p class="about">Memory is planned of the steps’ tensors; measured is what the whole process grew by in them: '
        "freed memory that it keeps for the next step and what libraries take for themselves, too.</p>"
    )  # fmt: skip
    return table(["", "planned", "measured"], rows) + note


def drawn(summary: dict) -> str:
    energy = summary.get("energy")
    if not energy:
        return ""
    rows = [
        ["energy", in_words(energy["joules"])],
        ["", f"{energy['kwh']:.4g} kWh"],
        ["CO2e", f"{energy['co2e_grams']:.3g} g"],
        ["a million tokens", in_words(energy["joules_per_million_tokens"])],
    ]
    return table(["", ""], rows) + f'<p class="about">{escape(energy["by"])}</p>'


def differences(run: Run, others: list[Run]) -> str:
    rows = unlike([flat(run.config), flat(others[0].config)])
    if not rows and others[0].config:
        return '<p class="about">nothing</p>'
    return table(["", run.name, others[0].name], rows)


def unlike(configs: Sequence[dict[str, object]]) -> list[list[str]]:
    """Of the settings that are not the same in all of them, its name and each one's value."""
    names = sorted({name for one in configs for name in one if name not in OF_ANY_RUN})
    rows = [[name, *(str(one.get(name, "")) for one in configs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]


def flat(config: object, name: str = "") -> dict[str, object]:
    """By the names that flags have."""
    if isinstance(config, dict) and config:
        found = {}
        for key, value in config.items():
            found |= flat(value, f"{name}.{key}" if name else str(key))
        return found
    return {canonical(name): config}


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def write_run_page(folder: Path) -> Path:
    file = folder / FILE
    file.write_text(run_page(read_run(folder), neighbours(folder)))
    return file
