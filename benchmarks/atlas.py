"""What helps, by how much, and where it stops helping: optimizers, schedules and regularization on one fixed task.

Run:
    python benchmarks/run.py --only atlas --keep runs/atlas --page docs/benchmarks.md      75 minutes on 2 cores

Each row has the same budget: its own rate, or strength, is tuned on one seed by as many runs as any other's, then three
seeds are run with the best one.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from page import Table
from side_by_side import SEEDS, Runs, run, spread

TASK = {
    "model.architecture.hidden_size": 128,
    "model.architecture.intermediate_size": 512,
    "model.architecture.num_hidden_layers": 2,
    "data.vocab_size": 2048,
    "data.seq_len": 128,
    "data.batch_size": 16,
    "trainer.max_steps": 300,
    "trainer.max_time": "null",
    "trainer.val_check_interval": 300,
    "trainer.gradient_clip_val": 1.0,
    "samples.max_new_tokens": 0,
    "data.max_val_rows": 512,
}
WARM = {"model.schedule.warmup_fraction": 0.05}
COSINE = {"model.schedule": "Cosine", **WARM}
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Rates that are tried, times the usual one."""
TORCH, MORE = "torch.optim", "pytorch_optimizer"
OPTIMIZERS = {
    "SGD with momentum": ({"model.optimizer": f"{TORCH}.SGD", "model.optimizer.momentum": 0.9}, 0.5),
    "Adagrad": ({"model.optimizer": f"{TORCH}.Adagrad"}, 0.02),
    "RMSprop": ({"model.optimizer": f"{TORCH}.RMSprop"}, 1e-3),
    "Adam": ({"model.optimizer": f"{TORCH}.Adam"}, 4e-3),
    "AdamW": ({"model.optimizer": f"{TORCH}.AdamW", "model.optimizer.weight_decay": 0.1}, 4e-3),
    "Adafactor": ({"model.optimizer": f"{TORCH}.Adafactor"}, 2e-2),
    "LAMB": ({"model.optimizer": f"{MORE}.Lamb"}, 1e-2),
    "Muon, AdamW for the rest": ({"model.optimizer": "lightning_modules.optim.MuonAdamW"}, 2e-2),
}
SCHEDULES = {
    "constant": {"model.schedule": "Constant"},
    "steps, a half each 75": {"model.schedule": "Step", "model.schedule.every": 75},
    "exponential": {"model.schedule": "Exponential", "model.schedule.gamma": 0.99},
    "linear": {"model.schedule": "Linear"},
    "cosine": {"model.schedule": "Cosine"},
    "warm-up, stable, decay": {"model.schedule": "WarmupStableDecay", "model.schedule.decay_fraction": 0.3},
}
SMALL_TEXT = {"trainer.max_steps": 600, "data.val_fraction": 0.95, "trainer.val_check_interval": 60}
"""A twentieth of the text, read about ten times, so that there is something to regularize against."""
ADAMW = {"model.optimizer": f"{TORCH}.AdamW", "model.optimizer.lr": 4e-3, "model.optimizer.weight_decay": 0.0}
STRENGTHS = {
    "nothing": ({}, None, ()),
    "L1": ({}, "model.l1", (1e-6, 1e-5, 1e-4)),
    "L2 (decoupled weight decay)": ({}, "model.optimizer.weight_decay", (0.1, 0.5, 2.0)),
    "dropout (of attention)": ({}, "model.architecture.attention_dropout", (0.05, 0.1, 0.3)),
    "label smoothing": ({}, "model.label_smoothing", (0.02, 0.05, 0.1)),
}


