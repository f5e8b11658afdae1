"""Our recipe as a user runs it: `recipes/pretrain.py fit --config …` in this process, with one more callback.

Everything that happens at a step is in the figure: the order of rows, the module's hooks, the progress bar, the log to
metrics.csv every 10 steps. Validation, checkpoints and start-up are not.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from sizes import Job
from tokens import text_flags
from turns import Turns, run_row

from lightning_modules.architectures import parameter_count

SCRIPT = Path(__file__).parents[1] / "recipes" / "pretrain.py"


class TakesTurns(Callback):
    def __init__(self, job: str):
        self.job = Job.from_json(job)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.turns = Turns(self.job, parameter_count(module.network))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        self.turns.step_begins()


def trainer(job: Job, precision: str) -> dict[str, object]:
    """Its flags: no end, no validation, and turns."""
    return {
        "accelerator": job.device,
        "devices": 1,
        "precision": precision if job.bf16 else "32-true",
        "default_root_dir": str(Path(job.folder) / f"run-{os.getpid()}"),
        "max_steps": 10**6,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 10,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "enable_checkpointing": False,
        "callbacks": [{"class_path": "recipe_row.TakesTurns", "init_args": {"job": job.to_json()}}],
    }


def config(job: Job) -> dict[str, dict]:
    """The YAML of the run. What it leaves out is the recipe's default: AdamW, the callbacks, metrics.csv.

    The learning rate is the constant one of the other rows: a warm-up towards a million steps would train nothing.
    """
    size = job.size
    fields = {**size.fields, **size.without_dropout()}
    architecture = {"class_path": f"transformers.{size.config}", "init_args": fields}
    return {
        "trainer": trainer(job, "bf16-true" if job.device == "cpu" else "bf16-mixed"),
        "model": {
            "class_path": "CausalLM",
            "init_args": {
                "architecture": architecture,
                "compile": True if job.compile else "auto",
                "schedule": {"class_path": "Constant", "init_args": {"warmup_steps": 0}},
            },
        },
        "data": text_flags(size, job.text_path),
    }


def run_recipe(job: Job, settings: dict[str, dict], *imports: str) -> None:
    file = Path(job.folder) / f"recipe-{os.getpid()}.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    allowed = [word for name in imports for word in ("--allow_import", name)]
    sys.argv = ["recipes/pretrain.py", "fit", *allowed, "--config", str(file)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def train(job: Job) -> None:
    run_recipe(job, config(job), "recipe_row")


if __name__ == "__main__":
    run_row(train)
