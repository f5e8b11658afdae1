"""Many short runs of the recipes, two at a time, whose summaries become tables with the spread of their seeds.

A run that has left its summary.json is not repeated, so that an interrupted measurement goes on.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from page import ROOT
from turns import environment

WORKERS = os.cpu_count() or 2
SEEDS = (0, 1, 2)
STUDENT_T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Of 95 %, by the number of figures."""


@dataclass(frozen=True)
class Run:
    """Flags by name, without their dashes."""

    name: str
    flags: tuple[tuple[str, object], ...]
    recipe: str = "pretrain"
    verb: str = "fit"

    def command(self, folder: Path) -> list[str]:
        words = [f"--{name}={value}" for name, value in self.flags]
        script = str(ROOT / "recipes" / f"{self.recipe}.py")
        return [sys.executable, script, self.verb, *words, f"--trainer.default_root_dir={folder}", "--ckpt_path=last"]


def run(name: str, flags: dict[str, object], recipe: str = "pretrain") -> Run:
    return Run(name, tuple(flags.items()), recipe)


@dataclass
class Runs:
    """Summaries of runs, done where they are not yet.

    Args:
        folder: With one in it for each run, by its name.
        threads: Of each run.
    """

    folder: Path
    threads: int = 1
    failed: list[str] = field(default_factory=list)

    def done(self, runs: list[Run]) -> dict[str, dict]:
        with ThreadPoolExecutor(max(1, WORKERS // self.threads)) as pool:
            found = dict(zip((one.name for one in runs), pool.map(self._summary, runs), strict=True))
        return {name: summary for name, summary in found.items() if summary is not None}

    def _summary(self, one: Run) -> dict | None:
        """None of one that failed, such as by a rate at which nothing stays finite."""
        folder = self.folder / one.name
        file, failed = folder / "summary.json", folder.with_suffix(".failed")
        if not file.is_file() and not failed.is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with folder.with_suffix(".log").open("w") as log:
                command = one.command(folder)
                code = subprocess.run(
                    command, cwd=ROOT, env=environment(self.threads), stdout=log, stderr=log
                ).returncode
            print(f"{one.name}: {'done' if not code else f'ended with {code}'}", file=sys.stderr, flush=True)
            if code:
                failed.touch()
        if failed.is_file():
            self.failed.append(one.name)
            return None
        return json.loads(file.read_text())


def spread(figures: list[float], digits: int = 4) -> str:
    """The mean, and where 95 % of means of so many seeds lie, by Student's t."""
    mean = statistics.mean(figures)
    if len(figures) < 2:
        return f"{mean:.{digits}f}"
    half = STUDENT_T[len(figures)] * statistics.stdev(figures) / math.sqrt(len(figures))
    return f"{mean:.{digits}f} ± {half:.{digits}f}"
