"""The recipes as they are, one process after the other, and what each comes to: a table, in README.md too.

Run:
    python benchmarks/run.py --only named_runs --keep runs/named --page docs/benchmarks.md      40 minutes on 2 cores

A run that has left its summary.json is not repeated. tinyshakespeare is left out where its text is not here.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from page import ROOT, Table
from turns import environment

COLUMNS = ["run", "what", "hardware", "time", "result"]
COMMAND = "python benchmarks/run.py --only named_runs"


def range_of(*figures: float, digits: int = 2) -> str:
    """1.46 to 1.49, or 1.46 where all are that."""
    found = list(dict.fromkeys(f"{figure:.{digits}f}" for figure in (min(figures), max(figures))))
    return " to ".join(found)


def of_text(runs: list[dict]) -> str:
    found, than = runs[0]["baselines"], [run["val_bits_per_byte"] for run in runs]
    beside = {"gzip": "gzip -9", "xz": "xz -9", "xz given the training text": "xz -9 after the training text"}
    told = ", ".join(f"{name} {found[key]:.2f}" for name, key in beside.items() if key in found)
    return f"{range_of(*than)} bits per byte ({told})"


def of_characters(runs: list[dict]) -> str:
    return f"{range_of(*(run['val_loss'] for run in runs))} nats per character"


def of_labels(runs: list[dict]) -> str:
    return f"accuracy {range_of(*(run['val_accuracy'] for run in runs))}"


def of_answers(runs: list[dict]) -> str:
    bits, exact = ([run[name] for run in runs] for name in ("val_bits_per_byte", "val_exact_match"))
    return f"{range_of(*bits)} bits per byte of the answers, {range_of(*exact, digits=0)} % exact"


def of_spans(runs: list[dict]) -> str:
    f1, exact = ([run[name] for run in runs] for name in ("val_f1", "val_exact_match"))
    return f"F1 {range_of(*f1, digits=0)}, exact {range_of(*exact, digits=0)}"


def of_score(name: str, key: str) -> Callable[[list[dict]], str]:
    return lambda runs: f"{name} {range_of(*(run[key] for run in runs), digits=0)}"


def of_student(runs: list[dict]) -> str:
    shares = [run["gap_recovered"] for run in runs]
    share = "none" if None in shares else range_of(*shares, digits=0)
    bits = {name: [run["comparison"][name]["bits_per_byte"] for run in runs] for name in ("student", "without teacher")}
    return (
        f"{share} % of the gap; {range_of(*bits['student'])} bits per byte, "
        f"{range_of(*bits['without teacher'])} without the teacher"
    )


@dataclass(frozen=True)
class Named:
    """A row; `words` makes its result of the summaries of its runs."""

    name: str
    what: str
    flags: str
    """Of a script in recipes/; {pretrained} is the default run's folder, {shakespeare} the text."""
    words: Callable[[list[dict]], str]
    seeds: tuple[int, ...] = (0,)

    @property
    def file(self) -> str:
        return self.name.split()[0]


NAMED = (
    Named("pretrain (default)", "decoder, 3.3 M, standard library", "pretrain.py fit", of_text, (0, 1, 2)),
    Named(
        "pretrain_shakespeare_char",
        "decoder, 0.8 M, tinyshakespeare by characters (`--data.path input.txt`)",
        "pretrain.py fit --config recipes/pretrain_shakespeare_char.yaml --data.path {shakespeare}",
        of_characters,
        (0, 1, 2),
    ),
    Named(
        "pretrain_stdlib_20min",
        "decoder, 10 M, standard library",
        "pretrain.py fit --config recipes/pretrain_stdlib_20min.yaml",
        of_text,
    ),
    Named(
        "finetune_sentiment",
        "functions to one of six packages, 1 M, by `finetune.py`",
        "finetune.py fit --config recipes/finetune_sentiment.yaml --model.from new",
        of_labels,
    ),
    Named(
        "finetune_text_generation",
        "questions about functions to answers, from the default run's model",
        "finetune.py fit --config recipes/finetune_text_generation.yaml --model.from {pretrained}",
        of_answers,
    ),
    Named(
        "finetune_question_answering",
        "default values in signatures, a third without an answer, 1 M",
        "finetune.py fit --config recipes/finetune_question_answering.yaml --model.from new",
        of_spans,
    ),
    Named(
        "finetune_translation",
        "docstrings to signatures, from the default run's model",
        "finetune.py fit --config recipes/finetune_translation.yaml --model.from {pretrained}",
        of_score("SacreBLEU", "val_bleu"),
    ),
    Named(
        "finetune_summarization",
        "functions to docstrings, from the default run's model",
        "finetune.py fit --config recipes/finetune_summarization.yaml --model.from {pretrained}",
        of_score("ROUGE-1", "val_rouge1"),
    ),
    Named(
        "distill",
        "1.6 M learn from the default run's 3.3 M, by `distill.py`",
        "distill.py fit --model.teacher {pretrained}",
        of_student,
    ),
)


