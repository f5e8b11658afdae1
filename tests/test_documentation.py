"""The documentation is whole: pages that link to each other, the flags that there are, and a shell that knows them."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from datamodules.ordered import Ordered
from lightning_modules.finetune import FineTune
from lightning_modules.language_module import LanguageModule
from lightning_modules.schedules import Schedule

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
QUICK = (  # whose --help needs no torch
    *(("compare", None), ("score", None), ("export", None), ("generate", None), ("prepare", None), ("doctor", None)),
    *(("dashboard", None), *(("compress", verb) for verb in ("quantize", "prune", "train", "search", "run", "report"))),
)


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("write_reference", DOCS / "write_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("recipe", "verb"), QUICK)
def test_the_written_flags_are_those_that_there_are(recipe, verb, reference):
    assert "\n".join(reference.section(recipe, verb)).strip() in (DOCS / "reference.md").read_text(), "make reference"
    line = f"{recipe} {verb or '-'} {' '.join(reference.names(recipe, verb))}"
    assert line in (ROOT / "recipes" / "completion.txt").read_text().splitlines(), "make reference"


def test_the_written_classes_are_those_that_there_are(reference):
    text = (DOCS / "reference.md").read_text()
    for flag in reference.CLASSES:
        assert "\n".join(reference.classes_section(flag)).strip() in text, "make reference"


def test_every_class_of_a_recipe_is_in_the_reference(reference):
    listed = {reference.named(package, name) for package, names in reference.CLASSES.values() for name in names.split()}
    families = {"lightning_modules": (LanguageModule, FineTune, Schedule), "datamodules": (Ordered,)}
    for package, bases in families.items():
        found = set()
        for file in (ROOT / package).glob("*.py"):
            module = importlib.import_module(f"{package}.{file.stem}")
            found |= {one for one in vars(module).values() if isinstance(one, type) and issubclass(one, bases)}
        leaves = {one for one in found if not any(other is not one and issubclass(other, one) for other in found)}
        chosen = {one for one in leaves if not one.__name__.startswith("LazyInstance")}  # jsonargparse's defaults
        assert chosen and chosen <= listed, chosen - listed


def test_every_recipe_and_verb_is_in_the_reference(reference):
    text = (DOCS / "reference.md").read_text()
    for file in (ROOT / "recipes").glob("*.py"):
        for verb in reference.VERBS.get(file.stem, (None,)):
            assert f"\n## {file.name}{f' {verb}' if verb else ''}\n" in text, "make reference"
    flags = ("--model.optimizer.lr", "--data.seq_len", "--trainer.max_steps", "--energy.country")
    (line,) = [
        x for x in (ROOT / "recipes" / "completion.txt").read_text().splitlines() if x.startswith("pretrain fit ")
    ]
    assert all(flag in line.split() for flag in flags)


def test_every_page_is_found_and_every_link_leads_somewhere():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = set(re.findall(r"[\w/]+\.md", yaml.safe_dump(config["nav"])))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert listed == pages
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_pages_are_built_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tutorials" / "first_run" / "index.html").is_file()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["python", "recipes/pretrain.py", "fit", "--model.optimizer.adam"], ["--model.optimizer.adamw_lr"]),
        (["python3", "a/recipes/pretrain.py", "f"], ["fit"]),
        (["python", "recipes/finetune.py", "pre"], ["predict"]),
        (["python", "recipes/compress.py", "prune", "--para"], ["--parameters"]),
        (["torchrun", "--nproc-per-node", "8", "recipes/score.py", "--document"], ["--document_start"]),
        (["python", "recipes/distill.py", "validate", "--model.temp"], ["--model.temperature"]),
        (["python", "other.py", "--model"], []),
        (["python", "recipes/pretrain.py", "fit", "--config", "rec"], []),
    ],
)
def test_the_shell_completes_verbs_and_flags(words, found):
    quoted = " ".join(f"'{word}'" for word in words)
    script = f"source recipes/completion.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _recipes"
    done = subprocess.run(
        ["bash", "-c", f'{script}; echo "${{COMPREPLY[@]}}"'], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == found and not done.stderr
