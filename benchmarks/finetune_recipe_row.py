"""Our fine-tuning as a user runs it: `recipes/finetune.py fit` in this process, with a callback more that takes turns.

Validation, checkpoints and start-up are not in the figure.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from finetuning import BATCH_SIZE, LEARNING_RATE, MAX_LENGTH
from recipe_row import trainer
from sizes import Job
from turns import run_row

SCRIPT = Path(__file__).parents[1] / "recipes" / "finetune.py"
CLASSES = {"labels": ("Classification", "Labelled"), "spans": ("QuestionAnswering", "Spans")}


def config(job: Job) -> dict[str, dict]:
    """The YAML of the run."""
    module, data = CLASSES[job.task]
    optimizer = {
        "class_path": "torch.optim.AdamW",
        "init_args": {"lr": LEARNING_RATE, "weight_decay": 0.0, "fused": True},
    }
    return {
        "trainer": trainer(job, "bf16-true"),
        "model": {
            "class_path": module,
            "init_args": {
                "from": job.model,
                "optimizer": optimizer,
                "schedule": {"class_path": "Constant", "init_args": {"warmup_steps": 0}},
            },
        },
        "data": {
            "class_path": data,
            "init_args": {"path": job.data_file, "max_length": MAX_LENGTH[job.task], "batch_size": BATCH_SIZE},
        },
    }


def train(job: Job) -> None:
    file = Path(job.folder) / f"recipe-{os.getpid()}.yaml"
    file.write_text(json.dumps(config(job)))  # JSON is YAML
    sys.argv = ["recipes/finetune.py", "fit", "--allow_import", "recipe_row", "--config", str(file)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    run_row(train)
