"""What models from 124 M to 175 B parameters would take on 8 to 4,096 GPUs: planned by the recipe, never run.

Run:
    python benchmarks/scale.py                     half an hour on a CPU; prints the table of docs/scale.md
    python benchmarks/scale.py --only 1B --devices 8 64
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from page import ROOT, Table

from lightning_modules.architectures import bytes_of
from lightning_modules.planning import duration

LLAMA, GPT2 = "transformers.LlamaConfig", "transformers.GPT2Config"


class Model(NamedTuple):
    kind: str
    fields: dict[str, int | bool]
    tokens: float
    """Of the run."""
    seq_len: int
    rows: int
    """Of a micro-batch."""


MODELS = {
    "124M": Model(GPT2, {"vocab_size": 50304}, 10e9, 1024, 16),
    "1B": Model(
        LLAMA,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
        100e9,
        4096,
        8,
    ),
    "8B": Model(
        LLAMA,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
        1e12,
        8192,
        1,
    ),
    "70B": Model(
        LLAMA,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
        | {"num_key_value_heads": 8, "vocab_size": 128256},
        1e12,
        8192,
        1,
    ),
    "175B": Model(
        GPT2,
        {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048, "vocab_size": 50304},
        300e9,
        2048,
        1,
    ),
}
"""GPT-2, Llama 3.2 1B, Llama 3 8B and 70B, and GPT-3 by the fields of their configs; tokens as ours."""
DEVICES = (8, 64, 512, 4096)
GROUP = 64
"""Devices that keep one copy; more than that are groups of so many."""


def of_plan(model: Model, devices: int, hardware: str, file: Path) -> dict[str, object]:
    flags = [f"--model.architecture={model.kind}"]
    flags += [f"--model.architecture.{name}={str(value).lower()}" for name, value in model.fields.items()]
    flags += [f"--model.architecture.max_position_embeddings={model.seq_len}"] if model.kind == LLAMA else []
    flags += ["--model.optimizer=torch.optim.AdamW", f"--model.max_tokens={model.tokens:.0f}"]
    flags += ["--trainer.max_steps=-1", "--trainer.max_time=null", "--trainer.precision=bf16-true"]
    flags += [f"--data.seq_len={model.seq_len}", f"--data.batch_size={model.rows}", "--samples.max_new_tokens=0"]
    if len(model.fields) > 1:
        flags += ["--model.activation_checkpointing=true", "--trainer.strategy=FSDP2"]
        flags += [f"--trainer.strategy.group_size={GROUP}"] if devices > GROUP else []
    else:
        flags += ["--trainer.strategy=ddp", "--trainer.precision=bf16-mixed"]
    command = [sys.executable, "recipes/pretrain.py", "plan", *flags, f"--devices={devices}"]
    command += [f"--hardware={hardware}", f"--output={file}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(file.read_text())


def table(names: list[str], counts: list[int], hardware: str) -> Table:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for devices in counts:
                found = of_plan(MODELS[name], devices, hardware, Path(folder) / "plan.json")
                fits = f"yes, {found['most_rows']} rows" if found["fits"] else f"no, {found['most_rows']} rows"
                rows.append([name, f"{devices:,}", f"{found['parameters'] / 1e9:,.2f} B", f"{found['tokens']:.2g}"])
                rows[-1] += [bytes_of(found["peak_memory_bytes"]), fits, duration(found["seconds"])]
                used = found["kilowatt_hours"]
                rows[-1].append(f"{used / 1000:,.2f} MWh" if used >= 1000 else f"{used:,.0f} kWh")
                print(*rows[-1], sep="  ", file=sys.stderr, flush=True)
    columns = ["model", "GPUs", "parameters", "tokens", "memory of each", "fits", "time", "energy, at most"]
    return Table(f"Planned, not run: {hardware}", "python benchmarks/scale.py", columns, rows)


def tables() -> Iterator[Table]:
    yield table(list(MODELS), list(DEVICES), "h100")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS), help="these models alone")
    parser.add_argument("--devices", nargs="+", type=int, default=list(DEVICES))
    parser.add_argument("--hardware", default="h100")
    options = parser.parse_args()
    print(table(options.only, options.devices, options.hardware).markdown(""))
