"""What helps, by how much, and where it stops helping: optimizers, schedules and regularization on one fixed task.

Run:
    python benchmarks/run.py --only atlas --keep runs/atlas --page docs/benchmarks.md      75 minutes on 2 cores

Each row has the same budget: its own rate, or strength, is tuned on one seed by as many runs as any other's, and by
more where the best is at an end; three other seeds are told.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from page import Table
from side_by_side import SEEDS, Run, Runs, best, curve, mean, run, told, tuned

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
RATE = "model.optimizer.lr"
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Rates that are tried, times the usual one."""
TORCH, MORE = "torch.optim", "pytorch_optimizer"
OPTIMIZERS = {
    "Muon, AdamW for the rest": ({"model.optimizer": "lightning_modules.optim.MuonAdamW"}, 2e-2),
    "LAMB": ({"model.optimizer": f"{MORE}.Lamb"}, 1e-1),
    "Adafactor": ({"model.optimizer": f"{TORCH}.Adafactor"}, 8e-2),
    "AdamW": ({"model.optimizer": f"{TORCH}.AdamW", "model.optimizer.weight_decay": 0.1}, 4e-3),
    "Adam": ({"model.optimizer": f"{TORCH}.Adam"}, 4e-3),
    "RMSprop": ({"model.optimizer": f"{TORCH}.RMSprop", "model.optimizer.momentum": 0.0}, 2e-3),
    "Adagrad": ({"model.optimizer": f"{TORCH}.Adagrad"}, 0.02),
    "SGD with momentum": ({"model.optimizer": f"{TORCH}.SGD", "model.optimizer.momentum": 0.9}, 0.5),
}
SCHEDULES = {
    "warm-up, stable, decay": {"model.schedule": "WarmupStableDecay", "model.schedule.decay_fraction": 0.3},
    "cosine": {"model.schedule": "Cosine"},
    "linear": {"model.schedule": "Linear"},
    "exponential": {"model.schedule": "Exponential", "model.schedule.gamma": 0.99},
    "steps, a half each 75": {"model.schedule": "Step", "model.schedule.every": 75},
    "constant": {"model.schedule": "Constant"},
}
SMALL_TEXT = {
    "trainer.max_steps": 600,
    "data.val_fraction": 0.95,
    "trainer.val_check_interval": 60,
    "trainer.callbacks": "[]",
}
"""A twentieth of the text, read six to seven times, so that there is something to regularize against. Nothing ends a
run early; its summary has the best validation all the same."""
ADAMW = {"model.optimizer": f"{TORCH}.AdamW", RATE: 4e-3, "model.optimizer.weight_decay": 0.0}
STRENGTHS = {
    "L1": ("model.l1", (1e-6, 1e-5, 1e-4)),
    "L2 (decoupled weight decay)": ("model.optimizer.weight_decay", (0.1, 0.5, 2.5)),
    "dropout (of attention)": ("model.architecture.attention_dropout", (0.05, 0.1, 0.2)),
    "label smoothing": ("model.label_smoothing", (0.025, 0.05, 0.1)),
}
COMMAND = "python benchmarks/run.py --only atlas"
OF_TASK = "A decoder of 2 layers × 128 on the standard library, 300 steps of 16 × 128 tokens, one thread a run."
OF_ROWS = (
    "Muon's rate is that of the matrices, the rest has 0.01; torch's Adafactor takes no more than 1/√t in step t; "
    "AdamW has weight decay 0.1, the others none."
)


def tables(keep: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs((keep or Path(temporary)).absolute())
        yield optimizers(runs)
        yield schedules(runs)
        yield regularization(runs)
        yield crossed(runs)


def trial(name: str, flags: dict, tried: str, value: float) -> Run:
    return run(f"{name}, {value:g}", flags | {tried: value})


def seeds(runs: Runs, name: str, flags: dict) -> list[dict | None]:
    return runs.done([run(name, flags, seed) for seed in SEEDS])


def by_rate(runs: Runs, name: str, flags: dict, usual: float) -> dict[float, float]:
    return tuned(partial(trial, name, flags, RATE), [usual * factor for factor in FACTORS], runs)


def optimizers(runs: Runs) -> Table:
    contenders = {name: (COSINE | flags, usual) for name, (flags, usual) in OPTIMIZERS.items()}
    return rates(runs, "optimizers", contenders, f"Cosine with 5 % warm-up. {OF_ROWS}")


def schedules(runs: Runs) -> Table:
    adamw, usual = OPTIMIZERS["AdamW"]
    contenders = {name: (adamw | flags | WARM, usual) for name, flags in SCHEDULES.items()}
    return rates(runs, "schedules", contenders, "AdamW, 5 % warm-up.")


def rates(runs: Runs, kind: str, contenders: dict[str, tuple[dict, float]], common: str) -> Table:
    """Each at its own best rate; the first is what the others are measured against."""
    rows, reference = [], None
    for name, (flags, usual) in contenders.items():
        losses = by_rate(runs, name, TASK | flags, usual)
        rate = best(losses)
        found = seeds(runs, f"{name}, {rate:g}", TASK | flags | {RATE: rate})
        more = "" if reference is None else f"{mean(found) - reference:+.4f}"
        rows.append([name, f"{rate:g}", told(found), more, curve(losses)])
        reference = reference or mean(found)
    return Table(
        f"The atlas: {kind}",
        COMMAND,
        ["", "rate", "nats a token, three seeds", "more than the first's", "by rate, another seed"],
        rows,
        f"{OF_TASK} {common} Five rates, a factor of two apart, and more where the best is at an end.",
    )


def regularization(runs: Runs) -> Table:
    """By the best validation and by the last: early stopping is the difference."""
    plain, rows = TASK | SMALL_TEXT | ADAMW | COSINE, []
    for name, (tried, values) in {"nothing": ("", ()), **STRENGTHS}.items():
        losses = tuned(partial(trial, name, plain, tried), list(values), runs) if values else {}
        flags = {tried: best(losses)} if losses else {}
        found = seeds(runs, f"{name}, {flags}", plain | flags)
        last = told(found, lambda summary: summary["val_loss_final"])
        rows.append([name, f"{best(losses):g}" if losses else "", told(found), last, curve(losses)])
    return Table(
        "The atlas: regularization",
        COMMAND,
        [
            "",
            "strength",
            "nats a token, best of ten validations (early stopping)",
            "at the last",
            "by strength, another seed",
        ],
        rows,
        "The same model on a twentieth of the text, 600 steps, six to seven epochs; AdamW, cosine. Three "
        "strengths, and more where the best is at an end, chosen by the best validation.",
    )


def crossed(runs: Runs) -> Table:
    """Each optimizer, at the rate that is its best with Cosine, with each schedule."""
    rows = []
    for name, (flags, usual) in OPTIMIZERS.items():
        rate = best(by_rate(runs, name, TASK | COSINE | flags, usual))
        settings = {key: TASK | of_schedule | WARM | flags | {RATE: rate} for key, of_schedule in SCHEDULES.items()}
        rows.append([name, *(told(seeds(runs, f"{name}, {key}", s), digits=3) for key, s in settings.items())])
    return Table(
        "The atlas: optimizers with schedules",
        COMMAND,
        ["nats a token, three seeds", *SCHEDULES],
        rows,
        f"{OF_TASK} Each optimizer at the rate that is its best with Cosine. {OF_ROWS}",
    )
