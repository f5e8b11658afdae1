"""How long a recipe takes to say what it can do: CPU seconds (user + system) of `--help`.

Run:
    python benchmarks/run.py --only startup
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from page import Goal, Table

ROOT = Path(__file__).parents[1]
SCRIPTS = ("pretrain", "generate", "score")


def cpu_seconds(arguments: list[str]) -> float:
    """Of a process of this Python that must end well."""
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    process.returncode = 0
    return usage.ru_utime + usage.ru_stime


def tables(repeats: int) -> list[Table]:
    rows, goals = [], []
    for name in SCRIPTS:
        arguments = [f"recipes/{name}.py", "--help"]
        cpu_seconds(arguments)  # the first import writes bytecode
        seconds = sorted(cpu_seconds(arguments) for _ in range(repeats))
        middle = statistics.median(seconds)
        rows.append([f"python {' '.join(arguments)}", f"{middle:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"])
        if name == "pretrain":
            goals.append(Goal("CPU seconds of pretrain.py --help", middle, at_most=4))
    columns = ["", "CPU seconds (fewest to most)"]
    return [Table("Start-up", "python benchmarks/run.py --only startup", columns, rows, goals=goals)]
