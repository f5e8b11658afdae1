"""The commands of the README and of the recipes' docstrings run as they are written, at toy size."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from transformers import BertConfig, BertForMaskedLM

from datamodules.tokenization import bpe_tokenizer
from recipes import compress, prepare
from tests.distilling import run as distill
from tests.finetuning import run as finetune
from tests.test_recipes import ROOT, SMALL, TOY, fit

GUIDES = ("how_to", "evaluation", "scale", "distillation", "compression", "export")
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in GUIDES),
    *sorted((ROOT / "docs" / "tutorials").glob("*.md")),
    *(file for kind in ("*.py", "*.yaml") for file in sorted((ROOT / "recipes").glob(kind))),
]
COMMAND = re.compile(r"python recipes/\w+\.py[^`\n]*")


def commands() -> list[str]:
    """Without those that only stand for a command: a name in capitals or an ellipsis as a flag's whole value."""
    texts = [re.sub(r" \\\n +", " ", path.read_text()) for path in DOCUMENTS]
    found = {re.sub(r"\s+#.*", "", m).strip() for text in texts for m in COMMAND.findall(text)}
    return sorted(c for c in found if not re.search(r"NAME|VERB|--config …|{\w+[}.(]", c))


@pytest.fixture(scope="module")
def place(tmp_path_factory, corpus):
    """A folder with what the commands name, under their names."""
    folder = tmp_path_factory.mktemp("place")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        fit(folder / "run", corpus, **{"model.architecture.num_hidden_layers": 3})
    text = "".join(path.read_text() for path in corpus.iterdir())
    rows = "".join(json.dumps({"body": part}) + "\n" for part in text.split("\n\n"))
    with pyarrow.CompressedOutputStream(str(folder / "news.jsonl.zst"), "zstd") as stream:
        stream.write(rows.encode())
    (folder / "news.jsonl").write_text(rows[:1000].rsplit("\n", 1)[0])
    (folder / "held_out.txt").write_text(text[:500])
    (folder / "stories.txt").write_text(text[:300] + "<|endoftext|>" + text[300:600])
    (folder / "prompt.txt").write_text("def f")
    write_questions(folder)
    lines = [f"{'fine' if i % 2 else 'dull'} film number {i},{i % 2}" for i in range(60)]
    (folder / "reviews.csv").write_text("\n".join(["review,label", *lines, ""]))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = bpe_tokenizer(lines, 2000, 300, "masked")
    for part in (BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **small)), tokenizer):
        part.save_pretrained(folder / "runs" / "encoder" / "model")
    shutil.copytree(folder / "run", folder / "runs" / "mine")
    chats = [{"question": f"Is {i} even?", "answer": "no" if i % 2 else "yes"} for i in range(60)]
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "new.csv").write_text("review\nfine film\ndull film\n")
    for side, word in (("en", "film"), ("de", "Film")):
        (folder / f"train.{side}").write_text("".join(f"{word} {i}\n" for i in range(60)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        tuned = ["--data.path=reviews.csv", "--model.from=runs/encoder", "--trainer.default_root_dir=runs/tuned"]
        finetune("fit", *tuned, "--trainer.max_steps=2", "--trainer.val_check_interval=2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        for name in ("texts", "web", "code"):
            words = [
                "--data.path",
                str(corpus),
                "--data.tokenizer",
                "bytes",
                "--output",
                str(folder / "prepared" / name),
            ]
            prepare.main(words)
    for name in ("texts", "my_texts"):
        (folder / name).symlink_to(corpus)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "README.md").write_text((ROOT / "README.md").read_text()[:500])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.chdir(folder)
        distill("cache", "--folder=cache/mine", *small_distillation([]))
    return folder


def test_there_are_commands():
    verbs = {command.split()[1] for command in commands()}
    assert {"recipes/pretrain.py", "recipes/generate.py", "recipes/score.py"} <= verbs and len(commands()) >= 12


def marked(command: str) -> object:
    """Of verify and of rounds there are tests of their own."""
    slow = command.endswith(" verify") or "--rounds" in command
    return pytest.param(command, marks=pytest.mark.slow, id=command) if slow else command


@pytest.mark.parametrize("command", map(marked, commands()))
def test_a_command_runs_as_it_is_written(command, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    _, script, *arguments = shlex.split(command, comments=True)
    arguments = [re.sub(r"^~", str(place), argument) for argument in arguments]
    if "<" in arguments:
        monkeypatch.setattr(sys, "stdin", io.StringIO(Path(arguments[-1]).read_text()))
        arguments = arguments[:-2]
    if "--trainer.default_root_dir" in arguments:  # where there may be a run of another command
        arguments[arguments.index("--trainer.default_root_dir") + 1] = str(tmp_path / "run")
    if arguments[0] == "replay":
        arguments = ["replay", "--run", "run", "--step", "2"]
    elif script == "recipes/prepare.py":
        arguments = [re.sub("^(web|code)/.*|^my_texts/", "texts", argument) for argument in arguments]
        arguments.append("--data.tokenizer=bytes")
        shutil.rmtree(arguments[arguments.index("--output") + 1], ignore_errors=True)
    elif script == "recipes/doctor.py":
        arguments = [re.sub("^/shared", str(place), argument) for argument in arguments]
    elif script == "recipes/pretrain.py":
        arguments += toy_flags(arguments)
    elif script == "recipes/distill.py":
        arguments = [re.sub("^runs/mine$", "run", argument) for argument in arguments]  # which is a decoder
        arguments += small_distillation(arguments)
    elif script == "recipes/finetune.py":
        arguments = [re.sub("^runs/tuned/model-int4$", "runs/tuned/model", argument) for argument in arguments]
        few = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--data.max_val_examples=6"]
        arguments += few if arguments[0] == "fit" else []
    elif script == "recipes/compress.py":
        arguments = small_compression(arguments, place)
        monkeypatch.setattr(os, "execv", lambda file, words: sys.exit(subprocess.run(words).returncode))
    elif script == "recipes/dashboard.py":  # what it would send, for want of an account
        pytest.importorskip("wandb_workspaces")
        arguments += [] if "--output" in arguments else ["--output", "view.json"]
    elif script == "recipes/compare.py":
        arguments = small_comparison(arguments, place)
    elif script == "recipes/export.py":
        arguments[arguments.index("--model") + 1] = "run/model"
        arguments.append("--overwrite")
    else:  # whatever model the command names
        arguments[arguments.index("--model") + 1] = "runs/tuned" if "tuned" in arguments else "run/model"
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for what runs in processes of its own
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def write_questions(folder: Path) -> None:
    question = {"query": "def f0_1(x,", "choices": ["y=0):", "y=1):"], "gold": 0}
    (folder / "arc_easy.jsonl").write_text(json.dumps(question) + "\n")
    pair = {"sentence_good": "return x * 1", "sentence_bad": "return return x"}
    (folder / "blimp.jsonl").write_text(json.dumps(pair) + "\n")
    (folder / "crows_pairs_anonymized.csv").write_text("sent_more,sent_less,bias_type\nhe is,she is,gender\n")


def copy_of_run(place: Path) -> Path:
    if not (place / "copy").exists():
        shutil.copytree(place / "run" / "model", place / "copy")
    return place / "copy"


def small_comparison(arguments: list[str], place: Path) -> list[str]:
    """Of the model at hand and a copy of it."""
    copy_of_run(place)
    flags = arguments[next((i for i, word in enumerate(arguments) if word.startswith("--")), len(arguments)) :]
    flags = [re.sub("^held_out/$", "texts", flag) for flag in flags]
    read = [] if "--data.path" in flags else ["--data.path", "texts"]
    return ["run", "copy", *flags, *read, "--data.val_fraction", "0.3"]


def small_compression(arguments: list[str], place: Path) -> list[str]:
    """Of the model at hand, on little text, in few steps."""
    verb, pruned = arguments[0], place / "pruned"
    if not pruned.exists():
        read = ["--data.path", "texts", "--data.val_fraction", "0.3", "--rows", "2"]
        compress.main(["prune", "--model", "run", "--layers", "1", "--output", str(pruned), *read])
    arguments = [re.sub("^my_texts/$", "texts", re.sub("^runs/mine", "run", argument)) for argument in arguments]
    smaller = {"0.67": "0.85", "0.5": "0.85"}  # the model is too small for less
    smaller |= {"4": "2", "1024": "16", "3000": "300"} if verb == "prune" else {}
    smaller |= {"run/model-pruned": "pruned", "run/model-int4": "run"}
    smaller |= {"runs/taught": "pruned"} if "--trainer.default_root_dir" not in arguments else {}
    arguments = [smaller.get(argument, argument) for argument in arguments]
    if verb == "report":
        flags = [place for place, word in enumerate(arguments) if word.startswith("--") and word != "--model"]
        arguments = ["report", "--model", "run", str(copy_of_run(place)), *arguments[min(flags, default=999) :]]
    given = {a.removeprefix("--") for a in arguments if a.startswith("--")}
    few = {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "data.seq_len": 32, "data.batch_size": 4}
    toy = {"data.path": "texts", "data.val_fraction": 0.3}
    toy |= {"rows": 2} if verb in ("quantize", "prune", "search") else {}
    toy |= {"overwrite": "true"} if verb in ("quantize", "prune") else {}
    toy |= few | {"samples.max_new_tokens": 0} if verb in ("train", "search") else {}
    toy |= {"trials": 4, "output": "searched"} if verb == "search" else {}
    if verb == "probe":
        return arguments
    if verb == "run":
        (place / "graph.yaml").write_text("nodes: {pruned: {verb: prune, layers: 1, rows: 2}}")
        toy |= {"config": "graph.yaml", "output": "graph"}
        shutil.rmtree(place / "graph", ignore_errors=True)
    forced = {"trainer.max_steps"}
    return [*arguments, *(f"--{name}={value}" for name, value in toy.items() if name not in given or name in forced)]


def small_distillation(arguments: list[str]) -> list[str]:
    """What makes a distillation small, and names its teacher where the command does not."""
    given = {a.removeprefix("--").partition("=")[0] for a in arguments if a.startswith("--")}
    if "config" in given:  # of a task, whose student is a BertConfig
        return ["--trainer.max_epochs=-1", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    toy = {"data.path": "texts", "model.teacher": "run", "data.seq_len": 32, "data.batch_size": 4}
    if "cache" not in arguments and "folder" not in given:
        toy |= {"trainer.max_steps": 2, "trainer.val_check_interval": 2}
    toy |= {} if "model.student" in given else {f"model.student.{n}": v for n, v in SMALL["NanoChatConfig"].items()}
    return [f"--{name}={value}" for name, value in toy.items() if name not in given]


def toy_flags(arguments: list[str]) -> list[str]:
    """What makes a run small, as far as the command does not say it itself; devices stay one."""
    given = {a.removeprefix("--") for a in arguments if a.startswith("--")}
    config = next((Path(b) for a, b in zip(arguments, arguments[1:], strict=False) if a == "--config"), None)
    text = (ROOT / (config or "recipes/pretrain.yaml")).read_text()
    small = next(fields for name, fields in SMALL.items() if f"{name}\n" in text)
    if "model.architecture" in given:
        small = SMALL[arguments[arguments.index("--model.architecture") + 1].rpartition(".")[2]]
    toy = TOY | {f"model.architecture.{name}": value for name, value in small.items()}
    toy |= {} if "data.path" in given else {"data.path": "texts"}
    if "data.tokenizer" in given:  # a Hub name, out of reach here
        toy |= {"data.tokenizer": "bytes"}
    forced = {"trainer.devices", "trainer.strategy", "trainer.max_steps", "data.tokenizer"}
    return [f"--{name}={value}" for name, value in toy.items() if name not in given or name in forced]
