"""What the plan of a run says of its memory and FLOPs, beside what torch's profiler and FLOP counter find in a step.

Run:
    python benchmarks/planned.py
    python benchmarks/planned.py --only decoder lstm
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from page import ROOT, Goal, Table

SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8}
FEW = ["--trainer.max_steps=4", "--trainer.limit_val_batches=0"]
RUNS = {
    "decoder": ["pretrain", "--model.architecture=transformers.LlamaConfig", "--data.batch_size=16"],
    "encoder": ["pretrain", "--config=recipes/pretrain_bert.yaml", "--data.batch_size=8", "--data.vocab_size=4096"],
    "encoder-decoder": ["pretrain", "--config=recipes/pretrain_t5.yaml", "--data.batch_size=8"],
    "LSTM": ["pretrain", "--config=recipes/pretrain_lstm.yaml", "--data.batch_size=32"],
    "LoRA": ["finetune", "--config=recipes/finetune_text_generation.yaml", "--model.adapter.target_modules=all-linear"],
    "distillation": ["distill", "--model.student=transformers.LlamaConfig"],
}
"""Flags of each; those of the sizes come to the first two and the last."""
SIZED = {"decoder": "model.architecture", "encoder": "model.architecture", "distillation": "model.student"}


def of_run(name: str, folder: Path, *more: str) -> dict[str, dict]:
    """What was planned of a run with some `more` flags, and what was measured in it."""
    recipe, *flags = RUNS[name]
    flags += [f"--{SIZED[name]}.{field}={value}" for field, value in SIZES.items()] if name in SIZED else []
    if recipe != "finetune":
        flags.append("--samples.max_new_tokens=0")
    if recipe == "distill":
        flags.append("--comparison.control=false")
    command = [sys.executable, str(ROOT / "benchmarks" / "planned_row.py"), f"recipes/{recipe}.py", "fit", *flags]
    command += [*FEW, *more, f"--trainer.default_root_dir={folder}"]
    environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    summary = json.loads((folder / "summary.json").read_text())
    step = json.loads((folder / "measured_step.json").read_text())
    return {"planned": summary["planned"], "step": step, "run": summary["measured"]}


def table(names: list[str]) -> Table:
    rows, goals = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            found = of_run(name, Path(folder) / name)
            planned, step, run = found["step"]["simulated"], found["step"], found["run"]
            ratio = step["peak_memory_bytes"] / planned["peak_memory_bytes"]
            resident = (run["peak_memory_bytes"] or 0) / found["planned"]["peak_memory_bytes"]
            flops = step["flops_per_token"] / planned["flops_per_token"]
            megabytes = [x["peak_memory_bytes"] / 1e6 for x in (planned, step)]
            rows.append([name, f"{found['planned']['parameters'] / 1e6:.1f} M", *(f"{x:,.1f}" for x in megabytes)])
            rows[-1] += [f"{ratio:.3f}", f"{resident:.2f}", f"{planned['flops_per_token']:.4g}", f"{flops:.6f}"]
            goals.append(Goal(f"memory of the {name}, away from the plan", abs(ratio - 1), at_most=0.15))
            goals.append(Goal(f"FLOPs of the {name}, away from the plan", abs(flops - 1), at_most=0))
    columns = ["run", "parameters", "planned MB", "measured MB", "measured / planned"]
    columns += ["resident / planned", "planned FLOP a token", "counted / planned"]
    return Table(
        "What was planned, and what was measured",
        "python benchmarks/run.py --only planned",
        columns,
        rows,
        "The plan of one micro-batch, and what it took: the most that all tensors of a step take together, by torch's "
        "profiler, and the FLOPs of torch's counter. Resident is what the process grew by in the run, beside the plan "
        "of the run: it holds freed memory that it keeps for later, and what libraries take for themselves, too.",
        goals,
    )


def tables(names: list[str] | None = None) -> Iterator[Table]:
    yield table(names or list(RUNS))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, help="these runs alone")
    for found in tables(parser.parse_args().only):
        found.print()
