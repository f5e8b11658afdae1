"""Training speed: a raw loop, our recipe and transformers' Trainer on the same architecture, clipping, data and batch.

Run:
    python benchmarks/run.py --only training
    python benchmarks/run.py --only training --quick
    python benchmarks/run.py --only training --compile all       with compiled rows at 124M, too
"""

import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matrix_row import SIZE as MATRIX
from page import Goal, Table
from sizes import GPT2, MIDDLE, Job, Size
from tokens import prepare
from transformers import AutoModelForCausalLM
from turns import Row, Turn, interleave, quartiles

from lightning_modules import hardware
from lightning_modules.architectures import flops_per_token

RAW, RECIPE, DEFAULTS, BEST = "raw PyTorch loop", "our recipe", "Trainer, defaults", "Trainer, best settings"
SCRIPTS = {RAW: "raw_row.py", RECIPE: "recipe_row.py", DEFAULTS: "trainer_row.py", BEST: "trainer_row.py"}
COMPILED = ", compiled"
MATRIX_ROW = "matrix product"


@dataclass(frozen=True)
class Speeds:
    """One size on one number of threads."""

    size: Size
    vocab_size: int
    threads: int
    turns: dict[str, list[Turn]]
    matrix_flops: float
    model_flops_per_token: int
    skipped: str = ""

    def rates(self, name: str) -> list[float]:
        """Tokens per second of each turn."""
        tokens = self.size.batch_size * self.size.seq_len
        return [tokens * len(turn.seconds) / sum(turn.seconds) for turn in self.turns[name]]

    def rate(self, name: str) -> float:
        return statistics.median(self.rates(name))

    def peak_bytes(self, name: str) -> int:
        return max(turn.peak_bytes for turn in self.turns[name])

    def mfu(self, name: str) -> float:
        return self.rate(name) * self.model_flops_per_token / self.matrix_flops

    @property
    def fastest_trainer(self) -> str:
        return max((name for name in self.turns if name.startswith("Trainer")), key=self.rate)

    @property
    def leanest_best_trainer_bytes(self) -> int:
        return min(self.peak_bytes(name) for name in self.turns if name.startswith(BEST))


def measure(size: Size, threads: int, rounds: int, turn_seconds: float, compiled: bool, device: str = "cpu") -> Speeds:
    """Runs the rows of a size in turns."""
    bf16 = hardware.best_precision(device).startswith("bf16")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as rows:
        job = prepare(size, Path(folder), bf16, device)
        jobs = {name: replace(job, best_settings=name == BEST) for name in SCRIPTS}
        if compiled:
            jobs |= {name + COMPILED: replace(job, compile=True) for name, job in jobs.items()}
        started = {
            name: rows.enter_context(Row(SCRIPTS[name.removesuffix(COMPILED)], job, threads))
            for name, job in jobs.items()
        }
        if device == "cpu":
            started[MATRIX_ROW] = rows.enter_context(Row("matrix_row.py", job, threads))
        turns = interleave(started, rounds, turn_seconds)
    matrix = turns.pop(MATRIX_ROW, None)
    counts = {name: row_turns[0].parameters for name, row_turns in turns.items()}
    assert len(set(counts.values())) == 1, f"the rows of {size.name} train different models: {counts}"
    return Speeds(size, job.vocab_size, threads, turns, _matrix_flops(matrix), _model_flops(job))


def _matrix_flops(turns: list[Turn] | None) -> float:
    """The best product of each turn, the median over turns; on a GPU the data sheet's."""
    if turns is None:
        return hardware.matrix_flops("cuda", torch.bfloat16, 1)
    return statistics.median(2 * MATRIX**3 / min(turn.seconds) for turn in turns)


def _model_flops(job: Job) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(job.size.architecture(job.vocab_size))
    return flops_per_token(model, job.size.seq_len)


def table(speeds: Speeds, command: str) -> Table:
    size = speeds.size
    threads = "" if torch.cuda.is_available() else f", {speeds.threads} thread{'s' if speeds.threads > 1 else ''}"
    rows = []
    for name in speeds.turns:
        low, rate, high = quartiles(speeds.rates(name))
        raw = RAW + COMPILED if name.endswith(COMPILED) else RAW
        ratios = [rate / speeds.rate(other) for other in (raw, speeds.fastest_trainer, DEFAULTS)]
        rows.append(
            [name, f"{rate:,.0f} ({low:,.0f} to {high:,.0f})"]
            + [f"{ratio:.2f}" for ratio in ratios]
            + [f"{speeds.mfu(name):.1%}", f"{speeds.peak_bytes(name) / 2**20:,.0f}"]
        )
    return Table(
        title=f"Training speed, {size.name}{threads}",
        command=command,
        columns=[
            "",
            "tokens/s",
            "of the raw loop",
            "of the fastest Trainer",
            "of Trainer's defaults",
            "MFU",
            "peak MiB",
        ],
        rows=rows,
        notes=_notes(speeds),
        goals=goals(speeds),
    )


def _notes(speeds: Speeds) -> str:
    size = speeds.size
    dropout = " (the defaults row keeps GPT-2's dropout of 0.1)" if size.without_dropout() else ""
    where = "from its data sheet" if torch.cuda.is_available() else "measured in the same rounds"
    return (
        f"transformers.{size.config}, vocabulary {speeds.vocab_size:,}, batches of {size.batch_size} × {size.seq_len} "
        f"tokens, clipping at 1, AdamW{dropout}. The raw loop and our recipe: the fused head and loss; on a CPU bf16 "
        f"weights under float32 masters and our bf16 kernels (not in the compiled rows). Trainer: float32 at its "
        f"defaults, bf16 autocast at its best. A compiled row is compared with the compiled raw loop. MFU is of "
        f"{speeds.matrix_flops / 1e9:,.0f} GFLOP/s, {where}; {speeds.model_flops_per_token / 1e6:,.1f} MFLOP a token. "
        f"Start-up, validation and checkpoints excluded.{speeds.skipped}"
    )


def goals(speeds: Speeds) -> list[Goal]:
    size, where = speeds.size, f"{speeds.size.name}, {speeds.threads} thread{'s' if speeds.threads > 1 else ''}"
    recipe = speeds.rate(RECIPE)
    chosen = [Goal(f"recipe of the raw loop, {where}", recipe / speeds.rate(RAW), at_least=0.97)]
    if RECIPE + COMPILED in speeds.turns:
        ratio = speeds.rate(RECIPE + COMPILED) / speeds.rate(RAW + COMPILED)
        chosen.append(Goal(f"compiled recipe of the compiled raw loop, {where}", ratio, at_least=0.97))
    if size == MIDDLE:
        faster = recipe / speeds.rate(speeds.fastest_trainer)
        chosen.append(Goal(f"recipe of the fastest Trainer row, {where}", faster, at_least=1.25))
        chosen.append(Goal(f"recipe of Trainer's defaults, {where}", recipe / speeds.rate(DEFAULTS), at_least=3))
        if speeds.threads == 1:
            chosen.append(Goal(f"recipe's MFU, {where}", speeds.mfu(RECIPE), at_least=0.58))
    if size == GPT2:
        memory = speeds.peak_bytes(RECIPE) / speeds.leanest_best_trainer_bytes
        chosen.append(Goal(f"recipe's peak memory of Trainer's at its best, {where}", memory, at_most=0.8))
    return chosen
