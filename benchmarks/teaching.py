"""What a student learns from each signal at equal tokens: how much of the gap to its teacher it closes, several seeds.

Run:
    python benchmarks/run.py --only teaching --page docs/benchmarks.md --keep runs/teaching       about 2 hours on 2 cores

`--keep` names a folder whose finished runs are not repeated, so that an interrupted measurement goes on.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from page import ROOT, Goal, Table
from tasks import models
from turns import environment

ENVIRONMENT = environment(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


@dataclass(frozen=True)
class Signal:
    """What the student learns from."""

    name: str
    flags: str = ""
    cache: str = ""
    """Flags of `distill.py cache`, where the teacher's words are written down first."""


@dataclass(frozen=True)
class Lesson:
    """A teacher, its student, and a text."""

    name: str
    title: str
    common: str
    """Flags of all runs, with {data} for the folder of the data."""
    teacher: str
    """{stories}, or the flags of the pretraining that makes it."""
    signals: tuple[Signal, ...]
    needs: str | None = None
    """Folder in the data folder."""


WITHOUT = Signal("without a teacher", "--model.hard_weight 1")
FULL = "the teacher at hand, forward_kl"
CACHED_BYTES = 60
"""Most of a token, of the caches that are compared."""

STDLIB = Lesson(
    "stdlib",
    "Standard library: a student of a quarter of its teacher's parameters",
    "--trainer.max_steps 400 --trainer.val_check_interval 400 --model.student.hidden_size 80 "
    "--model.student.intermediate_size 320 --model.student.num_hidden_layers 2",
    "--trainer.max_steps 750 --trainer.max_time null --trainer.val_check_interval 750",
    (
        WITHOUT,
        Signal(FULL),
        Signal("12 likeliest words and their tail", cache="--scheme top_k --exact 12"),
        Signal("28 words drawn", cache="--scheme sampled --drawn 28"),
        Signal("6 likeliest words, 15 drawn", cache="--scheme hybrid --exact 6 --drawn 15"),
    ),
)
LESSONS = (STDLIB,)


class Runs:
    """Of one lesson, in a folder; what is done already is not done again."""

    def __init__(self, lesson: Lesson, folder: Path, found: dict[str, str]):
        self.lesson, self.folder, self.found = lesson, folder / lesson.name, found
        self.teacher = (
            lesson.teacher.format(**found) if lesson.teacher.startswith("{") else str(self.folder / "teacher")
        )

    def losses(self, seeds: int) -> dict[str, list[float]]:
        """Nats per label of held-out text after each run, and the teacher's own."""
        if not self.lesson.teacher.startswith("{"):
            self._do("recipes/pretrain.py fit", self.lesson.teacher, Path(self.teacher))
        found: dict[str, list[float]] = {signal.name: [] for signal in self.lesson.signals}
        for seed in range(seeds):
            for i, signal in enumerate(self.lesson.signals):
                summary = self._student(signal, self.folder / f"{i}-{seed}", seed)
                found[signal.name].append(summary["val_loss_final"])
                compared = summary.get("comparison", {})
                found |= {"teacher": [row["nats"]] for name, row in compared.items() if name == "teacher"}
        return found

    def _student(self, signal: Signal, folder: Path, seed: int) -> dict:
        flags = f"--model.teacher={self.teacher} {self.lesson.common} {signal.flags}"
        if signal.cache:
            cache = self.folder / signal.cache.replace("--", "").replace(" ", "-")
            self._do("recipes/distill.py cache", f"--model.teacher={self.teacher} {signal.cache}", cache, "--folder")
            flags += f" --data.teacher_cache={cache}"
        flags += f" --seed_everything={seed} --data.seed={seed} --comparison.control=false"
        self._do("recipes/distill.py fit", flags, folder)
        return json.loads((folder / "summary.json").read_text())

    def _do(self, command: str, flags: str, folder: Path, where: str = "--trainer.default_root_dir") -> None:
        done, log = folder.with_suffix(".done"), folder.with_suffix(".log")
        if done.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [*shlex.split(f"{command} {flags.format(**self.found)}"), f"{where}={folder}"]
        words += ["--samples.max_new_tokens=0", "--ckpt_path=last"] if "fit" in words else []
        print(shlex.join(words), file=sys.stderr, flush=True)
        with log.open("w") as stream:
            code = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, stdout=stream, stderr=stream)
        if code.returncode:
            raise RuntimeError(f"it ended with {code.returncode}: {log.read_text()[-500:]}")
        done.touch()
