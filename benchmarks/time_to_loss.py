"""The figure that matters: how soon tinyshakespeare by characters is learned as well as by nanoGPT's CPU setting.

Run:
    python benchmarks/run.py --only time_to_loss --data.path input.txt

The baseline (`nanogpt_cpu.py`) and `recipes/pretrain_shakespeare_char.yaml` are processes of their own; whole wall time
counts their start-up, compilation, evaluation and what they write.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from page import ROOT, Goal, Table

BASELINE = "benchmarks/nanogpt_cpu.py"
CONFIG = "recipes/pretrain_shakespeare_char.yaml"
COMMAND = "python benchmarks/run.py --only time_to_loss --data.path input.txt"


@dataclass(frozen=True)
class Run:
    name: str
    seed: int
    val_loss: float
    """Nats per character, over the last tenth of the text."""
    training_seconds: float
    wall_seconds: float
    parameters: int


def find_text(path: str | None) -> Path | None:
    """The text that was named, or the one beside the project, or None."""
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path}; pass tinyshakespeare's input.txt as --data.path")
        return Path(path)
    beside = ROOT / "../shared/data/lm_tinyshakespeare/input.txt"
    return beside if beside.is_file() else None


def timed(arguments: list[str]) -> tuple[str, float]:
    """What a process of this Python prints, and its wall time in seconds."""
    environment = {name: value for name, value in os.environ.items() if name != "LIGHTNING_LM_RUN_FOLDER"}
    environment |= {"GOMP_SPINCOUNT": "10000", "WANDB_MODE": "disabled"}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, time.perf_counter() - start


def baseline(text: Path, seed: int, flags: tuple[str, ...] = ()) -> Run:
    output, wall = timed([BASELINE, str(text), str(seed), *flags])
    found = json.loads(output)
    return Run("nanoGPT's CPU setting", seed, found["val_loss"], found["seconds"], wall, found["parameters"])


def recipe(text: Path, seed: int, flags: tuple[str, ...] = (), config: str = CONFIG) -> Run:
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["recipes/pretrain.py", "fit", "--config", config, "--data.path", str(text)]
        arguments += ["--seed_everything", str(seed), "--data.seed", str(seed)]
        _, wall = timed([*arguments, "--trainer.default_root_dir", folder, *flags])
        found = json.loads((Path(folder) / "summary.json").read_text())
    training = found["tokens"] / found["tokens_per_second"]
    return Run(Path(config).stem, seed, found["val_loss"], training, wall, found["parameters"])


def tables(text: Path, seeds: int) -> list[Table]:
    text = text.resolve()
    base = baseline(text, seed=0)
    mine = [recipe(text, seed) for seed in range(seeds)]
    training = base.training_seconds / statistics.median(run.training_seconds for run in mine)
    wall = base.wall_seconds / statistics.median(run.wall_seconds for run in mine)
    worst = max(run.val_loss for run in mine)
    parameters = mine[0].parameters / base.parameters
    rows = [
        [run.name, f"{run.seed}", f"{run.val_loss:.4f}", f"{run.training_seconds:.1f}", f"{run.wall_seconds:.1f}"]
        + [f"{run.parameters:,}"]
        for run in (base, *mine)
    ]
    goals = [
        Goal("time to loss: highest loss of the seeds, minus the baseline's", worst - base.val_loss, at_most=0),
        Goal("time to loss: training, times faster", training, at_least=12),
        Goal("time to loss: whole wall time, times faster", wall, at_least=5),
        Goal("time to loss: parameters of the baseline's, at most", parameters, at_most=1.01),
        Goal("time to loss: parameters of the baseline's, at least", parameters, at_least=0.99),
    ]
    notes = (
        f"`--config {CONFIG} --data.path input.txt --seed_everything SEED --data.seed SEED`, and `{BASELINE}`, both on "
        f"{_threads()} threads. The loss is in nats per character over the last tenth of the text, which neither "
        f"trained on. Medians over the seeds: training {training:.1f} times as fast, all in all {wall:.1f} times."
    )
    columns = ["", "seed", "held-out loss", "training s", "whole wall s", "parameters"]
    return [Table("Time to loss, tinyshakespeare by characters", COMMAND, columns, rows, notes, goals)]


def _threads() -> str:
    return os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count())
