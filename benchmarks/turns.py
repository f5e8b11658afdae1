"""Rows of a benchmark take turns: each is a process of its own that does some steps when it is asked to, then waits.

So threads, memory and imports are a row's own, only one of them computes at a time, and a change in the machine's
speed meets all rows alike.
"""

import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from memory import peak_bytes
from sizes import Job

HERE = Path(__file__).parent


class NoMoreTurns(Exception):
    """The driver has hung up: whatever loop the row is in, it ends here."""


class Turns:
    """The side of the row, whose loop calls `step_begins` before each optimizer step.

    `parameters` is the size of what is trained, for the driver to compare between rows.
    """

    def __init__(self, job: Job, parameters: int):
        self.commands = os.fdopen(job.commands, closefd=False)
        self.answers = os.fdopen(job.answers, "w", closefd=False)
        self.parameters = parameters
        self.steps = 0
        self.starts: list[float] = []

    def step_begins(self) -> None:
        now = time.perf_counter()
        if len(self.starts) < self.steps:
            self.starts.append(now)
            return
        if self.steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
                now = time.perf_counter()
            ends = [*self.starts[1:], now]
            seconds = [end - start for start, end in zip(self.starts, ends, strict=True)]
            answer = {"seconds": seconds, "peak_bytes": peak_bytes(), "parameters": self.parameters}
            print(json.dumps(answer), file=self.answers, flush=True)
        command = self.commands.readline()
        if not command:
            raise NoMoreTurns
        self.steps = int(command)
        self.starts = [time.perf_counter()]


def run_row(train: Callable[[Job], None]) -> None:
    """What the script of a row does: `python raw_row.py JOB`."""
    job = Job.from_json(sys.argv[1])
    # Out of the way of libraries that close what they take for their own: torch's compiler did so now and then.
    commands, answers = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 900) for fd in (job.commands, job.answers))
    os.close(job.commands)
    os.close(job.answers)
    try:
        train(Job(**(asdict(job) | {"size": job.size, "commands": commands, "answers": answers})))
    except NoMoreTurns:
        # Neither Lightning nor transformers needs to tidy up: the driver removes the folder.
        os._exit(0)


@dataclass(frozen=True)
class Turn:
    """An answer."""

    seconds: list[float]
    """Of each step."""
    peak_bytes: int
    """Of the process so far."""
    parameters: int


class Row:
    """The side of the driver: starts the process, asks for turns, ends it with the block. A peer may need another
    Python."""

    def __init__(self, script: str, job: Job, threads: int, python: str = sys.executable):
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        logs = len(list(Path(job.folder).glob("*.log")))
        self.log = Path(job.folder) / f"{Path(script).stem}-{logs}.log"
        job = Job(**(asdict(job) | {"size": job.size, "commands": commands, "answers": answers}))
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, str(HERE / script), job.to_json()],
                pass_fds=(commands, answers),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=HERE.parent,
                env=environment(threads),
            )
        os.close(commands)
        os.close(answers)
        self._read = os.fdopen(self._answers)

    def __enter__(self) -> "Row":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._commands)
        self._read.close()
        self.process.wait(timeout=60)

    def turn(self, steps: int) -> Turn:
        with suppress(BrokenPipeError):  # of a process that has failed: its log says why
            os.write(self._commands, f"{steps}\n".encode())
        answer = self._read.readline()
        if not answer:
            raise RuntimeError(f"{self.process.args[1]} ended; its last words:\n{self.log.read_text()[-3000:]}")
        return Turn(**json.loads(answer))


def environment(threads: int) -> dict[str, str]:
    """Of every row alike. OpenMP threads wait as our packages set it for themselves."""
    ours = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LM_RUN_FOLDER"}
    return ours | {
        "OMP_NUM_THREADS": str(threads),
        "GOMP_SPINCOUNT": "10000",
        "WANDB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def interleave(rows: dict[str, Row], rounds: int, turn_seconds: float) -> dict[str, list[Turn]]:
    """`rounds` turns of each row, of about `turn_seconds` each, after a warm-up in which compilation happens."""
    steps = {}
    for name, row in rows.items():
        print(f"  warming up {name}", file=sys.stderr, flush=True)
        pace = statistics.median(row.turn(1).seconds)
        if pace < turn_seconds or pace > 10 * turn_seconds:  # the first step of many, or a compilation
            pace = statistics.median(row.turn(3).seconds)
        steps[name] = max(1, round(turn_seconds / pace))
    turns: dict[str, list[Turn]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, row in rows.items():
            turns[name].append(row.turn(steps[name]))
    return turns


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
