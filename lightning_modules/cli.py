"""The command line of a recipe: LightningCLI, with the YAML beside the script as the default run.

What is added: errors of one line, a folder for each run, precision by hardware, W&B and CSV, the callbacks that show
and keep a run.
"""

import difflib
import gc
import importlib
import inspect
import json
import logging
import re
import sys
import warnings
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import yaml
from jsonargparse import DefaultHelpFormatter, Namespace, set_parsing_settings
from jsonargparse.typing import PositiveInt
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from transformers import PreTrainedConfig

from lightning_modules import explaining, hardware, tracking
from lightning_modules.callbacks.agreement import Agreement
from lightning_modules.callbacks.comparison import Comparison
from lightning_modules.callbacks.energy import Energy
from lightning_modules.callbacks.fake_quantization import FakeQuantization
from lightning_modules.callbacks.guard import Guard
from lightning_modules.callbacks.horizon import Horizon
from lightning_modules.callbacks.layers import Layers
from lightning_modules.callbacks.model_artifact import ModelArtifact
from lightning_modules.callbacks.plan import Plan
from lightning_modules.callbacks.predictions import HeldOutPredictions, Predictions
from lightning_modules.callbacks.progress import Progress
from lightning_modules.callbacks.push import Push
from lightning_modules.callbacks.recovery import Recovery
from lightning_modules.callbacks.report import Report
from lightning_modules.callbacks.samples import Samples
from lightning_modules.callbacks.sparse_weights import SparseWeights
from lightning_modules.callbacks.speed import Speed
from lightning_modules.callbacks.watchdog import Watchdog
from lightning_modules.checkpoint_io import CheckpointFiles
from lightning_modules.command_line import OneLineParser, fail, one_line_errors, take_flag, unbreakable_output
from lightning_modules.language_module import LanguageModule
from lightning_modules.precision import BF16Shards, BF16Weights
from lightning_modules.recipe_trainer import RecipeTrainer
from lightning_modules.redaction import redacted
from lightning_modules.restarts import join, require_free_port
from lightning_modules.run_folder import find_checkpoint, no_empty_run_folder, require_new, run_folder
from lightning_modules.schedules import Schedule
from lightning_modules.strategies import NAMES
from lightning_modules.student import PartOfTeacher
from lightning_modules.taught import Taught

IMPORTABLE = (
    "lightning_modules",
    "datamodules",
    "lightning.pytorch",
    "pytorch_lightning",
    "torch.optim",
    "pytorch_optimizer",
    "transformers",
)
"""Packages whose classes a configuration may name; --allow_import PACKAGE adds one."""
NEVER = ("lightning.pytorch.callbacks.LambdaCallback", "lightning.pytorch.callbacks.lambda_function")
"""Calls whatever it is given."""
CALLBACKS = (Layers, ModelArtifact, FakeQuantization, SparseWeights)
"""Those that are added by --trainer.callbacks+=NAME: their names are enough, since their classes are imported here."""

OF_FIT = ("ckpt_path", "weights_only")
"""Which verbs such as explain do not take, to whom a run's config.yaml is given as it is."""
FLAT = str | int | float | bool | list | dict | None


class Parser(OneLineParser, LightningArgumentParser):
    """Knows `from`, which no argument in Python can be called, as `from_`, and a student that names layers as the class
    that it is; a run's config.yaml is read by verbs that take no checkpoint, too."""

    def _load_config_parser_mode(self, content: str, *args, **settings) -> Namespace:
        taken = {action.dest for action in self._actions}
        idle = [name for name in OF_FIT if name not in taken and f"{name}:" in content]
        if idle or re.search(r"""\b(from|teacher_layers)["']?:""", content):
            config = yaml.safe_load(content)
            if isinstance(config, dict):
                _named(config.get("model"))
                content = yaml.safe_dump({k: v for k, v in config.items() if k not in idle}, sort_keys=False)
        return super()._load_config_parser_mode(content, *args, **settings)


def _named(model: object) -> None:
    """Renames, in place, what stands in a YAML by a shorter name."""
    for place in (model, model.get("init_args")) if isinstance(model, dict) else ():
        if isinstance(place, dict) and "from" in place:
            place["from_"] = place.pop("from")
        if isinstance(place, dict) and isinstance(place.get("student"), dict) and "teacher_layers" in place["student"]:
            place["student"] = _part_of_teacher(place["student"])


