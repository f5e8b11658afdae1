"""Runs that are ended by force and started again: for test_recovery.py and torture.py.

A run is a process of its own. Those on one rank are forked from one that has imported everything, which makes a start
200 times cheaper; those that have ranks to start are commands as a user types them.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from lightning.pytorch import Callback

from lightning_modules import checkpoint_io
from lightning_modules.callbacks.recovery import steps_done

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "pretrain.py"
TOY = {
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.max_steps": 60,
    "trainer.max_time": "null",
    "trainer.val_check_interval": 15,
    "trainer.limit_val_batches": 2,
    "trainer.log_every_n_steps": 5,
    "model.architecture": "transformers.GPT2Config",  # has dropout, on by default
    "model.architecture.n_embd": 16,
    "model.architecture.n_layer": 1,
    "model.architecture.n_head": 2,
    "data.tokenizer": "bytes",
    "data.seq_len": 32,
    "data.batch_size": 4,
    "recovery.every_n_steps": 7,
    "samples.max_new_tokens": 0,
    "ckpt_path": "last",
}
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def arguments(folder: Path, corpus: Path, flags: dict[str, object], verb: str = "fit") -> list[str]:
    """Of a toy run; a flag of None is left out."""
    chosen = TOY | {"data.path": corpus, "trainer.default_root_dir": folder} | flags
    return [verb, "--allow_import=tests", *(f"--{name}={value}" for name, value in chosen.items() if value is not None)]


class LimitsFiles(Callback):
    """Lets files grow to `size` bytes from one step to another, as a disk that is full for a while."""

    def __init__(self, first: int, last: int, size: int):
        self.first, self.last, self.size = first, last, size

    def on_train_batch_start(self, trainer, module, batch, batch_idx: int) -> None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        is_full = self.first <= trainer.global_step < self.last
        if trainer.global_step == self.last:
            print("kept", sorted(path.name for path in Path(trainer.default_root_dir).glob("checkpoints/*.ckpt")))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size if is_full else most, most))


def signal_at(step: int, number: int = signal.SIGTERM, **settings: object) -> list[str]:
    """The flags that put `SignalAt` into a run."""
    settings |= {"step": step, "number": int(number)}
    added = {"class_path": "tests.faults.SignalAt", "init_args": settings}
    return [f"--trainer.callbacks+={json.dumps(added)}"]


def forked(argv: list[str], log: Path) -> multiprocessing.Process:
    """A run on one rank, started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults_preloaded"])
    process = context.Process(target=_recipe, args=(argv, str(log), dict(os.environ)))
    process.start()
    return process


def _recipe(argv: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment | ENVIRONMENT)
    os.environ.pop("LIGHTNING_LM_RUN_FOLDER", None)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    torch.set_num_threads(1)
    sys.argv = [str(SCRIPT), *argv]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def command(
    argv: list[str],
    log: Path,
    launcher: list[str] | None = None,
    cwd: Path = ROOT,
    script: Path = SCRIPT,
    **environment: str,
) -> subprocess.Popen:
    """The same as a command, with its ranks in a process group of its own."""
    variables = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LM_RUN_FOLDER"}
    with log.open("a") as file:
        return subprocess.Popen(
            [*(launcher or [sys.executable]), str(script), *argv],
            env=variables | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=file,
            stderr=file,
            cwd=cwd,
            start_new_session=True,
        )


