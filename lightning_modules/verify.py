"""`python recipes/pretrain.py verify [flags of fit]`: the promises of this collection, measured on the user's own run.

Some checks are made in one process before its first step (`checks.py`); the others compare whole short runs: two ranks
with one, and one that is killed and goes on with one that is not.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules import checkpoint_io
from lightning_modules.callbacks.recovery import STEPS_DONE, steps_done
from lightning_modules.checks import Check, at_most, difference
from lightning_modules.command_line import fail
from lightning_modules.run_folder import RUN_FOLDER

STEPS = 12
SHORT = (
    "--trainer.max_time=null",
    "--trainer.val_check_interval=5",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.limit_val_batches=2",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.fast_dev_run=false",
    "--recovery.every_n_steps=3",
)


class KeepsGradient(Callback):
    """Writes the gradient of the first step, as the optimizer gets it.

    Args:
        file: Where to.
    """

    def __init__(self, file: str):
        self.file = file

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        module.network.eval()  # no dropout: ranks draw other numbers than micro-batches of other sizes
        clip = module.configure_gradient_clipping

        def clip_and_keep(*arguments: object, **settings: object) -> None:
            clip(*arguments, **settings)
            if trainer.global_step == 0 and trainer.is_global_zero:
                gradients = [p.grad.flatten().float().cpu() for p in module.network.parameters() if p.grad is not None]
                torch.save(torch.cat(gradients), self.file)

        module.configure_gradient_clipping = clip_and_keep


class Runs:
    """Short runs of a recipe with the user's flags, each in a process of its own."""

    def __init__(self, script: Path, flags: list[str], folder: Path, quiet: list[str]):
        self.script, self.flags, self.folder, self.quiet = script, flags, folder, quiet

    def start(self, name: str, *flags: str) -> subprocess.Popen:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if key != RUN_FOLDER}
        log = (folder / "log").open("a")
        return subprocess.Popen(
            [sys.executable, str(self.script), "fit", *self.flags, *SHORT, *self.quiet, *flags]
            + [f"--trainer.default_root_dir={folder}"],
            env=environment | {"WANDB_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def finish(self, name: str, *flags: str) -> Path:
        """Runs to the end; ends this process with the run's own error where it fails."""
        if self.start(name, *flags).wait():
            last = (self.folder / name / "log").read_text().strip().splitlines()[-1:]
            fail(f"the run '{name}' of verify failed: {' '.join(last).removeprefix('error: ')}")
        return self.folder / name


def verify(script: Path, flags: list[str], quiet: list[str]) -> None:
    """Prints the table and ends the process: 0 where all checks pass, 1 otherwise. `quiet` are flags for runs that show
    less."""
    report = Path(f"runs/verify-{datetime.now():%Y%m%d-%H%M%S}.json")
    checks: list[Check] = []
    print(f"verify: short runs of {script.name} with these flags; about a minute for a small model", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        for part in measured(Runs(script, flags, Path(folder), quiet)):
            checks += part
            for check in part:
                print(check.line(width=28), flush=True)
    failed = [check.name for check in checks if not check.passed]
    report.parent.mkdir(exist_ok=True)
    report.write_text(json.dumps([vars(check) for check in checks], indent=2) + "\n")
    print(f"{len(checks) - len(failed)} of {len(checks)} passed; {report}")
    sys.exit(1 if failed else 0)


def measured(runs: Runs) -> Iterator[list[Check]]:
    yield in_one_process(runs)
    yield [two_processes(runs)]
    yield [killed(runs)]


def callback(name: str, **settings: object) -> str:
    return f"--trainer.callbacks+={json.dumps({'class_path': name, 'init_args': settings})}"


def in_one_process(runs: Runs) -> list[Check]:
    report = runs.folder / "checks.json"
    exact = "--trainer.precision=32-true"
    runs.finish("checks", exact, callback("lightning_modules.checks.Checks", report=str(report)))
    found = json.loads(report.read_text())
    print("where the loss lies: input→label, · where there is none")
    for line in found["labels"]:
        print(f"  │ {line}")
    return [Check(**check) for check in found["checks"]]


def two_processes(runs: Runs) -> Check:
    """The gradient of the first step on two CPU ranks, and on one with two micro-batches."""
    gradients = {}
    for name, flags in (
        ("one", ("--trainer.devices=1", "--trainer.strategy=auto", "--trainer.accumulate_grad_batches=2")),
        ("two", ("--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.accumulate_grad_batches=1")),
    ):
        file = runs.folder / f"{name}.pt"
        keep = callback("lightning_modules.verify.KeepsGradient", file=str(file))
        cpu = ("--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.max_steps=1")
        runs.finish(name, *cpu, *flags, keep)
        gradients[name] = torch.load(file, weights_only=True)
    figure = difference(gradients["one"], gradients["two"])
    return at_most("gradient on two processes", "against two micro-batches of one", figure, 1e-5)


def killed(runs: Runs) -> Check:
    """Weights, optimizer, schedule and place in the text of a run that was killed and went on, bit by bit."""
    flags = (f"--trainer.max_steps={STEPS}", "--ckpt_path=last")
    whole = runs.finish("whole", *flags)
    process = runs.start("killed", *flags)
    folder = runs.folder / "killed" / "checkpoints"
    while process.poll() is None and (not (folder / STEPS_DONE).exists() or steps_done(folder) < STEPS // 2):
        time.sleep(0.01)
    was_alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    at = steps_done(folder)
    went_on = runs.finish("killed", *flags)
    digests = [checkpoint_io.digest(last_checkpoint(folder)) for folder in (whole, went_on)]
    equal = digests[0] == digests[1]
    what = "bit by bit equal to" if equal else "differs from"
    measured = f"killed at step {at} of {STEPS}, went on; {what} the whole run (SHA-256 {digests[1][:12]})"
    return Check("kill and resume", measured, equal and was_alive)


def last_checkpoint(folder: Path) -> dict:
    path = checkpoint_io.newest(folder / "checkpoints")
    assert path is not None, f"no checkpoint in {folder}"
    return torch.load(path, weights_only=True)