def _part_of_teacher(settings: dict) -> dict:
    return {"class_path": f"{PartOfTeacher.__module__}.{PartOfTeacher.__name__}", "init_args": settings}


def _named_words(words: list[str]) -> list[str]:
    """The same of a command line."""
    words = [re.sub(r"^--model\.from(?==|$)", "--model.from_", word) for word in words]
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if not re.fullmatch(r"--model\.student(\.teacher_layers)?", flag) or (not equals and i + 1 == len(words)):
            continue
        place = i if equals else i + 1
        try:
            value = yaml.safe_load(value if equals else words[place])
        except yaml.YAMLError:  # the parser says it better
            continue
        settings = {"teacher_layers": value} if flag.endswith("layers") else value
        if isinstance(settings, dict) and "teacher_layers" in settings:
            words[i : place + 1] = [f"--model.student={json.dumps(_part_of_teacher(settings))}"]
    return words


class Formatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of a recipe's docstring."""


class SaveConfig(SaveConfigCallback):
    """Writes config.yaml into the run's folder, so that `fit --config config.yaml` is the same run again.

    Once the run begins: one that is refused, such as by the checkpoint that it was to go on from, changes nothing.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and not self.already_saved:
            self.save_config(trainer, pl_module, "fit")
            self.already_saved = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)  # of a run that was over when it was taken up

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        text = redacted(self.parser.dump(self.config, skip_none=False)).replace(" from_:", " from:")
        (folder / "config.yaml").touch(mode=0o600)
        (folder / "config.yaml").write_text(text)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams(yaml.safe_load(text))


class RecipeCLI(LightningCLI):
    """See `main`."""

    def __init__(
        self,
        recipe: str,
        default_config: Path,
        default_model: type[LightningModule],
        args: list[str] | None = None,
        **settings,
    ):
        self.recipe = recipe
        self.default_config = default_config
        self.default_model = default_model
        self.args, allowed = take_flag("--allow_import", list(sys.argv[1:] if args is None else args))
        self.args = _named_words(self.args)
        # What a YAML or a flag may name, checked before it is imported: importing is running.
        set_parsing_settings(import_path_denylist=["*", *NEVER], import_path_allowlist=[*IMPORTABLE, *allowed])
        super().__init__(args=args, **settings)

    def subcommands(self) -> dict[str, set[str]]:
        return LightningCLI.subcommands() | getattr(self.trainer_class, "verbs", {})

    def init_parser(self, **settings) -> LightningArgumentParser:
        parser = Parser(**settings)
        parser.add_argument("-c", "--config", action="config", help="A YAML with flags; several are merged in order.")
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **settings) -> LightningArgumentParser:
        """Flags only for the subcommand that is asked for: they cost a quarter of a second each."""
        first = self.args[0] if self.args else "--help"
        if first in ("-h", "--help") or (first in self.subcommands() and first != subcommand):
            return self.init_parser(**settings)
        return super()._prepare_subcommand_parser(klass, subcommand, **settings)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.set_defaults({"model": {"class_path": f"{self.default_model.__module__}.{self.default_model.__name__}"}})
        if issubclass(self.default_model, LanguageModule):
            parser.add_lightning_class_args(Samples, "samples")
            if not self.subclass_mode_data:
                parser.link_arguments("model", "data.objective", compute_fn=_objective)
        parser.add_argument(
            "--global_batch_size",
            type=PositiveInt | None,
            default=None,
            help="Rows of a step, of all ranks together: --trainer.accumulate_grad_batches follows from it.",
        )
        if issubclass(self.default_model, Taught):
            parser.add_lightning_class_args(Comparison, "comparison")
        parser.add_lightning_class_args(Energy, "energy")
        parser.add_lightning_class_args(Push, "push")
        parser.add_lightning_class_args(Recovery, "recovery")
        parser.add_lightning_class_args(Guard, "guard")
        parser.add_lightning_class_args(Watchdog, "watchdog")

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        args = list(self.args)
        given = any(arg in ("-c", "--config") or arg.startswith("--config=") for arg in args)
        if args and args[0] in self.subcommands() and not given and self.default_config.exists():
            args[1:1] = ["--config", str(self.default_config)]
        self.words = args[1:]
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Lightning would lay the checkpoint's settings over the command line here, in silence; the flags decide."""
        config = self.config[self.config.subcommand]
        if "ckpt_path" not in config:
            self.ckpt_path = None
            return
        folder = config.trainer.default_root_dir
        if self.config.subcommand == "fit" and config.ckpt_path is None and folder is not None:
            require_new(Path(folder))
        self.ckpt_path = find_checkpoint(config.ckpt_path, folder)

    def before_instantiate_classes(self) -> None:
        self.parsed = explaining.flat(self.config[self.subcommand])
        trainer = self.config[self.subcommand].trainer
        on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
        if self.subcommand == "plan":
            on_cpu = on_cpu and self.config.plan.hardware is None
            plan_without_devices(self.config.plan, trainer)
        else:
            chosen = getattr(trainer.strategy, "init_args", None) or Namespace()
            join(on_cpu, chosen.get("process_group_backend"), chosen.get("timeout"))
            if trainer.devices not in (1, "auto"):
                require_free_port()
        if not on_cpu and torch.cuda.is_available() and not dist.is_nccl_available() and trainer.devices != 1:
            raise ValueError("this build of torch has no NCCL, by which GPUs talk; install one for CUDA on Linux")
        if trainer.precision is None:
            bf16_gpu = self.subcommand == "plan" and not on_cpu
            trainer.precision = "bf16-mixed" if bf16_gpu else hardware.best_precision("cpu" if on_cpu else "cuda")
        kept = [one.class_path for one in trainer.callbacks or [] if one.class_path.endswith("ModelCheckpoint")]
        if trainer.enable_checkpointing is False and kept:
            raise ValueError(
                "--trainer.enable_checkpointing false, but a ModelCheckpoint is among the callbacks; leave the flag "
                "out, or the callbacks, too: --trainer.callbacks '[]'"
            )
        name = name_of(trainer.strategy)
        if str(trainer.precision) in ("16", "16-mixed") and name.endswith(("tp", "TensorParallel")):
            raise ValueError(f"--trainer.precision 16-mixed does not go with {name}; pass bf16-mixed")
        if (rows := self.config[self.subcommand].get("global_batch_size")) is not None:
            data = self.config[self.subcommand].data
            of_rank = getattr(data, "init_args", data).batch_size
            trainer.accumulate_grad_batches = accumulated(rows, of_rank, groups_of_ranks(trainer))
        if isinstance(trainer.val_check_interval, int) and trainer.check_val_every_n_epoch == 1:
            # Steps counted on through epochs: text of fewer batches than the interval is trained on, too.
            trainer.check_val_every_n_epoch = None
        if issubclass(self.default_model, Taught):
            model, data = self.config[self.subcommand].model, self.config[self.subcommand].data
            if model.init_args.teacher is None:  # by name, so that the saved config is this run again
                model.init_args.teacher = _class_of(model).default_teacher()
            if "objective" in data.init_args:
                data.init_args.objective = _objective(model)
        if self.subcommand == "fit":
            trainer.default_root_dir = str(run_folder(self.recipe, trainer.default_root_dir))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            # A class refused its arguments: a config's validation, an optimizer's range.
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            raise ValueError(str(cause)) from error
        if self.datamodule.objective != self.model.objective:
            raise ValueError(
                f"--model {type(self.model).__name__} trains on {self.model.objective}, and --data "
                f"{type(self.datamodule).__name__} has {self.datamodule.objective}"
            )
        # Not in `config`: the saved one says "last" again.
        if "ckpt_path" in self.config_init[self.subcommand]:
            self.config_init[self.subcommand].ckpt_path = self.ckpt_path

    def instantiate_trainer(self, **settings) -> Trainer:
        trainer = self.config[self.subcommand].trainer
        if trainer.logger is None and self.subcommand == "fit":
            settings["logger"] = tracking.loggers(Path(trainer.default_root_dir), self.recipe)
        elif self.subcommand != "fit":
            settings["logger"] = False
        plugins = [*(trainer.plugins or [])]
        kind = kind_of(trainer.strategy)
        if kind != "other":  # which write in their own way
            plugins.append(CheckpointFiles())
        if trainer.precision == "bf16-true" and kind != "other":
            settings["precision"] = None
            plugins.append(BF16Weights() if kind == "whole" else BF16Shards())
        settings["plugins"] = plugins
        for callback in self._get(self.config_init, "trainer")["callbacks"] or []:
            # Without this the checkpoints would land in the folder of a logger.
            if self.subcommand == "fit" and isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        own = [Predictions()] if self.subcommand == "predict" else []
        if self.subcommand != "predict" and (
            not issubclass(self.default_model, LanguageModule) or issubclass(self.default_model, Taught)
        ):
            own = [HeldOutPredictions()]
        settings["callbacks"] = [*(self._get(self.config_init, "trainer")["callbacks"] or []), *own]
        if self.subcommand == "fit":
            settings["callbacks"].append(Agreement(flags_of(self.config[self.subcommand])))
        trainer = super().instantiate_trainer(**settings)
        trainer.callbacks.sort(key=place_of)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, object]:
        settings = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "explain":
            return settings
        final = explaining.flat(self.config[subcommand])
        defaults = explaining.flat(self._parser(subcommand).get_defaults())
        return settings | {"settings": explaining.origins(self.parsed, final, self.words, defaults)}

    def after_fit(self) -> None:
        if self.trainer.is_global_zero:
            leave_page(Path(self.trainer.default_root_dir))
        tracking.finish(self.trainer.loggers)

    def after_instantiate_classes(self) -> None:
        if self.subcommand != "fit" and not self.config[self.subcommand].get("ckpt_path", "none needed"):
            origin = getattr(self.model, "origin", None)
            of = "freshly initialised weights" if origin is None else f"{origin} as it is"
            what = "predictions" if self.subcommand == "predict" else "numbers"
            print(f"no --ckpt_path given: these are the {what} of {of}", file=sys.stderr)


