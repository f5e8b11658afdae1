"""Where each setting of a run comes from, and which of them change nothing or contradict each other."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_modules import energy, planning
from lightning_modules.architectures import require_in
from lightning_modules.finetune import FineTune
from lightning_modules.schedules import Constant, Schedule

FLAG, DEFAULT = "flag", "default"
COMPUTED = {
    "trainer.precision": "what this machine does well",
    "trainer.accumulate_grad_batches": "--global_batch_size",
    "trainer.check_val_every_n_epoch": "an interval in steps counts through epochs",
    "model.teacher": "the newest pretraining in runs/",
}
"""Settings that follow from something else, and from what, where they are other than what was said."""
LINKED = {
    "data.objective": "linked: --model",
    **{f"model.architecture.{name}_token_id": "computed: the tokenizer" for name in ("pad", "bos", "eos")},
}
"""Settings that are always another's."""
VOCABULARY, POSITIONS = "model.architecture.vocab_size", "model.architecture.max_position_embeddings"
"""Follow from the data where nothing is said of them."""
OF_THE_COMMAND = ("config", "ckpt_path")
OF_A_WHOLE_RUN = (
    *("max_steps", "max_epochs", "overfit_batches", "limit_train_batches", "limit_val_batches", "val_check_interval"),
    "enable_checkpointing",
)
"""Settings of the Trainer that fast_dev_run puts its own in the place of."""


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    origin: str
    is_default: bool = False
    """Whether it is what it would be without having been said."""
    overrules: bool = False
    """Whether it was said, and is computed all the same."""


def origins(
    parsed: dict[str, object], final: dict[str, object], words: list[str], defaults: dict[str, object]
) -> list[Setting]:
    """Of each setting, what is used and where it was said last.

    Args:
        parsed: By name, as flags and files say it.
        final: The same once the rest is known.
        words: Of the command line.
        defaults: What it is where nobody says it.
    """
    said_by, found = last_said(words), []
    for name, value in final.items():
        if name in OF_THE_COMMAND:
            continue
        origin = said_by.get(name, DEFAULT)
        if name in LINKED:
            value, origin = value if name == "data.objective" else "as the data has it", LINKED[name]
        elif name == VOCABULARY and origin == DEFAULT:
            value, origin = "as the data has it", "computed: the tokenizer"
        elif name == POSITIONS and origin == DEFAULT and (length := final.get("data.seq_len") or 0) > (value or length):
            value, origin = length, "computed: --data.seq_len"
        elif name in COMPUTED and value != parsed.get(name):
            origin = f"computed: {COMPUTED[name]}"
        is_default = name in defaults and defaults[name] == value
        overrules = origin.startswith("computed: --") and name in said_by
        found.append(Setting(name, in_words(value), origin, is_default, overrules))
    return found


def last_said(words: list[str]) -> dict[str, str]:
    """By name, the flag or the file that gives it last, in the order of the command line: that one counts."""
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if not word.startswith("-"):
            continue
        name, equals, value = word.partition("=")
        name = name.lstrip("-").removesuffix("+")
        value = value if equals else words[place + 1] if place + 1 < len(words) else ""
        if name in ("config", "c"):
            found |= dict.fromkeys(names_of(yaml.safe_load(Path(value).read_text())), shown(value))
        elif value.endswith((".yaml", ".yml")) and Path(value).is_file():  # of a group, such as --energy
            found |= dict.fromkeys(names_of({name: yaml.safe_load(Path(value).read_text())}), shown(value))
        else:
            found[canonical(name)] = FLAG
            if value.startswith("{"):
                found |= dict.fromkeys((canonical(f"{name}.{one}") for one in names_of(yaml.safe_load(value))), FLAG)
    return found


def shown(file: str) -> str:
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file


