"""Writes docs/reference.md, every flag of every recipe and of the classes that a flag names, as --help says it, and
recipes/completion.txt for the shell.

`make reference` runs it.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from unittest import mock

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings
from torch.optim import Optimizer
from transformers import PreTrainedConfig

from lightning_modules import explaining
from lightning_modules.schedules import Schedule
from lightning_modules.student import PartOfTeacher

ROOT = Path(__file__).parents[1]
VERBS = {
    "pretrain": ("fit", "plan"),
    "finetune": ("fit",),
    "distill": ("fit", "cache", "write"),
    "compress": ("quantize", "prune", "train", "search", "run", "report", "probe"),
}
"""Of recipes that have several; the others of Lightning's take the flags of fit."""
LANGUAGE = "CausalDistillation MaskedDistillation DenoisingDistillation"
TASKS = (
    "ClassificationDistillation QuestionAnsweringDistillation TextGenerationDistillation TranslationDistillation "
    "SummarizationDistillation"
)
FINE_TUNED = (
    "classification.Classification question_answering.QuestionAnswering text_generation.TextGeneration "
    "translation.Translation summarization.Summarization"
)
CLASSES = {
    "--model of pretrain.py": ("lightning_modules.pretrain", "CausalLM MaskedLM SpanDenoising"),
    "--model of finetune.py": ("lightning_modules", FINE_TUNED),
    "--model of distill.py, for language models": ("lightning_modules.distillation", LANGUAGE),
    "--model of distill.py, for tasks": ("lightning_modules.task_distillation", TASKS),
    "--model.inner of distill.py": ("lightning_modules.inner_signals", "InnerSignals"),
    "--model.on_policy of distill.py": ("lightning_modules.on_policy", "OnPolicy"),
    "--model.adapter": ("lightning_modules.adapter", "Adapter"),
    "--model.optimizer": ("lightning_modules.optim", "adamw MuonAdamW"),
    "--model.schedule": (
        "lightning_modules.schedules",
        "Constant Linear Cosine Step Exponential InverseSquareRoot WarmupStableDecay",
    ),
    "--data of pretrain.py and distill.py": ("datamodules.text", "Text"),
    "--data of finetune.py": ("datamodules", "labelled.Labelled spans.Spans pairs.Pairs instructions.Instructions"),
    "--trainer.callbacks": (
        "lightning_modules.callbacks",
        "layers.Layers model_artifact.ModelArtifact fake_quantization.FakeQuantization sparse_weights.SparseWeights",
    ),
}
"""By the flag that names them: a package, and what of it."""
OPTION = re.compile(r"^  (-[^\s].*?)(?:\s{2,}(.*))?$")
LIGHTNING = ("pretrain", "finetune", "distill")
"""Recipes whose --print_config shows the default run."""
LIGHTNINGS = ("--trainer", "--ckpt_path", "--data CONFIG", "--config")
"""Flags that are described elsewhere."""