def place_of(callback: Callback) -> int:
    """Speed after all that may end the run; then checkpoints; Comparison and FakeQuantization add to what Report has
    written, and Recovery may leave."""
    last = (FakeQuantization, ModelArtifact, Push, Comparison, Recovery)
    if isinstance(callback, Speed):
        return 1
    return 3 + last.index(type(callback)) if type(callback) in last else 2 * isinstance(callback, Checkpoint)


def leave_page(folder: Path) -> None:
    """A run that has come to its end does not fail by what is only shown of it."""
    from lightning_modules.pages.run_page import write_run_page

    try:
        write_run_page(folder)
    except Exception as error:  # the model is there, whatever stands in the files around it
        print(f"warning: no report.html: {type(error).__name__}: {error}", file=sys.stderr)


def plan_without_devices(flags: Namespace, trainer: Namespace) -> None:
    """Makes the flags of a run those of one that only looks like it: on the CPU, with as many ranks."""
    per_node = trainer.devices if isinstance(trainer.devices, int) else 1
    devices = per_node * trainer.num_nodes if flags.devices is None else flags.devices
    if devices < 1:
        raise ValueError(f"--devices is {devices}; pass 1 or more")
    per_node = next(count for count in range(min(8, devices), 0, -1) if devices % count == 0)
    trainer.accelerator, trainer.devices, trainer.num_nodes = "cpu", per_node, devices // per_node
    if kind_of(trainer.strategy) == "other":
        name = name_of(trainer.strategy)
        if name not in ("fsdp", "FSDPStrategy"):
            raise ValueError(f"--trainer.strategy {name} cannot be planned; take ddp, fsdp2, tp or fsdp2_tp")
        trainer.strategy = "fsdp2"  # which keeps the same parts
    if devices == 1:
        trainer.strategy = "auto"


