"""The peer: transformers' Trainer with its padding collator, as its example scripts for these tasks use it.

At its defaults, and at the best settings that it has for this: bf16 autocast, fused AdamW, no log, no bar; with and
without its sampler that groups examples by length. The examples are those of our datamodule, tokenized the same.
"""

import transformers
from finetuning import BATCH_SIZE, LEARNING_RATE, encoded
from sizes import Job
from trainer_row import BEST, TakesTurns
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from turns import Turns, run_row


def model_of(job: Job, labels: int):
    transformers.set_seed(0)
    if job.task == "labels":
        return AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=labels)
    return AutoModelForQuestionAnswering.from_pretrained(job.model)


def arguments(job: Job, **settings: object) -> TrainingArguments:
    best = (BEST | {"bf16": job.bf16}) if job.best_settings else {}
    return TrainingArguments(
        output_dir=job.folder,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        train_sampling_strategy="group_by_length" if job.by_length else "random",
        **(settings | best),
    )


def train(job: Job) -> None:
    rows, labels = encoded(job)
    model = model_of(job, labels)
    collate = DataCollatorWithPadding(AutoTokenizer.from_pretrained(job.model))
    turns = Turns(job, sum(p.numel() for p in model.parameters()))
    settings = arguments(job, max_steps=10**6)
    Trainer(model, settings, train_dataset=rows, data_collator=collate, callbacks=[TakesTurns(turns)]).train()


if __name__ == "__main__":
    run_row(train)
