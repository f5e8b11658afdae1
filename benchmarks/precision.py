"""Precision × compile × loss on one device: tokens a second, MFU, peak memory, and the loss after as many steps."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from page import ROOT, Goal, Table
from sizes import Size

PRECISIONS = {"float32": "32-true", "tf32": "32-true", "bf16-mixed": "bf16-mixed", "bf16-true": "bf16-true"}
PRECISIONS |= {"fp16": "16-mixed", "fp8": "transformer-engine"}
"""Names of a row, and what the Trainer calls them."""


def of_row(size: Size, precision: str, compiled: bool, loss: str, device: str, steps: int, folder: Path) -> dict | None:
    """What a run of the recipe has in its summary; None where it does not run here."""
    if precision == "fp8" and importlib.util.find_spec("transformer_engine") is None:
        return None
    flags = {"model.architecture": f"transformers.{size.config}"}
    if size.bpe_ids is not None:
        flags["data.vocab_size"] = size.bpe_ids
    flags |= {f"model.architecture.{name}": value for name, value in size.fields.items()}
    flags |= {"model.optimizer": "torch.optim.AdamW", "model.compile": str(compiled).lower()}
    flags |= {"data.seq_len": size.seq_len, "data.batch_size": size.batch_size, "samples.max_new_tokens": 0}
    flags |= {"trainer.accelerator": device, "trainer.devices": 1, "trainer.precision": PRECISIONS[precision]}
    flags |= {"trainer.max_steps": steps, "trainer.max_time": "null", "trainer.val_check_interval": steps}
    flags |= {"trainer.limit_val_batches": 10, "trainer.default_root_dir": folder}
    command = [sys.executable, str(ROOT / "benchmarks" / "precision_row.py"), loss, "recipes/pretrain.py", "fit"]
    command += [f"--{name}={value}" for name, value in flags.items()]
    environment = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    environment |= {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"} if precision == "tf32" else {}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        print(f"{size.name} {precision} {loss}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads((folder / "summary.json").read_text())


def table(size: Size, device: str, steps: int, command: str, precisions: list[str] | None = None) -> Table:
    rows, found = [], {}
    with tempfile.TemporaryDirectory() as folder:
        choices = itertools.product(precisions or PRECISIONS, (False, True), ("fused", "plain"))
        for number, (precision, compiled, loss) in enumerate(choices):
            summary = of_row(size, precision, compiled, loss, device, steps, Path(folder) / str(number))
            name = f"{precision}, {'compiled' if compiled else 'eager'}, {loss} loss"
            if summary is None:
                rows.append([name, *["does not run here"] * 4])
                continue
            found[precision, compiled, loss] = summary
            peak = f"{summary['measured']['peak_memory_bytes'] / 1e9:,.2f}"
            rows.append([name, f"{summary['tokens_per_second']:,.0f}", f"{summary['mfu']:.1%}", peak])
            rows[-1].append(f"{summary['val_loss']:.4f}")
    goals = []
    if "bf16-mixed" in (precisions or PRECISIONS) and device == "cuda" and found:
        best = max(summary["mfu"] for (precision, *_), summary in found.items() if precision.startswith("bf16"))
        goals = [Goal(f"MFU in bf16, {size.name}", best, at_least=0.55 if "1B" in size.name else 0.5)]
    columns = ["", "tokens/s", "MFU", "peak GB", f"held-out loss after {steps} steps"]
    return Table(f"Precision, compile and loss, {size.name}", command, columns, rows, goals=goals)