def kind_of(strategy: object) -> Literal["whole", "sharded", "other"]:
    """What a rank has of the network, for what --trainer.strategy says: a name, or a class with its arguments."""
    name = name_of(strategy)
    if name in {*NAMES, *(found.__name__ for found in NAMES.values())}:
        return "sharded"
    return "whole" if name == "auto" or name.lower().startswith("ddp") else "other"


def groups_of_ranks(trainer: Namespace) -> int:
    """How many ranks see different rows."""
    devices = trainer.devices
    if isinstance(devices, list):
        devices = len(devices)
    elif devices in ("auto", -1, "-1"):
        on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
        devices = 1 if on_cpu else torch.cuda.device_count()
    ranks = int(devices) * trainer.num_nodes
    name = name_of(trainer.strategy)
    if name in ("tp", "TensorParallel"):
        return 1
    if name in ("fsdp2_tp", "FSDP2TensorParallel"):
        settings = getattr(trainer.strategy, "init_args", Namespace())
        return ranks // (settings.get("tensor_parallel_size") or (int(devices) if trainer.num_nodes > 1 else 2))
    return ranks


def accumulated(rows: int, of_rank: int, ranks: int) -> int:
    """Micro-batches of a step."""
    if rows % (of_rank * ranks):
        raise ValueError(
            f"--global_batch_size {rows} is no multiple of {of_rank} rows on each of {ranks} ranks; pass one of "
            f"{of_rank * ranks}, or another --data.batch_size"
        )
    return rows // (of_rank * ranks)


