"""Two processes over gloo compute what one computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]


def fit(folder, corpus, **flags):
    """The recipe as a user runs it, in processes of its own; returns (summary, exported weights)."""
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 4,
        "trainer.max_time": "null",
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder,
        "model.architecture.hidden_size": 16,
        "model.architecture.num_hidden_layers": 1,
        "model.architecture.num_attention_heads": 2,
        "model.architecture.intermediate_size": 32,
        "data.path": corpus,
        "data.tokenizer": "bytes",
        "data.seq_len": 50,
        "data.val_batch_size": 3,
        "samples.max_new_tokens": 0,
    }
    command = [sys.executable, str(ROOT / "recipes" / "pretrain.py"), "fit"]
    command += [f"--{name}={value}" for name, value in (settings | flags).items()]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "summary.json").read_text()), load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("length", [{"trainer.max_steps": 4}, {"trainer.max_steps": -1, "trainer.max_epochs": 2}])
def test_two_ranks_are_one_process_with_two_micro_batches(length, corpus, tmp_path, shared_cache):
    """In steps, and over epochs whose last step is short, where one rank may have no row at all."""
    flags = {"data.batch_size": 4, "trainer.val_check_interval": 1.0, **length}
    flags |= {"data.seq_len": 241} if "trainer.max_epochs" in length else {}
    one, weights_one = fit(tmp_path / "one", corpus, **flags, **{"trainer.accumulate_grad_batches": 2})
    two, weights_two = fit(tmp_path / "two", corpus, **flags, **{"trainer.devices": 2, "trainer.strategy": "ddp"})
    assert one["tokens"] == two["tokens"] and one["steps"] == two["steps"] >= 4
    assert one["val_loss"] == pytest.approx(two["val_loss"], rel=1e-6)
    for name, weight in weights_one.items():
        assert (weight - weights_two[name]).abs().max() <= 1e-6, name


def test_ranks_whose_run_ends_by_the_clock_go_by_one_clock(corpus, tmp_path):
    """Rates and ramps follow the time that is over; two clocks would let the replicas drift apart."""
    by_time = {"trainer.max_steps": -1, "trainer.max_time": "00:00:00:05", "trainer.val_check_interval": 100_000}
    by_time |= {"trainer.limit_val_batches": 1, "data.batch_size": 2, "trainer.devices": 2, "trainer.strategy": "ddp"}
    by_time |= {
        "trainer.callbacks+": json.dumps({"class_path": "tests.faults.SameOnAllRanks"}),
        "allow_import": "tests",
    }
    fit(tmp_path, corpus, **by_time)
    assert (tmp_path / "same").exists()
