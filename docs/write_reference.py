"""Writes docs/reference.md, every flag of every recipe as its --help says it, and recipes/completion.txt for the shell.

`make reference` runs it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

from lightning_modules import explaining

ROOT = Path(__file__).parents[1]
VERBS = {
    "pretrain": ("fit", "plan"),
    "finetune": ("fit",),
    "distill": ("fit", "cache", "write"),
    "compress": ("quantize", "prune", "train", "search", "run", "report", "probe"),
}
"""Of recipes that have several; the others of Lightning's take the flags of fit."""
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
        lines += [f"- `{flag}`{': ' if words else ''}{escaped(words)}" for flag, words in options] + [""]
    return lines


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
            "chosen by name has flags of its own: `python recipes/pretrain.py fit --model.help=CausalLM`.",
            "",
        ],
        [],
    )
    for file in sorted((ROOT / "recipes").glob("*.py")):
        for verb in VERBS.get(file.stem, (None,)):
            lines += section(file.stem, verb)
            completion.append(f"{file.stem} {verb or '-'} {' '.join(names(file.stem, verb))}")
    (ROOT / "docs" / "reference.md").write_text("\n".join(lines).rstrip() + "\n")
    (ROOT / "recipes" / "completion.txt").write_text("\n".join(completion) + "\n")


if __name__ == "__main__":
    main()
