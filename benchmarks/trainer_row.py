"""The peer: transformers' own Trainer, at its defaults or at the best settings it has for this.

Best: bf16 autocast, fused AdamW, no dropout, no key-value cache, no log, no bar. Both: the default attention, clipping
at 1, tokens from the same memory-mapped file, loaded in the training process, no evaluation, no checkpoint.
"""

import numpy as np
import torch
import transformers
from sizes import Job
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from turns import Turns, run_row

BEST: dict[str, bool | str] = {
    "bf16": True,
    "optim": "adamw_torch_fused",
    "logging_strategy": "no",
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}


class Rows(Dataset):
    """Labels are the inputs: the model shifts them."""

    def __init__(self, job: Job):
        self.tokens_N = np.memmap(job.tokens_file, job.tokens_dtype, "r")
        self.seq_len = job.size.seq_len

    def __len__(self) -> int:
        return len(self.tokens_N) // self.seq_len

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        tokens = self.tokens_N[row * self.seq_len : (row + 1) * self.seq_len]
        input_ids = torch.from_numpy(tokens.astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids}


class TakesTurns(TrainerCallback):
    def __init__(self, turns: Turns):
        self.turns = turns

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.turns.step_begins()


def train(job: Job) -> None:
    transformers.set_seed(0)
    fields = {**job.size.without_dropout(), "use_cache": False} if job.best_settings else {}
    model = AutoModelForCausalLM.from_config(job.size.architecture(job.vocab_size, **fields))
    best = (BEST | {"bf16": job.bf16}) if job.best_settings else {}
    arguments = TrainingArguments(
        output_dir=job.folder,
        per_device_train_batch_size=job.size.batch_size,
        max_steps=10**6,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        use_cpu=job.device == "cpu",
        torch_compile=job.compile,
        **best,
    )
    turns = Turns(job, sum(p.numel() for p in model.parameters()))
    Trainer(model, arguments, train_dataset=Rows(job), callbacks=[TakesTurns(turns)]).train()


if __name__ == "__main__":
    run_row(train)
