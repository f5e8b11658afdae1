"""A student with its teacher at hand, beside TRL's GKDTrainer: time of a step, memory, and where the same steps end.

Run:
    python -m venv trl && trl/bin/pip install trl==1.16.0 torch==2.13.0 transformers==5.23.0
    python benchmarks/run.py --only peer_distillation --trl_python trl/bin/python

Each in an environment of its own; the same weights, tokens, divergence, AdamW and constant rate.
"""

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from distill_row import config
from page import ROOT, Goal, Table
from sizes import Job, Size, nanochat
from tokens import prepare
from transformers import AutoModelForCausalLM
from turns import HERE, Row, environment, interleave, quartiles

from datamodules.text import Text
from lightning_modules import hardware

SMALL = (
    Size("3L/128", "NanoChatConfig", nanochat(128, 3, 4, 256), seq_len=256, batch_size=12, bpe_ids=4096),
    Size("4L/192", "NanoChatConfig", nanochat(192, 4, 4, 256), seq_len=256, batch_size=12, bpe_ids=4096),
)
"""The default student and its teacher."""
WIDE = (
    Size("4L/256", "NanoChatConfig", nanochat(256, 4, 4, 256), seq_len=256, batch_size=8, bpe_ids=32000),
    Size("6L/384", "NanoChatConfig", nanochat(384, 6, 6, 256), seq_len=256, batch_size=8, bpe_ids=32000),
)
"""With a vocabulary as it is usual."""
STEPS = 150
"""Of the runs whose losses are compared."""
OURS, BEST, DEFAULTS = "recipes/distill.py", "TRL, best settings", "TRL, defaults"


def tables(python: Path, threads: int, rounds: int, turn_seconds: float) -> list[Table]:
    settings = (str(python), threads, rounds, turn_seconds)
    return [measured(*SMALL, *settings, is_trained=True), measured(*WIDE, *settings, is_trained=False)]


def measured(
    student: Size, teacher: Size, python: str, threads: int, rounds: int, turn_seconds: float, is_trained: bool
) -> Table:
    """Losses are compared beside a trained teacher; for times and memory new weights are as good."""
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(student, Path(folder), hardware.best_precision("cpu").startswith("bf16"))
        base = _changed(base, model=folder, task="peer")
        save_models(base, student, teacher)
        if is_trained:
            train_teacher(base, threads)
        jobs = {OURS: base, BEST: _changed(base, best_settings=True), DEFAULTS: base}
        rows = {
            name: ("distill_row.py", None) if name == OURS else ("peer_distillation_row.py", python) for name in jobs
        }
        with ExitStack() as started:
            running = {
                name: started.enter_context(Row(script, jobs[name], threads, *([other] if other else [])))
                for name, (script, other) in rows.items()
            }
            turns = interleave(running, rounds, turn_seconds)
        losses = {name: loss_after(name, jobs[name], python, threads) for name in (OURS, BEST) if is_trained}
    seconds = {name: [statistics.median(turn.seconds) for turn in found] for name, found in turns.items()}
    peaks = {name: max(turn.peak_bytes for turn in found) / 2**20 for name, found in turns.items()}
    ratio = {name: statistics.median(values) / statistics.median(seconds[OURS]) for name, values in seconds.items()}
    shown = [
        [
            name,
            "{1:.0f} ({0:.0f} to {2:.0f})".format(*(1000 * s for s in quartiles(values))),
            f"{ratio[name]:.2f}",
            f"{peaks[name]:,.0f}",
            f"{losses[name]:.4f}" if name in losses else "",
        ]
        for name, values in seconds.items()
    ]
    goals = [Goal("TRL's best settings: time of a step, of ours", ratio[BEST], at_least=1.5)]
    if is_trained:
        goals.append(Goal("our loss less TRL's, nats", losses[OURS] - losses[BEST], at_most=0.0))
    return Table(
        f"Distillation beside TRL, {student.name} from {teacher.name}, {student.bpe_ids:,} words, {threads} threads",
        "python benchmarks/run.py --only peer_distillation --trl_python trl/bin/python",
        ["", "ms a step", "of ours", "MiB at most", f"nats after {STEPS} steps"],
        shown,
        f"{student.batch_size} × {student.seq_len} tokens; forward KL on given text; the memory of the whole process; "
        "the loss on the first 200 held-out rows.",
        goals,
    )


def save_models(job: Job, student: Size, teacher: Size) -> None:
    data = _data(job)
    for name, size in (("student", student), ("teacher", teacher)):
        torch.manual_seed(0)
        network = AutoModelForCausalLM.from_config(size.architecture(data.vocab_size))
        for part in (network, data.tokenizer):
            part.save_pretrained(Path(job.model) / name)


def train_teacher(job: Job, threads: int) -> None:
    """The default pretraining, shortened."""
    run = Path(job.folder) / "pretraining"
    flags = ["--trainer.max_steps=400", "--trainer.max_time=null", "--trainer.val_check_interval=400"]
    command = [sys.executable, "recipes/pretrain.py", "fit", *flags, f"--trainer.default_root_dir={run}"]
    subprocess.run(command, cwd=ROOT, env=environment(threads), check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(Path(job.model) / "teacher")
    (run / "model").rename(Path(job.model) / "teacher")


def loss_after(name: str, job: Job, python: str, threads: int) -> float:
    """Of a run to its end, in nats per token of held-out rows."""
    job = _changed(job, steps=STEPS)
    if name == OURS:
        settings = config(job)
        folder = Path(job.folder) / "ours"
        settings["trainer"] |= {"max_steps": STEPS, "default_root_dir": str(folder), "callbacks": []}
        settings["model"]["init_args"]["optimizer"] = {
            "class_path": "torch.optim.AdamW",
            "init_args": {"lr": 1e-3, "weight_decay": 0.0, "fused": True},
        }
        file = Path(job.folder) / "ours.yaml"
        file.write_text(json.dumps(settings | {"comparison": {"control": False}}))
        command = [sys.executable, "recipes/distill.py", "fit", "--config", str(file)]
        model = folder / "model"
    else:
        command = [python, str(HERE / "peer_distillation_row.py"), job.to_json()]
        model = Path(job.folder) / "peer"
    subprocess.run(command, cwd=ROOT, env=environment(threads), check=True, stdout=subprocess.DEVNULL)
    return held_out_loss(AutoModelForCausalLM.from_pretrained(model), _data(job))


@torch.inference_mode()
def held_out_loss(network, data: Text, rows: int = 200) -> float:
    nats = tokens = 0.0
    for batch in data.val_dataloader():
        log_q = network.eval()(batch["input_ids"]).logits.float().log_softmax(-1)
        keep = batch["labels"] >= 0
        nats -= float(log_q.gather(-1, batch["labels"].clamp(min=0)[..., None])[..., 0][keep].sum())
        tokens += int(keep.sum())
        if (rows := rows - len(keep)) <= 0:
            break
    assert math.isfinite(nats)
    return nats / tokens


def _data(job: Job) -> Text:
    data = Text(vocab_size=job.size.bpe_ids, seq_len=job.size.seq_len, batch_size=job.size.batch_size)
    data.prepare_data()
    data.setup("fit")
    return data


def _changed(job: Job, **fields: object) -> Job:
    return Job(**(asdict(job) | {"size": job.size} | fields))
