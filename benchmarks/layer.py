"""What the layer that makes a run survive costs: at each step, and at each checkpoint.

Run:
    python benchmarks/run.py --only layer
"""

import gc
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from page import Goal, Table
from sizes import Job, Size
from tokens import prepare
from turns import Row, Turn, interleave, quartiles

from lightning_modules import hardware
from lightning_modules.checkpoint_io import CheckpointFiles, bytes_of_tensors

COMMAND = "python benchmarks/run.py --only layer"
STARTS = 5
ROWS = {"without the layer": "bare_row.py", "our recipe": "recipe_row.py"}


def steps(sizes: list[Size], threads: list[int], rounds: int, turn_seconds: float) -> Table:
    """The recipe in turns with itself without the layer."""
    rows, goals = [], []
    bf16 = hardware.best_precision("cpu").startswith("bf16")
    for size in sizes:
        tokens = size.batch_size * size.seq_len
        for count in threads:
            with tempfile.TemporaryDirectory() as folder:
                job = prepare(size, Path(folder), bf16)
                rates = {name: [] for name in ROWS}
                for _ in range(STARTS):
                    for name, turns in turns_of(job, count, rounds, turn_seconds).items():
                        rates[name] += [tokens * len(turn.seconds) / sum(turn.seconds) for turn in turns]
            where = f"{size.name}, {count} thread{'s' if count > 1 else ''}"
            bare, ours = (statistics.median(rates[name]) for name in ROWS)
            spreads = [quartiles(rates[name]) for name in ROWS]
            rows.append([where, *(f"{mid:,.0f} ({low:,.0f} to {high:,.0f})" for low, mid, high in spreads)])
            rows[-1].append(f"{ours / bare:.3f}")
            goals.append(Goal(f"with the layer, of without, {where}", ours / bare, at_least=0.98))
    return Table(
        "What surviving costs at each step",
        COMMAND,
        ["", *(f"{name}, tokens/s" for name in ROWS), "of without"],
        rows,
        f"{STARTS} pairs of processes, {rounds} turns of each: two processes of one row differ by some 3 %. The layer: "
        "checkpoints by the clock, signals, numbers that are not finite, ranks that stand still, a seed for each "
        "micro-batch, a second try where memory runs out.",
        goals,
    )


def turns_of(job: Job, threads: int, rounds: int, turn_seconds: float) -> dict[str, list[Turn]]:
    """Of both rows, in processes of their own."""
    with ExitStack() as started:
        running = {name: started.enter_context(Row(script, job, threads)) for name, script in ROWS.items()}
        return interleave(running, rounds, turn_seconds)


def checkpoints(numbers: int, repeats: int) -> Table:
    """Weights and two moments of so many numbers, saved in turns by ours and by Lightning's plugin."""
    weights = torch.randn(numbers)
    checkpoint = {"global_step": 1, "state_dict": {"w": weights}}
    checkpoint["optimizer_states"] = [{"exp_avg": weights * 2, "exp_avg_sq": weights * weights}]
    plugins: dict[str, CheckpointIO] = {"ours": CheckpointFiles(), "Lightning's": TorchCheckpointIO()}
    seconds: dict[str, list[float]] = {name: [] for name in plugins}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        for _ in range(repeats):
            for name, plugin in plugins.items():
                gc.collect()
                start = time.perf_counter()
                plugin.save_checkpoint(checkpoint, Path(folder) / "one.ckpt")
                seconds[name].append(time.perf_counter() - start)
                shutil.rmtree(folder)
                Path(folder).mkdir()
    ours, plain = (statistics.median(values) for values in seconds.values())
    share = (ours - plain) / 600
    return Table(
        f"Saving a checkpoint of {bytes_of_tensors(checkpoint) / 1e9:.2f} GB",
        COMMAND,
        ["", "seconds"],
        [[name, f"{quartiles(values)[1]:.2f}"] for name, values in seconds.items()],
        f"Weights and two moments of {numbers / 1e6:.0f} million numbers. Ours is flushed to the disk, read back and "
        "compared before it gets its name; Lightning's returns as soon as the system has the bytes.",
        [Goal("what ours takes longer, of the 10 minutes between two", share, at_most=0.02)],
    )