def help_of(*words: str) -> str:
    """Wide, so that no description is broken into more lines than it needs."""
    command = [sys.executable, str(ROOT / "recipes" / f"{words[0]}.py"), *words[1:], "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def options_of(text: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups in order, each with its flags and what they are."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    for line in text.splitlines():
        if line and not line.startswith((" ", "usage:")) and line.endswith(":"):
            groups.append((line.rstrip(":"), []))
        elif groups and (found := OPTION.match(line)):
            groups[-1][1].append((found[1].split(", --")[0].strip(), found[2] or ""))
        elif groups and groups[-1][1] and line.startswith("        "):
            flag, words = groups[-1][1][-1]
            groups[-1][1][-1] = (flag, f"{words} {line.strip()}".strip())
    return [(title, shown) for title, some in groups if (shown := [one for one in some if is_own(one[0])])]


def is_own(flag: str) -> bool:
    return not flag.startswith((*LIGHTNINGS, "-h", "--print_shtab"))


def section(recipe: str, verb: str | None) -> list[str]:
    text = help_of(recipe, *([verb] if verb else []))
    lines = [f"## {recipe}.py{f' {verb}' if verb else ''}", ""]
    for title, options in options_of(text):
        lines += [f"**{title}**", ""] if title != "options" else []
        lines += [*listed(dict(options)), ""]
    return lines


def named(package: str, name: str) -> Callable:
    module, _, attribute = f"{package}.{name}".rpartition(".")
    return getattr(import_module(module), attribute)


def flags_of_class(one: Callable, prefix: str) -> dict[str, str]:
    """Each with what it is."""
    set_parsing_settings(subclasses_enabled=[Schedule, PreTrainedConfig, PartOfTeacher])
    parser = ArgumentParser(exit_on_error=False)
    if isinstance(one, type):
        parser.add_class_arguments(one, skip={"params"} if issubclass(one, Optimizer) else set())
    else:
        parser.add_function_arguments(one, skip={"params"})
    with mock.patch.dict(os.environ, COLUMNS="200"):
        groups = options_of(parser.format_help())
    found = {flag: words for _, options in groups for flag, words in options}
    return {
        f"--{prefix}.{flag[2:].replace('from_ FROM_', 'from FROM')}": plain(words)
        for flag, words in found.items()
        if not re.search(r"\.help( |$)", flag)
    }


def plain(words: str) -> str:
    """Without all that a class could be, and with types by their names."""
    return re.sub(r"<class '(\w+)'>", r"\1", re.sub(r", known subclasses: [^)]*(?=\))", "", words))


def classes_section(flag: str) -> list[str]:
    """What all classes of a flag have in common, then what is each one's own."""
    package, names = CLASSES[flag]
    found = {name.rpartition(".")[2]: named(package, name) for name in names.split()}
    flags = {name: flags_of_class(one, flag.split()[0][2:]) for name, one in found.items()}
    first, *others = flags.values()
    common = {one: words for one, words in first.items() if all(other.get(one) == words for other in others)}
    lines = [f"### {flag}", ""]
    if common and others:
        lines += [f"**All of them: {', '.join(f'`{name}`' for name in found)}**", "", *listed(common), ""]
    for name, one in found.items():
        about = (one.__doc__ or "").strip().partition("\n\n")[0].replace("\n", " ")
        own = {one: words for one, words in flags[name].items() if one not in common or not others}
        lines += [f"**`{name}`**: {escaped(' '.join(about.split()))}", "", *listed(own), *([""] if own else [])]
    return lines


def listed(flags: dict[str, str]) -> list[str]:
    return [f"- `{flag}`{': ' if words else ''}{escaped(words)}" for flag, words in flags.items()]


def escaped(words: str) -> str:
    return words.replace("<", "&lt;").replace("*", r"\*")


def names(recipe: str, verb: str | None) -> list[str]:
    """All flags, those of Lightning and of the classes of the default run included."""
    words = [recipe, *([verb] if verb else [])]
    found = set(re.findall(r"^  (--[\w.]+)", help_of(*words), re.MULTILINE))
    if recipe in LIGHTNING and verb == "fit":
        command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), verb, "--print_config"]
        config = yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        found |= {f"--{name}" for name in explaining.names_of(config)}
        found |= {f"--{name.rpartition('.')[0]}" for name in explaining.names_of(config) if "." in name}
    return sorted(found)


def main() -> None:
    lines, completion = (
        [
            "# Flags of the recipes",
            "",
            "Written by `make reference` from each recipe's `--help`; do not edit. Options of Lightning's Trainer "
            "are left out: https://lightning.ai/docs/pytorch/stable/common/trainer.html. A class that is "
            "chosen by name has flags of its own, [further down](#classes-that-a-flag-names).",
            "",
        ],
        [],
    )
    for file in sorted((ROOT / "recipes").glob("*.py")):
        for verb in VERBS.get(file.stem, (None,)):
            lines += section(file.stem, verb)
            completion.append(f"{file.stem} {verb or '-'} {' '.join(names(file.stem, verb))}")
    lines += [
        "## Classes that a flag names",
        "",
        "`--model MaskedLM`, or `class_path` in YAML, takes the class; flags below it, its settings. torch's and "
        "transformers' own classes go the same way: `--model.optimizer.help=torch.optim.SGD` says what they take. "
        "Callbacks are added: `--trainer.callbacks+=Layers --trainer.callbacks.every_n_steps=10`.",
        "",
    ]
    for flag in CLASSES:
        lines += classes_section(flag)
    (ROOT / "docs" / "reference.md").write_text("\n".join(lines).rstrip() + "\n")
    (ROOT / "recipes" / "completion.txt").write_text("\n".join(completion) + "\n")


if __name__ == "__main__":
    main()
