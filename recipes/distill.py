"""Distil a language model: a student learns what a teacher makes of a text, beside one that learns from the text alone.

Run:
    python recipes/distill.py fit
    python recipes/distill.py fit --model.teacher runs/mine --model.divergence reverse_kl --data.path my_texts/
    python recipes/distill.py fit --model.student '{teacher_layers: [0, 2]}' --model.temperature 2
    python recipes/distill.py cache --folder cache/mine --model.teacher runs/mine
    python recipes/distill.py fit --model.teacher runs/mine --data.teacher_cache cache/mine
    python recipes/distill.py verify
"""

import os
import subprocess
import sys
from pathlib import Path

from datamodules.instructions import Instructions
from datamodules.labelled import Labelled
from datamodules.ordered import Ordered
from datamodules.pairs import Pairs
from datamodules.spans import Spans
from datamodules.text import Text
from lightning_modules.cli import main
from lightning_modules.distillation import CausalDistillation, DenoisingDistillation, MaskedDistillation
from lightning_modules.task_distillation import (
    ClassificationDistillation,
    QuestionAnsweringDistillation,
    SummarizationDistillation,
    TextGenerationDistillation,
    TranslationDistillation,
)
from lightning_modules.taught import Taught
from lightning_modules.teacher_trainer import TeacherTrainer

OF_TEXT = (CausalDistillation, DenoisingDistillation, MaskedDistillation)
OF_TASKS = (
    ClassificationDistillation,
    QuestionAnsweringDistillation,
    SummarizationDistillation,
    TextGenerationDistillation,
    TranslationDistillation,
)
DATA = (Instructions, Labelled, Pairs, Spans, Text)
"""What --model and --data know by its name alone, since it is imported here."""

TEACHER = ("--trainer.max_time=00:00:01:15", "--trainer.max_steps=500", "--samples.max_new_tokens=0")
"""Of a teacher that is trained because there is none."""


def train_teacher(words: list[str]) -> None:
    """Leaves a pretraining in runs/ where a run is to begin, names no teacher and no YAML, and would find none."""
    flags = {word.partition("=")[0] for word in words}
    given = {"-h", "--help", "-c", "--config", "--model", "--model.teacher", "--model.class_path"}
    if words[:1] not in (["fit"], ["cache"], ["write"], ["verify"]) or flags & given or "RANK" in os.environ:
        return
    if CausalDistillation.default_teacher() is None:
        print("no pretraining in runs/ to learn from: training a teacher first, for 75 s", file=sys.stderr)
        command = [sys.executable, str(Path(__file__).with_name("pretrain.py")), "fit", *TEACHER, *of_the_text(words)]
        if code := subprocess.run(command).returncode:
            sys.exit(code)


def of_the_text(words: list[str]) -> list[str]:
    """The flags that say which text is read, and where."""
    found, passed = [], False
    for word in words:
        is_flag = word.startswith("--")
        if is_flag:
            of_text = word.startswith(("--data.", "--trainer.accelerator"))
            passed = of_text and not word.startswith("--data.teacher_cache")
        if passed:
            found.append(word)
    return found


if __name__ == "__main__":
    train_teacher(sys.argv[1:])
    main(Taught, CausalDistillation, Ordered, Path(__file__), __doc__, trainer=TeacherTrainer)
