"""`python recipes/pretrain.py replay --step N --run runs/NAME`: a step of a past run once more, looked at closely.

What made the run makes it again: its config.yaml and the newest checkpoint before the step. Nothing is written into its
folder.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_modules import checkpoint_io, sharded_checkpoints
from lightning_modules.command_line import fail
from lightning_modules.losses import IGNORED


class Replay(Callback):
    """Trains up to a step, tells what is in it, and ends the run.

    Args:
        step: Counted from 1.
        rows: Samples to show.
        tokens: Of each sample.
        progress: A JSON file of steps and their progress, of a run that followed a clock.
    """

    def __init__(self, step: int, rows: int = 3, tokens: int = 48, progress: Path | None = None):
        self.step, self.rows, self.tokens, self.progress = step, rows, tokens, progress
        self.batches: list[dict[str, Tensor]] = []
        self.norms: dict[str, float] = {}

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self.progress is not None:
            module.given_progress = dict(json.loads(self.progress.read_text()))

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch, batch_idx: int) -> None:
        if trainer.global_step != self.step - 1:
            return
        if not self.batches:
            print(f"\nstep {self.step}\n")
            self._show(module, trainer.datamodule.tokenizer, batch)
        self.batches.append(batch)

    def _show(self, module: LightningModule, tokenizer, batch: dict[str, Tensor]) -> None:
        """Each token with the nats that it costs, under the weights before the step."""
        for i in range(min(self.rows, len(batch["rows"]))):
            row = {name: value[i : i + 1] for name, value in batch.items()}
            print(f"row {int(row['rows'][0])}: token (nats)")
            labels = row["labels"][0].tolist()[: self.tokens]
            words = []
            for place, label in enumerate(labels):
                if label == IGNORED:
                    continue
                alone = row["labels"].new_full(row["labels"].shape, IGNORED)
                alone[0, place] = label
                with torch.no_grad():
                    _, nats, _ = module.loss(row | {"labels": alone})
                words.append(f"{tokenizer.decode([label])!r} ({float(nats):.2f})")
            print("  │ " + "  ".join(words))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        clip = module.configure_gradient_clipping

        def clip_and_look(*arguments: object, **settings: object) -> None:
            if trainer.global_step == self.step - 1:
                self.norms = layer_norms(module)
            clip(*arguments, **settings)

        module.configure_gradient_clipping = clip_and_look

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs, batch, batch_idx: int) -> None:
        if trainer.global_step < self.step or trainer.fit_loop.epoch_loop._should_accumulate():
            return
        scale = float(module.step_grad_norm) / max(1e-30, sum(norm**2 for norm in self.norms.values()) ** 0.5)
        print(f"\ngradient norm {float(module.step_grad_norm):.6f}, by layer")
        width = max(map(len, self.norms))
        for name, norm in self.norms.items():
            print(f"  {name:<{width}}  {scale * norm:.6f}")
        print(f"\nloss {float(module.step_loss):.10f}", flush=True)
        os._exit(0)  # nothing of this run is to be kept


def layer_norms(module: LightningModule) -> dict[str, float]:
    """Of the gradients of each layer: the modules' names up to their number."""
    squares: dict[str, float] = {}
    for name, parameter in module.network.named_parameters():
        if parameter.grad is not None:
            parts = name.split(".")
            number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
            layer = ".".join(parts[: number + 1])
            squares[layer] = squares.get(layer, 0.0) + float(parameter.grad.float().square().sum())
    return {layer: square**0.5 for layer, square in squares.items()}


def replay(script: Path, words: list[str]) -> None:
    """Ends the process: 0 where the loss is the one that metrics.csv has of the step, or where it has none. Flags
    that it does not know are for fit."""
    parser = argparse.ArgumentParser(prog=f"{script.name} replay", description=__doc__)
    parser.error = fail
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--step", type=int, required=True, help="counted from 1")
    options, flags = parser.parse_known_args(words)
    if not (options.run / "config.yaml").is_file():
        fail(f"--run {options.run} has no config.yaml; pass the folder of a run")
    start = checkpoint_before(options.run / "checkpoints", options.step)
    begins = f"from {start.name}" if start else "from the beginning, since no checkpoint is from before"
    print(f"replaying step {options.step} of {options.run} {begins}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        config = yaml.safe_load((options.run / "config.yaml").read_text())
        progress = Path(folder) / "progress.json"
        progress.write_text(json.dumps(progress_by_clock(options.run / "checkpoints")))
        settings = {"step": options.step, "progress": str(progress)}
        look = {"class_path": "lightning_modules.replay.Replay", "init_args": settings}
        callbacks = [one for one in config["trainer"]["callbacks"] or [] if not one["class_path"].endswith(".Timer")]
        config["ckpt_path"] = str(start.resolve()) if start else None
        config["trainer"] |= {"default_root_dir": folder, "callbacks": [*callbacks, look]}
        config["trainer"] |= {"limit_val_batches": 0, "max_time": None}
        (Path(folder) / "replay.yaml").write_text(yaml.safe_dump(config))
        environment = os.environ | {"WANDB_MODE": "disabled"}
        command = [sys.executable, str(script), "fit", "--config", str(Path(folder) / "replay.yaml"), *flags]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    _, found, told = done.stdout.partition(f"\nstep {options.step}\n")
    if not found:
        fail(f"the run did not come to step {options.step}")
    print(told.rstrip())
    before = logged_loss(options.run / "metrics.csv", options.step)
    now = float(told.rpartition("loss ")[2])
    if before is None:
        print(f"metrics.csv has no loss of step {options.step}")
        sys.exit(0)
    same = abs(before - now) <= 1e-6 * abs(before)  # metrics.csv has float32
    print(f"metrics.csv: {before:.10f}, {'the same' if same else 'ANOTHER ONE'}")
    sys.exit(0 if same else 1)


def checkpoint_before(folder: Path, step: int) -> Path | None:
    """The whole checkpoint nearest to a step among those from before it."""
    steps = {path: checkpoint_io.step_of(path) for path in folder.glob("*.ckpt")}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
        if steps[path] < step:
            checkpoint_io.verify(path)
            return path
    return None


def progress_by_clock(folder: Path) -> list[tuple[int, float]]:
    """Steps whose rate followed the clock, each with the progress that it had, as far as there are checkpoints."""
    path = checkpoint_io.newest(folder)
    if path is None:
        return []
    if path.is_dir():
        found = sharded_checkpoints.rest_of(path)
    else:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    steps, progress = found.get("progress_by_clock", ((), ()))
    return [(int(step), float(one)) for step, one in zip(steps, progress, strict=True)]


def logged_loss(file: Path, step: int) -> float | None:
    with file.open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if int(row["step"]) == step - 1 and row["train/loss"]]
    return float(rows[-1]["train/loss"]) if rows else None
