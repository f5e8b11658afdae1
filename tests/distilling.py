"""What the tests of distillation share: small text, small students, and runs of the recipe."""

import json
from functools import partial
from pathlib import Path

from lightning.pytorch import Trainer
from transformers import LlamaConfig

from datamodules.text import Text
from lightning_modules.distillation import CausalDistillation
from tests import finetuning

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "distill.py"
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
run, refused, as_command = (
    partial(function, script=SCRIPT) for function in (finetuning.run, finetuning.refused, finetuning.as_command)
)


def opened(texts: Path, teacher: Path | list[str], module=CausalDistillation, **settings: object):
    """A module with its networks, and a batch."""
    data = Text(path=str(texts), seq_len=32, batch_size=4, val_fraction=0.2, objective=module.objective)
    names = [str(name) for name in teacher] if isinstance(teacher, list) else str(teacher)
    return started(module(teacher=names, **({"student": LlamaConfig(**SMALL)} | settings)), data)


def started(made, data):
    """The module with its networks, and a batch."""
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=10
    )
    trainer.datamodule = data
    data.trainer, trainer.strategy._lightning_module, made.trainer = trainer, made, trainer
    data.prepare_data()
    data.setup("fit")
    made.configure_model()
    return made, next(iter(data.train_dataloader()))


def flags_of(folder: Path, texts: Path, teacher: Path, **flags: object) -> list[str]:
    chosen = {
        "model.student": "transformers.LlamaConfig",
        **{f"model.student.{name}": value for name, value in SMALL.items()},
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 0.01,
        "model.teacher": teacher,
        "data.path": texts,
        "data.val_fraction": 0.2,
        "data.seq_len": 32,
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 12,
        "trainer.val_check_interval": 6,
        "trainer.log_every_n_steps": 1,
        "trainer.default_root_dir": folder,
        "samples.max_new_tokens": 0,
    } | flags
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


def fit(folder: Path, *arguments: object, **flags: object) -> dict:
    run("fit", *flags_of(folder, *arguments, **flags))
    return json.loads((folder / "summary.json").read_text())
