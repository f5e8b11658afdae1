"""What the model writes, at each validation."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger

from lightning_modules import tracking
from lightning_modules.checkpoint_io import replace_text
from lightning_modules.language_module import LanguageModule
from lightning_modules.redaction import redacted_prose

FILE = "samples.jsonl"
COLUMNS = ("step", "prompt", "text")
SHOWN = 100
"""Of the newest, in W&B: each validation sends them once more."""


class Samples(Callback):
    """Prints what the model makes of fixed prompts after each validation of a fit, and logs it to W&B.

    Args:
        prompts: Texts to go on from. Left out: the beginnings of two held-out documents.
        max_new_tokens: Length of a sample; 0 writes none.
        temperature: Of sampling; 0 always takes the likeliest token.
    """

    def __init__(self, prompts: list[str] | None = None, max_new_tokens: int = 48, temperature: float = 0.8):
        self.prompts = prompts
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if (
            trainer.sanity_checking
            or trainer.state.fn != "fit"
            or not self.max_new_tokens
            or not (trainer.is_global_zero or module.is_sharded)
            or not isinstance(module, LanguageModule)
        ):
            return
        tokenizer = trainer.datamodule.tokenizer
        if self.prompts is None:
            documents = trainer.datamodule.val_documents(limit_bytes=100_000)
            self.prompts = [document[:40].decode(errors="ignore") for document in documents[:2]]
        module.network.eval()
        try:
            # Sampling must leave no trace in the training's random numbers.
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(0)
                texts = [module.sample(tokenizer, p, self.max_new_tokens, self.temperature) for p in self.prompts]
        except Exception as error:  # whatever an architecture does not do; its training goes on
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            print(f"warning: no samples ({reason}); --samples.max_new_tokens 0 leaves them out", file=sys.stderr)
            return
        finally:
            module.network.train()
        if not trainer.is_global_zero:
            return
        loss = trainer.callback_metrics["val/loss"]
        bits = trainer.callback_metrics["val/bits_per_byte"]
        print(f"step {trainer.global_step}: val loss {loss:.4f} nats per token, {bits:.4f} bits per byte")
        for text in texts:
            print("  │ " + text.rstrip().replace("\n", "\n  │ "))
        hidden = [map(redacted_prose, pair) for pair in zip(self.prompts, texts, strict=True)]
        rows = so_far = [[trainer.global_step, *pair] for pair in hidden]
        file = Path(trainer.default_root_dir) / FILE
        with tracking.written(file):
            so_far = keep(file, rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_text("samples", columns=list(COLUMNS), data=so_far[-SHOWN:])


def keep(file: Path, rows: list[list[object]]) -> list[list[object]]:
    """Adds lines to a file, whole or not at all, without those of steps that are done again; returns all in it."""
    before = [[found[name] for name in COLUMNS] for found in whole_lines(file) if found["step"] < rows[0][0]]
    found = [dict(zip(COLUMNS, row, strict=True)) for row in [*before, *rows]]
    replace_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
    return [*before, *rows]


def whole_lines(file: Path) -> list[dict]:
    """Objects of a file of JSON lines, without one that was cut off; [] where there is no file."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [one for one in found if isinstance(one, dict)]