def names_of(config: object, name: str = "") -> Iterator[str]:
    """Of a YAML's settings, each by its whole name."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            yield from names_of(value, f"{name}.{key}" if name else str(key))
    else:
        yield canonical(name)


def canonical(name: str) -> str:
    """As a flag says it: without the words by which classes are nested."""
    return re.sub(r"\.from_$", ".from", re.sub(r"\.(init_args|class_path)\b", "", name))


def flat(config: Namespace) -> dict[str, object]:
    return {canonical(name): value for name, value in vars(config.as_flat()).items()}


def in_words(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(in_words(one) for one in value)
    if isinstance(value, Namespace) and "class_path" in value:
        return value.class_path.rpartition(".")[2]
    return (
        str(value).rpartition(".")[2]
        if isinstance(value, str) and value.startswith("lightning_modules.")
        else str(value)
    )


def lines(settings: list[Setting]) -> list[str]:
    """What was said first, defaults last; those of Lightning that are not set are left out."""
    some = [s for s in settings if not (s.origin == DEFAULT and s.value in ("None", "[]", "{}"))]
    some.sort(key=lambda s: (s.origin == DEFAULT, s.origin.startswith("computed"), s.origin != FLAG, s.name))
    widths = [max(len(getattr(s, name)) for s in some) for name in ("name", "value")]
    return [f"{s.name:<{widths[0]}}  {s.value[:60]:<{min(60, widths[1])}}  {s.origin}".rstrip() for s in some]


# What changes nothing, or contradicts itself


def remarks(trainer: Trainer, module: LightningModule, data: LightningDataModule, settings: list[Setting]) -> list[str]:
    said = {s.name for s in settings if s.origin != DEFAULT and not s.is_default}
    values = {s.name: s.value for s in settings}
    steps = most_steps(trainer, module, data)
    found = [
        *about_the_architecture(module),
        *about_the_schedule(steps, module.schedule, said),
        *about_callbacks(trainer, module, steps),
        *about_time(trainer, module, steps),
        *about_data(data, said, values),
        *about_flags(trainer, said, values, {s.name for s in settings if s.overrules}),
        *about_a_trial(trainer, {s.name for s in settings if s.origin == FLAG}),
    ]
    return found


def most_steps(trainer: Trainer, module: LightningModule, data: LightningDataModule) -> int | None:
    """By max_steps and, where a row has as many tokens as it is long, by max_tokens; None where neither is said."""
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if module.max_tokens and not isinstance(module, FineTune) and module.objective != "denoising":
        rows = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
        ends.append(-(-module.max_tokens // (rows * data.seq_len)))
    return min(ends, default=None)


def about_the_architecture(module: LightningModule) -> Iterator[str]:
    try:
        if getattr(module, "architecture", None) is not None:
            require_in(module.auto_class, module.architecture)
    except ValueError as error:
        yield f"fit refuses this: {error}"


def about_the_schedule(steps: int | None, schedule: Schedule, said: set[str]) -> Iterator[str]:
    if steps is not None and schedule.warmup_steps is not None and steps <= schedule.warmup_steps:
        yield f"the warm-up of {schedule.warmup_steps} steps is no shorter than the run of {steps}"
    if schedule.warmup_steps is not None and "model.schedule.warmup_fraction" in said:
        yield "--model.schedule.warmup_fraction changes nothing: --model.schedule.warmup_steps is given"
    every = getattr(schedule, "every", None)
    if steps is not None and every is not None and steps <= every:
        yield f"the rate falls each {every} steps, and the run has {steps}: it never falls"
    if isinstance(schedule, Constant) and schedule.warmup_steps == 0:
        yield "the rate is the same from the first to the last step"
    fraction = getattr(schedule, "decay_fraction", None)
    if fraction is not None and fraction + schedule.warmup_fraction > 1 and schedule.warmup_steps is None:
        yield f"warm-up and decay together are {fraction + schedule.warmup_fraction:.0%} of the run"


def about_callbacks(trainer: Trainer, module: LightningModule, steps: int | None) -> Iterator[str]:
    known = None if isinstance(module, FineTune) else {"val/loss", "val/perplexity", "val/bits_per_byte"}
    validations = count_validations(trainer, steps)
    for callback in trainer.callbacks:
        monitor = getattr(callback, "monitor", None)
        name = type(callback).__name__
        if monitor and known is not None and monitor.startswith("val/") and monitor not in known:
            yield f"{name} watches {monitor}, which is never logged; it is one of {', '.join(sorted(known))}"
        if isinstance(callback, EarlyStopping) and validations is not None and callback.patience >= validations:
            yield f"{name} waits for {callback.patience} validations, and the run has {validations}: it never stops it"
        if isinstance(callback, ModelCheckpoint) and callback.save_top_k == 0 and not callback.save_last:
            yield f"{name} keeps nothing"


def count_validations(trainer: Trainer, steps: int | None) -> int | None:
    """None where it is not known from the flags alone."""
    interval = trainer.val_check_interval
    in_steps = isinstance(interval, int) and trainer.check_val_every_n_epoch is None
    return steps // (interval // trainer.accumulate_grad_batches or 1) if in_steps and steps is not None else None


def about_time(trainer: Trainer, module: LightningModule, steps: int | None) -> Iterator[str]:
    if count_validations(trainer, steps) == 0:
        yield (
            f"the first validation comes after {trainer.val_check_interval} micro-batches, and the run has "
            f"{steps} steps: there is none before the end"
        )
    limit = planning.time_allowed(trainer)
    ends = [f"{trainer.max_steps:,} steps"] if trainer.max_steps > 0 else []
    ends += [f"{trainer.max_epochs} epochs"] if (trainer.max_epochs or -1) > 0 else []
    ends += [f"{module.max_tokens:,} tokens"] if module.max_tokens else []
    ends += [str(timedelta(seconds=limit))] if limit is not None else []
    if len(ends) > 1:
        either = f"{', '.join(ends[:-1])} or {ends[-1]}"
        yield f"the run ends after {either}, what comes first; the schedule follows the one that is further on"


def about_data(data: LightningDataModule, said: set[str], values: dict[str, str]) -> Iterator[str]:
    objective = getattr(data, "objective", None)
    for name, needed in (("mask_fraction", "masked"), ("mean_span", "denoising")):
        if f"data.{name}" in said and objective not in (needed, "denoising"):
            yield f"--data.{name} changes nothing: the objective is {objective}"
    length, positions = (values.get(name, "None") for name in ("data.seq_len", POSITIONS))
    if "None" not in (length, positions) and int(length) > int(positions):
        yield f"rows of {length} tokens do not fit the {positions} positions of the architecture: fit refuses them"
    if "data.val_fraction" in said and values.get("data.val_path", "None") != "None":
        yield "--data.val_fraction changes nothing: --data.val_path says what is held out"
    if "data.vocab_size" in said and values.get("data.tokenizer", "None") not in ("None", "bpe"):
        yield "--data.vocab_size changes nothing: the tokenizer that is given has its own words"


def about_flags(trainer: Trainer, said: set[str], values: dict[str, str], overruled: set[str]) -> Iterator[str]:
    if values.get("trainer.precision") == "16-mixed" and trainer.precision != "16-mixed":
        yield f"--trainer.precision 16-mixed is for GPUs; Lightning takes {trainer.precision} here"
    if "trainer.gradient_clip_algorithm" in said and not trainer.gradient_clip_val:
        yield "--trainer.gradient_clip_algorithm changes nothing without --trainer.gradient_clip_val"
    if values.get("samples.max_new_tokens") == "0" and said & {"samples.temperature", "samples.prompts"}:
        yield "--samples.temperature and --samples.prompts change nothing: --samples.max_new_tokens is 0"
    if "energy.country" in said and values.get("energy.measure") == "False":
        yield "--energy.country changes nothing: --energy.measure is false"
    if "energy.country" in said and not energy.is_installed():
        yield "--energy.country changes nothing: codecarbon is not installed"
    if "push.private" in said and values.get("push.to") == "None":
        yield "--push.private changes nothing without --push.to"
    if values.get("model.freeze_backbone") == "True" and values.get("model.adapter", "None") != "None":
        yield "--model.freeze_backbone changes nothing: an adapter leaves the backbone as it is"
    if "trainer.accumulate_grad_batches" in overruled:
        yield "--trainer.accumulate_grad_batches changes nothing: it follows from --global_batch_size"
    rate = values.get("model.optimizer.lr", "None")  # Adafactor's may be None: its own
    if rate != "None" and (not math.isfinite(float(rate)) or float(rate) <= 0):
        yield f"--model.optimizer.lr is {rate}: nothing is learnt"
    if "trainer.deterministic" in said and values.get("trainer.deterministic") != "False":
        yield "--trainer.deterministic: runs are repeated bit by bit without it, and it refuses some operations"


def about_a_trial(trainer: Trainer, flags: set[str]) -> Iterator[str]:
    idle = [f"--trainer.{name}" for name in OF_A_WHOLE_RUN if f"trainer.{name}" in flags]
    if trainer.fast_dev_run and idle:
        yield f"{', '.join(idle)}: --trainer.fast_dev_run decides instead"
