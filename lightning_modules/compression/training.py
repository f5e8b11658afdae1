"""The training that follows on compression, as a command of recipes/distill.py."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from lightning_modules.command_line import fail, take_flag
from lightning_modules.compression import opened as folders
from lightning_modules.compression.packed_folder import is_packed
from lightning_modules.compression.quantization import SchemeName
from lightning_modules.compression.vocabulary import smaller_network
from lightning_modules.model_folder import find_folder, load_tokenizer, summary_of
from lightning_modules.run_folder import moment

OF_TEXT = "distill_compressed.yaml"
RUNS = {
    AutoModelForCausalLM: ("CausalDistillation", OF_TEXT),
    AutoModelForMaskedLM: ("MaskedDistillation", OF_TEXT),
    AutoModelForSeq2SeqLM: ("DenoisingDistillation", OF_TEXT),
    AutoModelForSequenceClassification: ("ClassificationDistillation", "distill_sentiment.yaml"),
    AutoModelForQuestionAnswering: ("QuestionAnsweringDistillation", "distill_question_answering.yaml"),
}
"""The class that a model is trained by, and the YAML with its settings."""
RATES = {"distill_sentiment.yaml": 1e-4, "distill_question_answering.yaml": 1e-4}
"""Of YAMLs whose learning rate is for new weights."""
ASKED = "asked.json"
"""In a folder of several steps, what they are for."""
CALLBACKS = "lightning_modules.callbacks"
OF_DOCUMENTS = ("--data.separator", "--data.max_val_documents")
"""Flags of compress.py that a training, which reads rows of text, does not know."""
MANY = 0.1
"""Share of a matrix that is zero: more than chance, so meant."""


@dataclass(frozen=True)
class Methods:
    """What is done to weights while they are trained."""

    qat: SchemeName | None = None
    group_size: int | None = None
    ends: int = 8
    sparsity: float | None = None

    def flags(self, has_zeros: bool) -> list[str]:
        words = []
        if self.sparsity is not None or has_zeros:
            words.append(f"--trainer.callbacks+={CALLBACKS}.sparse_weights.SparseWeights")
            words += [] if self.sparsity is None else [f"--trainer.callbacks.sparsity={self.sparsity:g}"]
        if self.qat is not None:
            words.append(f"--trainer.callbacks+={CALLBACKS}.fake_quantization.FakeQuantization")
            settings = {"scheme": self.qat, "group_size": self.group_size, "ends": self.ends}
            words += [f"--trainer.callbacks.{name}={v}" for name, v in settings.items() if v is not None]
        return words


def command(recipes: Path, model: str, methods: Methods, rest: list[str]) -> list[str]:
    """Of the training of a compressed model by the one that it was made of, with the flags in `rest` besides.

    Raises ValueError for a model of few bits, and one to which nothing was done.
    """
    folder = find_folder(model)
    config = AutoConfig.from_pretrained(folder)
    if is_packed(config):
        raise ValueError(f"--model {model} has few bits already; pass the model that it was made from, and --qat")
    about = folders.done_so_far(folder)
    if (
        not about["steps"]
        and not has_zeros(Path(folder))
        and methods == Methods(group_size=methods.group_size, ends=methods.ends)
    ):
        raise ValueError(
            f"nothing was done to --model {model}; prune it, or pass --qat int4, --sparsity 0.5 or --parameters 0.67"
        )
    module, yaml = RUNS[folders.auto_class_of(folder, config)]
    if summary_of(Path(folder).parent).get("task") == "Translation":
        module, yaml = "TranslationDistillation", "distill_translation.yaml"
    given = {word.partition("=")[0] for word in rest}
    words = [sys.executable, str(recipes / "distill.py"), "fit"]
    if not given & {"--config", "-c"}:
        words += ["--config", str(recipes / yaml), f"--model={module}"]
        if yaml in RATES and not any(name.startswith("--model.optimizer") for name in given):
            words.append(f"--model.optimizer.lr={RATES[yaml]:g}")
    words.append(f"--model.student={folder}")
    if "--model.teacher" not in given:
        words.append(f"--model.teacher={teacher_of(folder, str(about['source']))}")
    if "--comparison.control" not in given:
        words.append("--comparison.control=false")
    return words + methods.flags(has_zeros(Path(folder))) + rest


def teacher_of(folder: str, source: str) -> str:
    """The model that another was made of; where that one has fewer words, in a folder of its own with these alone."""
    theirs, words = load_tokenizer(find_folder(source)).get_vocab(), load_tokenizer(folder).get_vocab()
    if theirs == words:
        return source
    place = Path(folder).with_name(f"{Path(folder).name}-teacher")
    if not (place / "config.json").is_file():
        whole = folders.open_model(source)
        kept = [theirs[word] for word in sorted(words, key=words.get)]
        whole.network = smaller_network(whole.network, kept, whole.auto_class)
        whole.tokenizer = load_tokenizer(folder)
        with folders.written_whole(place, whole, {"verb": "prune", "words": len(kept)}) as temporary:
            whole.network.to(whole.stored).save_pretrained(temporary)
    return str(place)


def pruned_in_rounds(
    recipes: Path, model: str, parameters: float, rounds: int, rest: list[str]
) -> tuple[str, list[str]]:
    """Prunes to a share of the parameters, in turns with training; what is done already is not done again. Returns what
    is to be trained last, with the flags for it."""
    rest, given = take_flag("--trainer.default_root_dir", rest)
    root, texts = Path(given[0] if given else f"{find_folder(model)}-rounds"), of_text(rest)
    for flag in OF_DOCUMENTS:
        rest, _ = take_flag(flag, rest)
    asked = {"model": find_folder(model), "parameters": parameters, "rounds": rounds}
    require_same(root, asked)
    for number in range(1, rounds + 1):
        pruned = root / f"pruned-{number}"
        if not pruned.exists():
            share = parameters ** (1 / rounds)
            flags = [f"--parameters={share:g}", f"--output={pruned}", f"--model={model}"]
            finished([sys.executable, str(recipes / "compress.py"), "prune", *flags, *texts])
            note_asked(root, asked)
        if number < rounds:
            trained = root / f"trained-{number}"
            if not (trained / "model" / "config.json").is_file():
                more = [*rest, f"--trainer.default_root_dir={trained}", "--ckpt_path=last"]
                finished(command(recipes, str(pruned), Methods(), more))
            model = str(trained / "model")
            keep_history(pruned, Path(model), {"verb": "train"})
    return str(pruned), [*rest, f"--trainer.default_root_dir={root / f'trained-{rounds}'}", "--ckpt_path=last"]


def has_zeros(folder: Path) -> bool:
    """Whether more than chance has made weights zero."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - no mapping
                tensor = opened.get_tensor(name)
                if tensor.ndim == 2 and float((tensor == 0).float().mean()) > MANY:
                    return True
    return False


