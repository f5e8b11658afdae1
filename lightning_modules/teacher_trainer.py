"""The verbs `cache` and `write` of distillation: what a teacher makes of a text, and what it writes itself."""

import json
import os
import shlex
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

from lightning.pytorch import LightningDataModule

from lightning_modules.architectures import bytes_of
from lightning_modules.distillation import Distilled
from lightning_modules.on_policy import OnPolicy
from lightning_modules.recipe_trainer import RecipeTrainer
from lightning_modules.taught import Taught
from lightning_modules.teacher import Teacher


class TeacherTrainer(RecipeTrainer):
    """Which can have a teacher write down what a student learns from, too."""

    verbs: ClassVar[dict[str, set[str]]] = RecipeTrainer.verbs | {
        name: {"model", "datamodule"} for name in ("cache", "write")
    }
    """Of the command line, with the arguments that it does not show."""

    def cache(
        self,
        model: Distilled,
        datamodule: LightningDataModule,
        folder: str,
        scheme: Literal["top_k", "sampled", "hybrid"] = "hybrid",
        exact: int = 4,
        drawn: int = 27,
        temperature: float = 1.0,
        rows: int | None = None,
    ) -> None:
        """Writes the teacher's words for each token of the text; the same command goes on where it was interrupted.

        Args:
            model: Whose teacher is asked.
            datamodule: Whose rows are read.
            folder: Where to.
            scheme: top_k: the `exact` likeliest words, all others as one; sampled: `drawn` words by their probability;
                hybrid: the `exact` likeliest, and `drawn` ones of the others.
            exact: Words of a token that are kept with their probability.
            drawn: Words of a token that are drawn.
            temperature: Divides the teacher's logits; that of the training that reads the cache.
            rows: Of the order of training. Left out: all rows of an epoch.
        """
        exact, drawn = exact if scheme != "sampled" else 0, drawn if scheme != "top_k" else 0
        if exact < 0 or drawn < 0 or exact + drawn < 1 or temperature <= 0:
            raise ValueError(
                f"--exact {exact}, --drawn {drawn}, --temperature {temperature}: pass 1 or more words, T > 0"
            )
        if rows is not None and rows < 1:
            raise ValueError(f"--rows is {rows}; pass 1 or more, or leave it out for all")
        if not isinstance(model, Distilled):
            raise ValueError(
                f"a cache is of the words of a text, not for {type(model).__name__}; its teacher is at hand"
            )
        teacher = self._open(model, datamodule)
        if exact + drawn > datamodule.vocab_size:
            raise ValueError(f"--exact {exact} and --drawn {drawn} are more than the {datamodule.vocab_size} words")
        about = datamodule.about_cache(
            scheme=scheme,
            exact=exact,
            drawn=drawn,
            temperature=temperature,
            rows=rows or datamodule.rows_per_epoch,
        )
        print(f"teacher  {teacher.describe()}")
        tokens = about.rows * about.labels_of_a_row
        size = bytes_of(tokens * about.bytes_of_a_token)
        print(f"cache    {folder}: {tokens:,} tokens × {about.bytes_of_a_token:.1f} bytes = {size}", flush=True)
        rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        start, done = time.perf_counter(), 0
        for count in datamodule.write_cache(Path(folder), about, model.kept_words, rank, ranks):
            done += count
            rate = done * about.labels_of_a_row / (time.perf_counter() - start)
            print(f"{done:,} of {about.rows:,} rows, {rate:,.0f} tokens/s", file=sys.stderr, flush=True)
        more = ["--data.teacher_cache", folder]
        more += ["--model.temperature", f"{temperature:g}"] if temperature != 1 else []
        print(f"next     {fit_command(teacher, ('--data.teacher_cache', '--model.temperature'), more)}")

    def write(
        self,
        model: Taught,
        datamodule: LightningDataModule,
        folder: str,
        rows: int | None = None,
        prompt_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        """Has the teacher write what a student is then trained on, https://arxiv.org/abs/1606.07947; the same command
        goes on where it was interrupted.

        Args:
            model: Whose teacher writes: on from the beginnings of rows of text, or answers to examples, by beam search
                where the task has it.
            datamodule: Whose rows or examples are begun from; what it holds out is copied as it is.
            folder: Where to: train.jsonl and val.jsonl.
            rows: Of the order of training, at most an epoch. Left out: all of it.
            prompt_tokens: Tokens of a row of text that are given. Left out: a quarter of the row.
            temperature: Of the sampling that goes on from text.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"--rows is {rows}; pass 1 or more, or leave it out for all")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("one process writes; leave torchrun out")
        if model.objective not in ("causal", "completions"):
            raise ValueError(f"a teacher of {type(model).__name__} does not write; take one of text or of answers")
        own = model.on_policy = OnPolicy(1.0, prompt_tokens, temperature)
        teacher = self._open(model, datamodule)
        own.require_range(datamodule.seq_len)
        model.require_writing(datamodule)
        if (rows := rows or datamodule.rows_per_epoch) > datamodule.rows_per_epoch:
            raise ValueError(f"--rows is {rows:,}; the data have {datamodule.rows_per_epoch:,}")
        about = {"teacher": teacher.digest, "rows": rows, "seed": model.seed, "own": str(own)}
        about |= model.writing_settings() | {"data": datamodule.identity()}
        place = Path(folder)
        require_same_header(place, about)
        print(f"teacher  {teacher.describe()}", flush=True)
        with (place / "val.jsonl").open("w") as file:
            file.writelines(map(line_of, datamodule.held_out_rows()))
        start, begun_at = time.perf_counter(), rows_done(place)
        with (place / "train.jsonl").open("a") as file, model.teacher_writes():
            for batch in datamodule.batches_in_order(begun_at, rows):
                file.writelines(map(line_of, model.teachers_rows(batch)))
                file.flush()
                done = int(batch["rows"][-1]) + 1
                write_whole(place / "progress.json", {"rows": done, "bytes": file.tell()})
                rate = (done - begun_at) / (time.perf_counter() - start)
                print(f"{done:,} of {rows:,} rows, {rate:,.1f} rows/s", file=sys.stderr, flush=True)
        more = ["--data.path", f"{folder}/train.jsonl", "--data.val_path", f"{folder}/val.jsonl"]
        print(f"next     {fit_command(teacher, ('--data.path', '--data.val_'), more)}")

    def _open(self, model: Taught, datamodule: LightningDataModule) -> Teacher:
        """Data and teachers, made ready; the first of them."""
        if len(model.teachers) > 1:
            raise ValueError("one teacher is asked at a time; do it once for each")
        self.datamodule, model.seed = datamodule, int(os.environ.get("PL_GLOBAL_SEED", 0))
        datamodule.trainer, self.strategy._lightning_module, model.trainer = self, model, self
        datamodule.prepare_data()
        datamodule.setup("fit")
        model.teachers[0].require_fit(datamodule)
        model.load_teachers()
        return model.teachers[0]


def fit_command(teacher: Teacher, without: tuple[str, ...], more: list[str]) -> str:
    """Of the run that this command prepared: with its model and data, but for some flags."""
    words, kept = [], False
    for word in sys.argv[2:]:
        if word.startswith("-"):
            kept = word.startswith(("--config", "-c", "--model", "--data")) and not word.startswith(without)
        words += [word] if kept else []
    named = any(word.startswith("--model.teacher") for word in words)
    words += ([] if named else ["--model.teacher", teacher.folder]) + more
    return shlex.join(["python", "recipes/distill.py", "fit", *words])


def line_of(row: dict[str, object]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def rows_done(folder: Path) -> int:
    """What was written of other rows, before a kill, is taken away."""
    file, progress = folder / "train.jsonl", folder / "progress.json"
    file.touch()
    done = json.loads(progress.read_text()) if progress.exists() else {"rows": 0, "bytes": 0}
    if file.stat().st_size < done["bytes"]:  # the machine went down before the disk had it
        done = {"rows": 0, "bytes": 0}
    os.truncate(file, done["bytes"])
    return done["rows"]


def write_whole(file: Path, content: dict[str, object]) -> None:
    """Replaces a file by another, in one go."""
    temporary = file.with_name(f".{file.name}.partial")
    temporary.write_text(json.dumps(content, indent=2))
    temporary.rename(file)


def require_same_header(folder: Path, about: dict[str, object]) -> None:
    """Writes what the rows are of, once. Raises ValueError where there is something else."""
    header = folder / "header.json"
    if header.exists():
        there = json.loads(header.read_text())
        if differing := [name for name, value in about.items() if there.get(name) != value]:
            raise ValueError(f"{folder} was written with another {' and '.join(differing)}; write into a new folder")
        return
    if there := [name for name in ("train.jsonl", "val.jsonl") if (folder / name).exists()]:
        raise ValueError(f"{folder} has a {there[0]} that was not written here; write into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(header, about)
