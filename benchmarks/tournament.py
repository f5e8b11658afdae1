"""Architectures beside each other on one text: on equal bytes, and in equal seconds.

Run:
    python benchmarks/run.py --only tournament --keep runs/tournament --page docs/benchmarks.md       75 minutes

About as many parameters each, one optimizer, its rates tuned for each of them alike. Bits per byte of the decoders and
the LSTM are those of the text; BERT's are its pseudo-likelihood, which sees both sides of a token, T5's of spans.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from page import ROOT, Table
from side_by_side import SEEDS, Run, Runs, best, run, told, tuned
from turns import environment

THREADS = 2
STEPS, SECONDS = 300, 60
ROWS, LENGTH = 12, 256
COMMON = {
    "data.vocab_size": 4096,
    "data.seq_len": LENGTH,
    "data.batch_size": ROWS,
    "samples.max_new_tokens": 0,
    "model.optimizer": "lightning_modules.optim.MuonAdamW",
    "model.optimizer.momentum": 0.9,
    "model.schedule": "WarmupStableDecay",
    "model.schedule.decay_fraction": 0.8,
    "trainer.callbacks": "[]",
}
BYTES = {"trainer.max_steps": STEPS, "trainer.max_time": "null", "trainer.val_check_interval": STEPS}
LIMIT = f"00:00:{SECONDS // 60:02d}:{SECONDS % 60:02d}"
TIME = {"trainer.max_steps": -1, "trainer.max_time": LIMIT, "trainer.val_check_interval": 10_000}
ARCHITECTURE = "model.architecture"
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
        **{f"{ARCHITECTURE}.{name}_pdrop": 0.0 for name in ("resid", "embd", "attn")},
    },
    "modern decoder (NanoChat)": {
        ARCHITECTURE: "transformers.NanoChatConfig",
        f"{ARCHITECTURE}.hidden_size": 192,
        f"{ARCHITECTURE}.num_hidden_layers": 4,
        f"{ARCHITECTURE}.intermediate_size": 768,
        f"{ARCHITECTURE}.num_attention_heads": 4,
        f"{ARCHITECTURE}.max_position_embeddings": 256,
    },
    "BERT": {
        "model": "MaskedLM",
        ARCHITECTURE: "transformers.BertConfig",
        f"{ARCHITECTURE}.hidden_size": 216,
        f"{ARCHITECTURE}.num_hidden_layers": 4,
        f"{ARCHITECTURE}.intermediate_size": 864,
        f"{ARCHITECTURE}.num_attention_heads": 4,
        f"{ARCHITECTURE}.max_position_embeddings": 256,
        f"{ARCHITECTURE}.hidden_dropout_prob": 0.0,
        f"{ARCHITECTURE}.attention_probs_dropout_prob": 0.0,
    },
    "T5": {
        "model": "SpanDenoising",
        ARCHITECTURE: "transformers.T5Config",
        f"{ARCHITECTURE}.d_model": 176,
        f"{ARCHITECTURE}.d_ff": 704,
        f"{ARCHITECTURE}.d_kv": 44,
        f"{ARCHITECTURE}.num_heads": 4,
        f"{ARCHITECTURE}.num_layers": 3,
        f"{ARCHITECTURE}.dropout_rate": 0.0,
        "data.seq_len": 232,  # of which a row takes 257 tokens of text
    },
}
PSEUDO = ("BERT", "T5")
RATES = (0.01, 0.02, 0.04)
"""Of the matrices; of the rest half of it."""
SCORED_BYTES = 40_000
"""At most, of held-out text: a token of BERT's is a forward pass."""


def tables(keep: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).absolute()
        runs, side_by_side = Runs(folder, THREADS), Runs(folder)  # the rates' own time is not told
        text = held_out(folder / "held_out.jsonl")
        side_by_side.done([contender(name, BYTES, rate) for name in CONTENDERS for rate in RATES])
        rates = {name: best(tuned(partial(contender, name, BYTES), list(RATES), side_by_side)) for name in CONTENDERS}
        found = {name: seeds(runs, name, rates[name], BYTES) for name in CONTENDERS}
        yield table(found, text, rates, "bytes", f"{STEPS} steps of {ROWS} × {LENGTH} tokens of text.")
        in_time = {name: seeds(runs, name, rates[name], TIME) for name in CONTENDERS}
        limit = f"{SECONDS} seconds of training, at the rates of equal bytes."
        yield table(in_time, text, rates, "seconds", limit)
        yield times({name: some[0]["folder"] for name, some in found.items() if some[0] is not None})


