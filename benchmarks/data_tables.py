"""The tables of `encoding.py` and `loading.py`: each is run as a script, and what it prints is read.

Run:
    python benchmarks/run.py --only encoding loading
"""

import re
import subprocess
import sys

from page import ROOT, Goal, Table
from sizes import Size
from training import RECIPE, Speeds

FIGURE = re.compile(r"^(?P<name>\S.*?) +(?P<figure>[\d.]+) (?:MB|Mtok) per CPU-second", re.MULTILINE)


def printed(script: str, *flags: str) -> tuple[str, dict[str, float]]:
    """The first line and the figures, by name, of a script of this folder."""
    arguments = [sys.executable, f"benchmarks/{script}", *flags]
    output = subprocess.run(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    figures = {match["name"]: float(match["figure"]) for match in FIGURE.finditer(output)}
    assert len(figures) == 3, f"{script} printed no three figures:\n{output}"
    return output.splitlines()[0], figures


def encoding(rounds: int) -> Table:
    what, figures = printed("encoding.py", "--rounds", str(rounds))
    ours, tiktoken, datasets_map = figures.values()
    return Table(
        "Text to tokens",
        "python benchmarks/encoding.py",
        ["", "MB per CPU-second"],
        [[name, f"{figure:.2f}"] for name, figure in figures.items()],
        f"{what}; one core. `encode_corpus` reads the files and writes the store as well.",
        [
            Goal("encoding and writing, of raw tiktoken", ours / tiktoken, at_least=0.9),
            Goal("encoding and writing, of datasets.map", ours / datasets_map, at_least=3),
        ],
    )


def loading(sizes: list[Size], rounds: int, trained: list[Speeds]) -> Table:
    """The share of a step that loading takes is known for the sizes that were trained in the same run."""
    rows, goals = [], []
    for size in sizes:
        shape = ["--seq_len", str(size.seq_len), "--batch_size", str(size.batch_size)]
        _, figures = printed("loading.py", *shape, "--rounds", str(rounds))
        tokens_per_cpu_second = 1e6 * next(iter(figures.values()))
        rates = [speeds.rate(RECIPE) for speeds in trained if speeds.size == size]
        share = max(rates) / tokens_per_cpu_second if rates else None
        rows.append([f"{size.batch_size} × {size.seq_len}", *(f"{figure:.1f}" for figure in figures.values())])
        rows[-1].append("not trained in this run" if share is None else f"{share:.2%}")
        if share is not None:
            goals.append(Goal(f"loading, part of a step at {size.name}", share, at_most=0.01))
    return Table(
        "Loading rows",
        "python benchmarks/run.py --only training loading",
        ["batch", *(f"{name} (Mtok per CPU-second)" for name in figures), "share of a step"],
        rows,
        "In the training process, without workers. The share is of the fastest rate at which the recipe trained here.",
        goals,
    )
