"""Four sizes on one dial, the law that they follow, and the next size, foretold and then run.

Run:
    python benchmarks/run.py --only ladder --keep runs/ladder --page docs/benchmarks.md      50 minutes on 2 cores

The dial is the width; all else follows from it, tokens and rates included. The law is
L(C) = E + A · C^-α of the FLOPs of a run, section 3.3 of https://arxiv.org/abs/2203.15556 with one variable.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from page import Goal, Table
from side_by_side import SEEDS, Run, Runs, best, run, spread, tuned

WIDTHS, NEXT = (64, 96, 128, 192), 256
TUNED = (64, 128)
"""Widths whose rates are tuned; those of the others lie on the power law through both."""
RATES = (0.02, 0.04, 0.08)
"""Of the matrices; of the rest half of it."""
TOKENS_A_WEIGHT = 2
"""Of all weights but the embeddings that are read."""
VOCABULARY, ROWS, LENGTH = 4096, 12, 256
DRAWS = 2000


def flags_of(width: int, rate: float) -> dict[str, object]:
    layers = max(2, round(width / 48))
    weights = 12 * layers * width**2 + VOCABULARY * width
    steps = max(50, round(TOKENS_A_WEIGHT * weights / (ROWS * LENGTH)))
    return {
        "model.architecture.hidden_size": width,
        "model.architecture.intermediate_size": 4 * width,
        "model.architecture.num_hidden_layers": layers,
        "model.architecture.num_attention_heads": max(1, width // 32),
        "model.optimizer.lr": rate,
        "model.optimizer.adamw_lr": rate / 2,
        "data.vocab_size": VOCABULARY,
        "data.seq_len": LENGTH,
        "data.batch_size": ROWS,
        "trainer.max_steps": steps,
        "trainer.max_time": "null",
        "trainer.val_check_interval": steps,
        "trainer.callbacks": "[]",
        "samples.max_new_tokens": 0,
    }


def trial(width: int, rate: float) -> Run:
    return run(f"{width} wide, {rate:g}", flags_of(width, rate))


def tables(keep: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs((keep or Path(temporary)).absolute())
        low, high = ((width, best(tuned(partial(trial, width), list(RATES), runs))) for width in TUNED)
        rates = {width: rate_between(low, high, width) for width in (*WIDTHS, NEXT)}
        yield table(rungs(runs, rates), rates)


def rate_between(low: tuple[int, float], high: tuple[int, float], width: int) -> float:
    """On the power law through both (width, rate); three digits, as a flag has them."""
    power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return float(f"{low[1] * (width / low[0]) ** power:.3g}")


def rungs(runs: Runs, rates: dict[int, float]) -> dict[int, list[dict]]:
    """Summaries of three seeds by width; the widest are run first, so that no worker waits for them at the end."""
    keys = [(width, seed) for width in sorted(rates, reverse=True) for seed in SEEDS]
    trials = [run(f"{width} wide, {rates[width]:g}", flags_of(width, rates[width]), seed) for width, seed in keys]
    by_key = dict(zip(keys, runs.done(trials), strict=True))
    for trial, summary in zip(trials, by_key.values(), strict=True):
        if summary is None:
            raise RuntimeError(f"{trial.name}, came to nothing; see {runs.folder / trial.place}.log")
    return {width: [by_key[width, seed] for seed in SEEDS] for width in rates}


def flops(summary: dict) -> float:
    return summary["planned"]["model_flops_per_token"] * summary["tokens"]


def fitted(compute_N: np.ndarray, loss_N: np.ndarray) -> tuple[float, float, float]:
    """(E, A, α): for each of many E the line of log(L - E) by log C, of which the one with the least squares of L."""
    least = (math.inf, 0.0, 0.0, 0.0)
    for floor in np.linspace(0, 0.999 * loss_N.min(), 400):
        slope, intercept = np.polyfit(np.log(compute_N), np.log(loss_N - floor), 1)
        error = float(np.square(floor + np.exp(intercept) * compute_N**slope - loss_N).sum())
        least = min(least, (error, float(floor), float(np.exp(intercept)), float(-slope)))
    return least[1:]


@dataclass(frozen=True)
class Law:
    """L = floor + scale · C^-power."""

    floor: float
    scale: float
    power: float

    def loss(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.power


def laws(found: dict[int, list[dict]]) -> tuple[Law, list[Law]]:
    """Of the sizes' means, and of means drawn around them as the seeds scatter, all sizes alike (Student's t)."""
    compute_N = np.array([flops(found[width][0]) for width in WIDTHS])
    loss_NS = np.array([[summary["val_loss"] for summary in found[width]] for width in WIDTHS])
    mean_N, degrees = loss_NS.mean(axis=1), loss_NS.size - len(loss_NS)
    error = math.sqrt(loss_NS.var(axis=1, ddof=1).mean() / loss_NS.shape[1])
    noise_DN = np.random.default_rng(0).standard_t(degrees, (DRAWS, len(mean_N))) * error
    return Law(*fitted(compute_N, mean_N)), [Law(*fitted(compute_N, mean_N + noise_N)) for noise_N in noise_DN]


def interval(figures: list[float], digits: int) -> str:
    """Where 95 % of them lie."""
    low, high = np.percentile(figures, [2.5, 97.5])
    return f"{low:.{digits}f} to {high:.{digits}f}"


def table(found: dict[int, list[dict]], rates: dict[int, float]) -> Table:
    rows = []
    for width, some in found.items():
        losses, tokens, parameters = [s["val_loss"] for s in some], some[0]["tokens"], some[0]["parameters"]
        rows.append(
            [
                f"{width} wide" + (", foretold" if width == NEXT else ""),
                f"{rates[width]:g}",
                f"{parameters:,}",
                f"{tokens:,}",
                f"{tokens / parameters:.2f}",
                f"{flops(some[0]):.2e}",
                spread(losses),
                "",
            ]
        )
    law, drawn = laws(found)
    goal = flops(found[NEXT][0])
    rows[-1][-1] = f"{law.loss(goal):.4f} ({interval([one.loss(goal) for one in drawn], 4)})"
    came = float(np.mean([summary["val_loss"] for summary in found[NEXT]]))
    return Table(
        "The ladder: four sizes and the next",
        "python benchmarks/run.py --only ladder",
        ["", "rate", "parameters", "tokens", "a parameter", "FLOPs", "nats a token, three seeds", "foretold"],
        rows,
        f"The default run's decoder on the standard library. Rates: tuned at {TUNED[0]} and {TUNED[1]} wide, a power "
        f"law through both. L = {law.floor:.3f} + {law.scale:.3g} · C^-{law.power:.3f} of four. Where 95 % lie by the "
        f"scatter of seeds alone: in brackets; power {interval([one.power for one in drawn], 3)}, floor "
        f"{interval([one.floor for one in drawn], 2)}. The training text has 3.4 million tokens: the largest fitted "
        "size reads it one and a half times, the next one three times.",
        [Goal("the next size: nats away from what was foretold", abs(came - law.loss(goal)), at_most=0.05)],
    )