def contender(name: str, limit: dict, rate: float, seed: int | None = None) -> Run:
    rates = {"model.optimizer.lr": rate, "model.optimizer.adamw_lr": rate / 2}
    flags = CONTENDERS[name] | (COMMON | CONTENDERS[name]) | limit | rates  # classes before what is in them
    return run(f"{name}, {rate:g}", flags) if seed is None else run(f"{name}, {rate:g}", flags, seed)


def seeds(runs: Runs, name: str, rate: float, limit: dict) -> list[dict | None]:
    return runs.done([contender(name, limit, rate, seed) for seed in SEEDS])


def held_out(file: Path) -> Path:
    """Of each of some held-out documents the beginning, so that all architectures are scored on the same text."""
    from datamodules.held_out import Texts, documents

    some = documents(Texts(max_val_documents=20), "val")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text[: SCORED_BYTES // len(some)]}) + "\n" for text in some))
    return file


def scored(name: str, folder: Path, text: Path) -> dict:
    """What score.py says: bits per byte, by as much context as a row of training has."""
    file = folder / f"score-{hashlib.sha256(text.read_bytes()).hexdigest()[:12]}.json"
    if not file.is_file():
        words = ["recipes/score.py", "--model", str(folder), "--data.path", str(text), "--json"]
        words += ["--seq_len", str(LENGTH), *(["--stride", str(LENGTH // 2)] if name != "T5" else [])]
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, env=environment(THREADS), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr[-500:]}")
        file.write_text(done.stdout)
    return json.loads(file.read_text())


def table(found: dict[str, list[dict | None]], text: Path, rates: dict[str, float], kind: str, budget: str) -> Table:
    rows, scores = [], {}
    for name, summaries in found.items():
        for summary in summaries:
            if summary is not None:
                scores[name] = scored(name, summary["folder"], text)
                summary["scored"] = scores[name]["bits_per_byte"]
        some = [summary for summary in summaries if summary is not None]
        read = [summary["steps"] * ROWS * LENGTH for summary in some]
        speeds = [tokens / s["measured"]["seconds"] for tokens, s in zip(read, some, strict=True)]
        joules = [summary["energy"]["joules"] for summary in some if "energy" in summary]
        rows.append(
            [
                name + (" (pseudo-likelihood)" if name in PSEUDO else ""),
                *([f"{some[0]['parameters']:,}"] if some else [""]),
                f"{rates[name]:g}",
                told(summaries, lambda summary: summary["scored"]),
                *(f"{statistics.mean(figures):,.0f}" if figures else "" for figures in (speeds, read, joules)),
            ]
        )
    one = next(iter(scores.values()))
    return Table(
        f"The tournament: equal {kind}",
        "python benchmarks/run.py --only tournament",
        ["", "parameters", "rate", "bits per byte, three seeds", "tokens/s", "tokens of text", "joules"],
        rows,
        f"{budget} The standard library, {THREADS} threads; judged by the beginnings of {one['documents']} held-out "
        f"files, {one['bytes']:,} bytes, with {LENGTH} tokens of context. BERT learns from 15 % of the tokens, T5 too. "
        "Joules: codecarbon's, here an estimate by load.",
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
    stored = ", ".join(dict.fromkeys(str(one.stored).removeprefix("torch.") for one in opened.values()))
    return Table(
        "The tournament: latency",
        "python benchmarks/run.py --only tournament",
        ["", f"ms a text of {PROMPT_TOKENS} tokens", "ms a new token"],
        [[name, f"{text:.2f}", "" if token is None else f"{token:.2f}"] for name, (text, token) in found.items()],
        f"Medians, the models in turns, {stored}, {THREADS} threads. T5 reads the text and is given as much to write.",
    )
