"""Architectures beside each other on one text: on equal bytes, and in equal seconds.

Run:
    python benchmarks/run.py --only tournament --keep runs/tournament --page docs/benchmarks.md      an hour on 2 cores

About as many parameters each, one optimizer, its rate tuned by three runs of each; three seeds. Bits per byte of the
decoders and the LSTM are those of the text; of BERT and T5 of its pseudo-likelihood, which sees both sides of a token.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from page import ROOT, Table
from side_by_side import SEEDS, Runs, run, spread
from turns import environment

THREADS = 2
STEPS, SECONDS = 300, 60
COMMON = {
    "data.vocab_size": 4096,
    "data.seq_len": 256,
    "data.batch_size": 12,
    "samples.max_new_tokens": 0,
    "model.optimizer": "lightning_modules.optim.MuonAdamW",
    "model.optimizer.adamw_lr": 0.01,
    "model.optimizer.momentum": 0.9,
    "model.schedule": "WarmupStableDecay",
    "model.schedule.decay_fraction": 0.8,
    "trainer.callbacks": "[]",
}
BYTES = {"trainer.max_steps": STEPS, "trainer.max_time": "null", "trainer.val_check_interval": STEPS}
LIMIT = f"00:00:{SECONDS // 60:02d}:{SECONDS % 60:02d}"
TIME = {"trainer.max_steps": -1, "trainer.max_time": LIMIT, "trainer.val_check_interval": 10_000}
ARCHITECTURE = "model.architecture"
WIDE = {f"{ARCHITECTURE}.hidden_size": 192, f"{ARCHITECTURE}.num_hidden_layers": 4}
CONTENDERS = {
    "LSTM": {
        ARCHITECTURE: "lightning_modules.lstm.LSTMConfig",
        f"{ARCHITECTURE}.hidden_size": 416,
        f"{ARCHITECTURE}.num_hidden_layers": 1,
    },
    "GPT-2": {
        ARCHITECTURE: "transformers.GPT2Config",
        f"{ARCHITECTURE}.n_embd": 216,
        f"{ARCHITECTURE}.n_layer": 4,
        f"{ARCHITECTURE}.n_head": 4,
        f"{ARCHITECTURE}.n_positions": 256,
    },
    "modern decoder (NanoChat)": {
        ARCHITECTURE: "transformers.NanoChatConfig",
        **WIDE,
        f"{ARCHITECTURE}.intermediate_size": 768,
        f"{ARCHITECTURE}.num_attention_heads": 4,
        f"{ARCHITECTURE}.max_position_embeddings": 256,
    },
    "BERT": {
        "model": "MaskedLM",
        ARCHITECTURE: "transformers.BertConfig",
        **WIDE,
        f"{ARCHITECTURE}.hidden_size": 216,
        f"{ARCHITECTURE}.intermediate_size": 864,
        f"{ARCHITECTURE}.num_attention_heads": 4,
        f"{ARCHITECTURE}.max_position_embeddings": 256,
    },
    "T5": {
        "model": "SpanDenoising",
        ARCHITECTURE: "transformers.T5Config",
        f"{ARCHITECTURE}.d_model": 176,
        f"{ARCHITECTURE}.d_ff": 704,
        f"{ARCHITECTURE}.d_kv": 44,
        f"{ARCHITECTURE}.num_heads": 4,
        f"{ARCHITECTURE}.num_layers": 3,
    },
}
RATES = (0.01, 0.02, 0.04)
SCORED_BYTES = 40_000
"""Of held-out text: a token of BERT's is a forward pass."""


def tables(keep: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).absolute()
        runs = Runs(folder, THREADS)
        text = held_out(folder / "held_out.jsonl")
        rates = {name: best_rate(runs, name, flags) for name, flags in CONTENDERS.items()}
        yield table(runs, text, rates, "bytes", BYTES, f"{STEPS} steps of 12 × 256 tokens")
        yield table(runs, text, rates, "seconds", TIME, f"{SECONDS} seconds of training")
        yield times({name: folder / folder_of(name, rates[name], SEEDS[0], "bytes") for name in CONTENDERS})


