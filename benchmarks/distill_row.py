"""Our distillation as a user runs it: `recipes/distill.py fit` in this process, with a callback more that takes turns.

Validation, checkpoints and start-up are not in the figure.
"""

import json
import os
import runpy
import sys
from pathlib import Path

from recipe_row import trainer
from sizes import Job
from turns import run_row

SCRIPT = Path(__file__).parents[1] / "recipes" / "distill.py"


SIGNALS = {
    "hidden": {"inner": {"hidden": 1.0, "embeddings": 1.0}},
    "relations": {"inner": {"relations": 0.1}},
    "own": {"on_policy": {"share": 0.25}},
}


def config(job: Job) -> dict[str, dict]:
    """The YAML of the run; the job's task is "alone", "teacher", "cache", one of SIGNALS, or "peer" with a student's
    folder."""
    size = job.size
    student = {"class_path": f"transformers.{size.config}", "init_args": size.fields}
    teacher = job.model
    if job.task == "peer":
        student, teacher = f"{job.model}/student", f"{job.model}/teacher"
    cache = {"teacher_cache": job.data_file} if job.task == "cache" else {}
    return {
        "trainer": trainer(job, "bf16-true"),
        "model": {
            "class_path": "CausalDistillation",
            "init_args": {
                "teacher": teacher,
                "student": student,
                "hard_weight": 1.0 if job.task == "alone" else 0.0,
                **SIGNALS.get(job.task, {}),
                "schedule": {"class_path": "Constant", "init_args": {"warmup_steps": 0}},
            },
        },
        "data": {"class_path": "Text", "init_args": {"seq_len": size.seq_len, "batch_size": size.batch_size} | cache},
    }


def train(job: Job) -> None:
    file = Path(job.folder) / f"distill-{os.getpid()}.yaml"
    file.write_text(json.dumps(config(job)))  # JSON is YAML
    sys.argv = ["recipes/distill.py", "fit", "--allow_import", "recipe_row", "--config", str(file)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    run_row(train)
