"""The peer: TRL's GKDTrainer on given text, which is what it makes of forward KL between a student and its teacher.

At its defaults, or at the best settings it has for this: bf16, no recomputation of activations, fused AdamW, no log.
Both: the same weights to begin with, tokens from the same memory-mapped file, clipping at 1, no evaluation. Runs in an
environment that has TRL, see peer_distillation.py.
"""

import sys
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from sizes import Job
from trainer_row import BEST, Rows, TakesTurns
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from turns import Turns, run_row

RATE = 1e-3


def rows(job: Job) -> Dataset:
    """Row by row from the file, as the trainer wants them."""
    read = Rows(job)
    return Dataset.from_dict({"row": range(len(read))}).with_transform(
        lambda some: {"input_ids": [read[row]["input_ids"] for row in some["row"]]}
    )


def collate(some: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """All tokens count; the trainer shifts the labels."""
    ids = torch.stack([row["input_ids"] for row in some])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def train(job: Job) -> None:
    """Takes turns; where the job has steps, does so many and saves the student."""
    transformers.set_seed(0)
    student, teacher = (AutoModelForCausalLM.from_pretrained(f"{job.model}/{name}") for name in ("student", "teacher"))
    best = BEST | {"bf16": job.bf16, "gradient_checkpointing": False} if job.best_settings else {}
    arguments = GKDConfig(
        output_dir=job.folder,
        lmbda=0.0,  # the student writes nothing itself
        beta=0.0,  # forward KL
        temperature=1.0,
        per_device_train_batch_size=job.size.batch_size,
        max_steps=job.steps or 10**6,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=job.device == "cpu",
        **best,
    )
    turns = [] if job.steps else [TakesTurns(Turns(job, sum(p.numel() for p in student.parameters())))]
    trainer = GKDTrainer(
        student,
        teacher,
        arguments,
        data_collator=collate,
        train_dataset=rows(job),
        processing_class=AutoTokenizer.from_pretrained(f"{job.model}/teacher"),
        callbacks=turns,
    )
    trainer.train()
    if job.steps:
        student.float().save_pretrained(Path(job.folder) / "peer")


if __name__ == "__main__":
    whole = Job.from_json(sys.argv[1])
    train(whole) if whole.steps else run_row(train)
