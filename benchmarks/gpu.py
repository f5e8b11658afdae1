"""On a CUDA device: training speed at 124M and 1B, and nanoGPT's GPU run of tinyshakespeare by characters.

Run:
    python benchmarks/run.py --gpu
"""

import json
import tempfile
from pathlib import Path

import precision
import torch
import yaml
from page import ROOT, Goal, Table
from sizes import GPT2_GPU, LLAMA_1B
from time_to_loss import CONFIG, recipe
from training import COMPILED, RECIPE, measure
from training import table as speed_table

COMMAND = "python benchmarks/run.py --gpu"


def training(rounds: int, turn_seconds: float) -> list[Table]:
    """bf16, eager and compiled."""
    tables = []
    for size in (GPT2_GPU, LLAMA_1B):
        speeds = measure(size, torch.get_num_threads(), rounds, turn_seconds, compiled=True, device="cuda")
        goal = Goal(f"recipe's MFU, compiled, {size.name}", speeds.mfu(RECIPE + COMPILED), at_least=0.5)
        table = speed_table(speeds, COMMAND)
        table.goals.append(goal)
        tables.append(table)
    return tables


def precisions(steps: int = 50) -> list[Table]:
    return [precision.table(size, "cuda", steps, COMMAND) for size in (GPT2_GPU, LLAMA_1B)]


def nanogpt_gpu_config() -> dict[str, dict]:
    """The named run at nanoGPT's GPU size: 6 layers, 6 heads, 384 wide, context 256, dropout 0.2, 5,000 steps of 64."""
    config = yaml.safe_load((ROOT / CONFIG).read_text())
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.2)
    size = {"n_layer": 6, "n_head": 6, "n_embd": 384, "n_positions": 256}
    adamw = {"lr": 1e-3, "betas": [0.9, 0.99], "weight_decay": 0.1, "fused": True}
    config["model"]["init_args"] = {
        "architecture": {"class_path": "transformers.GPT2Config", "init_args": size | dropout},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": adamw},
        "schedule": {"class_path": "Cosine", "init_args": {"warmup_steps": 100, "final": 0.1}},
    }
    config["trainer"] |= {"max_steps": 5000, "val_check_interval": 250, "accelerator": "cuda", "devices": 1}
    config["data"] |= {"seq_len": 256, "batch_size": 64}
    return config


def shakespeare(text: Path) -> list[Table]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "nanogpt_gpu.yaml"
        file.write_text(json.dumps(nanogpt_gpu_config()))  # JSON is YAML
        run = recipe(text.resolve(), seed=0, config=str(file))
    row = [run.name, f"{run.val_loss:.4f}", f"{run.training_seconds:.0f}", f"{run.wall_seconds:.0f}"]
    columns = ["", "held-out loss", "training s", "whole wall s"]
    goals = [Goal("tinyshakespeare at nanoGPT's GPU size: held-out loss", run.val_loss, at_most=1.47)]
    return [Table("tinyshakespeare by characters, 6L/384/ctx 256", COMMAND, columns, [row], goals=goals)]
