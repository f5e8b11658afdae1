"""What a student learns from each signal at equal tokens: how much of the gap to its teacher it closes, several seeds.

Run:
    python benchmarks/run.py --only teaching --page docs/benchmarks.md --keep runs/teaching      two hours on 2 cores
    python benchmarks/run.py --only teaching --lessons stories sst2

`--keep` names a folder whose finished runs are not repeated, so that an interrupted measurement goes on. What needs
data or a model that are not here is left out, and said.
"""

import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from page import ROOT, Goal, Table
from tasks import models
from turns import environment

ENVIRONMENT = environment(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
WITHOUT = "without a teacher"
AT_HAND = "forward KL"


@dataclass(frozen=True)
class Signal:
    """What the student learns from."""

    name: str
    flags: str = ""
    cache: str = ""
    """Flags of `distill.py cache`, where the teacher's words are written down first."""
    written: str = ""
    """Flags of `distill.py write`, where the student reads what its teacher wrote."""


@dataclass(frozen=True)
class Lesson:
    """A teacher, its student, and what both read."""

    name: str
    title: str
    common: str
    """Flags of all runs of the student."""
    teacher: str
    """A folder, or the command that makes it."""
    signals: tuple[Signal, ...]
    shown: tuple[str, ...]
    """Of the comparison in summary.json; the first is what the gap is measured by."""
    least: float = 0
    """Percent of the gap that forward KL is to close."""
    folder: str | None = None
    """Of the data, in the data folder; {data} in flags. {stories} and {minilm} are models, {rows} a story a line."""


STDLIB = Lesson(
    "stdlib",
    "Distillation on the standard library: a student of a quarter of its teacher's parameters",
    "--trainer.max_steps 400 --trainer.val_check_interval 400 --model.student.hidden_size 80 "
    "--model.student.intermediate_size 320 --model.student.num_hidden_layers 2",
    "recipes/pretrain.py fit --trainer.max_steps 750 --trainer.max_time null --trainer.val_check_interval 750",
    (
        Signal(WITHOUT, "--model.hard_weight 1"),
        Signal(AT_HAND),
        Signal("12 likeliest words and their tail", cache="--scheme top_k --exact 12"),
        Signal("27 drawn words", cache="--scheme sampled --drawn 27"),
        Signal("4 likeliest and 27 drawn words", cache="--scheme hybrid --exact 4 --drawn 27"),
        Signal(
            "4 likeliest and 27 drawn words, a tenth of the text's loss",
            "--model.hard_weight 0.1",
            cache="--scheme hybrid --exact 4 --drawn 27",
        ),
        Signal("forward KL, a quarter of the rows its own", "--model.on_policy.share 0.25"),
        Signal("the teacher's own text alone", "--model.hard_weight 1", written="--rows 4800"),
        Signal("forward KL, on the teacher's own text", written="--rows 4800"),
        Signal("forward KL, hidden states", "--model.inner.hidden 1"),
        Signal("forward KL, hidden states, embeddings", "--model.inner.hidden 1 --model.inner.embeddings 1"),
        Signal("forward KL, hidden states, relations", "--model.inner.hidden 1 --model.inner.relations 0.1"),
        Signal("forward KL, relations", "--model.inner.relations 0.1"),
    ),
    ("nats", "kl_to_teacher"),
    least=30,
)
STORIES = Lesson(
    "stories",
    "Distillation of stories260K into two layers, on TinyStories",
    "--data.path {rows} --data.seq_len 512 --data.batch_size 6 --data.cross_document_attention false "
    "--trainer.max_steps 400 --trainer.val_check_interval 400 --model.student transformers.LlamaConfig "
    "--model.student.hidden_size 64 --model.student.intermediate_size 172 --model.student.num_hidden_layers 2 "
    "--model.student.num_attention_heads 8 --model.student.num_key_value_heads 4 "
    "--model.student.tie_word_embeddings true --model.student.max_position_embeddings 512",
    "{stories}",
    (
        Signal(WITHOUT, "--model.hard_weight 1"),
        Signal(AT_HAND),
        Signal("forward KL, hidden states, embeddings", "--model.inner.hidden 1 --model.inner.embeddings 1"),
    ),
    ("nats", "kl_to_teacher"),
    folder="lm_tinystories",
)
SST2 = Lesson(
    "sst2",
    "Distillation of MiniLM, fine-tuned on SST-2, into three narrower layers",
    "--config recipes/distill_sentiment.yaml --data.path {data}/train.tsv --data.val_path {data}/dev.tsv "
    '--model.optimizer.lr 1e-4 --trainer.max_epochs 4 --model.student "{{teacher_layers: [0, 2, 5], '
    'fields: {{hidden_size: 288, num_attention_heads: 9}}, narrow: project}}"',
    "recipes/finetune.py fit --config recipes/finetune_sentiment.yaml --model.from {minilm} "
    "--data.path {data}/train.tsv --data.val_path {data}/dev.tsv --model.optimizer.lr 5e-5 --trainer.max_epochs 3 "
    "--trainer.max_time null",
    (
        Signal(WITHOUT, "--model.hard_weight 1"),
        Signal(AT_HAND),
    ),
    ("accuracy", "nats"),
    folder="sent_sst2",
)
LESSONS = (STDLIB, STORIES, SST2)


class Runs:
    """Of one lesson, in a folder; what is done already is not done again."""

    def __init__(self, lesson: Lesson, folder: Path, found: dict[str, str]):
        self.lesson, self.folder, self.found = lesson, folder / lesson.name, found
        self.teacher = str(self.folder / "teacher")

    def rows(self, seeds: int) -> dict[str, list[dict[str, float]]]:
        """The comparison's rows of each signal, one a seed; those of "teacher" are all the same."""
        if "/" in self.lesson.teacher:
            command, _, flags = self.lesson.teacher.partition(" fit ")
            self._do(f"{command} fit", flags, Path(self.teacher))
        else:
            self.teacher = self.lesson.teacher.format(**self.found)
        return {
            signal.name: [self._student(signal, seed) for seed in range(seeds)] for signal in self.lesson.signals
        } | {"teacher": [self._compared(self._of(self.lesson.signals[1], 0))[0]]}

    def _of(self, signal: Signal, seed: int) -> Path:
        return self.folder / f"{_slug(signal.name)}-{seed}"

    def _student(self, signal: Signal, seed: int) -> dict[str, float]:
        flags = f"--model.teacher={self.teacher} {self.lesson.common} {signal.flags}"
        if signal.cache:
            cache = self.folder / _slug(signal.cache)
            self._do("recipes/distill.py cache", f"--model.teacher={self.teacher} {signal.cache}", cache, "--folder")
            flags += f" --data.teacher_cache={cache}"
        if signal.written:
            text = self.folder / _slug(f"written {signal.written}")
            self._do("recipes/distill.py write", f"--model.teacher={self.teacher} {signal.written}", text, "--folder")
            flags += f" --data.path={text}/train.jsonl --data.val_path={text}/val.jsonl"
        flags += f" --seed_everything={seed} --data.seed={seed} --comparison.control=false"
        self._do("recipes/distill.py fit", flags, self._of(signal, seed))
        summary = json.loads((self._of(signal, seed) / "summary.json").read_text())
        if "comparison" in summary:
            teacher, student = self._compared(self._of(signal, seed))
            return student | {"teacher_milliseconds": teacher["milliseconds"]}
        return {name.removeprefix("val_"): value for name, value in summary.items()} | {"nats": summary["val_loss"]}

    @staticmethod
    def _compared(folder: Path) -> list[dict[str, float]]:
        """The teacher's row and the student's."""
        return list(json.loads((folder / "summary.json").read_text())["comparison"].values())

    def _do(self, command: str, flags: str, folder: Path, where: str = "--trainer.default_root_dir") -> None:
        done, log = folder.with_suffix(".done"), folder.with_suffix(".log")
        if done.exists():
            return
        folder.parent.mkdir(parents=True, exist_ok=True)
        words = [*shlex.split(f"{command} {flags.format(**self.found)}"), f"{where}={folder}"]
        words += ["--samples.max_new_tokens=0"] if "pretrain" in command or "distill.py fit" in command else []
        words += ["--ckpt_path=last"] if "fit" in words else []
        print(shlex.join(words), file=sys.stderr, flush=True)
        with log.open("w") as stream:
            code = subprocess.run([sys.executable, *words], cwd=ROOT, env=ENVIRONMENT, stdout=stream, stderr=stream)
        if code.returncode:
            raise RuntimeError(f"it ended with {code.returncode}: {log.read_text()[-500:]}")
        done.touch()


def tables(names: list[str] | None, data_folder: Path, keep: Path | None, seeds: int) -> Iterator[Table]:
    """Of the lessons whose data and model are here."""
    with tempfile.TemporaryDirectory() as temporary:
        for lesson in LESSONS:
            if names and lesson.name not in names:
                continue
            found = models(data_folder) | {"data": str(data_folder / (lesson.folder or ""))}
            needed = {name for name in ("minilm", "stories") if f"{{{name}}}" in lesson.teacher}
            if needed - found.keys() or not Path(found["data"]).is_dir():
                print(f"{lesson.name} left out: {needed or found['data']} is not here", file=sys.stderr)
                continue
            place = (keep or Path(temporary)).absolute()
            if "{rows}" in lesson.common:
                found["rows"] = str(write_stories(Path(found["data"]) / "stories.txt", place / "stories.jsonl"))
            runs = Runs(lesson, place, found)
            yield table(lesson, runs.rows(seeds), seeds)


def write_stories(file: Path, rows: Path) -> Path:
    """A story a line, as documents of their own; the last is cut off."""
    stories = file.read_text().split("<|endoftext|>")[:-1]
    rows.parent.mkdir(parents=True, exist_ok=True)
    rows.write_text("".join(json.dumps({"text": story.strip()}) + "\n" for story in stories))
    return rows


def table(lesson: Lesson, rows: dict[str, list[dict[str, float]]], seeds: int) -> Table:
    """By the mean over the seeds, with the least and the most."""
    teacher, by = rows["teacher"][0], lesson.shown[0]
    means = {name: statistics.mean(row[by] for row in found) for name, found in rows.items()}
    gap = means[WITHOUT] - teacher[by]
    recovered = {name: 100 * (1 - (mean - teacher[by]) / gap) for name, mean in means.items()}
    shown = []
    for name, found in rows.items():
        cells = [_spread([row[key] for row in found]) if key in found[0] else "" for key in lesson.shown]
        shown.append([name, *cells, f"{found[0]['parameters']:,}", f"{recovered[name]:.1f} %"])
    best_cached = max((recovered[signal.name] for signal in lesson.signals if signal.cache), default=None)
    goals = [Goal("percent of the gap that forward KL closes", recovered[AT_HAND], at_least=lesson.least)]
    if "accuracy" in teacher:
        goals = [*small_and_fast(teacher, rows[AT_HAND])]
    if best_cached is not None:
        share = best_cached / recovered[AT_HAND]
        goals.append(Goal("best cache of at most 60 bytes a token, of what forward KL closes", share, at_least=0.9))
    common = lesson.common.replace("{{", "{").replace("}}", "}")
    titles = [name.replace("_", " ") for name in lesson.shown]
    own_flags = {
        s.name: " ".join(filter(None, (s.flags, s.cache and f"cache {s.cache}", s.written and f"write {s.written}")))
        for s in lesson.signals
    }
    flags = "; ".join(f"{name}: `{of_signal}`" for name, of_signal in own_flags.items() if of_signal)
    return Table(
        lesson.title,
        f"python benchmarks/run.py --only teaching --lessons {lesson.name} --seeds {seeds}",
        ["", *titles, "parameters", "of the gap"],
        shown,
        f"Mean of {seeds} seeds of weights and order, and from the least to the most; the held-out text. Teacher: "
        f"`{lesson.teacher}`. Students: `python recipes/distill.py fit {common}`, and {flags}.",
        goals,
    )


def small_and_fast(teacher: dict[str, float], students: list[dict[str, float]]) -> Iterator[Goal]:
    """What DistilBERT promised, https://arxiv.org/abs/1910.01108."""
    accuracy = statistics.mean(row["accuracy"] for row in students)
    yield Goal("accuracy, of the teacher's", accuracy / teacher["accuracy"], at_least=0.97)
    yield Goal("parameters, of the teacher's", students[0]["parameters"] / teacher["parameters"], at_most=0.6)
    speed = statistics.median(row["teacher_milliseconds"] / row["milliseconds"] for row in students)
    yield Goal("speed of a forward pass of one row, of the teacher's", speed, at_least=1.6)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(set(values)) == 1 else f"{mean} ({min(values):.4f} to {max(values):.4f})"


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-")
