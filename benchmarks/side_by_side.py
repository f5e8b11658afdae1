"""Many short runs of the recipes, several at a time, whose summaries become tables with the spread of their seeds.

A run lies in a folder by its flags, so that it is done once, whichever tables it is in, and again where a flag changes;
an interrupted measurement goes on.
"""

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from page import ROOT
from turns import environment

WORKERS = os.cpu_count() or 2
TUNING, SEEDS = 0, (1, 2, 3)
"""The seed by which rates and strengths are chosen, and those that are told."""
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of 95 %, by the number of figures."""
FURTHER = 4
"""Steps beyond what is tried at first, where the best is at an end."""
INTERRUPTED = (130, 143)


@dataclass(frozen=True)
class Run:
    """Flags by name, without their dashes; `name` is for people."""

    name: str
    flags: tuple[tuple[str, object], ...]
    recipe: str = "pretrain"

    @property
    def place(self) -> str:
        words = json.dumps([self.recipe, sorted((name, str(value)) for name, value in self.flags)])
        return hashlib.sha256(words.encode()).hexdigest()[:12]

    def command(self, folder: Path) -> list[str]:
        words = [f"--{name}={value}" for name, value in self.flags]
        script = str(ROOT / "recipes" / f"{self.recipe}.py")
        return [sys.executable, script, "fit", *words, f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]


def run(name: str, flags: dict[str, object], seed: int = TUNING, recipe: str = "pretrain") -> Run:
    return Run(f"{name}, seed {seed}", tuple((flags | {"seed_everything": seed, "data.seed": seed}).items()), recipe)


@dataclass
class Runs:
    """Summaries of runs, done where they are not yet.

    Args:
        folder: With one in it for each run.
        threads: Of each run.
    """

    folder: Path
    threads: int = 1

    def done(self, runs: list[Run]) -> list[dict | None]:
        """Each with its `folder`; None of one that failed, such as by a rate at which nothing stays finite."""
        with ThreadPoolExecutor(max(1, WORKERS // self.threads)) as pool:
            return list(pool.map(self._summary, runs))

    def _summary(self, one: Run) -> dict | None:
        folder, failed = self.folder / one.place, self.folder / f"{one.place}.failed"
        file = folder / "summary.json"
        if not file.is_file() and not failed.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            command = one.command(folder)
            with (self.folder / f"{one.place}.log").open("w") as log:
                done = subprocess.run(command, cwd=ROOT, env=environment(self.threads), stdout=log, stderr=log)
            code = done.returncode
            print(f"{one.name}: {'done' if not code else f'ended with {code}'}, {folder}", file=sys.stderr, flush=True)
            if code < 0 or code in INTERRUPTED:
                raise KeyboardInterrupt
            if code:
                failed.touch()
        return None if failed.is_file() else json.loads(file.read_text()) | {"folder": folder}


def tuned(trial: Callable[[float], Run], values: list[float], runs: Runs) -> dict[float, float]:
    """Losses by value, of one seed; where the best is the first or the last value, others behind it are tried."""
    losses: dict[float, float] = {}

    def measure(some: list[float]) -> None:
        for value, summary in zip(some, runs.done([trial(value) for value in some]), strict=True):
            losses[value] = summary["val_loss"] if summary and math.isfinite(summary["val_loss"]) else math.inf

    measure(values)
    step = values[1] / values[0]
    for _ in range(FURTHER):
        value = best(losses)
        if math.isinf(losses[value]) or min(losses) < value < max(losses):
            break
        measure([value * step if value == max(losses) else value / step])
    return losses


def best(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


def curve(losses: dict[float, float], digits: int = 2) -> str:
    """0.1 4.16, 0.2 4.11, 0.4 diverged."""
    told = {value: f"{losses[value]:.{digits}f}" if math.isfinite(losses[value]) else "diverged" for value in losses}
    return ", ".join(f"{value:g} {told[value]}" for value in sorted(losses))


def spread(figures: list[float], digits: int = 4) -> str:
    """The mean, and where 95 % of means of so many seeds lie, by Student's t."""
    mean = statistics.mean(figures)
    if len(figures) < 2:
        return f"{mean:.{digits}f}"
    half = STUDENT_T[len(figures)] * statistics.stdev(figures) / math.sqrt(len(figures))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def told(found: list[dict | None], figure: Callable[[dict], float] = lambda s: s["val_loss"], digits: int = 4) -> str:
    """Of runs with several seeds, and how many of them have come to nothing."""
    figures = [figure(summary) for summary in found if summary is not None]
    figures = [one for one in figures if math.isfinite(one)]
    if len(figures) == len(found):
        return spread(figures, digits)
    lost = f"{len(found) - len(figures)} of {len(found)} diverged"
    return f"{spread(figures, digits)}, {lost}" if figures else lost


def mean(found: list[dict | None], figure: Callable[[dict], float] = lambda s: s["val_loss"]) -> float:
    """NaN where one of them has come to nothing."""
    return statistics.mean(math.nan if summary is None else figure(summary) for summary in found)