def best_rate(runs: Runs, name: str, flags: dict) -> float:
    trials = runs.done([contender(name, flags, rate, 0, "bytes", BYTES) for rate in RATES])
    losses = {rate: trials[folder_of(name, rate, 0, "bytes")]["val_loss"] for rate in RATES}
    return min(losses, key=losses.get)


def contender(name: str, flags: dict, rate: float, seed: int, kind: str, limit: dict):
    rates = {"model.optimizer.lr": rate, "seed_everything": seed, "data.seed": seed}
    return run(folder_of(name, rate, seed, kind), flags | COMMON | limit | rates)


def folder_of(name: str, rate: float, seed: int, kind: str) -> str:
    return f"{kind}/{''.join(letter for letter in name.lower() if letter.isalnum())}-{rate:g}-{seed}"


def held_out(file: Path) -> Path:
    """Of each of some held-out documents the beginning, so that all architectures are scored on the same text."""
    from datamodules.held_out import Texts, documents

    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        some = documents(Texts(max_val_documents=20), "val")
        parts = [text[: SCORED_BYTES // len(some)] for text in some]
        file.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts))
    return file


def scored(folder: Path, text: Path) -> float:
    """Bits per byte."""
    file = folder / "score.json"
    if not file.is_file():
        words = ["recipes/score.py", "--model", str(folder), "--data.path", str(text), "--json"]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment(THREADS), capture_output=True, text=True, check=True
        )
        file.write_text(done.stdout)
    return json.loads(file.read_text())["bits_per_byte"]


def table(runs: Runs, text: Path, rates: dict[str, float], kind: str, limit: dict, budget: str) -> Table:
    rows = []
    for name, flags in CONTENDERS.items():
        found = runs.done([contender(name, flags, rates[name], seed, kind, limit) for seed in SEEDS])
        bits = [scored(runs.folder / one, text) for one in found]
        some = list(found.values())
        speed = statistics.mean(summary["tokens_per_second"] for summary in some)
        joules = [summary["energy"]["joules"] for summary in some if "energy" in summary]
        rows.append(
            [
                name + (" (pseudo-likelihood)" if name in ("BERT", "T5") else ""),
                f"{some[0]['parameters']:,}",
                f"{rates[name]:g}",
                spread(bits),
                f"{speed:,.0f}",
                f"{statistics.mean(summary['tokens'] for summary in some):,.0f}",
                f"{statistics.mean(joules):,.0f}" if joules else "",
            ]
        )
    return Table(
        f"The tournament: equal {kind}",
        "python benchmarks/run.py --only tournament",
        ["", "parameters", "rate", "bits per byte, three seeds", "tokens/s", "tokens", "joules"],
        rows,
        f"{budget} of the standard library, {THREADS} threads; {SCORED_BYTES:,} bytes of held-out files. Joules: "
        "codecarbon's, here an estimate by load.",
    )


def times(folders: dict[str, Path]) -> Table:
    """Of the models of the first seed, in turns."""
    from lightning_modules.compression.opened import open_model
    from lightning_modules.evaluation.judging import PROMPT_TOKENS, latencies

    torch.set_num_threads(THREADS)
    opened = {name: open_model(str(folder / "model")) for name, folder in folders.items()}
    for one in opened.values():
        one.to_stored()
    found = latencies(opened)
    return Table(
        "The tournament: latency",
        "python benchmarks/run.py --only tournament",
        ["", f"ms a text of {PROMPT_TOKENS} tokens", "ms a new token"],
        [[name, f"{text:.2f}", "" if token is None else f"{token:.2f}"] for name, (text, token) in found.items()],
        f"Medians, the models in turns, bf16, {THREADS} threads. T5 reads the text and is given as much to write.",
    )