NOT_ALIKE = re.compile(r"(config|ckpt_path|trainer\.default_root_dir|data\.(init_args\.)?(path|val_path|cache_dir))\b")
"""Flags in which ranks may differ: machines may have other paths, and of text what is read is compared."""


def flags_of(config: Namespace) -> dict[str, object]:
    """Every flag by its name, as text; classes that are given already by their own."""
    plain = {name: value for name, value in vars(config.as_flat()).items() if not NOT_ALIKE.match(name)}
    return {
        name: re.sub(r" at 0x\w+", "", str(value)) if isinstance(value, FLAT) else type(value).__name__
        for name, value in plain.items()
    }


def name_of(strategy: object) -> str:
    return str(getattr(strategy, "class_path", strategy)).rpartition(".")[2]


def _objective(model: object) -> str:
    """What the datamodule's labels are follows from the module's class."""
    return _class_of(model).objective


def _class_of(model: object) -> type[LightningModule]:
    module, _, name = model.class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def require_verb(words: list[str], verbs: list[str]) -> None:
    if not words or words[0].startswith("-") or words[0] in verbs:
        return
    near = difflib.get_close_matches(words[0], verbs, n=1)
    fail(f"there is no {words[0]}; " + (f"did you mean {near[0]}?" if near else f"there are {', '.join(verbs)}"))


def also(verbs: list[str]) -> str:
    """For --help, of what is no part of LightningCLI."""
    about = {
        "verify": "measures on these flags that gradients, resuming and the exported model are what they should be.",
        "replay": "--run DIR --step N does a step of a past run again, and shows what is in it.",
    }
    return "Besides:\n" + "\n".join(f"  {verb:<10} {about[verb]}" for verb in verbs)


def main(
    model: type[LightningModule],
    default_model: type[LightningModule],
    data: type[LightningDataModule],
    script: Path,
    description: str,
    default_config: Path | None = None,
    args: list[str] | None = None,
    trainer: type[Trainer] = RecipeTrainer,
) -> None:
    """Runs the recipe of a script: any subclass of `model`, `default_model` unless named, on `data`, of which a
    subclass is named where it is abstract.

    `default_config` is the run that happens when the command line names no --config: the YAML beside the script, if
    no other is given. `description` opens the --help. `trainer` may have more `verbs` than Lightning's.
    """
    gc.set_threshold(700, 10, 10)
    words = list(sys.argv[1:] if args is None else args)
    more = ["verify"] + ["replay"] * issubclass(default_model, LanguageModule)
    require_verb(words, [*LightningCLI.subcommands(), *getattr(trainer, "verbs", {}), *more])
    if words[:1] == ["verify"] and "--help" not in words:
        from lightning_modules.verify import verify

        quiet = ["--samples.max_new_tokens=0"] if issubclass(default_model, LanguageModule) else []
        quiet.append("--push.to=null")
        quiet += ["--comparison.control=false"] if issubclass(default_model, Taught) else []
        verify(script, words[1:], quiet)
    if words[:1] == ["replay"] and issubclass(default_model, LanguageModule):
        from lightning_modules.replay import replay

        with one_line_errors():
            replay(script, words[1:])
    set_parsing_settings(subclasses_enabled=[Schedule, PreTrainedConfig, PartOfTeacher])
    warnings.filterwarnings("ignore", module="lightning|torch")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # what its callers should change
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with unbreakable_output(), one_line_errors(), no_empty_run_folder():
        RecipeCLI(
            script.stem,
            default_config or script.with_suffix(".yaml"),
            default_model,
            model_class=model,
            subclass_mode_model=True,
            datamodule_class=data,
            subclass_mode_data=inspect.isabstract(data),
            args=args,
            trainer_class=trainer,
            parser_kwargs={"description": description, "formatter_class": Formatter, "epilog": also(more)},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            trainer_defaults={
                # The order of the rows is the datamodule's; Lightning's sampler would shuffle it once more.
                "use_distributed_sampler": False,
                "enable_model_summary": False,
                "callbacks": [Speed(), Plan(), Horizon(), Progress(), Report()],
            },
        )