def killed_until_done(argv: list[str], folder: Path, rng: random.Random, kills: int, longest: float) -> tuple[int, int]:
    """Starts the same command again and again, kills it when it is 2 to 6 steps further than ever, `kills` times, then
    lets it end. Every other time after up to `longest` seconds, if that comes first.
    Returns how many of the kills met a living process, and how often it went on from a checkpoint."""
    met, log, furthest = 0, folder / "log", 0
    for i in range(kills):
        process = forked(argv, log)
        goal = furthest + rng.randint(2, 6)
        deadline = time.monotonic() + (math.inf if i % 2 else rng.uniform(0, longest))
        while process.is_alive() and steps_done(folder / "checkpoints") < goal and time.monotonic() < deadline:
            time.sleep(0.001)
        met += process.is_alive()
        furthest = max(furthest, steps_done(folder / "checkpoints"))
        process.kill()
        process.join()
    process = forked(argv, log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return met, log.read_text().count("going on from step")


class SpoilsLoss(Callback):
    """Multiplies the loss of some steps.

    Args:
        steps: Counted from 1.
        factor: nan, for a loss that is not finite.
        rank: Whose loss; None: all ranks'.
    """

    def __init__(self, steps: list[int], factor: float = float("nan"), rank: int | None = None):
        self.steps, self.factor, self.rank = steps, factor, rank

    def on_train_start(self, trainer, module) -> None:
        honest = module.loss

        def spoiled(batch, divisor=1.0):
            objective, nats, count = honest(batch, divisor)
            here = trainer.training and trainer.global_step + 1 in self.steps
            factor = self.factor if here and self.rank in (None, trainer.global_rank) else 1.0
            return objective * factor, nats * factor, count

        module.loss = spoiled


class SameOnAllRanks(Callback):
    """Ends with an error where the ranks have other weights or another rate at the end."""

    def on_train_end(self, trainer, module) -> None:
        mine = torch.cat([p.detach().double().flatten() for p in module.network.parameters()])
        rate = mine.new_tensor([trainer.optimizers[0].param_groups[0]["lr"]])
        of_ranks = module.all_gather(torch.cat([mine, rate]))
        assert torch.equal(of_ranks[0], of_ranks[1]), float((of_ranks[0] - of_ranks[1]).abs().max())
        (Path(trainer.default_root_dir) / "same").touch()


class KeepsRows(Callback):
    """Writes, for each step, the rows it was made of; a step that is done again writes anew.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        self.rows: list[int] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.rows += batch["rows"].tolist()
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self.folder.mkdir(exist_ok=True)
            (self.folder / f"{trainer.global_step}.json").write_text(json.dumps(self.rows))
            self.rows = []


def state(folder: Path) -> str:
    """The digest of the last checkpoint of a run."""
    path = checkpoint_io.newest(folder / "checkpoints")
    assert path is not None, f"no checkpoint in {folder}"
    return checkpoint_io.digest(torch.load(path, weights_only=True))


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def wait_for_step(folder: Path, step: int, timeout: float = 60.0) -> None:
    """Until a run in another process has done so many steps."""
    deadline = time.monotonic() + timeout
    while steps_done(folder / "checkpoints") < step:
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        time.sleep(0.005)


def members(group: int) -> list[int]:
    """The processes of a group that are alive."""
    alive = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else ["Z"]
        except OSError:
            continue
        if fields[0] != "Z" and int(fields[2]) == group:
            alive.append(int(entry.name))
    return alive


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A disk of its own, such as "900k", where this process may mount one."""
    folder.mkdir(exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True, capture_output=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class SignalAt(Callback):
    """Sends a signal to its own process, once: in a training step, or in the validation that follows it.

    Args:
        step: The optimizer step in which it happens, counted from 1.
        number: Of the signal.
        where: train, before the step's first micro-batch; validation, in its second batch.
        rank: Which sends it to itself; None: all.
        marker: A file that is written then, and whose presence keeps it from happening again.
        times: How often.
    """

    def __init__(
        self,
        step: int,
        number: int = signal.SIGTERM,
        where: str = "train",
        rank: int | None = None,
        marker: str | None = None,
        times: int = 1,
    ):
        self.step, self.number, self.where, self.rank, self.marker = step, number, where, rank, marker
        self.times = times

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if self.where == "train" and trainer.global_step == self.step - 1:
            self._send(trainer)

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        if self.where == "validation" and trainer.global_step == self.step and batch_idx == 1:
            self._send(trainer)

    def _send(self, trainer) -> None:
        self.step = -1
        if self.rank in (None, trainer.global_rank) and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).touch()
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