def require_same(folder: Path, asked: dict[str, object]) -> None:
    """Raises ValueError where a folder was begun for something else."""
    file = folder / ASKED
    if file.is_file() and (there := json.loads(file.read_text())) != asked:
        name = next(name for name in asked if there.get(name) != asked[name])
        raise ValueError(f"{folder} was begun with {name} {there.get(name)}; pass the same, or another folder")


def note_asked(folder: Path, asked: dict[str, object]) -> None:
    """Once there is something in it: what was refused leaves nothing that a better command would have to fit."""
    (folder / ASKED).write_text(json.dumps(asked, indent=2) + "\n")


def history_flags(model: str, given: list[str], qat: str | None) -> list[str]:
    """Writes what was done to a model into the folder of its training, and names that folder where `given`, the flags
    of the training, do not."""
    _, named = take_flag("--trainer.default_root_dir", given)
    if not named and "RANK" in os.environ:  # each rank would make up a name
        return []
    folder = Path(named[0] if named else f"runs/compress-{moment()}")
    if int(os.environ.get("RANK", 0)) == 0:
        folder.mkdir(parents=True, exist_ok=True)
        about = folders.done_so_far(find_folder(model))
        about["steps"].append({"verb": "train", "qat": qat})
        (folder / folders.ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return [] if named else [f"--trainer.default_root_dir={folder}"]


def keep_history(before: Path, model: Path, step: dict[str, object]) -> None:
    """What was done to a model before it was trained, and this."""
    about = folders.done_so_far(str(before))
    about["steps"].append(step)
    (model / folders.ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def of_text(words: list[str]) -> list[str]:
    """The flags of a training that compress.py knows, too."""
    known = ("--data.path", "--data.val_path", "--data.val_fraction", "--data.text_column", *OF_DOCUMENTS)
    found, passed = [], False
    for word in words:
        if word.startswith("-"):
            passed = word.partition("=")[0] in known
        found += [word] if passed else []
    return found


def finished(words: list[str]) -> None:
    if code := subprocess.run(words).returncode:
        fail(f"{Path(words[1]).name} {words[2]} ended with {code}", code)
