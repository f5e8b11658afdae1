"""What a teacher was good for: the table that a distillation ends with."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.architectures import parameter_count
from lightning_modules.callbacks.report import best_by
from lightning_modules.command_line import take_flag
from lightning_modules.pages.text_table import aligned
from lightning_modules.run_folder import RUN_FOLDER
from lightning_modules.taught import Taught
from lightning_modules.teacher import Teacher

OF_THIS_RUN = (
    RUN_FOLDER,
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("WANDB_RUN_ID", "WANDB_RESUME"),
)
"""Of the environment, what another run must not be told."""
TITLES = {"kl_to_teacher": "KL to teacher", "milliseconds": "ms a row"}
FORMATS = {"parameters": ",", "milliseconds": ".1f"}
TIMES = 20
"""Forward passes of which the latency is the median."""


class Comparison(Callback):
    """Trains the student once more without a teacher, on the same tokens, and sets both beside the teacher.

    Args:
        control: Whether it is trained; the run lies in the folder control/ of this one.
    """

    def __init__(self, control: bool = True):
        self.control = control

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not module.learns_from_teachers:
            return
        folder = Path(trainer.default_root_dir)
        module.load_teachers()
        networks = {teacher.folder: teacher.network for teacher in module.teachers} | {
            "student": module.plain_network.eval()
        }
        milliseconds = latencies(trainer, module, networks)
        if self.control and trainer.world_size == 1 and train_control(trainer, module, folder / "control"):
            control = Teacher(str(folder / "control"), module.auto_class).read()
            networks["without teacher"] = control.to(module.device, module.network.dtype).eval()
            milliseconds["without teacher"] = milliseconds["student"]
            tokens = json.loads((folder / "control" / "summary.json").read_text())["tokens"]
            if tokens != int(module.tokens):  # EarlyStopping acts in each by itself
                print(f"note: it stopped at {tokens:,} tokens, the student at {int(module.tokens):,}", file=sys.stderr)
        found = {
            name: module.judged(network) | {"parameters": parameter_count(network), "milliseconds": milliseconds[name]}
            for name, network in networks.items()
        }
        if not trainer.is_global_zero:
            return
        print(aligned(cells(found, f"nats per {module.counted}")))
        more = {"comparison": found}
        if "without teacher" in found:
            by, sign = best_by(trainer)
            by, sign = (by, sign) if by in found["student"] else ("loss", 1)
            figures = [
                found[name]["nats" if by == "loss" else by] for name in ("without teacher", "student", module.start)
            ]
            more |= {"gap_recovered": gap_recovered(*(sign * figure for figure in figures)), "gap_by": by}
            print(f"{gap_in_words(more)}\n", flush=True)
        elif self.control and trainer.world_size > 1:
            print("without a teacher, on one rank: the same command with --model.hard_weight 1\n", flush=True)
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | more, indent=2) + "\n")


def train_control(trainer: Trainer, module: Taught, folder: Path) -> bool:
    """The same run with the text's own loss alone, in a process of its own; one that was interrupted goes on. Returns
    whether it came to its end."""
    flags = {
        "config": Path(trainer.default_root_dir) / "config.yaml",
        "model.teacher": json.dumps([teacher.folder for teacher in module.teachers]),
        "model.hard_weight": 1,
        "trainer.max_steps": trainer.global_step,
        "trainer.max_epochs": -1,
        "trainer.max_time": "null",
        "trainer.default_root_dir": folder,
        "samples.max_new_tokens": 0,
        "push.to": "null",
        "ckpt_path": "last",
    }
    folder.mkdir(exist_ok=True)
    print(f"training the student without a teacher on the same {int(module.tokens):,} tokens", file=sys.stderr)
    words = [f"--{name}={value}" for name, value in flags.items()]
    words += [f"--allow_import={name}" for name in take_flag("--allow_import", sys.argv[1:])[1]]
    with (folder / "log").open("a") as log:
        command = [sys.executable, sys.argv[0], "fit", *words]
        process = subprocess.Popen(command, env=other_run(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = process.wait()
        finally:
            process.terminate()  # where this process is told to end
    if code:
        last = (folder / "log").read_text().strip().splitlines()[-1:]
        print(f"warning: it ended with {code}: {' '.join(last)} ({folder / 'log'})", file=sys.stderr)
    return code == 0


def other_run() -> dict[str, str]:
    """The environment of another run, which this one starts."""
    return {name: value for name, value in os.environ.items() if name not in OF_THIS_RUN}


@torch.inference_mode()
def latencies(trainer: Trainer, module: Taught, networks: dict[str, PreTrainedModel]) -> dict[str, float]:
    """Median milliseconds of a forward pass of one row, the models in turns."""
    batch = trainer.strategy.batch_to_device(next(iter(trainer.datamodule.val_dataloader())))
    row = {name: value[:1] for name, value in batch.items()}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(TIMES + 2):
        for name, network in networks.items():
            seconds[name].append(timed(lambda network=network: module.read(row, network), module.device))
    return {name: 1000 * statistics.median(times[2:]) for name, times in seconds.items()}


def timed(forward: Callable[[], Tensor], device: torch.device) -> float:
    start = time.perf_counter()
    forward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gap_recovered(control: float, student: float, teacher: float) -> float | None:
    """Percent of the way from the control to the teacher, where less is better; None where the teacher is no better
    than the control."""
    return 100 * (control - student) / (control - teacher) if control > teacher else None


def gap_in_words(summary: dict) -> str:
    """Of what a distillation adds to summary.json; "" where it had no control."""
    if "gap_recovered" not in summary:
        return ""
    recovered, by = summary["gap_recovered"], summary["gap_by"]
    none = "none: the teacher is no better than the student without one"
    return f"gap recovered: {none if recovered is None else f'{recovered:.1f} % of {by}'}"


def cells(found: dict[str, dict[str, float]], loss: str = "nats") -> list[list[str]]:
    """A header, and a row for each network with all its figures."""
    titles = [({"nats": loss} | TITLES).get(name, name.replace("_", " ")) for name in next(iter(found.values()))]
    rows = [
        [name, *(f"{value:{FORMATS.get(key, '.4f')}}" for key, value in row.items())] for name, row in found.items()
    ]
    return [["", *titles], *rows]