def tables(keep: Path | None, text: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).absolute()
        here = [one for one in NAMED if text is not None or "{shakespeare}" not in one.flags]
        names = {"pretrained": str(folder / "pretrain-0"), "shakespeare": str(text)}
        found = {one: [done(one, seed, folder, names) for seed in one.seeds] for one in here}
    rows = [row(one, summaries) for one, summaries in found.items()]
    note = (
        "Time is that of the whole process, of the first seed; two figures are the least and the most of three seeds."
    )
    yield Table("The recipes as they are", COMMAND, COLUMNS, rows, note)
    write_readme(ROOT / "README.md", rows)


def done(one: Named, seed: int, folder: Path, names: dict[str, str]) -> dict:
    """Its summary, with the seconds that its process took."""
    place = folder / f"{one.file}-{seed}"
    if not (place / "seconds.json").is_file():
        place.mkdir(parents=True, exist_ok=True)
        words = shlex.split(one.flags.format(**names))
        words = [sys.executable, f"recipes/{words[0]}", *words[1:], f"--trainer.default_root_dir={place}"]
        words += ["--ckpt_path=last", *([f"--seed_everything={seed}", f"--data.seed={seed}"] if seed else [])]
        print(shlex.join(words), file=sys.stderr, flush=True)
        begun = (place / "checkpoints").exists()
        start = time.monotonic()
        with (folder / f"{place.name}.log").open("w") as log:
            code = subprocess.run(
                words, cwd=ROOT, env=environment(os.cpu_count() or 1), stdout=log, stderr=log
            ).returncode
        if code:
            raise RuntimeError(f"{one.name} ended with {code}; see {log.name}")
        seconds = None if begun else time.monotonic() - start  # of a run that went on nobody knows it
        (place / "seconds.json").write_text(json.dumps(seconds))
    seconds = json.loads((place / "seconds.json").read_text())
    return json.loads((place / "summary.json").read_text()) | {"process_seconds": seconds}


def row(one: Named, runs: list[dict]) -> list[str]:
    title = " ".join([f"`{one.file}`", *one.name.split()[1:]])
    hardware = runs[0]["hardware"].rpartition(", ")[2].replace("threads", "CPU cores")
    return [title, one.what, hardware, length(runs[0]["process_seconds"]), one.words(runs)]


def length(seconds: float | None) -> str:
    """9 s; 1 min 50; 20 min."""
    if seconds is None:
        return ""
    tens = round(seconds / 10) * 10
    if tens < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(tens, 60)
    return f"{minutes} min" if not rest or minutes >= 10 else f"{minutes} min {rest:02d}"


def write_readme(file: Path, rows: list[list[str]]) -> None:
    """Puts the rows in the place of those of the same names."""
    lines = file.read_text().splitlines()
    by_name = {f"| {cells[0]} |": f"| {' | '.join(cells)} |" for cells in rows}
    for name, line in by_name.items():
        (place,) = [number for number, old in enumerate(lines) if old.startswith(name)]
        lines[place] = line
    file.write_text("\n".join(lines) + "\n")