def tables(keep: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs((keep or Path(temporary)).absolute())
        yield optimizers(runs)
        yield schedules(runs)
        yield regularization(runs)
        yield crossed(runs)


def tuned(runs: Runs, name: str, flags: dict, tried: str, values: list[float]) -> tuple[float, list[dict]]:
    """The value of the least loss on one seed, and the summaries of all seeds with it."""
    trials = runs.done([run(f"{name}/{value:g}-0", flags | {tried: value}) for value in values])
    losses = {value: trials[f"{name}/{value:g}-0"]["val_loss"] for value in values if f"{name}/{value:g}-0" in trials}
    if not losses:
        raise RuntimeError(f"{name}: no run came to its end; see its logs in {runs.folder}")
    best = min(losses, key=losses.get)
    seeds = [run(f"{name}/{best:g}-{s}", flags | {tried: best, "seed_everything": s, "data.seed": s}) for s in SEEDS]
    return best, list(runs.done(seeds).values())


def cells(name: str, best: float, found: list[dict], values: list[float], reference: float | None) -> list[str]:
    losses = [summary["val_loss"] for summary in found]
    mean = sum(losses) / len(losses)
    at_end = " (at the end of what was tried)" if best in (min(values), max(values)) else ""
    return [name, f"{best:g}{at_end}", spread(losses), "" if reference is None else f"{mean - reference:+.4f}"]


def optimizers(runs: Runs) -> Table:
    contenders = {name: (COSINE | flags, rate) for name, (flags, rate) in reversed(OPTIMIZERS.items())}
    return rates(runs, "optimizer", contenders, "Cosine with 5 % warm-up")


def schedules(runs: Runs) -> Table:
    adamw, rate = OPTIMIZERS["AdamW"]
    contenders = {name: (adamw | flags | WARM, rate) for name, flags in reversed(SCHEDULES.items())}
    return rates(runs, "schedule", contenders, "AdamW, 5 % warm-up")


def rates(runs: Runs, kind: str, contenders: dict[str, tuple[dict, float]], common: str) -> Table:
    """Each at its own best rate; the first is what the others are measured against."""
    rows, reference = [], None
    for name, (flags, rate) in contenders.items():
        values = [rate * factor for factor in FACTORS]
        best, found = tuned(runs, f"{kind}-{slug(name)}", TASK | flags, "model.optimizer.lr", values)
        rows.append(cells(name, best, found, values, reference))
        reference = reference or sum(s["val_loss"] for s in found) / len(found)
    return Table(
        f"The atlas: {kind}s",
        "python benchmarks/run.py --only atlas",
        ["", "rate", "nats a token, three seeds", "more than the first's"],
        rows,
        f"{text_of_task()} {common}; each has five rates, a factor of two apart.",
    )


def regularization(runs: Runs) -> Table:
    """By the best validation and by the last: early stopping is the difference."""
    rows = []
    for name, (flags, tried, values) in STRENGTHS.items():
        settings = TASK | SMALL_TEXT | ADAMW | COSINE | flags
        if tried is None:
            seeds = [run(f"against-nothing/0-{s}", settings | {"seed_everything": s, "data.seed": s}) for s in SEEDS]
            best, found = "", list(runs.done(seeds).values())
        else:
            best, found = tuned(runs, f"against-{slug(name)}", settings, tried, list(values))
            best = f"{best:g}"
        both = [[summary[key] for summary in found] for key in ("val_loss", "val_loss_final")]
        rows.append([name, best, spread(both[0]), spread(both[1])])
    return Table(
        "The atlas: regularization",
        "python benchmarks/run.py --only atlas",
        ["", "strength", "nats a token at the best of ten validations (early stopping)", "at the last"],
        rows,
        "The same model on a twentieth of the text, 600 steps, about ten epochs; AdamW, cosine; three strengths each.",
    )


def crossed(runs: Runs) -> Table:
    """Each optimizer, at the rate that is its best with Cosine, with each schedule."""
    rows = []
    for name, (flags, usual) in reversed(OPTIMIZERS.items()):
        values = [usual * factor for factor in FACTORS]
        rate, _ = tuned(runs, f"optimizer-{slug(name)}", TASK | COSINE | flags, "model.optimizer.lr", values)
        row = [name]
        for schedule, of_schedule in SCHEDULES.items():
            settings = TASK | flags | of_schedule | WARM | {"model.optimizer.lr": rate}
            where = f"crossed/{slug(name)}-{slug(schedule)}"
            found = runs.done([run(f"{where}-{s}", settings | {"seed_everything": s, "data.seed": s}) for s in SEEDS])
            row.append(spread([summary["val_loss"] for summary in found.values()], 3))
        rows.append(row)
    return Table(
        "The atlas: optimizers with schedules",
        "python benchmarks/run.py --only atlas",
        ["nats a token, three seeds", *SCHEDULES],
        rows,
        f"{text_of_task()} Each optimizer at the rate that is its best with Cosine.",
    )


def text_of_task() -> str:
    return "A decoder of 2 layers × 128 on the standard library, 300 steps of 16 × 128 tokens, one thread a run."


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
