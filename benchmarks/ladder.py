"""Four sizes on one dial, the law that they follow, and the next size, foretold and then run.

Run:
    python benchmarks/run.py --only ladder --keep runs/ladder --page docs/benchmarks.md      50 minutes on 2 cores

The dial is the width; all else follows from it, tokens included. The law is
L(C) = E + A · C^-α of the FLOPs of a run, section 3.3 of https://arxiv.org/abs/2203.15556 with one variable.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from page import Goal, Table
from side_by_side import SEEDS, Runs, run, spread

WIDTHS, NEXT = (64, 96, 128, 192), 256
TOKENS_A_PARAMETER = 2
STEP_TOKENS = 12 * 256
DRAWS = 400


def flags_of(width: int, seed: int) -> dict[str, object]:
    layers = max(2, round(width / 48))
    blocks = 12 * layers * width**2
    steps = max(50, round(TOKENS_A_PARAMETER * (blocks + 4096 * width) / STEP_TOKENS))
    return {
        "model.architecture.hidden_size": width,
        "model.architecture.intermediate_size": 4 * width,
        "model.architecture.num_hidden_layers": layers,
        "model.architecture.num_attention_heads": max(1, width // 32),
        "model.optimizer.lr": 0.02,
        "trainer.max_steps": steps,
        "trainer.max_time": "null",
        "trainer.val_check_interval": steps,
        "trainer.callbacks": "[]",
        "samples.max_new_tokens": 0,
        "seed_everything": seed,
        "data.seed": seed,
    }


def tables(keep: Path | None) -> Iterator[Table]:
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs((keep or Path(temporary)).absolute(), threads=2)
        found = {width: rung(runs, width) for width in (*WIDTHS, NEXT)}
        yield table(found)


def rung(runs: Runs, width: int) -> list[dict]:
    return list(runs.done([run(f"{width}-{seed}", flags_of(width, seed)) for seed in SEEDS]).values())


def flops(summary: dict) -> float:
    return summary["planned"]["flops_per_token"] * summary["tokens"]


def fitted(compute_N: np.ndarray, loss_N: np.ndarray) -> tuple[float, float, float]:
    """(E, A, α) of the least squares of log(L - E), by a search over E."""
    best = (math.inf, 0.0, 0.0, 0.0)
    for floor in np.linspace(0, 0.999 * loss_N.min(), 400):
        slope, intercept = np.polyfit(np.log(compute_N), np.log(loss_N - floor), 1)
        error = float(np.square(floor + np.exp(intercept) * compute_N**slope - loss_N).sum())
        best = min(best, (error, float(floor), float(np.exp(intercept)), float(-slope)))
    return best[1:]


@dataclass(frozen=True)
class Law:
    """L = floor + scale · C^-power."""

    floor: float
    scale: float
    power: float

    def loss(self, compute: float) -> float:
        return self.floor + self.scale * compute**-self.power


def laws(found: dict[int, list[dict]]) -> tuple[Law, list[Law]]:
    """Of the sizes' means, and many more of means of the seeds drawn anew."""
    compute = np.array([flops(found[width][0]) for width in WIDTHS])
    losses = [np.array([summary["val_loss"] for summary in found[width]]) for width in WIDTHS]
    numbers = np.random.default_rng(0)
    drawn = [np.array([numbers.choice(some, len(some)).mean() for some in losses]) for _ in range(DRAWS)]
    return Law(*fitted(compute, np.array([some.mean() for some in losses]))), [
        Law(*fitted(compute, one)) for one in drawn
    ]


def interval(figures: list[float], digits: int) -> str:
    """Where 95 % of them lie."""
    low, high = np.percentile(figures, [2.5, 97.5])
    return f"{low:.{digits}f} to {high:.{digits}f}"


def table(found: dict[int, list[dict]]) -> Table:
    rows = []
    for width, some in found.items():
        losses = [summary["val_loss"] for summary in some]
        rows.append(
            [
                f"{width} wide" + (", foretold" if width == NEXT else ""),
                f"{some[0]['parameters']:,}",
                f"{some[0]['tokens']:,}",
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
        ["", "parameters", "tokens", "FLOPs", "nats a token, three seeds", "foretold (95 % of seeds drawn anew)"],
        rows,
        f"The default run's decoder on the standard library, {TOKENS_A_PARAMETER} tokens a parameter. "
        f"L = {law.floor:.3f} + {law.scale:.3g} · C^-{law.power:.3f} of the four; the power {law.power:.3f} lies in "
        f"{interval([one.power for one in drawn], 3)}.",
        [Goal("the next size: nats away from what was foretold", abs(came - law.loss(goal)), at_most=0.05)],
    )
