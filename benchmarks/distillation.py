"""A step of distillation beside one without a teacher: with the teacher at hand, and from a cache of its words.

Run:
    python benchmarks/run.py --only distillation
"""

import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from page import ROOT, Goal, Table
from sizes import Job, Size, nanochat
from transformers import AutoModelForCausalLM
from turns import Row, environment, interleave, quartiles

from datamodules.text import Text
from lightning_modules import hardware
from lightning_modules.architectures import parameter_count

WORDS = 4096
STUDENT = Size("3L/128", "NanoChatConfig", nanochat(128, 3, 4, 256), seq_len=256, batch_size=12, bpe_ids=WORDS)
TEACHER = Size("4L/192", "NanoChatConfig", nanochat(192, 4, 4, 256), seq_len=256, batch_size=12, bpe_ids=WORDS)
CACHED = 64
"""Words of a token of the cache."""
ROWS = {
    "alone": "without a teacher",
    "cache": f"from a cache of {CACHED} words",
    "teacher": "with the teacher at hand",
    "hidden": "and its hidden states and embeddings",
    "relations": "and its relations",
    "own": "and a quarter of the rows its own",
}


def prepare(folder: Path) -> tuple[Path, Path, int]:
    """A teacher of new weights, which takes as long as a trained one, a cache of it, and its parameters."""
    data = Text(vocab_size=WORDS, seq_len=TEACHER.seq_len)
    data.prepare_data()
    data.setup("fit")
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(TEACHER.architecture(data.vocab_size))
    for part in (teacher, data.tokenizer):
        part.save_pretrained(folder / "teacher")
    cache = folder / "words"
    flags = [
        f"--folder={cache}",
        "--scheme=top_k",
        f"--exact={CACHED}",
        f"--model.teacher={folder / 'teacher'}",
    ]
    command = [sys.executable, str(ROOT / "recipes" / "distill.py"), "cache", *flags]
    subprocess.run(command, env=environment(2), check=True, stdout=subprocess.DEVNULL)
    return folder / "teacher", cache, parameter_count(teacher)


def tables(threads: int, rounds: int, turn_seconds: float) -> list[Table]:
    with tempfile.TemporaryDirectory() as name:
        teacher, cache, parameters = prepare(Path(name))
        common = {"size": STUDENT, "folder": name, "text_path": None, "vocab_size": WORDS, "tokens_file": ""}
        common |= {"tokens_dtype": "", "bf16": hardware.best_precision("cpu").startswith("bf16")}
        jobs = {task: Job(**common, task=task, model=str(teacher), data_file=str(cache)) for task in ROWS}
        with ExitStack() as started:
            running = {task: started.enter_context(Row("distill_row.py", job, threads)) for task, job in jobs.items()}
            turns = interleave(running, rounds, turn_seconds)
    seconds = {task: [statistics.median(turn.seconds) for turn in found] for task, found in turns.items()}
    base = statistics.median(seconds["alone"])
    ratio = {task: statistics.median(values) / base for task, values in seconds.items()}
    own = turns["alone"][0].parameters
    allowed = (1 + parameters / (3 * own)) * 1.1
    rows = [
        [
            ROWS[task],
            "{1:.1f} ({0:.1f} to {2:.1f})".format(*(1000 * s for s in quartiles(values))),
            f"{ratio[task]:.2f}",
        ]
        for task, values in seconds.items()
    ]
    return [
        Table(
            f"A step of distillation, {STUDENT.batch_size} rows of {STUDENT.seq_len} tokens, {threads} threads",
            "python benchmarks/run.py --only distillation",
            ["", "ms a step", "of without"],
            rows,
            f"Student {STUDENT.name}, {own:,} parameters; teacher {TEACHER.name}, {parameters:,}; {WORDS:,} words. "
            "The recipes as a user runs them, in turns.",
            [
                Goal(f"a step from a cache of {CACHED} words, of one without a teacher", ratio["cache"], at_most=1.15),
                Goal(
                    "a step beside its teacher, of one without; the limit is (1 + N/3n) · 1.1",
                    ratio["teacher"],
                    at_most=allowed,
                ),
            ],
        )
    ]
